"""The paper's tables: the config keys that each row changes, and the numbers the paper printed.

Rows, numbers and claims are data in ``tables.yaml``; the recipes below expand what a row names
there (``focal: [2.0, 0.25]``) to config keys. Numbers are those of arXiv 1708.02002v2: AP in
percent on COCO, milliseconds per image on an Nvidia M40. docs/deviations.md lists what is assumed
where the paper leaves a choice open.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from retinanet_ext.data.sample_set import IMBALANCE_DIAL

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
ABOVE = "AP above 33.5"  # the outcome of figure 7's blue curves


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        name: unique in its table.
        settings: column -> text, for the columns left of the numbers.
        overrides: config key -> value.
        paper: published number of each metric; ``"ms"`` is the inference time per image.
        outcome: the paper's words, where it gives no number.
        model: the paper's model, which a preset maps to a config.
        preset_overrides: preset -> further overrides, where presets differ.
    """

    name: str
    settings: Mapping[str, str]
    overrides: Mapping[str, Any]
    paper: Mapping[str, float] = field(default_factory=dict)
    outcome: str = ""
    model: str = "R50"
    preset_overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """An ordering that the paper states or shows: the AP of ``better`` is above that of ``worse``.

    Attributes:
        text: the claim in words.
        better, worse: names of rows; of several, the one with the highest AP counts.
        than: two more rows. The claim is then that the lead of ``better`` over ``worse`` is above
            the lead of the first of them over the second.
    """

    text: str
    better: tuple[str, ...]
    worse: tuple[str, ...]
    than: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """A table of the paper, or an experiment that the paper describes in words.

    Attributes:
        name: as on the command line.
        title, source: what it shows, and where in the paper.
        note: what the paper leaves open, and what the small preset uses instead.
        presets: the presets that can run it.
    """

    name: str
    title: str
    source: str
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...] = ()
    note: str = ""
    presets: tuple[str, ...] = ("paper", "small", "gpu", "quick")

    def __getitem__(self, row: str) -> Row:
        return next(candidate for candidate in self.rows if candidate.name == row)


# Recipes: what a row of tables.yaml names, as config keys.


def _loss(name: str, **parameters: float) -> dict[str, Any]:
    node = "MODEL.RETINANET.CLS_LOSS"
    values = {f"{node}.{name.upper()}.{key}": value for key, value in parameters.items()}
    return {f"{node}.NAME": name, **values}


def _cross_entropy(alpha: float) -> dict[str, Any]:
    return _loss("cross_entropy", ALPHA=alpha)


def _focal(gamma: float = 2.0, alpha: float = 0.25) -> dict[str, Any]:
    node = "MODEL.RETINANET"
    values = {f"{node}.FOCAL_LOSS_GAMMA": gamma, f"{node}.FOCAL_LOSS_ALPHA": alpha}
    return {**_loss("focal"), **values}


def _ohem(batch: int, nms: float, ratio: float = 0.0) -> dict[str, Any]:
    return {
        **_cross_entropy(-1.0),
        "MODEL.RETINANET.LOSS_NORMALIZER": "selected",
        "MODEL.RETINANET.SELECTION.NAME": "ohem",
        "MODEL.RETINANET.SELECTION.OHEM.BATCH_SIZE": batch,
        "MODEL.RETINANET.SELECTION.OHEM.NMS_THRESH": nms,
        "MODEL.RETINANET.SELECTION.OHEM.NEG_POS_RATIO": ratio,
    }


def _anchors(scales: int, aspects: int) -> dict[str, Any]:
    return {
        "MODEL.ANCHOR_GENERATOR.SCALES_PER_OCTAVE": scales,
        "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [[0.5, 1.0, 2.0]] if aspects == 3 else [[1.0]],
    }


RECIPES: dict[str, Callable[..., dict[str, Any]]] = {
    "cross_entropy": _cross_entropy,
    "focal": _focal,
    "focal_star": lambda gamma, beta: _loss("focal_star", ALPHA=0.25, GAMMA=gamma, BETA=beta),
    "hinge": lambda margin: _loss("hinge", MARGIN=margin),
    "ohem": _ohem,
    "anchors": _anchors,
}

SHORT_SIDES = {400: 112, 500: 136, 600: 160, 700: 184, 800: 216}
"""Image sides of table 1e, and those of the small preset in proportion (600 pixels: 160)."""

SMALL_BACKBONES: dict[str, dict[str, Any]] = {
    "R50": {},
    "R101": {"MODEL.RESNETS.DEPTH": 34},
    "X101": {
        "MODEL.RESNETS.DEPTH": 50,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 256,
        "MODEL.RESNETS.NUM_GROUPS": 32,
        "MODEL.RESNETS.WIDTH_PER_GROUP": 4,
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
    },
}
"""What the small presets train in place of the paper's models, where a table compares models."""


def _sides(train: Sequence[int], longest: int = 0) -> dict[str, Any]:
    sides = {"INPUT.MIN_SIZE_TRAIN": tuple(train), "INPUT.MIN_SIZE_TEST": max(train)}
    if longest:
        sides |= {"INPUT.MAX_SIZE_TRAIN": longest, "INPUT.MAX_SIZE_TEST": longest}
    return sides


def _image_side(depth: int, side: int) -> dict[str, dict[str, Any]]:
    backbone = SMALL_BACKBONES[f"R{depth}"]
    small = {**_sides([SHORT_SIDES[side]]), **backbone}
    return {
        "paper": _sides([side], round(side * 5 / 3)),
        "small": small,
        "gpu": {**_sides([2 * SHORT_SIDES[side]]), **backbone},
        "quick": small,
    }


def _longer(model: str) -> dict[str, dict[str, Any]]:
    """Return a schedule 1.5 times as long, with scale jitter."""
    steps = {"SOLVER.MAX_ITER": 135_000, "SOLVER.STEPS": (90_000, 120_000)}
    small = SMALL_BACKBONES[model]
    return {
        "paper": {**steps, **_sides([640, 672, 704, 736, 768, 800], 1333)},
        "small": {"SOLVER.MAX_ITER": 525, **_sides([128, 144, 160]), **small},
        "gpu": {"SOLVER.MAX_ITER": 675, **_sides([256, 288, 320]), **small},
        "quick": {"SOLVER.MAX_ITER": 45, **_sides([96, 112, 128]), **small},
    }


PRESET_RECIPES = {"image_side": _image_side, "longer": _longer}
"""Recipes whose keys depend on the preset."""


def _read_row(name: str, columns: Sequence[str], row: Mapping[str, Any]) -> Row:
    overrides = dict(row.get("keys", {}))
    preset_overrides: dict[str, dict[str, Any]] = {}
    for recipe in row.keys() & RECIPES.keys():
        overrides |= RECIPES[recipe](*row[recipe])
    for recipe in row.keys() & PRESET_RECIPES.keys():
        preset_overrides = PRESET_RECIPES[recipe](*row[recipe])
    return Row(
        name,
        dict(zip(columns, row["columns"], strict=True)),
        overrides,
        dict(zip((*METRICS, "ms"), row.get("paper", ()), strict=False)),
        row.get("outcome", ""),
        row.get("model", "R50"),
        preset_overrides,
    )


def _read_claim(text: str, names: Sequence[str]) -> Claim:
    """Read ``better > worse: text``, each a name or a pattern such as ``ohem*``."""
    pair, _, words = text.partition(": ")
    sides = pair.split(" > ")
    better, worse = (tuple(name for name in names if fnmatchcase(name, side)) for side in sides)
    return Claim(words, better, worse)


def _read_tables() -> dict[str, Table]:
    text = Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")
    tables = {}
    for name, content in yaml.safe_load(text).items():
        rows, columns = content.pop("rows"), content.pop("columns")
        claims = [_read_claim(claim, list(rows)) for claim in content.pop("claims", [])]
        tables[name] = Table(
            name=name,
            rows=tuple(_read_row(row, columns, rows[row]) for row in rows),
            claims=tuple(claims),
            **content,
        )
    return tables


DIAL_LOSSES = {
    "ce": ("CE", _cross_entropy(-1.0)),
    "alpha-ce": ("α-CE", _cross_entropy(0.75)),
    "ohem": ("OHEM", _ohem(128, 0.5)),
    "focal": ("focal", _focal()),
}


def _sample_data(point: Mapping[str, Any]) -> dict[str, Any]:
    """Return the overrides of a point of the dial: synthetic images, at their own size."""
    custom = ("TRAIN_JSON", "TRAIN_IMAGES", "TEST_JSON", "TEST_IMAGES")
    return {
        **{f"DATASETS.CUSTOM.{key}": "" for key in custom},
        "DATASETS.TRAIN": ("retinanet_ext_sample_train",),
        "DATASETS.TEST": ("retinanet_ext_sample_val",),
        "DATALOADER.FILTER_EMPTY_ANNOTATIONS": False,
        **{f"DATASETS.SAMPLE.{key}": value for key, value in point.items()},
        **_sides([point["IMAGE_SIZE"]]),
        "MODEL.ANCHOR_GENERATOR.BASE_SCALE": 2.0,
    }


IMBALANCE = Table(
    "imbalance",
    "Imbalance as a dial: four losses on synthetic data",
    "beyond the paper; section 3's argument",
    tuple(
        Row(
            f"{name}-{ratio}",
            {"background : foreground": f"{ratio.partition(':')[2]} : 1", "loss": loss},
            {**overrides, **_sample_data(point)},
        )
        for ratio, point in IMBALANCE_DIAL.items()
        for name, (loss, overrides) in DIAL_LOSSES.items()
    ),
    tuple(
        Claim(f"at {ratio} focal is ahead of {loss}", (f"focal-{ratio}",), (f"{name}-{ratio}",))
        for ratio in IMBALANCE_DIAL
        for name, (loss, _) in DIAL_LOSSES.items()
        if name != "focal"
    ),
    note="Not in the paper, but its reasoning predicts that the lead of the focal loss grows with "
    "the imbalance. Fewer objects also mean fewer positives in the same number of iterations: "
    "compare losses at one point, not points with each other.",
    presets=("small", "gpu", "quick"),
)

TABLES: dict[str, Table] = {**_read_tables(), "imbalance": IMBALANCE}
