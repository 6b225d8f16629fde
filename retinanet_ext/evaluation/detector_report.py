"""All figures of an evaluation as one dict, which becomes its JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from retinanet_ext.evaluation.box_data import BoxData
from retinanet_ext.evaluation.detection_matches import (
    ERROR_KINDS,
    NO_ERROR,
    Matches,
    error_costs,
    error_kinds,
    match_detections,
)
from retinanet_ext.evaluation.detection_metrics import (
    COCO_MAX_DETECTIONS,
    PrecisionRecall,
    calibration,
    precision_recall,
)
from retinanet_ext.evaluation.error_examples import confusion_matrix, label_doubts, worst_images
from retinanet_ext.evaluation.score_curves import FROC_RATES, ScoreCurve, score_curve, score_curves
from retinanet_ext.evaluation.threshold_choice import Criterion, choose_thresholds

Report = Mapping[str, Any]

NUM_WORST = 6
NUM_DOUBTS = 20

AP_NAMES = {
    "AP": {},
    "AP50": {"iou": 0.5},
    "AP75": {"iou": 0.75},
    "APs": {"area": "small"},
    "APm": {"area": "medium"},
    "APl": {"area": "large"},
}


def evaluate_detections(
    data: BoxData, criterion: Criterion, max_detections: int = COCO_MAX_DETECTIONS
) -> tuple[Matches, dict[str, Any]]:
    """Return the matches of an evaluation and its figures, AP in percent and the others in [0, 1].

    Args:
        data: ground truth and detections
        criterion: what the threshold of each class is chosen for
        max_detections: per image and class

    Raises:
        InputError: there are no objects
    """
    data.require_objects()
    arrays = precision_recall(data, (1, 10, max_detections))
    matches = match_detections(data, max_detections)
    kinds, is_missed = error_kinds(matches)
    ap50, costs = error_costs(matches, kinds, is_missed)
    chosen = choose_thresholds(matches, criterion)
    thresholds = [each["threshold"] for each in chosen]
    counted = ~matches.is_ignored
    bins, error = calibration(data.scores[counted], matches.is_right[counted])
    found = [int(np.count_nonzero(kinds == kind)) for kind in range(len(ERROR_KINDS))]
    counts = dict(zip(ERROR_KINDS, found, strict=True)) | {"missed": int(is_missed.sum())}
    return matches, {
        "num_images": len(data.image_ids),
        "num_objects": int(data.num_objects.sum()),
        "num_detections": len(data.scores),
        "max_detections": max_detections,
        "criterion": str(criterion),
        "measure": criterion.what,
        "metrics": _metrics(arrays) | _recalls(arrays, max_detections),
        "classes": _classes(matches, arrays, chosen, kinds, is_missed),
        "confusion": confusion_matrix(matches, thresholds).tolist(),
        "errors": {k: {"count": n, "cost": 100 * costs[k]} for k, n in counts.items()},
        "AP50_of_errors": 100 * ap50,
        "calibration": {"error": error, "bins": bins},
        "froc": _froc(score_curve(matches)),
        "worst_images": worst_images(matches, thresholds, NUM_WORST),
        "label_doubts": {
            name: [_describe(data, each) for each in found]
            for name, found in label_doubts(matches, NUM_DOUBTS).items()
        },
    }


def _metrics(arrays: PrecisionRecall, label: int | None = None) -> dict[str, float]:
    return {name: 100 * arrays.ap(label=label, **which) for name, which in AP_NAMES.items()}


def _recalls(arrays: PrecisionRecall, max_detections: int) -> dict[str, float]:
    recalls = {}
    for index, number in enumerate((1, 10, max_detections)):
        values = arrays.recall[:, :, 0, index]
        recalls[f"AR{number}"] = 100 * float(np.mean(values[values > -1]))
    return recalls


def _classes(
    matches: Matches,
    arrays: PrecisionRecall,
    chosen: Sequence[dict[str, Any]],
    kinds: np.ndarray,
    is_missed: np.ndarray,
) -> list[dict[str, Any]]:
    """Return the figures of each class."""
    data = matches.data
    classes = []
    for label, curve in enumerate(score_curves(matches)):
        of_class = data.dt_classes == label
        counted = of_class & ~matches.is_ignored
        bins, error = calibration(data.scores[counted], matches.is_right[counted])
        errors = np.bincount(kinds[of_class & (kinds != NO_ERROR)], minlength=len(ERROR_KINDS))
        errors[-1] = np.count_nonzero(is_missed & (data.gt_classes == label))
        precision = arrays.precision[0, :, label, 0, -1]
        classes.append(
            {
                "name": data.class_names[label],
                "objects": int(data.num_objects[label]),
                "detections": int(of_class.sum()),
                **_metrics(arrays, label),
                "threshold": chosen[label],
                "errors": dict(zip(ERROR_KINDS, errors.tolist(), strict=True)),
                "calibration": {"error": error, "bins": bins},
                "froc": _froc(curve),
                # At recall 0, .01, ... 1, and at thresholds 0, .01, ... 1.
                "precision_at_recall": [] if precision[0] < 0 else precision.tolist(),
                "at_threshold": _at_thresholds(curve),
            }
        )
    return classes


def _at_thresholds(curve: ScoreCurve) -> dict[str, list[float]]:
    numbers = [curve.at(threshold) for threshold in np.linspace(0, 1, 101)]
    return {name: [each[name] for each in numbers] for name in ("precision", "recall", "f1")}


def _froc(curve: ScoreCurve) -> dict[str, float]:
    return {f"{rate:g}": curve.recall_at(rate) for rate in FROC_RATES}


def _describe(data: BoxData, doubt: dict[str, int]) -> dict[str, Any]:
    """Return what a person looks up of a doubtful label."""
    dt, gt = doubt["dt"], doubt["gt"]
    image = data.dt_images[dt] if dt >= 0 else data.gt_images[gt]
    found: dict[str, Any] = {"image_id": data.image_ids[image]}
    if gt >= 0:
        found |= {
            "annotation_id": data.gt_ids[gt],
            "label": data.class_names[data.gt_classes[gt]],
            "bbox": data.gt_boxes[gt].tolist(),
        }
    if dt >= 0:
        found |= {
            "detected": data.class_names[data.dt_classes[dt]],
            "score": float(data.scores[dt]),
            "detected_bbox": data.dt_boxes[dt].tolist(),
        }
    return found | doubt
