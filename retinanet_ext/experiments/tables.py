"""The paper's tables as data: what each row changes in a config, and what the paper measured.

Numbers are those of arXiv 1708.02002v2, in percent AP on COCO, milliseconds on an Nvidia M40. Where
the paper leaves a choice open, docs/deviations.md says what is taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from retinanet_ext.data.sample_set import IMBALANCE_DIAL

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        name: unique in its table.
        settings: what stands left of the numbers, by column.
        overrides: config key -> value.
        paper: published numbers by metric, ``"ms"`` for the inference time of an image.
        outcome: the paper's words where it gives no number.
        model: the paper's model, which a preset maps to a config.
        preset_overrides: preset -> more overrides, where presets differ.
        may_diverge: divergence would not surprise.
    """

    name: str
    settings: Mapping[str, str]
    overrides: Mapping[str, Any]
    paper: Mapping[str, float] = field(default_factory=dict)
    outcome: str = ""
    model: str = "R50"
    preset_overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    may_diverge: bool = False


@dataclass(frozen=True)
class Claim:
    """An ordering that the paper states or shows: one row's AP is above another's.

    Attributes:
        worse: one row, or several of which the highest counts.
        strict: otherwise it is enough that ``better`` is not below.
    """

    text: str
    better: str
    worse: str | tuple[str, ...]
    strict: bool = True

    @property
    def others(self) -> tuple[str, ...]:
        """Return the rows of ``worse``."""
        return (self.worse,) if isinstance(self.worse, str) else self.worse


@dataclass(frozen=True)
class Table:
    """A table of the paper, or an experiment it describes in words.

    Attributes:
        name: as on the command line.
        title, source: what it shows, and where it stands.
        note: what the paper leaves open, and how the small preset reads it.
        presets: which presets can run it.
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


def _ap(*values: float) -> dict[str, float]:
    return dict(zip(METRICS, values, strict=False))


def _number(value: float) -> str:
    """Write a number as the paper does: .25, 2.0, .999."""
    return f"{value:.3f}".rstrip("0").ljust(4, "0")[1:] if 0 < value < 1 else f"{value:.1f}"


def _cross_entropy(alpha: float) -> dict[str, Any]:
    return {
        "MODEL.RETINANET.CLS_LOSS.NAME": "cross_entropy",
        "MODEL.RETINANET.CLS_LOSS.CROSS_ENTROPY.ALPHA": alpha,
    }


def _focal(gamma: float = 2.0, alpha: float = 0.25) -> dict[str, Any]:
    return {
        "MODEL.RETINANET.CLS_LOSS.NAME": "focal",
        "MODEL.RETINANET.FOCAL_LOSS_GAMMA": gamma,
        "MODEL.RETINANET.FOCAL_LOSS_ALPHA": alpha,
    }


def _focal_star(gamma: float, beta: float) -> dict[str, Any]:
    return {
        "MODEL.RETINANET.CLS_LOSS.NAME": "focal_star",
        "MODEL.RETINANET.CLS_LOSS.FOCAL_STAR.ALPHA": 0.25,
        "MODEL.RETINANET.CLS_LOSS.FOCAL_STAR.GAMMA": gamma,
        "MODEL.RETINANET.CLS_LOSS.FOCAL_STAR.BETA": beta,
    }


def _ohem(batch: int, nms: float, ratio: float = 0.0) -> dict[str, Any]:
    return {
        **_cross_entropy(-1.0),
        "MODEL.RETINANET.LOSS_NORMALIZER": "selected",
        "MODEL.RETINANET.SELECTION.NAME": "ohem",
        "MODEL.RETINANET.SELECTION.OHEM.BATCH_SIZE": batch,
        "MODEL.RETINANET.SELECTION.OHEM.NMS_THRESH": nms,
        "MODEL.RETINANET.SELECTION.OHEM.NEG_POS_RATIO": ratio,
    }


def _table_1a() -> Table:
    numbers = {
        0.10: (0.0, 0.0, 0.0),
        0.25: (10.8, 16.0, 11.7),
        0.50: (30.2, 46.7, 32.8),
        0.75: (31.1, 49.4, 33.0),
        0.90: (30.8, 49.7, 32.3),
        0.99: (28.7, 47.4, 29.9),
        0.999: (25.1, 41.7, 26.1),
    }
    rows = (
        Row(f"alpha{_number(a)}", {"α": _number(a)}, _cross_entropy(a), _ap(*values))
        for a, values in numbers.items()
    )
    return Table(
        "1a",
        "Cross entropy balanced by α",
        "table 1a, section 5.1",
        tuple(rows),
        (
            Claim("α = .75 is ahead of α = .50", "alpha.75", "alpha.50"),
            Claim("a small α fails: α = .25 far behind α = .50", "alpha.50", "alpha.25"),
            Claim("a smaller α fails altogether: α = .10 behind α = .25", "alpha.25", "alpha.10"),
            Claim("a large α costs: α = .999 behind α = .75", "alpha.75", "alpha.999"),
        ),
    )


def _table_1b() -> Table:
    focal = {
        (0.1, 0.75): _ap(31.4, 49.9, 33.1),
        (0.2, 0.75): _ap(31.9, 50.7, 33.4),
        (0.5, 0.50): _ap(32.9, 51.7, 35.2),
        (1.0, 0.25): _ap(33.7, 52.0, 36.2),
        (2.0, 0.25): _ap(34.0, 52.5, 36.5),
        (5.0, 0.25): _ap(32.2, 49.6, 34.8),
        (2.0, 0.50): _ap(33.6),
    }
    # Focal loss at gamma 0 is balanced cross entropy: the very run of table 1a.
    zero = Row("gamma0", {"γ": "0", "α": ".75"}, _cross_entropy(0.75), _ap(31.1, 49.4, 33.0))
    rows = [
        Row(
            f"gamma{_number(gamma)}" + ("-alpha.50" if (gamma, alpha) == (2.0, 0.5) else ""),
            {"γ": _number(gamma), "α": _number(alpha)},
            _focal(gamma, alpha),
            numbers,
        )
        for (gamma, alpha), numbers in focal.items()
    ]
    return Table(
        "1b",
        "Focal loss, each γ with its best α",
        "table 1b, section 5.1",
        (zero, *rows),
        (
            Claim("the focal loss beats α-balanced cross entropy: γ = 2 ahead of γ = 0",
                  "gamma2.0", "gamma0"),
            Claim("γ = .5 is ahead of γ = 0", "gamma.50", "gamma0"),
            Claim("γ = 1 is ahead of γ = 0", "gamma1.0", "gamma0"),
            Claim("too large a γ costs: γ = 5 behind γ = 2", "gamma2.0", "gamma5.0"),
            Claim("at γ = 2 the smaller α is better: .25 ahead of .50",
                  "gamma2.0", "gamma2.0-alpha.50"),
        ),
        note="γ = 2 with α = .50 is given in words, as .4 AP lower.",
    )  # fmt: skip


def _table_1c() -> Table:
    numbers = {
        (1, 1): (30.3, 49.0, 31.8),
        (2, 1): (31.9, 50.0, 34.0),
        (3, 1): (31.8, 49.4, 33.7),
        (1, 3): (32.4, 52.3, 33.9),
        (2, 3): (34.2, 53.1, 36.5),
        (3, 3): (34.0, 52.5, 36.5),
        (4, 3): (33.8, 52.1, 36.2),
    }
    rows = (
        Row(
            f"scales{scales}-aspects{aspects}",
            {"scales": str(scales), "aspects": str(aspects)},
            {
                **_focal(),
                "MODEL.ANCHOR_GENERATOR.SCALES_PER_OCTAVE": scales,
                "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": (
                    [[0.5, 1.0, 2.0]] if aspects == 3 else [[1.0]]
                ),
            },
            _ap(*values),
        )
        for (scales, aspects), values in numbers.items()
    )
    return Table(
        "1c",
        "Anchors: scales an octave and aspect ratios",
        "table 1c, section 5.2",
        tuple(rows),
        (
            Claim("nine anchors beat a single square one", "scales3-aspects3", "scales1-aspects1"),
            Claim("aspect ratios help: 1 x 3 ahead of 1 x 1", "scales1-aspects3",
                  "scales1-aspects1"),
            Claim("scales help: 2 x 1 ahead of 1 x 1", "scales2-aspects1", "scales1-aspects1"),
            Claim("beyond 9 anchors nothing is gained: 4 x 3 not ahead of 3 x 3",
                  "scales3-aspects3", "scales4-aspects3", strict=False),
        ),
    )  # fmt: skip


def _table_1d() -> Table:
    numbers = {
        (128, 0.7, 0): (31.1, 47.2, 33.2),
        (256, 0.7, 0): (31.8, 48.8, 33.9),
        (512, 0.7, 0): (30.6, 47.0, 32.6),
        (128, 0.5, 0): (32.8, 50.3, 35.1),
        (256, 0.5, 0): (31.0, 47.4, 33.0),
        (512, 0.5, 0): (27.6, 42.0, 29.2),
        (128, 0.5, 3): (31.1, 47.2, 33.2),
        (256, 0.5, 3): (28.3, 42.4, 30.3),
        (512, 0.5, 3): (24.0, 35.5, 25.8),
    }
    rows = [
        Row(
            f"ohem{'-1:3' if ratio else ''}-{batch}-nms{_number(nms)[:2]}",
            {
                "method": "OHEM 1:3" if ratio else "OHEM",
                "batch": str(batch),
                "nms": _number(nms)[:2],
            },
            _ohem(batch, nms, float(ratio)),
            _ap(*values),
            model="R101",
        )
        for (batch, nms, ratio), values in numbers.items()
    ]
    focal = Row(
        "focal",
        {"method": "FL", "batch": "n/a", "nms": "n/a"},
        _focal(),
        _ap(36.0, 54.9, 38.7),
        model="R101",
    )
    best = "ohem-128-nms.5"
    return Table(
        "1d",
        "Online hard example mining against the focal loss",
        "table 1d, section 5.3",
        (*rows, focal),
        (
            Claim("the focal loss beats every OHEM", "focal", tuple(row.name for row in rows)),
            Claim("OHEM without the 1:3 ratio beats OHEM with it", best, "ohem-1:3-128-nms.5"),
            Claim("a larger mini-batch is worse: 512 behind 128", best, "ohem-512-nms.5"),
        ),
        note="ResNet-101 in the paper; the small preset keeps its one model. The paper leaves the "
        "loss on the mini-batch and its normaliser open: plain cross entropy over the number of "
        "selected anchors.",
    )


SHORT_SIDES = {400: 112, 500: 136, 600: 160, 700: 184, 800: 216}
"""Table 1e's test scales, and what stands for them in the small preset (600 pixels: 160)."""


def _table_1e() -> Table:
    numbers = {
        (50, 400): (30.5, 47.8, 32.7, 11.2, 33.8, 46.1, 64),
        (50, 500): (32.5, 50.9, 34.8, 13.9, 35.8, 46.7, 72),
        (50, 600): (34.3, 53.2, 36.9, 16.2, 37.4, 47.4, 98),
        (50, 700): (35.1, 54.2, 37.7, 18.0, 39.3, 46.4, 121),
        (50, 800): (35.7, 55.0, 38.5, 18.9, 38.9, 46.3, 153),
        (101, 400): (31.9, 49.5, 34.1, 11.6, 35.8, 48.5, 81),
        (101, 500): (34.4, 53.1, 36.8, 14.7, 38.5, 49.1, 90),
        (101, 600): (36.0, 55.2, 38.7, 17.4, 39.6, 49.7, 122),
        (101, 700): (37.1, 56.6, 39.8, 19.1, 40.6, 49.4, 154),
        (101, 800): (37.8, 57.5, 40.8, 20.2, 41.1, 49.2, 198),
    }
    rows = []
    for (depth, scale), (*ap, milliseconds) in numbers.items():
        small = {**_sides([SHORT_SIDES[scale]]), **_small_depth(depth)}
        rows.append(
            Row(
                f"depth{depth}-scale{scale}",
                {"depth": str(depth), "scale": str(scale)},
                _focal(),
                {**_ap(*ap), "ms": milliseconds},
                model=f"R{depth}",
                preset_overrides={
                    "paper": {
                        **_sides([scale]),
                        "INPUT.MAX_SIZE_TRAIN": round(scale * 5 / 3),
                        "INPUT.MAX_SIZE_TEST": round(scale * 5 / 3),
                    },
                    "small": small,
                    "quick": small,
                },
            )
        )
    return Table(
        "1e",
        "Accuracy and speed by depth and image scale",
        "table 1e, section 5.2; figure 2",
        tuple(rows),
        (
            Claim("larger images are better: 800 ahead of 400 pixels",
                  "depth50-scale800", "depth50-scale400"),
            Claim("the deeper network is better at 600 pixels",
                  "depth101-scale600", "depth50-scale600"),
        ),
        note="The paper's numbers are of test-dev; here it is the data in DATASETS.TEST, "
        "COCO's minival in the paper preset. Each row is trained at its own scale. The small "
        "preset takes ResNet-18 and ResNet-34 for 50 and 101, and 112 to 216 pixels.",
    )  # fmt: skip


def _sides(train: Sequence[int]) -> dict[str, Any]:
    return {"INPUT.MIN_SIZE_TRAIN": tuple(train), "INPUT.MIN_SIZE_TEST": max(train)}


def _small_depth(depth: int) -> dict[str, Any]:
    return {"MODEL.RESNETS.DEPTH": 34} if depth == 101 else {}


def _table_2() -> Table:
    longer = {
        "SOLVER.MAX_ITER": 135_000,
        "SOLVER.STEPS": (90_000, 120_000),
        **_sides([640, 672, 704, 736, 768, 800]),
        "INPUT.MAX_SIZE_TRAIN": 1333,
        "INPUT.MAX_SIZE_TEST": 1333,
    }
    small = {"SOLVER.MAX_ITER": 525, **_sides([128, 144, 160])}
    quick = {"SOLVER.MAX_ITER": 45, **_sides([96, 112, 128])}
    resnext = {
        "MODEL.RESNETS.DEPTH": 50,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 256,
        "MODEL.RESNETS.NUM_GROUPS": 32,
        "MODEL.RESNETS.WIDTH_PER_GROUP": 4,
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
    }
    return Table(
        "2",
        "Single models with scale jitter, trained 1.5 times longer",
        "table 2, section 5.3",
        (
            Row(
                "R101",
                {"backbone": "ResNet-101-FPN"},
                _focal(),
                _ap(39.1, 59.1, 42.3, 21.8, 42.7, 50.2),
                model="R101",
                preset_overrides={
                    "paper": longer,
                    "small": {**small, **_small_depth(101)},
                    "quick": {**quick, **_small_depth(101)},
                },
            ),
            Row(
                "X101",
                {"backbone": "ResNeXt-101-FPN (32x8d)"},
                _focal(),
                _ap(40.8, 61.1, 44.1, 24.1, 44.2, 51.2),
                model="X101",
                preset_overrides={
                    "paper": longer,
                    "small": {**small, **resnext},
                    "quick": {**quick, **resnext},
                },
            ),
        ),
        (Claim("ResNeXt-101 is ahead of ResNet-101", "X101", "R101"),),
        note="The paper's numbers are of test-dev; its range of the scale jitter is not known, 640 "
        "to 800 is Detectron2's. The small preset takes ResNet-34 and ResNeXt-50-32x4d.",
    )


def _table_3() -> Table:
    return Table(
        "3",
        "Cross entropy, focal loss and FL*",
        "table 3, appendix A",
        (
            Row("ce", {"loss": "CE", "γ": "–", "β": "–"}, _cross_entropy(0.75),
                _ap(31.1, 49.4, 33.0)),
            Row("focal", {"loss": "FL", "γ": "2.0", "β": "–"}, _focal(), _ap(34.0, 52.5, 36.5)),
            Row("focal-star-2-1", {"loss": "FL*", "γ": "2.0", "β": "1.0"}, _focal_star(2.0, 1.0),
                _ap(33.8, 52.7, 36.3)),
            Row("focal-star-4-0", {"loss": "FL*", "γ": "4.0", "β": "0.0"}, _focal_star(4.0, 0.0),
                _ap(33.9, 51.8, 36.4)),
        ),
        (
            Claim("the focal loss beats cross entropy", "focal", "ce"),
            Claim("FL* (γ = 2, β = 1) beats cross entropy", "focal-star-2-1", "ce"),
            Claim("FL* (γ = 4, β = 0) beats cross entropy", "focal-star-4-0", "ce"),
        ),
    )  # fmt: skip


def _prior() -> Table:
    def with_prior(probability: float) -> dict[str, Any]:
        return {**_cross_entropy(0.5), "MODEL.RETINANET.PRIOR_PROB": probability}

    return Table(
        "prior",
        "The prior of the classifier, with cross entropy",
        "section 5.1, network initialization",
        (
            Row(
                "none",
                {"π": "none (p = .5)"},
                {**_cross_entropy(0.5), "MODEL.RETINANET.PRIOR_INIT": False},
                outcome="diverged",
                may_diverge=True,
            ),
            Row("pi.10", {"π": ".1"}, with_prior(0.1), outcome="insensitive to π"),
            # The default, so that this is the run of table 1a.
            Row("pi.01", {"π": ".01"}, _cross_entropy(0.5), _ap(30.2, 46.7, 32.8)),
            Row("pi.001", {"π": ".001"}, with_prior(0.001), outcome="insensitive to π"),
        ),
        (
            Claim("without the prior, training fails", "pi.01", "none"),
            Claim("insensitive to π: .1 not ahead of .01", "pi.01", "pi.10", strict=False),
            Claim("insensitive to π: .001 not ahead of .01", "pi.01", "pi.001", strict=False),
        ),
        note="The paper's cross entropy carries the factor 1/2 of α = .50. It gives no number for "
        "another π.",
    )


def _hinge() -> Table:
    def hinge(margin: float) -> dict[str, Any]:
        return {
            "MODEL.RETINANET.CLS_LOSS.NAME": "hinge",
            "MODEL.RETINANET.CLS_LOSS.HINGE.MARGIN": margin,
        }

    rows = (
        Row(
            f"margin{_number(margin)}",
            {"loss": f"hinge, margin {_number(margin)[:2]}"},
            hinge(margin),
            outcome="unstable, no meaningful results",
            may_diverge=True,
        )
        for margin in (0.3, 0.5, 0.7, 0.9)
    )
    return Table(
        "hinge",
        "Hinge loss on p_t",
        "section 5.1",
        (
            *rows,
            Row("focal", {"loss": "focal"}, _focal(), _ap(34.0, 52.5, 36.5)),
        ),
        (
            Claim("hinge (margin .5) is behind the focal loss", "focal", "margin.50"),
            Claim("hinge (margin .9) is behind the focal loss", "focal", "margin.90"),
        ),
        note="The paper gives no margin.",
    )


FIGURE_7_ABOVE = ((2, 1), (2.5, 0), (3, -1), (3, 0), (3, 1), (4, -1), (4, 0))
"""(γ, β) whose AP is above 33.5, blue in figure 7; read off its vector curves."""

FIGURE_7_BELOW = (
    (1, 0), (1, 0.5), (1, 1), (2, 2), (2, 4), (3, -2), (3, 2), (3, 3), (4, -2), (4, -4),
)  # fmt: skip
"""(γ, β) that did not converge or stay below, grey in figure 7."""


def _figure_7() -> Table:
    def row(gamma: float, beta: float, outcome: str) -> Row:
        values = float(gamma), float(beta)
        return Row(
            f"gamma{gamma:g}-beta{beta:g}",
            {"γ": f"{gamma:g}", "β": f"{beta:g}".replace("-", "−")},
            _focal_star(*values),
            outcome=outcome,
            may_diverge=outcome != ABOVE,
        )

    return Table(
        "fig7",
        "FL* at the 17 settings of figure 7",
        "figure 7, appendix A",
        (
            *(row(*setting, ABOVE) for setting in FIGURE_7_ABOVE),
            *(row(*setting, BELOW) for setting in FIGURE_7_BELOW),
        ),
        note="The paper prints no AP for a setting, only on which side of 33.5 it fell.",
    )


ABOVE, BELOW = "AP above 33.5", "AP below 33.5 or not converged"


def _imbalance() -> Table:
    losses = {
        "CE": _cross_entropy(-1.0),
        "α-CE": _cross_entropy(0.75),
        "OHEM": _ohem(128, 0.5),
        "focal": _focal(),
    }
    names = {"CE": "ce", "α-CE": "alpha-ce", "OHEM": "ohem", "focal": "focal"}
    custom = dict.fromkeys(("TRAIN_JSON", "TRAIN_IMAGES", "TEST_JSON", "TEST_IMAGES"), "")
    rows = [
        Row(
            f"{names[loss]}-{ratio}",
            {"background : foreground": f"{ratio.partition(':')[2]} : 1", "loss": loss},
            {
                **overrides,
                **{f"DATASETS.CUSTOM.{key}": value for key, value in custom.items()},
                "DATASETS.TRAIN": ("retinanet_ext_sample_train",),
                "DATASETS.TEST": ("retinanet_ext_sample_val",),
                "DATALOADER.FILTER_EMPTY_ANNOTATIONS": False,
                **{f"DATASETS.SAMPLE.{key}": value for key, value in point.items()},
                # Nothing but the imbalance may differ: pictures at their own size.
                "INPUT.MIN_SIZE_TRAIN": (point["IMAGE_SIZE"],),
                "INPUT.MIN_SIZE_TEST": point["IMAGE_SIZE"],
                "MODEL.ANCHOR_GENERATOR.BASE_SCALE": 2.0,
            },
        )
        for ratio, point in IMBALANCE_DIAL.items()
        for loss, overrides in losses.items()
    ]
    return Table(
        "imbalance",
        "Imbalance as a dial: four losses on drawn data",
        "beyond the paper; section 3's argument",
        tuple(rows),
        tuple(
            Claim(f"at {ratio} focal is ahead of {text}", f"focal-{ratio}", f"{loss}-{ratio}")
            for ratio in IMBALANCE_DIAL
            for loss, text in (("ce", "CE"), ("alpha-ce", "α-CE"), ("ohem", "OHEM"))
        ),
        note="Not in the paper, whose reasoning makes one expect the focal loss to lead by more "
        "the larger the imbalance. Fewer objects also mean fewer positives in the same budget: "
        "compare losses at one point, not points with each other.",
        presets=("small", "quick"),
    )  # fmt: skip


TABLES: dict[str, Table] = {
    table.name: table
    for table in (
        _table_1a(),
        _table_1b(),
        _table_1c(),
        _table_1d(),
        _table_1e(),
        _table_2(),
        _table_3(),
        _prior(),
        _hinge(),
        _figure_7(),
        _imbalance(),
    )
}
