"""COCO's AP of images that count several times or not at all, from one matching per image.

COCO's evaluation matches detections to objects image by image, so that a resampled set of images
needs no new matching: each image's detections count as often as the image was drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retinanet_ext.evaluation.box_data import BoxData
from retinanet_ext.evaluation.detection_metrics import (
    COCO_MAX_DETECTIONS,
    IOU_THRESHOLDS,
    image_matches,
)

RECALLS = np.linspace(0, 1, 101)
"""The recalls at which COCO averages precision."""

BLOCK = 1 << 20  # (detection, resample) pairs at a time: 8 MB per array


@dataclass(frozen=True, eq=False)
class Matching:
    """Detections of one class and range of area, in descending order of score, and their matches.

    D detections, T IoU thresholds, I images. Detections that count at no threshold are left out.

    Attributes:
        image: index of the image per detection, (D,)
        is_true: whether the detection is matched to an object that counts, (T, D)
        is_ignored: whether the detection counts neither as true nor as false, (T, D)
        num_objects: objects that count, per image, (I,)
    """

    image: NDArray[np.int64]
    is_true: NDArray[np.bool_]
    is_ignored: NDArray[np.bool_]
    num_objects: NDArray[np.int64]

    @classmethod
    def join(cls, matches: Sequence[Mapping[str, Any]], num_images: int) -> Matching:
        """Join the matches of images, from ``image_matches``, of one class and range of area."""
        num_objects = np.zeros(num_images, np.int64)
        for each in matches:
            num_objects[each["image_id"]] = len(each["gtIgnore"]) - sum(each["gtIgnore"])
        scores = np.concatenate([np.empty(0), *(each["dtScores"] for each in matches)])
        order = np.argsort(-scores, kind="stable")
        images = [each["image_id"] for each in matches for _ in each["dtScores"]]
        image = np.array(images, np.int64)[order]
        none = np.empty((len(IOU_THRESHOLDS), 0))
        matched, ignored = (
            np.concatenate([none, *(each[key] for each in matches)], axis=1)[:, order] > 0
            for key in ("dtMatched", "dtIgnore")
        )
        counts = ~ignored.all(axis=0)
        return cls(
            image[counts],
            (matched & ~ignored)[:, counts],
            ignored[:, counts],
            num_objects,
        )

    def select(self, images: NDArray[np.int64]) -> Matching:
        """Return the matching of some of the images, which are numbered anew in this order."""
        index = np.full(len(self.num_objects), -1)
        index[images] = np.arange(len(images))
        image = index[self.image]
        kept = image >= 0
        return Matching(
            image[kept], self.is_true[:, kept], self.is_ignored[:, kept], self.num_objects[images]
        )

    def average_precision(self, weights: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return AP per IoU threshold for images that count ``weights`` times.

        It equals COCO's AP of a data set that holds each image as many times. Only copies of an
        image whose detections have equal scores may differ, because COCO's AP depends on their
        order.

        Args:
            weights: times that an image counts, (I, B) for B sets of weights

        Returns:
            AP in [0, 1], (T, B); NaN where no object counts
        """
        size = max(1, BLOCK // max(len(self.image), 1))
        starts = range(0, weights.shape[1], size)
        blocks = [self._average_precision(weights[:, start : start + size]) for start in starts]
        return np.concatenate(blocks, axis=1)

    def _average_precision(self, weights: NDArray[np.int64]) -> NDArray[np.float64]:
        objects = self.num_objects @ weights
        of_detections = weights.astype(np.int32)[self.image]
        seen = np.cumsum(of_detections, axis=0, dtype=np.int32)
        ap = np.full((len(self.is_true), weights.shape[1]), np.nan)
        for iou, (is_true, is_ignored) in enumerate(
            zip(self.is_true, self.is_ignored, strict=True)
        ):
            true, ignored = np.flatnonzero(is_true), np.flatnonzero(is_ignored)
            found = np.cumsum(of_detections[true], axis=0, dtype=np.int32)
            counted = seen[true]
            if len(ignored):
                skipped = np.cumsum(of_detections[ignored], axis=0, dtype=np.int32)
                skipped = np.concatenate([np.zeros_like(skipped[:1]), skipped])
                counted -= skipped[np.searchsorted(ignored, true)]
            ap[iou] = _integrate(found, counted, objects)
        ap[:, objects == 0] = np.nan
        return ap

    def image_ap(self) -> NDArray[np.float64]:
        """Return AP per IoU threshold of each image by itself, (T, I); NaN without objects."""
        ap = np.full((len(self.is_true), len(self.num_objects)), np.nan)
        order = np.argsort(self.image, kind="stable")  # by image, then by score
        is_true, is_counted = self.is_true[:, order].T, ~self.is_ignored[:, order].T
        images = np.flatnonzero(self.num_objects)
        bounds = np.searchsorted(self.image[order], [images, images + 1]).T
        for image, (start, stop) in zip(images, bounds, strict=True):
            found = np.cumsum(is_true[start:stop], axis=0)
            counted = np.cumsum(is_counted[start:stop], axis=0)
            ap[:, image] = _integrate(found, counted, self.num_objects[image])
        return ap


def _integrate(
    found: NDArray[np.int64], counted: NDArray[np.int64], objects: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return the mean of COCO's precisions at 101 recalls.

    Args:
        found: number of true detections down to each rank, (P, B). Ranks of other detections may
            be left out, because only true ones raise the recall.
        counted: the same of all detections that count, (P, B)
        objects: number of objects, (B,)
    """
    precision = found / (counted + np.spacing(1))
    precision = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
    # Each rank's precision is taken for the recalls that the rank is the first to reach.
    reached = np.searchsorted(RECALLS, found / np.maximum(objects, 1), side="right")
    first = np.diff(reached, axis=0, prepend=0)
    return (precision * first).sum(axis=0) / len(RECALLS)


@dataclass(frozen=True, eq=False)
class Matchings:
    """The matches of one detector on a data set, per class and range of area.

    Attributes:
        image_ids: ids of the I images, in the order of the matchings
        cells: K lists of a matching per size of
            :data:`~retinanet_ext.evaluation.detection_metrics.AREAS`
    """

    image_ids: Sequence[int | str]
    cells: Sequence[Sequence[Matching]]

    @classmethod
    def compute(cls, data: BoxData, max_detections: int = COCO_MAX_DETECTIONS) -> Matchings:
        """Match detections to objects as COCO's evaluation does.

        Args:
            data: ground truth and detections
            max_detections: maximum number of detections per image and class, by score
        """
        num_images = len(data.image_ids)
        cells = [
            [Matching.join(of_size, num_images) for of_size in of_class]
            for of_class in image_matches(data, max_detections)
        ]
        return cls(data.image_ids, cells)

    def select(self, images: NDArray[np.int64]) -> Matchings:
        """Return the matches of some of the images, which are numbered anew in this order."""
        cells = [[matching.select(images) for matching in row] for row in self.cells]
        return Matchings([self.image_ids[index] for index in images], cells)

    @property
    def num_objects(self) -> NDArray[np.int64]:
        """Return the number of objects that count, (K, 4, I)."""
        return np.array([[matching.num_objects for matching in row] for row in self.cells])

    def average_precision(self, weights: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return AP in [0, 1] for images that count ``weights`` times, an (I, B) array.

        Returns:
            (T, K, 4, B); NaN where no object counts
        """
        ap = np.array([[cell.average_precision(weights) for cell in row] for row in self.cells])
        return np.moveaxis(ap, 2, 0)

    def image_ap(self) -> NDArray[np.float64]:
        """Return the AP of each image by itself, (I,) in [0, 1]; NaN for images without objects.

        As COCO's AP it is the mean over the classes that the image has objects of, so that false
        positives of other classes do not lower it.
        """
        ap = np.stack([matching.image_ap() for matching, *_ in self.cells])
        return mean_of_defined(ap, axis=(0, 1))


def mean_of_defined(
    values: NDArray[np.float64], axis: int | tuple[int, ...]
) -> NDArray[np.float64]:
    """Return the mean of the values that are not NaN; NaN where there are none."""
    defined = ~np.isnan(values)
    count = defined.sum(axis=axis)
    total = np.where(defined, values, 0).sum(axis=axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
