"""The check of annotations: fields, boxes, references, and boxes that are labelled twice."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from retinanet_ext.data.box_format import BOX_FORMATS, find_format_fault, format_box, is_box
from retinanet_ext.data.coco_json import id_order, is_ignore_region, join_some, printable
from retinanet_ext.data.entries import annotation_name, describe_fault, field_faults, id_of
from retinanet_ext.data.findings import SAME_IOU, ValidationResult
from retinanet_ext.data.image_files import Images
from retinanet_ext.data.normalize import Normalized, normalize_annotations

MIN_SIDE = 0.01
"""Pixels; a narrower box has no area after the resize in float32."""

_Entries = Sequence[tuple[int, dict[str, Any]]]
"""Annotations with their indices in the json."""

_Faults = Iterable[tuple[int, str]]
"""Index of an annotation, and what is wrong with it."""


def check_annotations(
    content: dict[str, Any],
    images: Images,
    listed_ids: Collection[int | str | None],
    box_format: str,
    result: ValidationResult,
) -> list[dict[str, Any]]:
    """Return the annotations of usable images that the policy keeps, with boxes in COCO's format.

    Args:
        content: of the json, with usable categories and unchecked annotations; not modified.
        images: usable images.
        listed_ids: ids of all images of the json.
        box_format: a name in ``BOX_FORMATS``.
        result: gets the findings and notes.
    """
    normalized = normalize_annotations(content["annotations"], images, box_format)
    annotations, dropped = normalized.annotations, set[int]()
    result.notes.extend(normalized.notes)

    def name(index: int) -> str:
        return annotation_name(index, annotations[index], images)

    def add(kind: str, faults: _Faults) -> None:
        for index, fault in faults:
            ids = {
                "image_id": id_of(annotations[index], "image_id"),
                "annotation_id": id_of(annotations[index]),
            }
            if not result.add(kind, f"{name(index)}: {fault}", **ids):
                dropped.add(index)

    def unknown(field: str, known: Collection[Any], what: str) -> _Faults:
        values = ((i, a[field]) for i, a in rest if a[field] not in known)
        return ((i, f"{field} {printable(value)} is not {what}") for i, value in values)

    malformed = field_faults("annotations", annotations)
    rest = [(i, a) for i, a in enumerate(annotations) if i not in malformed]
    category_ids = {category["id"] for category in content["categories"]}
    ids = join_some(map(printable, sorted(category_ids, key=id_order)))
    derived = ((i, mask) for i, mask in normalized.derived.items() if i not in malformed)
    add("malformed_annotation", malformed.items())
    add("duplicate_annotation_id", _repeated_ids(rest))
    add("unknown_image", unknown("image_id", listed_ids, "among the images"))
    add("unknown_class", unknown("category_id", category_ids, f"a category ({ids})"))
    add("malformed_box", _missing_boxes(rest, normalized, box_format))
    add("derived_box", ((i, f"bbox is missing and taken from its {mask}") for i, mask in derived))
    format_fault = find_format_fault(normalized.boxes, box_format, name)
    # Boxes of another format are no boxes to look at more closely.
    if format_fault is None or result.add("other_box_format", format_fault):
        for index, kind, fault in _box_faults(normalized, box_format):
            if index not in malformed:
                add(kind, [(index, fault)])
    for flag, kind in (("iscrowd", "crowd"), ("ignore", "ignore")):
        add(kind, [(i, f"{flag} is 1") for i, a in rest if a.get(flag)])
    kept = [a for i, a in rest if i not in dropped and a["image_id"] in images]
    if result.policy["crowd"] == "object":
        kept = [{**a, "iscrowd": 0} if a.get("iscrowd") else a for a in kept]
    return kept


def _missing_boxes(entries: _Entries, normalized: Normalized, box_format: str) -> _Faults:
    """Yield the annotations without a box of four finite numbers."""
    valid = set(normalized.boxes.indices)
    for index, annotation in entries:
        if index not in valid and not is_box(annotation.get("bbox")):
            allowed = f"4 finite numbers {BOX_FORMATS[box_format]}"
            if not annotation.get("bbox"):
                allowed += ", or a polygon or mask must be there to take it from"
            yield index, describe_fault(annotation, "bbox", allowed)


def _repeated_ids(entries: _Entries) -> _Faults:
    """Yield the annotations whose id occurred before."""
    seen: set[int | str] = set()
    for index, annotation in entries:
        own_id = annotation.get("id")
        if own_id in seen:
            yield index, "the id is used before"
        if own_id is not None:
            seen.add(own_id)


def _box_faults(normalized: Normalized, box_format: str) -> Iterator[tuple[int, str, str]]:
    """Yield (index of the annotation, kind, what is wrong) of boxes of four finite numbers."""
    boxes = normalized.boxes
    origins = {index: f", taken from its {mask}," for index, mask in normalized.derived.items()}
    converted = "" if box_format == "xywh" else f", converted from {box_format},"
    with np.errstate(over="ignore", invalid="ignore"):  # numbers near the largest float
        low, high = np.hsplit(boxes.to_corners(box_format), 2)
        sides = boxes.numbers[:, 2:] if box_format == "xywh" else high - low
        inside = np.minimum(high, boxes.sizes) - np.maximum(low, 0)
        beyond = (low < -1) | (high > boxes.sizes + 1)  # a pixel may be rounding
    rules = (  # of several faults, the first is named
        ("inverted_box", sides < 0, " must have width and height >= 0"),
        ("zero_area_box", sides < MIN_SIDE, " has no area"),
        ("outside_box", inside < MIN_SIDE, " is outside its image of {} x {}"),
        ("clipped_box", beyond, " reaches outside its image of {} x {}"),
    )
    first = np.select([mask.any(1) for _, mask, _ in rules], range(len(rules)), -1)
    for row in np.flatnonzero(first >= 0).tolist():
        kind, _, text = rules[first[row]]
        index = boxes.indices[row]
        box = format_box(normalized.annotations[index]["bbox"])
        fault = f"bbox {box}{origins.get(index, converted)}{text}"
        yield index, kind, fault.format(*boxes.sizes[row].astype(int))


def find_duplicate_boxes(annotations: Sequence[dict[str, Any]]) -> dict[int, tuple[int, float]]:
    """Find boxes that overlap an earlier box of the same image and class by more than SAME_IOU.

    Returns:
        index of the later annotation -> (index of the earlier one, IoU of the two)
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
