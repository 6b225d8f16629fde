"""Which detection finds which object at one IoU, and what is wrong with the other detections."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from pycocotools import mask

from retinanet_ext.evaluation.box_data import BoxData
from retinanet_ext.evaluation.detection_metrics import COCO_MAX_DETECTIONS, average_precision

FOREGROUND_IOU = 0.5
BACKGROUND_IOU = 0.1

ERROR_KINDS = {
    "classification": "on an object of another class",
    "localisation": "of the right class, with IoU between .1 and .5",
    "both": "on no object of its class, with IoU between .1 and .5 to another",
    "duplicate": "on an object that a detection of higher score has found",
    "background": "with IoU of at most .1 to any object",
    "missed": "an object that no detection finds, even if its class or box were put right",
}
"""The kinds of TIDE (arXiv 2008.08115, section 2.2). The first five are of detections."""

NO_ERROR = -1


@dataclass(frozen=True)
class Matches:
    """Detections matched with objects of their class at IoU 0.5, as COCO's evaluation does.

    Attributes:
        data: M ground-truth boxes and D detections
        gt_of_dt: index of the object that a detection finds, -1 for none, (D,)
        is_ignored: whether a detection counts neither as right nor as wrong, (D,): it is on a crowd
            region of its class, or beyond the maximum number per image and class
        own_gt: object of the detection's class with the highest IoU, (D,)
        own_iou: its IoU, 0 where the image has none, (D,)
        other_gt: object of another class with the highest IoU, (D,)
        other_iou: its IoU, 0 where the image has none, (D,)
        in_crowd: largest share of the detection's area in a crowd region of any class, (D,)
        dt_of_gt: index of the detection that finds an object, -1 for none, (M,)
        gt_iou: highest IoU with a detection of any class and score, (M,)
    """

    data: BoxData
    gt_of_dt: np.ndarray
    is_ignored: np.ndarray
    own_gt: np.ndarray
    own_iou: np.ndarray
    other_gt: np.ndarray
    other_iou: np.ndarray
    in_crowd: np.ndarray
    dt_of_gt: np.ndarray
    gt_iou: np.ndarray

    @property
    def is_right(self) -> np.ndarray:
        """Whether a detection finds an object, (D,)."""
        return self.gt_of_dt >= 0

    @property
    def is_wrong(self) -> np.ndarray:
        """Whether a detection is a false positive, (D,)."""
        return (self.gt_of_dt < 0) & ~self.is_ignored


def match_detections(data: BoxData, max_detections: int = COCO_MAX_DETECTIONS) -> Matches:
    """Match detections with objects at IoU 0.5.

    In the order of their scores, each takes the free object of its class with the highest IoU.

    Args:
        data: ground truth and detections
        max_detections: per image and class, by score
    """
    num_dt, num_gt = len(data.scores), len(data.gt_images)
    matches = Matches(
        data=data,
        gt_of_dt=np.full(num_dt, -1),
        is_ignored=_rank(data) >= max_detections,
        own_gt=np.full(num_dt, -1),
        own_iou=np.zeros(num_dt),
        other_gt=np.full(num_dt, -1),
        other_iou=np.zeros(num_dt),
        in_crowd=np.zeros(num_dt),
        dt_of_gt=np.full(num_gt, -1),
        gt_iou=np.zeros(num_gt),
    )
    images = np.arange(len(data.image_ids) + 1)
    dt_bounds = np.searchsorted(data.dt_images, images)
    gt_bounds = np.searchsorted(data.gt_images, images)
    for image in images[:-1]:
        dts = np.arange(dt_bounds[image], dt_bounds[image + 1])
        gts = np.arange(gt_bounds[image], gt_bounds[image + 1])
        if len(dts) and len(gts):
            _match_image(matches, dts, gts)
    return matches


def _match_image(matches: Matches, dts: np.ndarray, gts: np.ndarray) -> None:
    """Fill in the matches of an image's detections and ground truth."""
    data = matches.data
    crowd = data.gt_is_crowd[gts]
    iou = mask.iou(data.dt_boxes[dts], data.gt_boxes[gts], crowd.astype(np.uint8).tolist())
    same = data.dt_classes[dts, None] == data.gt_classes[gts]
    for is_class, nearest, highest in (
        (same, matches.own_gt, matches.own_iou),
        (~same, matches.other_gt, matches.other_iou),
    ):
        chosen = np.where(is_class & ~crowd, iou, 0)
        nearest[dts], highest[dts] = gts[chosen.argmax(1)], chosen.max(1)
    matches.in_crowd[dts] = np.where(crowd, iou, 0).max(1)
    matches.gt_iou[gts] = iou.max(0)
    possible = same & (iou >= FOREGROUND_IOU)
    for row in np.flatnonzero(possible.any(1) & ~matches.is_ignored[dts]):
        free = np.flatnonzero(possible[row] & ~crowd & (matches.dt_of_gt[gts] < 0))
        if len(free):
            # Of equal ones the last, as pycocotools.
            best = free[::-1][iou[row, free[::-1]].argmax()]
            matches.gt_of_dt[dts[row]], matches.dt_of_gt[gts[best]] = gts[best], dts[row]
        elif (possible[row] & crowd).any():
            matches.is_ignored[dts[row]] = True


def _rank(data: BoxData) -> np.ndarray:
    """Return the position of each detection among those of its image and class, by score (D,)."""
    group = data.dt_images * len(data.class_names) + data.dt_classes
    order = np.argsort(group, kind="stable")
    _, starts, counts = np.unique(group[order], return_index=True, return_counts=True)
    rank = np.empty(len(group), np.int64)
    rank[order] = np.arange(len(group)) - np.repeat(starts, counts)
    return rank


def error_kinds(matches: Matches) -> tuple[np.ndarray, np.ndarray]:
    """Return the kind of error of each detection and object.

    Returns:
        index in ``ERROR_KINDS`` of each false positive, ``NO_ERROR`` for other detections, (D,);
        and whether an object is missed, (M,)
    """
    own, other = matches.own_iou, matches.other_iou
    conditions = (
        (own >= BACKGROUND_IOU) & (own < FOREGROUND_IOU),
        other >= FOREGROUND_IOU,
        own >= FOREGROUND_IOU,
        np.maximum(own, other) <= BACKGROUND_IOU,
    )
    names = list(ERROR_KINDS)
    order = ("localisation", "classification", "duplicate", "background")
    kinds = np.select(conditions, list(map(names.index, order)), names.index("both"))
    kinds = np.where(matches.is_wrong, kinds, NO_ERROR)
    is_missed = (matches.dt_of_gt < 0) & ~matches.data.gt_is_crowd
    is_missed[_fixable(matches, kinds)[0]] = False
    return kinds, is_missed


def error_costs(
    matches: Matches, kinds: np.ndarray, is_missed: np.ndarray
) -> tuple[float, dict[str, float]]:
    """Return AP at IoU 0.5, and by how much it rises if one kind of error is put right.

    Localisation and classification errors become true positives if their object is not found yet,
    one per object: that of the highest score. Other wrong detections are removed, and missed
    objects do not count (arXiv 2008.08115, section 2.3).

    Args:
        matches: of D detections and M objects
        kinds: from :func:`error_kinds`
        is_missed: from :func:`error_kinds`
    """
    counted = ~matches.is_ignored
    classes, is_right = matches.data.dt_classes, matches.is_right
    num_objects = matches.data.num_objects
    base = _mean_ap(matches.data, counted, classes, is_right, num_objects)
    costs = {}
    for index, name in enumerate(ERROR_KINDS):
        kept, fixed_classes, fixed_right = counted & (kinds != index), classes, is_right
        fixed_objects = num_objects
        if name == "missed":
            missed = matches.data.gt_classes[is_missed]
            fixed_objects = num_objects - np.bincount(missed, minlength=len(num_objects))
        elif name in ("localisation", "classification"):
            objects, detections = _fixable(matches, kinds)
            of_kind = kinds[detections] == index
            objects, detections = objects[of_kind], detections[of_kind]
            kept, fixed_classes, fixed_right = kept.copy(), classes.copy(), is_right.copy()
            kept[detections] = fixed_right[detections] = True
            fixed_classes[detections] = matches.data.gt_classes[objects]
        fixed = _mean_ap(matches.data, kept, fixed_classes, fixed_right, fixed_objects)
        costs[name] = max(fixed - base, 0.0)
    return base, costs


def _fixable(matches: Matches, kinds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the objects that a better box or class would find, and of each the best detection."""
    names = list(ERROR_KINDS)
    wrong_box, wrong_class = (
        kinds == names.index(name) for name in ("localisation", "classification")
    )
    detections = np.flatnonzero(wrong_box | wrong_class)
    objects = np.where(wrong_box, matches.own_gt, matches.other_gt)[detections]
    is_free = matches.dt_of_gt[objects] < 0
    detections, objects = detections[is_free], objects[is_free]
    by_score = np.argsort(-matches.data.scores[detections], kind="stable")
    objects, first = np.unique(objects[by_score], return_index=True)
    return objects, detections[by_score][first]


def _mean_ap(
    data: BoxData,
    kept: np.ndarray,
    classes: np.ndarray,
    is_right: np.ndarray,
    num_objects: np.ndarray,
) -> float:
    """Return AP at one IoU, the mean over classes that have objects; NaN without one."""
    kept = np.flatnonzero(kept)
    kept = kept[np.argsort(-data.scores[kept], kind="stable")]
    aps = [
        average_precision(is_right[kept[classes[kept] == label]], num_objects[label])
        for label in np.flatnonzero(num_objects)
    ]
    return float(np.mean(aps)) if aps else float("nan")
