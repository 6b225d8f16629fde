"""COCO's AP and AR by hotcoco, whose arrays are those of pycocotools bit for bit.

No other module imports hotcoco.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import hotcoco
import numpy as np

from retinanet_ext.evaluation.box_data import BoxData

COCO_MAX_DETECTIONS = 100
"""Maximum number of detections per image and class that COCO's AP counts, by score."""

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
AREAS = ("all", "small", "medium", "large")
"""COCO's sizes: small below 32 x 32 pixels, large from 96 x 96."""


@dataclass(frozen=True)
class PrecisionRecall:
    """What pycocotools' ``accumulate`` returns; -1 where a class has no object of that size.

    Attributes:
        precision: at each IoU threshold, recall, class, area and maximum number of detections,
            (10, 101, K, 4, 3)
        recall: the highest, (10, K, 4, 3)
        scores: at each recall, shaped as ``precision``
    """

    precision: np.ndarray
    recall: np.ndarray
    scores: np.ndarray

    def ap(self, *, iou: float | None = None, area: str = "all", label: int | None = None) -> float:
        """Return average precision in [0, 1], NaN without objects.

        Args:
            iou: 0.5, 0.55, ... or 0.95; by default the mean over all
            area: one of ``AREAS``
            label: index of a class; by default the mean over all
        """
        chosen = self.precision[..., AREAS.index(area), -1]
        if iou is not None:
            chosen = chosen[np.isclose(IOU_THRESHOLDS, iou)]
        if label is not None:
            chosen = chosen[:, :, label]
        chosen = chosen[chosen > -1]
        return float(np.mean(chosen)) if chosen.size else float("nan")


def precision_recall(
    data: BoxData, max_detections: Sequence[int] = (1, 10, COCO_MAX_DETECTIONS)
) -> PrecisionRecall:
    """Return precision and recall over COCO's IoU thresholds, sizes and numbers of detections.

    Args:
        data: ground truth and detections
        max_detections: three maximum numbers per image and class, ascending; AP is of the last
    """
    evaluator = _match(data, max_detections)
    evaluator.accumulate()
    arrays = evaluator.eval
    return PrecisionRecall(arrays["precision"], arrays["recall"], arrays["scores"])


def image_matches(
    data: BoxData, max_detections: int = COCO_MAX_DETECTIONS
) -> list[list[list[dict[str, Any]]]]:
    """Return the matches of each image as pycocotools' ``COCOeval.evalImgs`` has them.

    Args:
        data: ground truth and detections
        max_detections: per image and class

    Returns:
        per class and size of :data:`AREAS`, an entry per image that has objects or detections of
        the class; its ``image_id`` is the index of the image, and they ascend
    """
    evaluator = _match(data, [max_detections])
    sizes = [list(area_range) for area_range in evaluator.params.area_rng]
    cells: list[list[list[dict[str, Any]]]] = [[[] for _ in sizes] for _ in data.class_names]
    for each in evaluator.eval_imgs:
        if each is not None:
            cells[each["category_id"]][sizes.index(each["aRng"])].append(each)
    return cells


def _match(data: BoxData, max_detections: Sequence[int]) -> hotcoco.COCOeval:
    """Return hotcoco's evaluation after the matching."""
    truth = hotcoco.COCO.from_arrays(
        [{"id": i, "file_name": "", "width": 0, "height": 0} for i in range(len(data.image_ids))],
        [{"id": label, "name": str(label)} for label in range(len(data.class_names))],
        data.gt_images,
        data.gt_classes,
        data.gt_boxes,
        area=data.gt_areas,
        iscrowd=data.gt_is_crowd,
    )
    columns = (data.dt_images, data.dt_boxes, data.scores, data.dt_classes)
    found = truth.load_res(np.column_stack(columns))
    evaluator = hotcoco.COCOeval(truth, found, "bbox")
    evaluator.params.max_dets = list(max_detections)
    evaluator.evaluate()
    return evaluator


def average_precision(is_right: np.ndarray, num_objects: int) -> float:
    """Return COCO's AP at one IoU threshold, of detections that are sorted by score.

    Args:
        is_right: whether each detection is a true positive, (D,) of bool
        num_objects: number of objects, above 0
    """
    ranks = np.arange(len(is_right), 0, -1.0)
    return float(hotcoco.metrics.average_precision(ranks, is_right, int(num_objects)))


def calibration(
    scores: np.ndarray, is_right: np.ndarray, num_bins: int = 10
) -> tuple[list[dict[str, float]], float]:
    """Return how often detections of a score are right.

    Args:
        scores: in [0, 1], (D,)
        is_right: whether each detection is a true positive, (D,) of bool
        num_bins: number of bins of equal width

    Returns:
        per bin ``bin_lower``, ``bin_upper``, ``avg_confidence``, ``avg_accuracy`` and ``count``;
        and the expected calibration error, the mean over detections of the difference between the
        two averages of their bin, NaN without detections (arXiv 1706.04599, section 2)
    """
    if not len(scores):
        return [], float("nan")
    bins = hotcoco.metrics.calibration_curve(scores, is_right, num_bins)
    return bins, float(hotcoco.metrics.calibration_error(scores, is_right, num_bins)[0])
