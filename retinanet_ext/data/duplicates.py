"""Boxes of one object, labelled twice."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

from retinanet_ext.data.coco_json import is_region_to_ignore, printable

SAME_IOU = 0.9
"""Two boxes of a class that overlap more are one object, labelled twice."""


def check_duplicate_boxes(
    annotations: list[dict[str, Any]],
    images: Mapping[int | str, Mapping[str, Any]],
    found: Callable[..., bool],
) -> list[dict[str, Any]]:
    """Return the annotations without those that repeat an earlier one, where they are not kept.

    Along x the boxes are in order, so only near ones are compared.
    """
    groups: dict[tuple[int | str, int | str], list[dict[str, Any]]] = defaultdict(list)
    for annotation in annotations:
        if not is_region_to_ignore(annotation):
            groups[annotation["image_id"], annotation["category_id"]].append(annotation)
    dropped = set()
    for group in groups.values():
        order = sorted(range(len(group)), key=lambda k: group[k]["bbox"][0])
        again: set[int] = set()
        for position, left in enumerate(order):
            x, _, width, _ = group[left]["bbox"]
            for right in islice(order, position + 1, None):
                # Boxes that overlap so much begin this close.
                if left in again or group[right]["bbox"][0] > x + (1 - SAME_IOU) * width:
                    break
                if right in again or _iou(group[left], group[right]) <= SAME_IOU:
                    continue
                again.add(max(left, right))
                earlier, later = group[min(left, right)], group[max(left, right)]
                image_id = later["image_id"]
                names = " and ".join(
                    printable(a["id"]) if "id" in a else "without id" for a in (earlier, later)
                )
                what = (
                    f"annotations {names} of image {printable(image_id)} "
                    f"({printable(images[image_id]['file_name'])}): bbox {earlier['bbox']} and "
                    f"{later['bbox']}, IoU {_iou(earlier, later):.2f}"
                )
                own_id = later.get("id")
                if not found("duplicate_box", what, image_id=image_id, annotation_id=own_id):
                    dropped.add(id(later))
    return [annotation for annotation in annotations if id(annotation) not in dropped]


def _iou(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Return the IoU of the boxes of two annotations."""
    a, b = one["bbox"], other["bbox"]
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    common = max(width, 0) * max(height, 0)
    return common / (a[2] * a[3] + b[2] * b[3] - common)
