"""Measured losses, and which of them was best where data and budget were nearest to a training's.

The measurements are in ``measured_losses.yaml``. A setting is a data set with a budget; its rows
are losses with the AP of each seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

DEFAULT = "focal, gamma 2, alpha .25"
"""The paper's loss and Detectron2's default."""

CANDIDATES = (DEFAULT, f"{DEFAULT}, weight auto", "cross entropy, alpha .75")
"""Rows that are compared as the one loss for everything."""

COMMON_KEYS = {
    "MODEL.RETINANET.CLS_LOSS.WEIGHT": 1.0,
    "MODEL.RETINANET.CLS_LOSS.CLASS_ALPHA": [],
    "MODEL.RETINANET.SELECTION.NAME": "all",
}
"""Keys and defaults of what a row may change besides the loss and its parameters."""

MARGIN = 1.0
"""AP by which another row must be ahead of :data:`DEFAULT`: seeds differ by as much."""

SLACK = 1.1
"""Factor by which a training may lie outside of the measured range without a remark."""

MIN_AP = 5.0
"""AP of the best row below which a setting advises nothing, because no loss has learnt."""


@dataclass(frozen=True)
class Situation:
    """What a measured setting is compared by.

    Attributes:
        imbalance: background anchors per foreground anchor, at the training size
        images_seen: iterations times images per batch
        train_images: images of the training set
        optimizer: ``SGD`` or ``AdamW``
        weights: initial weights, ``random`` or ``pretrained``
    """

    imbalance: float
    images_seen: int
    train_images: int
    optimizer: str
    weights: str

    def distance(self, other: Situation) -> float:
        """Return the distance in octaves of imbalance and images seen."""
        return math.hypot(
            math.log2(self.imbalance / other.imbalance),
            math.log2(self.images_seen / other.images_seen),
        )

    def __str__(self) -> str:
        return (
            f"imbalance 1 : {self.imbalance:.0f}, {self.images_seen} images seen "
            f"({self.images_seen / self.train_images:.1f} epochs), {self.optimizer}, "
            f"{self.weights} weights"
        )


@dataclass(frozen=True)
class Setting:
    """A data set and budget on which losses were measured.

    Attributes:
        name: in words
        source: file of the repository, or publication, that has the numbers
        situation: of the data and the training
        rows: loss -> AP of each seed
    """

    name: str
    source: str
    situation: Situation
    rows: Mapping[str, tuple[float, ...]]

    def mean(self, row: str) -> float:
        return fmean(self.rows[row])

    @property
    def has_learnt(self) -> bool:
        """Whether the best row reaches :data:`MIN_AP`."""
        return self.mean(self.best()) >= MIN_AP

    def best(self, rows: Sequence[str] | None = None) -> str:
        """Return the row with the highest mean AP, of all or of some that were measured."""
        return max(self.rows if rows is None else rows, key=self.mean)


@dataclass(frozen=True)
class Advice:
    """A recommended row.

    Attributes:
        row: the loss
        setting: the nearest measured setting, which has the row
        remarks: sentences on what was not measured
    """

    row: str
    setting: Setting
    remarks: tuple[str, ...]


@cache
def read_measurements() -> tuple[list[Setting], dict[str, dict[str, Any]]]:
    """Return the measured settings, and row -> the config keys that make it, defaults included."""
    text = Path(__file__).with_name("measured_losses.yaml").read_text(encoding="utf-8")
    content = yaml.safe_load(text)
    settings = []
    for entry in content["settings"]:
        situation = Situation(**{key.name: entry[key.name] for key in fields(Situation)})
        rows = {row: tuple(map(float, aps)) for row, aps in entry["rows"].items()}
        settings.append(Setting(entry["name"], entry["source"], situation, rows))
    losses = {
        row: keys | {key: value for key, value in COMMON_KEYS.items() if key not in keys}
        for row, keys in content["losses"].items()
    }
    return settings, losses


def advised_keys(row: str, normalizer: str) -> dict[str, Any]:
    """Return the config keys that make a row of any config.

    Args:
        row: of :func:`read_measurements`
        normalizer: ``MODEL.RETINANET.LOSS_NORMALIZER`` of the config, which stays unless it is that
            of a mini-batch
    """
    keys = read_measurements()[1][row]
    key = "MODEL.RETINANET.LOSS_NORMALIZER"
    return keys if key in keys or normalizer != "selected" else {**keys, key: "foreground_ema"}


def recommend(
    situation: Situation, settings: Sequence[Setting], rows: Sequence[str] | None = None
) -> Advice:
    """Return the best row of the nearest setting; the default unless it is behind by a margin.

    Only settings of the same optimizer and initial weights are compared, or of the same optimizer,
    or all, whichever exist first.

    Args:
        situation: of the training to advise
        settings: measured ones
        rows: rows to choose from; settings without any of them are left out. All by default.
    """
    settings = [s for s in settings if s.has_learnt and (rows is None or s.rows.keys() & set(rows))]
    pool, remarks = comparable(situation, settings)
    nearest = min(pool, key=lambda setting: situation.distance(setting.situation))
    known = [row for row in nearest.rows if rows is None or row in rows]
    best = nearest.best(known)
    if DEFAULT in known and nearest.mean(best) < nearest.mean(DEFAULT) + MARGIN:
        best = DEFAULT
    return Advice(best, nearest, (*remarks, *_out_of_range(situation, pool)))


def comparable(
    situation: Situation, settings: Sequence[Setting]
) -> tuple[list[Setting], list[str]]:
    """Return the settings to compare with, and what they differ in."""
    same = [s for s in settings if s.situation.optimizer == situation.optimizer]
    if not same:
        return list(settings), [f"No loss was compared with {situation.optimizer}."]
    alike = [s for s in same if s.situation.weights == situation.weights]
    if alike:
        return alike, []
    return same, [
        f"No losses were compared with {situation.optimizer} from {situation.weights} weights."
    ]


def _out_of_range(situation: Situation, pool: Sequence[Setting]) -> list[str]:
    remarks = []
    for key, before, after in (("imbalance", "imbalance 1 : ", ""), ("images_seen", "", " images")):
        values = [getattr(setting.situation, key) for setting in pool]
        value, low, high = getattr(situation, key), min(values), max(values)
        if not low / SLACK <= value <= high * SLACK:
            measured = f"{low}" if low == high else f"{low} to {high}"
            remarks.append(
                f"Beyond what was measured: {before}{value:.0f}{after}, and not {measured}. The "
                "advice is an extrapolation."
            )
    return remarks


@dataclass(frozen=True)
class Regret:
    """What the advice costs on a setting that it does not know.

    Attributes:
        setting: the one left out
        advice: from the others, among the rows that were measured on ``setting``
        best: its best row
        ap, default: the AP lost against the best row with the advice, and with the default loss
    """

    setting: Setting
    advice: Advice
    best: str
    ap: float
    default: float


def leave_one_out(settings: Sequence[Setting]) -> list[Regret]:
    """Return the regret on each setting when it is advised from all others.

    Settings where no loss has learnt are left out.
    """
    found = []
    for setting in (setting for setting in settings if setting.has_learnt):
        others = [other for other in settings if other is not setting]
        advice = recommend(setting.situation, others, list(setting.rows))
        best = setting.best()
        lost = [setting.mean(best) - setting.mean(row) for row in (advice.row, DEFAULT)]
        found.append(Regret(setting, advice, best, *lost))
    return found


def one_loss_everywhere(settings: Sequence[Setting]) -> dict[str, dict[str, float]]:
    """Return what it costs to take one of :data:`CANDIDATES` on all settings.

    Returns:
        row -> setting that has all of them -> AP lost there against the best row; no rows if there
        is no such setting
    """
    common = [s for s in settings if s.has_learnt and s.rows.keys() >= set(CANDIDATES)]
    if not common:
        return {}
    return {row: {s.name: s.mean(s.best()) - s.mean(row) for s in common} for row in CANDIDATES}
