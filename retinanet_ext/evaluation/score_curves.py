"""Precision, recall, F1 and false positives as functions of the threshold."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from retinanet_ext.evaluation.detection_matches import Matches

FROC_RATES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""False positives per image, as in LUNA16 (arXiv 1612.08012)."""


@dataclass(frozen=True)
class ScoreCurve:
    """Numbers of detections at every threshold that is the score of one, the highest first.

    Attributes:
        scores: the different scores, (S,)
        true_positives: number of detections with at least that score that find an object, (S,)
        false_positives: number of the others, (S,)
        num_objects: number of objects
        num_images: number of images
    """

    scores: np.ndarray
    true_positives: np.ndarray
    false_positives: np.ndarray
    num_objects: int
    num_images: int

    @property
    def precision(self) -> np.ndarray:
        """Share of the detections that find an object, (S,)."""
        return self.true_positives / (self.true_positives + self.false_positives)

    @property
    def recall(self) -> np.ndarray:
        """Share of the objects that are found, (S,); NaN without objects."""
        if not self.num_objects:
            return np.full(len(self.scores), np.nan)
        return self.true_positives / self.num_objects

    @property
    def f1(self) -> np.ndarray:
        """Harmonic mean of precision and recall, (S,); NaN without objects."""
        if not self.num_objects:
            return np.full(len(self.scores), np.nan)
        num_detections = self.true_positives + self.false_positives
        return 2 * self.true_positives / (num_detections + self.num_objects)

    def at(self, threshold: float) -> dict[str, float]:
        """Return the numbers of detections with at least that score.

        Returns:
            ``precision`` (NaN without detections), ``recall`` and ``f1`` (NaN without objects)
        """
        index = int(np.count_nonzero(self.scores >= threshold)) - 1
        if index < 0:
            nothing = 0.0 if self.num_objects else float("nan")
            return {"precision": float("nan"), "recall": nothing, "f1": nothing}
        return {
            "precision": float(self.precision[index]),
            "recall": float(self.recall[index]),
            "f1": float(self.f1[index]),
        }

    def recall_at(self, false_positives_per_image: float) -> float:
        """Return the highest recall at no more false positives than that; NaN without objects."""
        if not self.num_objects:
            return float("nan")
        allowed = self.false_positives <= false_positives_per_image * self.num_images
        return float(self.recall[allowed].max(initial=0.0))


def score_curve(
    matches: Matches, label: int | None = None, images: np.ndarray | None = None
) -> ScoreCurve:
    """Return the curve of one class, or of all classes at one threshold.

    Args:
        matches: of all detections
        label: index of a class; by default all detections and objects
        images: whether each image counts, (N,); by default all
    """
    data = matches.data
    counted, objects = ~matches.is_ignored, ~data.gt_is_crowd
    if label is not None:
        counted = counted & (data.dt_classes == label)
        objects = objects & (data.gt_classes == label)
    if images is not None:
        counted, objects = counted & images[data.dt_images], objects & images[data.gt_images]
    order = np.argsort(-data.scores[counted], kind="stable")
    scores = data.scores[counted][order]
    is_right = matches.is_right[counted][order]
    # Index of the last detection of each score.
    last = np.flatnonzero(np.diff(scores, append=-np.inf))
    true_positives = np.cumsum(is_right)[last]
    num_images = len(data.image_ids) if images is None else int(images.sum())
    return ScoreCurve(
        scores[last], true_positives, last + 1 - true_positives, int(objects.sum()), num_images
    )


def score_curves(matches: Matches, images: np.ndarray | None = None) -> list[ScoreCurve]:
    """Return the curve of each class; ``images`` as for :func:`score_curve`."""
    return [score_curve(matches, label, images) for label in range(len(matches.data.class_names))]
