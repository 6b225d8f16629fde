"""Confusion of classes, the images with the most errors, and boxes that may be labelled wrongly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from retinanet_ext.evaluation.box_data import BoxData
from retinanet_ext.evaluation.detection_matches import (
    BACKGROUND_IOU,
    FOREGROUND_IOU,
    Matches,
)

CONFIDENT = 0.5
"""Lowest score of a detection that makes a label doubtful."""

DISAGREEMENT_IOU = 0.7
"""Lowest IoU of a detection and an object of different classes that makes the label doubtful."""

LABEL_DOUBTS = {
    "unlabelled": "a confident detection with IoU of at most .1 to any object",
    "unfound": "an object that no detection of any class and score has IoU .5 with",
    "class": "a confident detection of another class with IoU of at least .7 to an object",
}


def is_counted(data: BoxData, thresholds: Sequence[float]) -> np.ndarray:
    """Return whether each detection reaches the threshold of its class, (D,)."""
    return data.scores >= np.asarray(thresholds, float)[data.dt_classes]


def confusion_matrix(matches: Matches, thresholds: Sequence[float]) -> np.ndarray:
    """Return the number of objects of each class that detections of each class are on.

    A detection that finds no object of its class counts for the object of another class that it
    overlaps most, at IoU 0.5 or more, if nothing of a higher score has found it; otherwise it is on
    the background. Ignored detections do not count.

    Args:
        matches: of all detections
        thresholds: lowest score that counts, per class

    Returns:
        (K + 1, K + 1); rows are the objects' classes and columns the detections', the last of both
        is the background. A row sums to the number of objects, a column to that of detections.
    """
    data, background = matches.data, len(matches.data.class_names)
    counted = is_counted(data, thresholds) & ~matches.is_ignored
    matrix = np.zeros((background + 1, background + 1), np.int64)
    right = counted & matches.is_right
    found = np.zeros(len(data.gt_images), bool)
    found[matches.gt_of_dt[right]] = True
    np.add.at(matrix, (data.dt_classes[right],) * 2, 1)
    wrong = np.flatnonzero(counted & ~matches.is_right)
    wrong = wrong[np.argsort(-data.scores[wrong], kind="stable")]
    on_other = (matches.other_iou[wrong] >= FOREGROUND_IOU) & ~found[matches.other_gt[wrong]]
    objects, first = np.unique(matches.other_gt[wrong[on_other]], return_index=True)
    confused = wrong[on_other][first]
    found[objects] = True
    np.add.at(matrix, (data.gt_classes[objects], data.dt_classes[confused]), 1)
    alone = np.setdiff1d(wrong, confused)
    np.add.at(matrix[background], data.dt_classes[alone], 1)
    lost = data.gt_classes[~found & ~data.gt_is_crowd]
    np.add.at(matrix[:, background], lost, 1)
    return matrix


def worst_images(
    matches: Matches, thresholds: Sequence[float], number: int
) -> list[dict[str, Any]]:
    """Return the images with the lowest F1 at the thresholds; of equal ones, the most errors first.

    Returns:
        per image its ``index``, ``image_id``, ``found``, ``false_positives``, ``missed`` and ``f1``
    """
    data = matches.data
    counted = is_counted(data, thresholds)

    def count(indices: np.ndarray) -> np.ndarray:
        return np.bincount(indices, minlength=len(data.image_ids))

    found = count(data.dt_images[counted & matches.is_right])
    wrong = count(data.dt_images[counted & matches.is_wrong])
    missed = count(data.gt_images[~data.gt_is_crowd]) - found
    errors = wrong + missed
    f1 = 2 * found / np.maximum(2 * found + errors, 1)
    order = np.lexsort((-errors, f1))
    order = order[errors[order] > 0][:number]
    return [
        {
            "index": int(index),
            "image_id": data.image_ids[index],
            "found": int(found[index]),
            "false_positives": int(wrong[index]),
            "missed": int(missed[index]),
            "f1": float(f1[index]),
        }
        for index in order
    ]


def label_doubts(matches: Matches, number: int) -> dict[str, list[dict[str, Any]]]:
    """Return candidates for label errors, the most doubtful first.

    Returns:
        for each of ``LABEL_DOUBTS`` at most ``number`` records with the index ``dt`` of a
        detection or ``gt`` of an object, -1 for none
    """
    data = matches.data
    any_iou = np.maximum(matches.own_iou, matches.other_iou)
    confident = matches.is_wrong & (data.scores >= CONFIDENT)
    alone = confident & (any_iou <= BACKGROUND_IOU) & (matches.in_crowd < FOREGROUND_IOU)
    unlabelled = np.flatnonzero(alone)
    unlabelled = unlabelled[np.argsort(-data.scores[unlabelled], kind="stable")]
    unfound = np.flatnonzero((matches.gt_iou < FOREGROUND_IOU) & ~data.gt_is_crowd)
    unfound = unfound[np.argsort(matches.gt_iou[unfound], kind="stable")]
    finder = matches.dt_of_gt[matches.other_gt]
    own_score = np.where(finder >= 0, data.scores[finder], -1.0)
    differs = confident & (matches.other_iou >= DISAGREEMENT_IOU) & (own_score < data.scores)
    other = np.flatnonzero(differs)
    other = other[np.argsort(-data.scores[other], kind="stable")]
    return {
        "unlabelled": [{"dt": int(dt), "gt": -1} for dt in unlabelled[:number]],
        "unfound": [{"dt": -1, "gt": int(gt)} for gt in unfound[:number]],
        "class": [{"dt": int(dt), "gt": int(matches.other_gt[dt])} for dt in other[:number]],
    }
