"""Tables beyond the paper: losses at several budgets, initial weights, rates and imbalances.

Each row is a loss at one level of a grid. The paper's argument (section 3) is about easy negatives;
these tables ask how much of its result is about something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from retinanet_ext.data.dial import IMBALANCE_DIAL, objects_ratio
from retinanet_ext.experiments.rows import (
    Claim,
    Row,
    Table,
    cross_entropy,
    focal,
    image_sides,
    ohem,
)

SMALL_PRESETS = ("small", "gpu", "quick")
MATCHED = {**focal(), "MODEL.RETINANET.CLS_LOSS.WEIGHT": "auto"}
"""The focal loss whose positives start with the gradient of cross entropy, α = .75."""

LOSSES: dict[str, tuple[str, dict[str, Any]]] = {
    "ce.50": ("CE, α = .50", cross_entropy(0.5)),
    "ce.75": ("CE, α = .75", cross_entropy(0.75)),
    "focal.25": ("focal, α = .25", focal(2.0, 0.25)),
    "focal.50": ("focal, α = .50", focal(2.0, 0.5)),
    "matched": ("focal, matched weight", MATCHED),
    "ohem": ("OHEM, 128", ohem(128, 0.5)),
}
"""Name -> label and keys of the losses of the tables budget, init and fair-steps."""

REFERENCE = "ce.75"
"""What the paper compares the focal loss with: its best cross entropy."""

REFERENCE_LABEL = LOSSES[REFERENCE][0]

CHALLENGERS = {"focal.25": "focal loss", "matched": "focal loss with matched weight"}
"""Name -> words of the losses that claims put ahead of it."""

BUDGETS = (1, 3, 9)
RATES = {"half": 0.5, "common": 1.0, "double": 2.0}


def _lead(text: str, better: str, worse: str, *than: str) -> Claim:
    return Claim(text, (better,), (worse,), than)


BUDGET = Table(
    "budget",
    "Does the focal loss need a larger budget?",
    "beyond the paper; section 5.1 at several budgets",
    tuple(
        Row(
            f"{name}-{times}x",
            {"loss": label, "budget": f"{times} x"},
            keys,
            factors={"SOLVER.MAX_ITER": times, "SOLVER.CHECKPOINT_PERIOD": times},
        )
        for times in BUDGETS
        for name, (label, keys) in LOSSES.items()
    ),
    (
        *(
            _lead(
                f"at {times} x the budget the {words} is ahead of cross entropy (α = .75)",
                f"{name}-{times}x",
                f"ce.75-{times}x",
            )
            for name, words in CHALLENGERS.items()
            for times in BUDGETS
        ),
        _lead(
            "at 9 x the budget the focal loss is ahead of OHEM",
            *("focal.25-9x", "ohem-9x"),
        ),
        _lead(
            "the focal loss's lead over cross entropy (α = .75) is larger at 9 x the budget than "
            "at 1 x",
            *("focal.25-9x", "ce.75-9x", "focal.25-1x", "ce.75-1x"),
        ),
    ),
    note="The budget is SOLVER.MAX_ITER of the preset or of the command line, times 1, 3 and 9; "
    "warm-up stays as long as it is. Matched weight: CLS_LOSS.WEIGHT auto, which gives a positive "
    "of the focal loss the gradient that it has under cross entropy (α = .75) at the start.",
    presets=SMALL_PRESETS,
)

_WEIGHTS: dict[str, tuple[str, dict[str, Any]]] = {
    "imagenet": ("ImageNet", {}),
    "random": ("random", {"MODEL.TIMM.WEIGHTS": "", "MODEL.TIMM.NORM": "BN"}),
}

INIT = Table(
    "init",
    "Does the focal loss need ImageNet weights?",
    "beyond the paper; section 4.1 trains from ImageNet weights alone",
    tuple(
        Row(
            f"{name}-{start}",
            {"loss": label, "weights": weights},
            {**keys, **own},
            model="MobileNetV2",
        )
        for start, (weights, own) in _WEIGHTS.items()
        for name, (label, keys) in LOSSES.items()
    ),
    (
        *(
            _lead(
                f"from {weights} weights the {words} is ahead of cross entropy (α = .75)",
                f"{name}-{start}",
                f"ce.75-{start}",
            )
            for name, words in CHALLENGERS.items()
            for start, (weights, _) in _WEIGHTS.items()
        ),
        _lead(
            "the focal loss's lead over cross entropy (α = .75) is larger from ImageNet weights "
            "than from random ones",
            *("focal.25-imagenet", "ce.75-imagenet", "focal.25-random", "ce.75-random"),
        ),
    ),
    note="The model of configs/small_mobilenetv2_FPN.yaml with the preset's optimizer. From "
    "ImageNet weights its BatchNorm layers keep their mean and variance (MODEL.TIMM.NORM EvalBN), "
    "as in the paper, and train weight and bias, which the authors' code freezes too. Random "
    "weights have no statistics worth keeping, so those rows take BN, which computes them from the "
    "batch. The two starts therefore differ in weights and norm; compare losses at one start, and "
    "the leads of the two.",
    presets=SMALL_PRESETS,
    needs="MODEL.TIMM.WEIGHTS",
)

FAIR_STEPS = Table(
    "fair-steps",
    "Does the order of the losses depend on the learning rate?",
    "beyond the paper; section 5.1 with a rate for each loss",
    tuple(
        Row(
            f"{name}-{rate}",
            {"loss": label, "rate": f"x {factor:g}"},
            keys,
            factors={"SOLVER.BASE_LR": factor},
        )
        for rate, factor in RATES.items()
        for name, (label, keys) in LOSSES.items()
    ),
    (
        _lead(
            "at the common rate the focal loss is ahead of cross entropy (α = .75)",
            *("focal.25-common", "ce.75-common"),
        ),
        *(
            Claim(
                f"each at its best rate, the {words} is ahead of {others}",
                tuple(f"{name}-{rate}" for rate in RATES),
                tuple(f"{other}-{rate}" for rate in RATES),
            )
            for name, words, other, others in (
                ("focal.25", "focal loss", "ce.75", "cross entropy (α = .75)"),
                (
                    *("matched", "focal loss with matched weight"),
                    *("ce.75", "cross entropy (α = .75)"),
                ),
                ("focal.25", "focal loss", "ohem", "OHEM"),
            )
        ),
    ),
    note="The rate is SOLVER.BASE_LR of the preset or of the command line, times .5, 1 and 2. The "
    "highest of three means is biased upwards, for every loss alike.",
    presets=SMALL_PRESETS,
)


def _sample_data(point: Mapping[str, Any]) -> dict[str, Any]:
    """Return the overrides of a point of the dial: synthetic images, at their own size."""
    custom = ("TRAIN_JSON", "TRAIN_IMAGES", "TEST_JSON", "TEST_IMAGES")
    return {
        **{f"DATASETS.CUSTOM.{key}": "" for key in custom},
        "DATASETS.TRAIN": ("retinanet_ext_sample_train",),
        "DATASETS.TEST": ("retinanet_ext_sample_val",),
        "DATALOADER.FILTER_EMPTY_ANNOTATIONS": False,
        **{f"DATASETS.SAMPLE.{key}": value for key, value in point.items()},
        **image_sides([point["IMAGE_SIZE"]]),
        "MODEL.ANCHOR_GENERATOR.BASE_SCALE": 2.0,
    }


def _background(ratio: str) -> str:
    return f"{ratio.partition(':')[2]} : 1"


DIAL_LOSSES = {
    "ce": ("CE", cross_entropy(-1.0)),
    "alpha-ce": ("α-CE", cross_entropy(0.75)),
    "ohem": ("OHEM", ohem(128, 0.5)),
    "focal": ("focal", focal()),
    "matched": ("focal, matched weight", MATCHED),
}
NORMALIZERS = {"": "moving average", "-foreground": "foreground"}
"""Suffix of a row's name -> the normaliser in words. OHEM has its own, the selected anchors."""


def _dial_rows() -> list[Row]:
    rows = []
    for ratio, point in IMBALANCE_DIAL.items():
        times = objects_ratio(ratio)
        factors = {"SOLVER.MAX_ITER": times, "SOLVER.CHECKPOINT_PERIOD": times}
        if times < 1:  # otherwise a short training could end within its warm-up
            factors["SOLVER.WARMUP_ITERS"] = times
        for name, (label, keys) in DIAL_LOSSES.items():
            for suffix, normalizer in NORMALIZERS.items():
                own = {**keys, **_sample_data(point)}
                if suffix and name == "ohem":
                    continue
                if suffix:
                    own["MODEL.RETINANET.LOSS_NORMALIZER"] = "foreground"
                settings = {
                    "background : foreground": _background(ratio),
                    "loss": label,
                    "normaliser": "selected" if name == "ohem" else normalizer,
                }
                small = {"NUM_TRAIN": max(8, round(32 * times)), "NUM_VAL": 40}
                row = Row(
                    f"{name}{suffix}-{ratio}",
                    settings,
                    own,
                    preset_overrides={
                        "quick": {f"DATASETS.SAMPLE.{key}": n for key, n in small.items()}
                    },
                    factors=factors,
                )
                rows.append(row)
    return rows


DIAL = Table(
    "dial",
    "Does the lead of the focal loss grow with the imbalance?",
    "beyond the paper; section 3's argument",
    tuple(_dial_rows()),
    (
        *(
            Claim(
                f"at {ratio} the focal loss is ahead of cross entropy and OHEM",
                (f"focal-{ratio}",),
                tuple(f"{name}-{ratio}" for name in ("ce", "alpha-ce", "ohem")),
            )
            for ratio in IMBALANCE_DIAL
        ),
        _lead(
            "the focal loss's lead over cross entropy is larger at 1:1000 than at 1:30",
            *("focal-1:1000", "ce-1:1000", "focal-1:30", "ce-1:30"),
        ),
        _lead(
            "at 1:3000 the focal loss is better with the normaliser foreground",
            *("focal-foreground-1:3000", "focal-1:3000"),
        ),
    ),
    note="Iterations and training images grow as objects per image fall, so that every point shows "
    "the same number of objects, in all and per epoch. The preset's budget is that of 1:100; where "
    "it shrinks, so does the warm-up. "
    "docs/dial.md has the formula and what the paper's argument predicts.",
    presets=SMALL_PRESETS,
)

GRIDS = {table.name: table for table in (BUDGET, INIT, FAIR_STEPS, DIAL)}
