"""The paper's tables as data: the config keys each row changes, and the numbers the paper printed.

Numbers are those of arXiv 1708.02002v2: AP in percent on COCO, milliseconds per image on an Nvidia
M40. docs/deviations.md lists what is assumed where the paper leaves a choice open.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from retinanet_ext.data.sample_set import IMBALANCE_DIAL

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
ABOVE, BELOW = "AP above 33.5", "AP below 33.5 or not converged"


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        name: unique in its table.
        settings: the columns left of the numbers.
        overrides: config key -> value.
        paper: published numbers by metric; ``"ms"`` is the inference time per image.
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

    Of several rows in ``worse`` the one with the highest AP counts.
    """

    text: str
    better: str
    worse: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """A table of the paper, or an experiment it describes in words.

    Attributes:
        name: as on the command line.
        title, source: what it shows, and where in the paper.
        note: what the paper leaves open, and what the small preset takes instead.
        presets: the presets that can run it.
    """

    name: str
    title: str
    source: str
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...] = ()
    note: str = ""
    presets: tuple[str, ...] = ("paper", "small", "quick")

    def __getitem__(self, row: str) -> Row:
        return next(one for one in self.rows if one.name == row)


def _claims(text: str) -> tuple[Claim, ...]:
    """Return claims from lines ``better > worse: text``; several rows of ``worse`` by spaces."""
    claims = []
    for line in text.strip().splitlines():
        pair, _, words = line.strip().partition(": ")
        better, _, worse = pair.partition(" > ")
        claims.append(Claim(words, better, tuple(worse.split())))
    return tuple(claims)


def _ap(*values: float) -> dict[str, float]:
    return dict(zip(METRICS, values, strict=False))


def _number(value: float) -> str:
    """Write a number as the paper does: .25, 2.0, .999."""
    return f"{value:.3f}".rstrip("0").ljust(4, "0")[1:] if 0 < value < 1 else f"{value:.1f}"


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


def _focal_star(gamma: float, beta: float) -> dict[str, Any]:
    return _loss("focal_star", ALPHA=0.25, GAMMA=gamma, BETA=beta)


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


def _sides(train: Sequence[int], longest: int = 0) -> dict[str, Any]:
    sides = {"INPUT.MIN_SIZE_TRAIN": tuple(train), "INPUT.MIN_SIZE_TEST": max(train)}
    if longest:
        sides |= {"INPUT.MAX_SIZE_TRAIN": longest, "INPUT.MAX_SIZE_TEST": longest}
    return sides


TABLE_1A = Table(
    "1a",
    "Cross entropy balanced by α",
    "table 1a, section 5.1",
    tuple(
        Row(f"alpha{_number(alpha)}", {"α": _number(alpha)}, _cross_entropy(alpha), _ap(*values))
        for alpha, *values in (
            (0.10, 0.0, 0.0, 0.0),
            (0.25, 10.8, 16.0, 11.7),
            (0.50, 30.2, 46.7, 32.8),
            (0.75, 31.1, 49.4, 33.0),
            (0.90, 30.8, 49.7, 32.3),
            (0.99, 28.7, 47.4, 29.9),
            (0.999, 25.1, 41.7, 26.1),
        )
    ),
    _claims("""
        alpha.75 > alpha.50: α = .75 is ahead of α = .50
        alpha.50 > alpha.25: a small α fails: α = .25 far behind α = .50
        alpha.25 > alpha.10: a smaller α fails altogether: α = .10 behind α = .25
        alpha.75 > alpha.999: a large α costs: α = .999 behind α = .75
    """),
)

TABLE_1B = Table(
    "1b",
    "Focal loss, each γ with its best α",
    "table 1b, section 5.1",
    (
        # The focal loss at gamma 0 is balanced cross entropy: the very run of table 1a.
        Row("gamma0", {"γ": "0", "α": ".75"}, _cross_entropy(0.75), _ap(31.1, 49.4, 33.0)),
        *(
            Row(name, {"γ": _number(gamma), "α": _number(alpha)}, _focal(gamma, alpha), _ap(*ap))
            for name, gamma, alpha, *ap in (
                ("gamma.10", 0.1, 0.75, 31.4, 49.9, 33.1),
                ("gamma.20", 0.2, 0.75, 31.9, 50.7, 33.4),
                ("gamma.50", 0.5, 0.50, 32.9, 51.7, 35.2),
                ("gamma1.0", 1.0, 0.25, 33.7, 52.0, 36.2),
                ("gamma2.0", 2.0, 0.25, 34.0, 52.5, 36.5),
                ("gamma5.0", 5.0, 0.25, 32.2, 49.6, 34.8),
                ("gamma2.0-alpha.50", 2.0, 0.50, 33.6),
            )
        ),
    ),
    _claims("""
        gamma2.0 > gamma0: the focal loss beats α-balanced cross entropy: γ = 2 ahead of γ = 0
        gamma.50 > gamma0: γ = .5 is ahead of γ = 0
        gamma1.0 > gamma0: γ = 1 is ahead of γ = 0
        gamma2.0 > gamma5.0: too large a γ costs: γ = 5 behind γ = 2
        gamma2.0 > gamma2.0-alpha.50: at γ = 2 the smaller α is better: .25 ahead of .50
    """),
    note="γ = 2 with α = .50 is given in words, as .4 AP lower.",
)

TABLE_1C = Table(
    "1c",
    "Anchors: scales per octave and aspect ratios",
    "table 1c, section 5.2",
    tuple(
        Row(
            f"scales{scales}-aspects{aspects}",
            {"scales": str(scales), "aspects": str(aspects)},
            {**_focal(), **_anchors(scales, aspects)},
            _ap(*values),
        )
        for scales, aspects, *values in (
            (1, 1, 30.3, 49.0, 31.8),
            (2, 1, 31.9, 50.0, 34.0),
            (3, 1, 31.8, 49.4, 33.7),
            (1, 3, 32.4, 52.3, 33.9),
            (2, 3, 34.2, 53.1, 36.5),
            (3, 3, 34.0, 52.5, 36.5),
            (4, 3, 33.8, 52.1, 36.2),
        )
    ),
    _claims("""
        scales3-aspects3 > scales1-aspects1: nine anchors beat a single square one
        scales1-aspects3 > scales1-aspects1: aspect ratios help: 1 x 3 ahead of 1 x 1
        scales2-aspects1 > scales1-aspects1: scales help: 2 x 1 ahead of 1 x 1
        scales3-aspects3 > scales4-aspects3: beyond 9 anchors nothing is gained: 4 x 3 not ahead of 3 x 3
    """),  # noqa: E501
)

OHEM_ROWS = tuple(
    Row(
        f"ohem{'-1:3' if ratio else ''}-{batch}-nms{_number(nms)[:2]}",
        {"method": "OHEM 1:3" if ratio else "OHEM", "batch": str(batch), "nms": _number(nms)[:2]},
        _ohem(batch, nms, float(ratio)),
        _ap(*values),
        model="R101",
    )
    for batch, nms, ratio, *values in (
        (128, 0.7, 0, 31.1, 47.2, 33.2),
        (256, 0.7, 0, 31.8, 48.8, 33.9),
        (512, 0.7, 0, 30.6, 47.0, 32.6),
        (128, 0.5, 0, 32.8, 50.3, 35.1),
        (256, 0.5, 0, 31.0, 47.4, 33.0),
        (512, 0.5, 0, 27.6, 42.0, 29.2),
        (128, 0.5, 3, 31.1, 47.2, 33.2),
        (256, 0.5, 3, 28.3, 42.4, 30.3),
        (512, 0.5, 3, 24.0, 35.5, 25.8),
    )
)

TABLE_1D = Table(
    "1d",
    "Online hard example mining against the focal loss",
    "table 1d, section 5.3",
    (
        *OHEM_ROWS,
        Row(
            "focal",
            {"method": "FL", "batch": "n/a", "nms": "n/a"},
            _focal(),
            _ap(36.0, 54.9, 38.7),
            model="R101",
        ),
    ),
    _claims(f"""
        focal > {" ".join(row.name for row in OHEM_ROWS)}: the focal loss beats every OHEM
        ohem-128-nms.5 > ohem-1:3-128-nms.5: OHEM without the 1:3 ratio beats OHEM with it
        ohem-128-nms.5 > ohem-512-nms.5: a larger mini-batch is worse: 512 behind 128
    """),
    note="ResNet-101 in the paper; the small preset keeps its one model. The paper leaves the "
    "loss on the mini-batch and its normaliser open: plain cross entropy over the number of "
    "selected anchors.",
)

SHORT_SIDES = {400: 112, 500: 136, 600: 160, 700: 184, 800: 216}
"""Table 1e's test scales, and what stands for them in the small preset (600 pixels: 160)."""

SMALL_DEPTHS: dict[int, dict[str, Any]] = {50: {}, 101: {"MODEL.RESNETS.DEPTH": 34}}


def _scale_overrides(depth: int, scale: int) -> dict[str, dict[str, Any]]:
    small = {**_sides([SHORT_SIDES[scale]]), **SMALL_DEPTHS[depth]}
    return {"paper": _sides([scale], round(scale * 5 / 3)), "small": small, "quick": small}


TABLE_1E = Table(
    "1e",
    "Accuracy and speed by depth and image scale",
    "table 1e, section 5.2; figure 2",
    tuple(
        Row(
            f"depth{depth}-scale{scale}",
            {"depth": str(depth), "scale": str(scale)},
            _focal(),
            {**_ap(*values), "ms": milliseconds},
            model=f"R{depth}",
            preset_overrides=_scale_overrides(depth, scale),
        )
        for depth, scale, *values, milliseconds in (
            (50, 400, 30.5, 47.8, 32.7, 11.2, 33.8, 46.1, 64),
            (50, 500, 32.5, 50.9, 34.8, 13.9, 35.8, 46.7, 72),
            (50, 600, 34.3, 53.2, 36.9, 16.2, 37.4, 47.4, 98),
            (50, 700, 35.1, 54.2, 37.7, 18.0, 39.3, 46.4, 121),
            (50, 800, 35.7, 55.0, 38.5, 18.9, 38.9, 46.3, 153),
            (101, 400, 31.9, 49.5, 34.1, 11.6, 35.8, 48.5, 81),
            (101, 500, 34.4, 53.1, 36.8, 14.7, 38.5, 49.1, 90),
            (101, 600, 36.0, 55.2, 38.7, 17.4, 39.6, 49.7, 122),
            (101, 700, 37.1, 56.6, 39.8, 19.1, 40.6, 49.4, 154),
            (101, 800, 37.8, 57.5, 40.8, 20.2, 41.1, 49.2, 198),
        )
    ),
    _claims("""
        depth50-scale800 > depth50-scale400: larger images are better: 800 ahead of 400 pixels
        depth101-scale600 > depth50-scale600: the deeper network is better at 600 pixels
    """),
    note="The paper's numbers are of test-dev; here it is the data in DATASETS.TEST, "
    "COCO's minival in the paper preset. Each row is trained at its own scale. The small "
    "preset takes ResNet-18 and ResNet-34 for 50 and 101, and 112 to 216 pixels.",
)


def _longer(small: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        "paper": {
            "SOLVER.MAX_ITER": 135_000,
            "SOLVER.STEPS": (90_000, 120_000),
            **_sides([640, 672, 704, 736, 768, 800], 1333),
        },
        "small": {"SOLVER.MAX_ITER": 525, **_sides([128, 144, 160]), **small},
        "quick": {"SOLVER.MAX_ITER": 45, **_sides([96, 112, 128]), **small},
    }


SMALL_RESNEXT = {
    "MODEL.RESNETS.DEPTH": 50,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 256,
    "MODEL.RESNETS.NUM_GROUPS": 32,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 4,
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
}

TABLE_2 = Table(
    "2",
    "Single models with scale jitter, trained 1.5 times longer",
    "table 2, section 5.3",
    tuple(
        Row(
            model,
            {"backbone": backbone},
            _focal(),
            _ap(*values),
            model=model,
            preset_overrides=_longer(small),
        )
        for model, backbone, small, *values in (
            ("R101", "ResNet-101-FPN", SMALL_DEPTHS[101], 39.1, 59.1, 42.3, 21.8, 42.7, 50.2),
            ("X101", "ResNeXt-101-FPN (32x8d)", SMALL_RESNEXT, 40.8, 61.1, 44.1, 24.1, 44.2, 51.2),
        )
    ),
    _claims("""
        X101 > R101: ResNeXt-101 is ahead of ResNet-101
    """),
    note="The paper's numbers are of test-dev; its range of the scale jitter is not known, 640 "
    "to 800 is Detectron2's. The small preset takes ResNet-34 and ResNeXt-50-32x4d.",
)

TABLE_3 = Table(
    "3",
    "Cross entropy, focal loss and FL*",
    "table 3, appendix A",
    tuple(
        Row(name, {"loss": loss, "γ": gamma, "β": beta}, overrides, _ap(*values))
        for name, loss, gamma, beta, overrides, *values in (
            ("ce", "CE", "–", "–", _cross_entropy(0.75), 31.1, 49.4, 33.0),
            ("focal", "FL", "2.0", "–", _focal(), 34.0, 52.5, 36.5),
            ("focal-star-2-1", "FL*", "2.0", "1.0", _focal_star(2.0, 1.0), 33.8, 52.7, 36.3),
            ("focal-star-4-0", "FL*", "4.0", "0.0", _focal_star(4.0, 0.0), 33.9, 51.8, 36.4),
        )
    ),
    _claims("""
        focal > ce: the focal loss beats cross entropy
        focal-star-2-1 > ce: FL* (γ = 2, β = 1) beats cross entropy
        focal-star-4-0 > ce: FL* (γ = 4, β = 0) beats cross entropy
    """),
)

PRIOR = Table(
    "prior",
    "The prior of the classifier, with cross entropy",
    "section 5.1, network initialization",
    tuple(
        Row(name, {"π": prior}, {**_cross_entropy(0.5), **override}, paper, outcome)
        for name, prior, override, paper, outcome in (
            ("none", "none (p = .5)", {"MODEL.RETINANET.PRIOR_INIT": False}, {}, "diverged"),
            ("pi.10", ".1", {"MODEL.RETINANET.PRIOR_PROB": 0.1}, {}, "insensitive to π"),
            # The default, so that this is the run of table 1a.
            ("pi.01", ".01", {}, _ap(30.2, 46.7, 32.8), ""),
            ("pi.001", ".001", {"MODEL.RETINANET.PRIOR_PROB": 0.001}, {}, "insensitive to π"),
        )
    ),
    _claims("""
        pi.01 > none: without the prior, training fails
        pi.01 > pi.10: insensitive to π: .1 not ahead of .01
        pi.01 > pi.001: insensitive to π: .001 not ahead of .01
    """),
    note="The paper's cross entropy carries the factor 1/2 of α = .50. It gives no number for "
    "another π.",
)

HINGE = Table(
    "hinge",
    "Hinge loss on p_t",
    "section 5.1",
    (
        *(
            Row(
                f"margin{_number(margin)}",
                {"loss": f"hinge, margin {_number(margin)[:2]}"},
                _loss("hinge", MARGIN=margin),
                outcome="unstable, no meaningful results",
            )
            for margin in (0.3, 0.5, 0.7, 0.9)
        ),
        Row("focal", {"loss": "focal"}, _focal(), _ap(34.0, 52.5, 36.5)),
    ),
    _claims("""
        focal > margin.50: hinge (margin .5) is behind the focal loss
        focal > margin.90: hinge (margin .9) is behind the focal loss
    """),
    note="The paper gives no margin.",
)

FIGURE_7 = {
    ABOVE: "2,1 2.5,0 3,-1 3,0 3,1 4,-1 4,0",
    BELOW: "1,0 1,0.5 1,1 2,2 2,4 3,-2 3,2 3,3 4,-2 4,-4",
}
"""γ,β by outcome, blue and grey in figure 7; read off its vector curves."""

FIG7 = Table(
    "fig7",
    "FL* at the 17 settings of figure 7",
    "figure 7, appendix A",
    tuple(
        Row(
            f"gamma{gamma}-beta{beta}",
            {"γ": gamma, "β": beta.replace("-", "−")},
            _focal_star(float(gamma), float(beta)),
            outcome=outcome,
        )
        for outcome, settings in FIGURE_7.items()
        for gamma, beta in (setting.split(",") for setting in settings.split())
    ),
    note="The paper prints no AP for a setting, only on which side of 33.5 it fell.",
)

DIAL_LOSSES = {
    "ce": ("CE", _cross_entropy(-1.0)),
    "alpha-ce": ("α-CE", _cross_entropy(0.75)),
    "ohem": ("OHEM", _ohem(128, 0.5)),
    "focal": ("focal", _focal()),
}


def _drawn_data(point: Mapping[str, Any]) -> dict[str, Any]:
    """Return the overrides of a point of the dial: drawn pictures, taken at their own size."""
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
    "Imbalance as a dial: four losses on drawn data",
    "beyond the paper; section 3's argument",
    tuple(
        Row(
            f"{name}-{ratio}",
            {"background : foreground": f"{ratio.partition(':')[2]} : 1", "loss": loss},
            {**overrides, **_drawn_data(point)},
        )
        for ratio, point in IMBALANCE_DIAL.items()
        for name, (loss, overrides) in DIAL_LOSSES.items()
    ),
    tuple(
        Claim(f"at {ratio} focal is ahead of {loss}", f"focal-{ratio}", (f"{name}-{ratio}",))
        for ratio in IMBALANCE_DIAL
        for name, (loss, _) in DIAL_LOSSES.items()
        if name != "focal"
    ),
    note="Not in the paper, whose reasoning makes one expect the focal loss to lead by more "
    "the larger the imbalance. Fewer objects also mean fewer positives in the same budget: "
    "compare losses at one point, not points with each other.",
    presets=("small", "quick"),
)

TABLES: dict[str, Table] = {
    table.name: table
    for table in (
        *(TABLE_1A, TABLE_1B, TABLE_1C, TABLE_1D, TABLE_1E, TABLE_2, TABLE_3),
        *(PRIOR, HINGE, FIG7, IMBALANCE),
    )
}
