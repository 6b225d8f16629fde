"""What a table of experiments is made of: rows, claims, and the config keys of the losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


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
        factors: config key -> factor of the number that the preset or the command line gives it.
        baseline: published AP of what a claim compares the row with, from the same publication as
            ``paper``; None: that of the other row.
    """

    name: str
    settings: Mapping[str, str]
    overrides: Mapping[str, Any]
    paper: Mapping[str, float] = field(default_factory=dict)
    outcome: str = ""
    model: str = "R50"
    preset_overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    factors: Mapping[str, float] = field(default_factory=dict)
    baseline: float | None = None


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
        needs: a config key that the command line must give, and that rows may override.
    """

    name: str
    title: str
    source: str
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...] = ()
    note: str = ""
    presets: tuple[str, ...] = ("paper", "small", "gpu", "quick")
    needs: str = ""

    def __getitem__(self, row: str) -> Row:
        return next(candidate for candidate in self.rows if candidate.name == row)


def loss(name: str, **parameters: float) -> dict[str, Any]:
    """Return the keys of a loss and its parameters."""
    node = "MODEL.RETINANET.CLS_LOSS"
    values = {f"{node}.{name.upper()}.{key}": value for key, value in parameters.items()}
    return {f"{node}.NAME": name, **values}


def cross_entropy(alpha: float) -> dict[str, Any]:
    """Return the keys of cross entropy; alpha -1: not balanced."""
    return loss("cross_entropy", ALPHA=alpha)


def focal(gamma: float = 2.0, alpha: float = 0.25) -> dict[str, Any]:
    """Return the keys of the focal loss; by default the paper's best."""
    node = "MODEL.RETINANET"
    values = {f"{node}.FOCAL_LOSS_GAMMA": gamma, f"{node}.FOCAL_LOSS_ALPHA": alpha}
    return {**loss("focal"), **values}


def ohem(batch: int, nms: float, ratio: float = 0.0) -> dict[str, Any]:
    """Return the keys of OHEM: mini-batch, NMS threshold, negatives per positive (0: any)."""
    return {
        **cross_entropy(-1.0),
        "MODEL.RETINANET.LOSS_NORMALIZER": "selected",
        "MODEL.RETINANET.SELECTION.NAME": "ohem",
        "MODEL.RETINANET.SELECTION.OHEM.BATCH_SIZE": batch,
        "MODEL.RETINANET.SELECTION.OHEM.NMS_THRESH": nms,
        "MODEL.RETINANET.SELECTION.OHEM.NEG_POS_RATIO": ratio,
    }


def image_sides(train: Sequence[int], longest: int = 0) -> dict[str, Any]:
    """Return the keys of the short sides in training, the largest of them in testing."""
    sides = {"INPUT.MIN_SIZE_TRAIN": tuple(train), "INPUT.MIN_SIZE_TEST": max(train)}
    if longest:
        sides |= {"INPUT.MAX_SIZE_TRAIN": longest, "INPUT.MAX_SIZE_TEST": longest}
    return sides
