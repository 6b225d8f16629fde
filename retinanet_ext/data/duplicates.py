"""Boxes of one object, labelled twice."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from retinanet_ext.data.coco_json import is_ignore_region
from retinanet_ext.data.findings import SAME_IOU


def find_duplicate_boxes(annotations: Sequence[dict[str, Any]]) -> dict[int, tuple[int, float]]:
    """Find boxes that overlap an earlier box of the same image and class by more than SAME_IOU.

    Args:
        annotations: usable annotations with boxes [x, y, width, height] of positive size.

    Returns:
        index of the later box -> (index of the earlier one, IoU of the two)
    """
    objects = [i for i, a in enumerate(annotations) if not is_ignore_region(a)]
    if len(objects) < 2:
        return {}
    codes: dict[Hashable, int] = {}
    keys = ((annotations[i]["image_id"], annotations[i]["category_id"]) for i in objects)
    groups = np.array([codes.setdefault(key, len(codes)) for key in keys])
    boxes = np.array([annotations[i]["bbox"] for i in objects], float)
    order = np.lexsort((boxes[:, 0], groups))
    groups, boxes = groups[order], boxes[order]
    low, high = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    areas = boxes[:, 2:].prod(1)
    # In a group the boxes are in the order of x, and boxes that overlap so much begin this close.
    reach = low[:, 0] + (1 - SAME_IOU) * boxes[:, 2]
    pairs: list[tuple[int, int, float]] = []
    left, step = np.arange(len(order)), 0
    while len(left):
        step += 1
        left = left[left + step < len(order)]
        right = left + step
        near = (groups[left] == groups[right]) & (low[right, 0] <= reach[left])
        left, right = left[near], right[near]
        sides = np.minimum(high[left], high[right]) - np.maximum(low[left], low[right])
        common = sides.clip(0).prod(1)
        ious = common / (areas[left] + areas[right] - common)
        same = ious > SAME_IOU
        places = order[left[same]].tolist(), order[right[same]].tolist()
        pairs += zip(*places, ious[same].tolist(), strict=True)
    found: dict[int, tuple[int, float]] = {}
    for earlier, later, iou in sorted((min(a, b), max(a, b), iou) for a, b, iou in pairs):
        if objects[earlier] not in found and objects[later] not in found:
            found[objects[later]] = objects[earlier], iou
    return found
