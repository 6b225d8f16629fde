"""Choose operating thresholds, and measure them on images that they were not chosen on."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from retinanet_ext.errors import InputError
from retinanet_ext.evaluation.detection_matches import Matches
from retinanet_ext.evaluation.score_curves import ScoreCurve, score_curves

COMMON_THRESHOLD = 0.5
"""What the thresholds are compared with, and the threshold of a class without objects."""


@dataclass(frozen=True)
class Criterion:
    """What a threshold is chosen for.

    Attributes:
        what: "f1": the highest F1; "precision": the highest recall at that precision; "recall": the
            highest precision at that recall, by the score
        wanted: lowest precision or recall
    """

    what: str = "f1"
    wanted: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Criterion:
        """Return the criterion of a text such as ``f1``, ``precision=.9`` or ``recall=.9``.

        Raises:
            InputError: another text, or a number outside of (0, 1]
        """
        if text == "f1":
            return cls()
        found = re.fullmatch(r"(precision|recall)=(\d*\.?\d+)", text)
        if not found or not 0 < float(found[2]) <= 1:
            raise InputError(
                f"thresholds are chosen for f1, precision=P or recall=R with P and R in (0, 1], "
                f"got {text}"
            )
        return cls(found[1], float(found[2]))

    def __str__(self) -> str:
        return "best F1" if self.what == "f1" else f"{self.what} of at least {self.wanted:g}"

    def choose(self, curve: ScoreCurve) -> tuple[float, str]:
        """Return the threshold of a class, and a note where the criterion cannot be met.

        It lies halfway between the score of the last detection that counts and the next lower one,
        so that rounding does not change which detections count; 0 where all of them count.
        """
        if not curve.num_objects:
            return COMMON_THRESHOLD, "no objects"
        if not curve.true_positives.any():
            return COMMON_THRESHOLD, "no detection finds an object"
        values = getattr(curve, self.what)
        reached = np.flatnonzero(values >= self.wanted)
        note = ""
        if self.what == "f1":
            index = int(values.argmax())
        elif len(reached):
            index = int(reached[-1] if self.what == "precision" else reached[0])
        else:
            highest = np.flatnonzero(values == values.max())
            index = int(highest[-1] if self.what == "precision" else highest[0])
            note = f"{self.what} {self.wanted:g} is not reached, at most {values.max():.3f}"
        if index + 1 == len(curve.scores):
            return 0.0, note
        return float(curve.scores[index] + curve.scores[index + 1]) / 2, note


def choose_thresholds(matches: Matches, criterion: Criterion) -> list[dict[str, Any]]:
    """Choose the threshold of each class on all images, and check the choice on half of them.

    A second threshold is chosen on one half of the images; what it and a common 0.5 give on the
    other half is reported. The halves are drawn with a fixed seed.

    Returns:
        per class: ``threshold`` with its ``precision``, ``recall`` and ``f1`` on all images, a
        ``note`` where the criterion cannot be met, ``half_threshold``, and as ``other_half`` and
        ``other_half_at_0.5`` the numbers on the half that it was not chosen on
    """
    num_images = len(matches.data.image_ids)
    first = np.zeros(num_images, bool)
    first[np.random.default_rng(0).permutation(num_images)[: (num_images + 1) // 2]] = True
    chosen = []
    curves = (score_curves(matches, images) for images in (None, first, ~first))
    for everywhere, here, there in zip(*curves, strict=True):
        threshold, note = criterion.choose(everywhere)
        half_threshold, _ = criterion.choose(here)
        chosen.append(
            {
                "threshold": threshold,
                **everywhere.at(threshold),
                "note": note,
                "half_threshold": half_threshold,
                "other_half": there.at(half_threshold),
                "other_half_at_0.5": there.at(COMMON_THRESHOLD),
            }
        )
    return chosen
