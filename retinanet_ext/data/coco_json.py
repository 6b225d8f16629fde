"""COCO-format json files and their images, checked before anything is built on them.

Detectron2's own loader answers a fault in the data with an assertion, with a traceback out of the
training loop, or with a ``KeyError`` of pycocotools once training is over. Here each fault is one
:class:`InputError` that names the file and the id. Only boxes are read: Detectron2's loader drops
a box whose segmentation is malformed, though a box detector needs no segmentation.
"""

from __future__ import annotations

import json
import os
import reprlib
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePath
from typing import Any

from detectron2.data.detection_utils import check_image_size, read_image
from detectron2.structures import BoxMode
from PIL import Image, UnidentifiedImageError

from retinanet_ext.errors import InputError

MAX_DECODED_IMAGES = 1000
"""Sets up to this size are decoded whole: at about 10 ms an image that is seconds. Of larger sets
only the headers are read, and a fault behind the header ends training when it is met."""

_EXIF_ORIENTATION = 274

_Check = tuple[str, Callable[[Any], bool]]


def _is_number(value: Any) -> bool:
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and abs(value) <= sys.float_info.max
    )


def _is_integer(value: Any) -> bool:
    return _is_number(value) and value % 1 == 0


_INTEGER: _Check = ("an integer", _is_integer)
_TEXT: _Check = ("a text that is not empty", lambda value: isinstance(value, str) and value != "")
_SIZE: _Check = ("an integer above 0", lambda value: _is_integer(value) and value > 0)
_BOX: _Check = (
    "4 finite numbers [x, y, width, height] with width and height >= 0",
    lambda value: (
        isinstance(value, list)
        and len(value) == 4
        and all(map(_is_number, value))
        and min(value[2:]) >= 0
    ),
)
_REQUIRED: dict[str, dict[str, _Check]] = {
    "images": {"id": _INTEGER, "file_name": _TEXT, "width": _SIZE, "height": _SIZE},
    "categories": {"id": _INTEGER, "name": _TEXT},
    "annotations": {"id": _INTEGER, "image_id": _INTEGER, "category_id": _INTEGER, "bbox": _BOX},
}
_OPTIONAL: dict[str, _Check] = {
    "iscrowd": ("0 or 1", lambda value: value in (0, 1)),
    "area": ("a finite number >= 0", lambda value: _is_number(value) and value >= 0),
    # Neither Detectron2 nor COCO's evaluation knows this field: the first asserts, the second
    # would count the box as any other.
    "ignore": ("0: mark a region to ignore by iscrowd 1 instead", lambda value: value == 0),
}


def read_coco_json(json_file: str) -> dict[str, Any]:
    """Read a json file of COCO's instances format and check every field that is used later.

    Raises:
        InputError: the file cannot be read, a field is missing or out of range, an id or a
            category name occurs twice, or an annotation refers to nothing.
    """
    content = _parse(json_file)
    for key, required in _REQUIRED.items():
        _check_fields(json_file, content, key, required)
        _refuse_duplicates(json_file, f"{key}: id", (item["id"] for item in content[key]))
    _refuse_duplicates(json_file, "categories: name", (c["name"] for c in content["categories"]))

    for image in content["images"]:
        path = PurePath(image["file_name"])
        if path.is_absolute() or ".." in path.parts:
            raise InputError(
                f"{json_file}: file_name {image['file_name']!r} of image {image['id']} leaves the "
                "image folder; it must be a path relative to that folder, without '..'"
            )

    image_ids = {image["id"] for image in content["images"]}
    category_ids = {category["id"] for category in content["categories"]}
    for annotation in content["annotations"]:
        if annotation["image_id"] not in image_ids:
            raise InputError(
                f"{json_file}: annotation {annotation['id']} has image_id "
                f"{annotation['image_id']}, which is not among the images"
            )
        if annotation["category_id"] not in category_ids:
            raise InputError(
                f"{json_file}: annotation {annotation['id']} has category_id "
                f"{annotation['category_id']}, which is not among the categories "
                f"({join_some(sorted(category_ids))})"
            )
    return content


def check_images(
    json_file: str, content: dict[str, Any], image_root: str, *, image_format: str, decode: bool
) -> None:
    """Check that every image of a json file is there and can be read.

    Args:
        json_file: named in the errors.
        content: what :func:`read_coco_json` returned for it.
        image_root: the folder that the json's ``file_name`` entries are relative to.
        image_format: ``INPUT.FORMAT``, to which training will convert the images.
        decode: whether to open the images, and not only look for the files.

    Raises:
        InputError: the folder or an image is missing, or an image is damaged or has another size
            (after its EXIF orientation is applied, as in training) than the json says.
    """
    if not os.path.isdir(image_root):
        raise InputError(f"{json_file}: the image folder {image_root} does not exist")
    images = content["images"]
    paths = [os.path.join(image_root, image["file_name"]) for image in images]
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise InputError(
            f"{json_file}: {len(missing)} of {len(paths)} images are missing: {join_some(missing)}"
        )
    if not decode:
        return

    headers_only = len(images) > MAX_DECODED_IMAGES

    def check(path: str, image: dict[str, Any]) -> str | None:
        if headers_only and _header_agrees(path, image):
            return None
        fault = find_image_fault({**image, "file_name": path}, image_format)
        return fault and f"{path} (image id {image['id']}): {fault}"

    with ThreadPoolExecutor() as pool:
        faults = [fault for fault in pool.map(check, paths, images) if fault]
    if faults:
        raise InputError(
            f"{json_file}: {len(faults)} of {len(paths)} images cannot be used: "
            f"{join_some(faults, 3, separator='; ')}"
        )


def find_image_fault(record: dict[str, Any], image_format: str) -> str | None:
    """Read an image as training does, and return in one line why it cannot be used, if so.

    Args:
        record: with the file_name as a path, and the width and height that the image must have
            after its EXIF orientation is applied.
        image_format: ``INPUT.FORMAT``.
    """
    size = {key: record[key] for key in ("width", "height") if key in record}
    try:
        check_image_size(size, read_image(record["file_name"], format=image_format))
    except UnidentifiedImageError:
        return "not an image, or of a format that cannot be read"
    except Exception as error:  # Pillow's decoders raise many types, bare RuntimeError among them
        return " ".join(str(error).split()) or type(error).__name__
    return None


def contiguous_category_ids(content: dict[str, Any]) -> dict[int, int]:
    """Map category ids of the json to classes 0..K-1, in ascending order as Detectron2 does."""
    ids = sorted(category["id"] for category in content["categories"])
    return {category_id: label for label, category_id in enumerate(ids)}


def class_names(content: dict[str, Any]) -> list[str]:
    """Return the names of classes 0..K-1."""
    return [c["name"] for c in sorted(content["categories"], key=lambda c: c["id"])]


def boxes_without_area(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the annotations of which nothing is left once their box is clipped to its image.

    Detectron2's mapper drops them without a word; a loss computed from one is not finite.
    """
    return [
        annotation
        for annotation, (x0, y0, x1, y1), (width, height) in _with_corners(content)
        if min(x1, width) <= max(x0, 0) or min(y1, height) <= max(y0, 0)
    ]


def boxes_reaching_outside(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the annotations whose box reaches more than a pixel outside its image."""
    return [
        annotation
        for annotation, (x0, y0, x1, y1), (width, height) in _with_corners(content)
        if min(x0, y0) < -1 or x1 > width + 1 or y1 > height + 1
    ]


def load_dataset_dicts(json_file: str, image_root: str) -> list[dict[str, Any]]:
    """Return a COCO json as Detectron2's dataset dicts, boxes only, those without area left out."""
    content = read_coco_json(json_file)
    labels = contiguous_category_ids(content)
    dropped = {annotation["id"] for annotation in boxes_without_area(content)}
    annotations: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for annotation in content["annotations"]:
        if annotation["id"] not in dropped:
            annotations[annotation["image_id"]].append(
                {
                    "iscrowd": annotation.get("iscrowd", 0),
                    "bbox": annotation["bbox"],
                    "category_id": labels[annotation["category_id"]],
                    "bbox_mode": BoxMode.XYWH_ABS,
                }
            )
    return [
        {
            "file_name": os.path.join(image_root, image["file_name"]),
            "height": image["height"],
            "width": image["width"],
            "image_id": image["id"],
            "annotations": annotations[image["id"]],
        }
        for image in sorted(content["images"], key=lambda image: image["id"])
    ]


def complete_for_evaluation(content: dict[str, Any]) -> dict[str, Any] | None:
    """Return the json with what its evaluation needs filled in, or None if nothing is missing.

    A missing ``iscrowd`` becomes 0 and a missing ``area`` width times height, either of which
    would be a ``KeyError`` of pycocotools after training. Where an annotation id is below 1, all
    are numbered anew: the evaluation takes a match with id 0 for none, a false positive.
    """
    annotations = [
        {"iscrowd": 0, "area": a["bbox"][2] * a["bbox"][3], **a} for a in content["annotations"]
    ]
    if any(annotation["id"] < 1 for annotation in annotations):
        annotations = [{**a, "id": number} for number, a in enumerate(annotations, start=1)]
    return (
        None if annotations == content["annotations"] else {**content, "annotations": annotations}
    )


def join_some(items: Iterable[Any], limit: int = 10, *, separator: str = ", ") -> str:
    """Return the first ``limit`` items as text, and how many more there are."""
    items = list(items)
    more = [f"and {len(items) - limit} more"] if len(items) > limit else []
    return separator.join([*map(str, items[:limit]), *more])


def _with_corners(
    content: dict[str, Any],
) -> Iterator[tuple[dict[str, Any], tuple[float, float, float, float], tuple[int, int]]]:
    """Yield each annotation with its box as XYXY and the (width, height) of its image."""
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    for annotation in content["annotations"]:
        x, y, w, h = annotation["bbox"]
        yield annotation, (x, y, x + w, y + h), sizes[annotation["image_id"]]


def _parse(json_file: str) -> dict[str, Any]:
    try:
        with open(json_file, encoding="utf-8") as file:
            content = json.load(file)
    except OSError as error:
        raise InputError(f"{json_file}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{json_file}: is not JSON: {error}") from error
    content = content if isinstance(content, dict) else {}
    no_lists = [key for key in _REQUIRED if not isinstance(content.get(key), list)]
    if no_lists:
        raise InputError(
            f"{json_file}: is not a COCO instances file: no list of {join_some(no_lists)}"
        )
    for key in ("images", "categories"):
        if not content[key]:
            raise InputError(f"{json_file}: the list of {key} is empty")
    return content


def _check_fields(
    json_file: str, content: dict[str, Any], key: str, required: dict[str, _Check]
) -> None:
    optional = _OPTIONAL if key == "annotations" else {}
    for index, item in enumerate(content[key]):
        if not isinstance(item, dict):
            raise InputError(f"{json_file}: {key}[{index}] is not an object")
        for field, (allowed, is_valid) in (required | optional).items():
            if field in item:
                if is_valid(item[field]):
                    continue
                found = f"is {reprlib.repr(item[field])}"
            elif field in optional:
                continue
            else:
                found = "is missing"
            raise InputError(
                f"{json_file}: {field} of {_name(key, index, item)} {found}; it must be {allowed}"
            )


def _name(key: str, index: int, item: dict[str, Any]) -> str:
    """Return how an error calls one entry, e.g. ``annotations[4] (id 17, image_id 3)``."""
    ids = [f"{field} {reprlib.repr(item[field])}" for field in ("id", "image_id") if field in item]
    return f"{key}[{index}]" + (f" ({', '.join(ids)})" if ids else "")


def _refuse_duplicates(json_file: str, what: str, values: Iterable[Any]) -> None:
    twice = [value for value, count in Counter(values).items() if count > 1]
    if twice:
        raise InputError(f"{json_file}: {what} used more than once: {join_some(twice)}")


def _header_agrees(path: str, image: dict[str, Any]) -> bool:
    """Tell whether the header alone shows that the image has the size that the json says."""
    try:
        with Image.open(path) as opened:
            # The first test comes first because getexif() decodes a PNG that has no EXIF block.
            upright = "exif" not in opened.info or opened.getexif().get(_EXIF_ORIENTATION, 1) <= 4
            return upright and opened.size == (image["width"], image["height"])
    except Exception:  # decoding will tell; Detectron2 reads some images whose EXIF is malformed
        return False
