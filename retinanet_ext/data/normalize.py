"""Annotations as tools export them, made into what is checked, trained on and evaluated.

What is missing and has one obvious meaning is filled in, and said; what is given is not changed.
"""

from __future__ import annotations

import json
import math
import shlex
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as mask_util

from retinanet_ext.data.box_format import BoxTable, from_corners, is_box, is_number, is_relative
from retinanet_ext.data.coco_json import join_some, printable

BACKGROUND_NAMES = ("background", "__background__", "_background_", "bg")

# What is taken where a field is null or, as is said of the first two, missing.
_FILLED = {
    "id": "numbered for the evaluation",
    "area": "width x height of the box is taken",
    "iscrowd": "read as 0",
    "ignore": "read as 0",
}
_MAX_NAMES = 20  # of classes in a line to paste
_MAX_MASKS = 100  # looked at, to tell what crowd annotations cover
_MIN_CROWD = 5  # crowd annotations of a class at least, to say that they look like objects

Content = dict[str, Any]
Id = int | str


@dataclass(frozen=True)
class Normalized:
    """Annotations, each in its place, with their boxes in COCO's format.

    Attributes:
        annotations: with bbox [x, y, width, height] in pixels wherever it can be had
        boxes: the boxes as they stood, of images that are known
        derived: place -> what a missing box was taken from
        notes: one sentence for each field that was filled in
    """

    annotations: list[Any]
    boxes: BoxTable
    derived: Mapping[int, str]
    notes: Sequence[str]


def unify_ids(content: Content) -> tuple[Content, list[str]]:
    """Return a json in which an image or category has one id, wherever it is named.

    Ids that are text throughout stay the person's own, which the detections then have too. Where
    some are text and others numbers, or they are named as the other, all become numbers if the
    text is digits, else all become text.

    Returns:
        the json, itself if nothing changes, and a sentence for images and for categories if their
        ids are text.
    """
    notes = []
    for key, field in (("images", "image_id"), ("categories", "category_id")):
        ids = [item.get("id") for item in content[key] if isinstance(item, dict)]
        named = [a.get(field) for a in content["annotations"] if isinstance(a, dict)]
        if str not in {*map(type, ids), *map(type, named)}:
            continue
        texts = [value for value in ids if isinstance(value, str)]
        first = next(value for value in [*texts, *named] if isinstance(value, str))
        numbers = len(texts) < len(ids) and all(map(_is_digits, texts))
        convert = _to_number if numbers else _to_text
        mixed = any(type(convert(value)) is not type(value) for value in [*ids, *named])
        if texts or mixed:
            how = f"all are read as {'numbers' if numbers else 'text'}"
            notes.append(
                f"ids of {key} are text{' in places' if mixed else ''}, such as {first!r}, "
                f"and {how if mixed else 'are used as they are'}"
            )
        if not mixed:
            continue
        content = {
            **content,
            key: _convert(content[key], "id", convert),
            "annotations": _convert(content["annotations"], field, convert),
        }
    return content, notes


def _is_digits(value: Any) -> bool:
    """Tell whether it is the text of an integer, which no other text stands for."""
    return isinstance(value, str) and value.isdecimal() and str(int(value[:18])) == value


def _to_number(value: Any) -> Any:
    return int(value) if _is_digits(value) else value


def _to_text(value: Any) -> Any:
    return str(int(value)) if is_number(value) and value % 1 == 0 else value


def _convert(items: Iterable[Any], field: str, convert: Callable[[Any], Any]) -> list[Any]:
    return [
        {**item, field: convert(item[field])} if isinstance(item, dict) and field in item else item
        for item in items
    ]


def normalize_annotations(
    annotations: Sequence[Any], images: Mapping[Any, Mapping[str, Any]], box_format: str
) -> Normalized:
    """Return annotations with boxes in COCO's format and without fields that are null.

    Args:
        annotations: of a json, whatever they are; not changed
        images: the usable ones by id
        box_format: ``DATASETS.CUSTOM.BOX_FORMAT``
    """
    result = list(annotations)
    filled: Counter[tuple[str, str]] = Counter()
    derived: dict[int, str] = {}
    indices: list[int] = []
    numbers, sizes, areas = array("d"), array("d"), array("d")
    for index, annotation in enumerate(annotations):
        if not isinstance(annotation, dict):
            continue
        if (
            type(annotation.get("id")) is not int
            or "area" not in annotation
            or None in annotation.values()
        ):
            annotation = result[index] = _without_nulls(annotation, filled)
        image_id = annotation.get("image_id")
        image = images.get(image_id) if isinstance(image_id, int | float | str) else None
        box = annotation.get("bbox")
        if not box or box == [0, 0, 0, 0]:
            corners, source = _corners_of_mask(annotation.get("segmentation"), image, box_format)
            if corners:
                derived[index] = source
                box = from_corners(corners, box_format)
                annotation = result[index] = {**annotation, "bbox": box}
        if image and is_box(box):
            indices.append(index)
            numbers.extend(box)
            sizes.extend((image["width"], image["height"]))
            area = annotation.get("area")
            areas.append(area if is_number(area) else math.nan)
    boxes = BoxTable(
        indices,
        np.array(numbers).reshape(-1, 4),
        np.array(sizes).reshape(-1, 2),
        np.array(areas),
    )
    notes = [
        f"{field} is {lack} in {_annotations(count)} ({_FILLED[field]})"
        for (field, lack), count in filled.items()
    ]
    if box_format != "xywh":
        notes += _convert_boxes(result, boxes, box_format)
    return Normalized(result, boxes, derived, notes)


def _without_nulls(annotation: dict[str, Any], filled: Counter[tuple[str, str]]) -> dict[str, Any]:
    """Return an annotation without fields that are null, and count them and those missing."""
    nulls = [field for field in _FILLED if annotation.get(field, 0) is None]
    filled.update((field, "null") for field in nulls)
    filled.update((field, "missing") for field in ("id", "area") if field not in annotation)
    if isinstance(annotation.get("id"), str):
        filled["id", "text"] += 1
    return {k: v for k, v in annotation.items() if k not in nulls} if nulls else annotation


def _convert_boxes(annotations: list[Any], boxes: BoxTable, box_format: str) -> list[str]:
    """Put boxes in COCO's format in place of others, and say how many areas do not fit them.

    An area that is that of a mask in the box is kept; one that was computed from the numbers as
    if they were COCO's is not.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # numbers near the largest float
        corners = boxes.to_corners(box_format)
        sides = corners[:, 2:] - corners[:, :2]
        box_areas = sides.prod(1)
    is_kept = (0.01 * box_areas <= boxes.areas) & (boxes.areas <= 1.01 * box_areas)
    for index, origin, side, keep in zip(
        boxes.indices, corners[:, :2].tolist(), sides.tolist(), is_kept.tolist(), strict=True
    ):
        annotations[index] = {**annotations[index], "bbox": [*origin, *side]}
        if not keep:
            annotations[index].pop("area", None)
    wrong = int((~is_kept & ~np.isnan(boxes.areas)).sum())
    what = f"area does not fit the box, converted from {box_format}, in {_annotations(wrong)}"
    return [f"{what} ({_FILLED['area']})"] if wrong else []


def _annotations(count: int) -> str:
    return f"{count} annotation{'' if count == 1 else 's'}"


def _corners_of_mask(
    segmentation: Any, image: Mapping[str, Any] | None, box_format: str
) -> tuple[list[float], str]:
    """Return the box around a polygon or mask and which it is; an empty one where there is none.

    The corners are in pixels, or as fractions of the image where boxes are.
    """
    if polygons := _polygons(segmentation):
        xs = [x for polygon in polygons for x in polygon[::2]]
        ys = [y for polygon in polygons for y in polygon[1::2]]
        return [min(xs), min(ys), max(xs), max(ys)], "polygon"
    rle = _rle(segmentation, image)
    if rle is None or image is None:
        return [], ""
    x, y, width, height = mask_util.toBbox(rle).tolist()
    unit = (image["width"], image["height"]) if is_relative(box_format) else (1, 1)
    corners = [x / unit[0], y / unit[1], (x + width) / unit[0], (y + height) / unit[1]]
    return (corners, "mask") if width * height else ([], "")


def _polygons(segmentation: Any) -> list[list[float]]:
    """Return the polygons of a segmentation, none if it has anything else."""
    if not isinstance(segmentation, list) or not segmentation:
        return []
    polygons = segmentation if isinstance(segmentation[0], list) else [segmentation]
    for polygon in polygons:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            return []
        if not all(map(is_number, polygon)):
            return []
    return polygons


def _rle(segmentation: Any, image: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return a run-length mask of an image as pycocotools reads it, None if it is none."""
    if not isinstance(segmentation, dict) or image is None:
        return None
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if size != [image["height"], image["width"]] or not counts:
        return None
    try:
        if isinstance(counts, list):
            if sum(counts) != size[0] * size[1]:
                return None
            return mask_util.frPyObjects({"size": size, "counts": counts}, *size)
        rle = {"size": size, "counts": counts}
        x, y, width, height = mask_util.toBbox(rle)
        return rle if x + width <= size[1] and y + height <= size[0] else None
    except (TypeError, ValueError, OverflowError):
        return None


def find_crowd_objects(
    annotations: Sequence[Mapping[str, Any]],
    images: Mapping[Any, Mapping[str, Any]],
    categories: Sequence[Mapping[str, Any]],
) -> str | None:
    """Return in one sentence that crowd annotations look like single objects, if they do.

    They do where they are half of all annotations, or of a class, and few are of several pieces.

    Args:
        annotations: usable ones
        images: by id
        categories: of the json
    """
    total: Counter[Id] = Counter(a["category_id"] for a in annotations)
    crowd: dict[Id, list[Mapping[str, Any]]] = defaultdict(list)
    for annotation in annotations:
        if annotation.get("iscrowd"):
            crowd[annotation["category_id"]].append(annotation)
    many = {k: v for k, v in crowd.items() if len(v) >= _MIN_CROWD and 2 * len(v) >= total[k]}
    if crowd and 2 * sum(map(len, crowd.values())) >= total.total():
        many = crowd
    found = [annotation for group in many.values() for annotation in group]
    sample = found[:: -(-len(found) // _MAX_MASKS)] if found else []
    pieces = [_count_pieces(a.get("segmentation"), images[a["image_id"]]) for a in sample]
    if not sample or 2 * sum(count > 1 for count in pieces) > len(sample):
        return None
    names = {category["id"]: printable(category["name"]) for category in categories}
    classes = join_some(f"{names[k]} {len(v)} of {total[k]}" for k, v in many.items())
    return (
        f"{len(found)} of {total.total()} annotations have iscrowd 1 ({classes}), and are neither "
        "learned nor counted, but look like single objects (CVAT exports masks of objects so); "
        "DATASETS.CHECK.CROWD object takes them as objects"
    )


def _count_pieces(segmentation: Any, image: Mapping[str, Any]) -> int:
    """Return of how many connected pieces a segmentation is; 1 where it is a box alone."""
    if polygons := _polygons(segmentation):
        return len(polygons)
    rle = _rle(segmentation, image)
    if rle is None:
        return 1
    try:
        return cv2.connectedComponents(mask_util.decode(rle))[0] - 1
    except ValueError:  # runs that are longer than the image
        return 1


def explain_unused_classes(
    unused: Sequence[Mapping[str, Any]], categories: Sequence[Mapping[str, Any]]
) -> dict[Id, str]:
    """Return what classes without a box are, by category id, where they are no class of objects.

    Those are the background, and parents of others, which Roboflow exports as category 0.
    """
    what: dict[Id, str] = {}
    for category in unused:
        name = category["name"]
        children = [
            printable(other["name"])
            for other in categories
            if other is not category and other.get("supercategory") == name
        ]
        if children:
            what[category["id"]] = f"is the supercategory of {join_some(children, 3)}"
        elif name.lower() in BACKGROUND_NAMES:
            what[category["id"]] = "is the background, which needs no class"
    others = [category["name"] for category in categories if category["id"] not in what]
    names = f"the names of the other {len(others)}"
    if len(others) <= _MAX_NAMES:
        names = printable(shlex.quote(json.dumps(others, ensure_ascii=False)))
    return {
        category["id"]: f"class {printable(category['name'])} (category "
        f"{printable(category['id'])}) has no box and {what[category['id']]}; it is learned as a "
        f"class all the same, DATASETS.CUSTOM.CLASSES {names} leaves it out"
        for category in unused
        if category["id"] in what
    }
