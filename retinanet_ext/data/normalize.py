"""Annotations as tools export them, in the one form that is checked, trained on and evaluated.

Fields that are missing and have one obvious meaning are filled in, with a note that says so.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
from pycocotools import mask as mask_util

from retinanet_ext.data.box_format import BoxTable, from_corners, is_box, is_number, is_relative
from retinanet_ext.data.coco_json import join_some, printable

# What replaces a field that is null or, for the first two, missing.
_FILLED = {
    "id": "numbered for the evaluation",
    "area": "width x height of the box is taken",
    "iscrowd": "read as 0",
    "ignore": "read as 0",
}
_MAX_MASKS = 100  # decoded to find out what crowd annotations cover
_MIN_CROWD = 5  # crowd annotations of a class before they are said to look like objects

Content = dict[str, Any]


class Normalized(NamedTuple):
    """Annotations in their order, with boxes in COCO's format.

    Attributes:
        annotations: each with a bbox [x, y, width, height] in pixels if it has one or a mask.
        boxes: the boxes before the conversion, if they are four numbers and the image is known.
        derived: index of an annotation without a box -> what its box was taken from.
        notes: one sentence for each field that was filled in.
    """

    annotations: list[Any]
    boxes: BoxTable
    derived: Mapping[int, str]
    notes: Sequence[str]


def unify_ids(content: Content) -> tuple[Content, list[str]]:
    """Give every image and category an id of one type, and note where ids are text.

    Ids that are text throughout are kept, so that detections have them too. If some are text and
    others are numbers, or annotations refer to a text id by a number, all become numbers if every
    text is digits; otherwise all become text.
    """
    notes = []
    for key, field in (("images", "image_id"), ("categories", "category_id")):
        ids = [item.get("id") for item in content[key] if isinstance(item, dict)]
        named = [a.get(field) for a in content["annotations"] if isinstance(a, dict)]
        texts = [value for value in ids if isinstance(value, str)]
        first = next((value for value in [*texts, *named] if isinstance(value, str)), None)
        if first is None:
            continue
        numbers = len(texts) < len(ids) and all(map(_is_digits, texts))
        convert = _to_number if numbers else _to_text
        mixed = any(type(convert(value)) is not type(value) for value in [*ids, *named])
        if mixed:
            content = {
                **content,
                key: _convert(content[key], "id", convert),
                "annotations": _convert(content["annotations"], field, convert),
            }
        if texts or mixed:
            how = f"all are read as {'numbers' if numbers else 'text'}"
            notes.append(
                f"ids of {key} are text{' in places' if mixed else ''}, such as {first!r}, "
                f"and {how if mixed else 'are used as they are'}"
            )
    return content, [printable(note) for note in notes]


def _is_digits(value: Any) -> bool:
    """Return whether a value is the usual text of an integer, without leading zeros."""
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
    """Convert boxes to COCO's format, derive missing ones, and remove fields that are null.

    Args:
        annotations: the list of the json, whatever its entries are; not modified.
        images: usable images by id, of which those whose file is missing may have no size.
        box_format: ``DATASETS.CUSTOM.BOX_FORMAT``.
    """
    result = list(annotations)
    filled: Counter[tuple[str, str]] = Counter()
    derived: dict[int, str] = {}
    indices: list[int] = []
    sizes = {
        image_id: (image["width"], image["height"])
        for image_id, image in images.items()
        if image.get("width") and image.get("height")
    }
    for index, annotation in enumerate(annotations):
        if not isinstance(annotation, dict):
            continue
        if (
            type(annotation.get("id")) is not int
            or "area" not in annotation
            or None in annotation.values()
        ):
            annotation = result[index] = _without_nulls(annotation, filled)
        image_id, box = annotation.get("image_id"), annotation.get("bbox")
        size = sizes.get(image_id) if isinstance(image_id, int | float | str) else None
        if not box or box == [0, 0, 0, 0]:
            corners, source = _corners_of_mask(annotation.get("segmentation"), size, box_format)
            if corners:
                derived[index] = source
                box = from_corners(corners, box_format)
                result[index] = {**annotation, "bbox": box}
        if size and is_box(box):
            indices.append(index)
    used = [result[index] for index in indices]
    areas = (annotation.get("area") for annotation in used)
    boxes = BoxTable(
        indices,
        np.array([a["bbox"] for a in used], float).reshape(-1, 4),
        np.array([sizes[a["image_id"]] for a in used], float).reshape(-1, 2),
        np.array([area if is_number(area) else math.nan for area in areas], float),
    )
    notes = [
        f"annotations whose {field} is {lack}: {number} ({_FILLED[field]})"
        for (field, lack), number in filled.items()
    ]
    if box_format != "xywh":
        notes += _convert_boxes(result, boxes, box_format)
    return Normalized(result, boxes, derived, notes)


def _without_nulls(annotation: dict[str, Any], filled: Counter[tuple[str, str]]) -> dict[str, Any]:
    """Remove fields that are null; count them and the missing fields."""
    nulls = [field for field in _FILLED if annotation.get(field, 0) is None]
    filled.update((field, "null") for field in nulls)
    filled.update((field, "missing") for field in ("id", "area") if field not in annotation)
    if isinstance(annotation.get("id"), str):
        filled["id", "text"] += 1
    return {k: v for k, v in annotation.items() if k not in nulls} if nulls else annotation


def _convert_boxes(annotations: list[Any], boxes: BoxTable, box_format: str) -> list[str]:
    """Replace boxes by boxes in COCO's format; return a note about areas that do not fit.

    An area that a mask inside the box can have is kept. An area that was computed as if the
    numbers were COCO's is removed.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # numbers near the largest float
        low, high = np.hsplit(boxes.to_corners(box_format), 2)
        sides = high - low
        box_areas = sides.prod(1)
    is_kept = (0.01 * box_areas <= boxes.areas) & (boxes.areas <= 1.01 * box_areas)
    converted = np.hstack([low, sides]).tolist()
    for index, box, keep in zip(boxes.indices, converted, is_kept.tolist(), strict=True):
        annotations[index] = {**annotations[index], "bbox": box}
        if not keep:
            annotations[index].pop("area", None)
    wrong = int((~is_kept & ~np.isnan(boxes.areas)).sum())
    what = f"annotations whose area does not fit the box, converted from {box_format}"
    return [f"{what}: {wrong} ({_FILLED['area']})"] if wrong else []


def _corners_of_mask(
    segmentation: Any, size: tuple[int, int] | None, box_format: str
) -> tuple[list[float], str]:
    """Return the corners around a segmentation, and whether it is a "polygon" or a "mask".

    The corners have the unit of the boxes: pixels, or fractions of the image's (width, height).
    They are empty if the segmentation cannot be used.
    """
    if polygons := _polygons(segmentation):
        xs = [x for polygon in polygons for x in polygon[::2]]
        ys = [y for polygon in polygons for y in polygon[1::2]]
        return [min(xs), min(ys), max(xs), max(ys)], "polygon"
    rle = _rle(segmentation, size)
    if rle is None or size is None:
        return [], ""
    x, y, width, height = mask_util.toBbox(rle).tolist()
    unit = size if is_relative(box_format) else (1, 1)
    corners = [x / unit[0], y / unit[1], (x + width) / unit[0], (y + height) / unit[1]]
    return (corners, "mask") if width * height else ([], "")


def _polygons(segmentation: Any) -> list[list[float]]:
    """Return the polygons of a segmentation; none if it is anything else."""
    if not isinstance(segmentation, list) or not segmentation:
        return []
    polygons = segmentation if isinstance(segmentation[0], list) else [segmentation]
    is_valid = all(
        isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 and all(map(is_number, p))
        for p in polygons
    )
    return polygons if is_valid else []


def _rle(segmentation: Any, image_size: tuple[int, int] | None) -> dict[str, Any] | None:
    """Return a run-length mask as pycocotools reads it, or None if it is no mask of the image."""
    if not isinstance(segmentation, dict) or image_size is None:
        return None
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if size != [image_size[1], image_size[0]] or not counts:
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


def find_crowd_objects(content: Content) -> str | None:
    """Return a sentence that crowd annotations look like single objects, or None if they do not.

    They do if they are half of all annotations, or of a class, and most masks have one piece.
    """
    total: Counter[int | str] = Counter(a["category_id"] for a in content["annotations"])
    crowd: dict[int | str, list[dict[str, Any]]] = defaultdict(list)
    for annotation in content["annotations"]:
        if annotation.get("iscrowd"):
            crowd[annotation["category_id"]].append(annotation)
    many = {k: v for k, v in crowd.items() if len(v) >= _MIN_CROWD and 2 * len(v) >= total[k]}
    if 2 * sum(map(len, crowd.values())) >= total.total():
        many = crowd
    found = [annotation for group in many.values() for annotation in group]
    if not found:
        return None
    images = {image["id"]: image for image in content["images"]}
    sample = found[:: -(-len(found) // _MAX_MASKS)]
    pieces = [_count_pieces(a.get("segmentation"), images[a["image_id"]]) for a in sample]
    if 2 * sum(count > 1 for count in pieces) > len(sample):
        return None
    names = {category["id"]: printable(category["name"]) for category in content["categories"]}
    classes = join_some(f"{names[k]} {len(v)} of {total[k]}" for k, v in many.items())
    return (
        f"{len(found)} of {total.total()} annotations have iscrowd 1 ({classes}), and are neither "
        "learned nor counted, but look like single objects (CVAT exports masks of objects so); "
        "DATASETS.CHECK.CROWD object takes them as objects"
    )


def _count_pieces(segmentation: Any, image: Mapping[str, Any]) -> int:
    """Return the number of connected pieces of a segmentation; 1 for a box alone."""
    if polygons := _polygons(segmentation):
        return len(polygons)
    rle = _rle(segmentation, (image["width"], image["height"]))
    if rle is None:
        return 1
    try:
        return cv2.connectedComponents(mask_util.decode(rle))[0] - 1
    except ValueError:  # runs that are longer than the image
        return 1
