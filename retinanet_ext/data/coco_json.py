"""COCO-format json files and their images: reading them, and what Detectron2 and COCO's evaluation
are given of them.

Only boxes are read: Detectron2's own loader drops a box whose segmentation is malformed, though a
box detector needs no segmentation. :mod:`retinanet_ext.data.validation` says what is wrong with a
file.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from detectron2.structures import BoxMode

from retinanet_ext.errors import InputError

LISTS = ("images", "categories", "annotations")


def read_coco_json(json_file: str, *, needs_annotations: bool = True) -> dict[str, Any]:
    """Read a json file that has the lists of COCO's instances format, whatever is in them.

    Encodings are those of JSON: UTF-8, UTF-16 and UTF-32, with or without a byte order mark.

    Args:
        json_file: its path.
        needs_annotations: not so of images to test on: COCO's image info format.

    Raises:
        InputError: the file cannot be read, has no such lists, or no images or categories.
    """
    try:
        with open(json_file, "rb") as file:
            content = json.load(file)
    except OSError as error:
        raise InputError(f"{json_file}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{json_file}: is not JSON: {error}") from error
    content = content if isinstance(content, dict) else {}
    optional = {"annotations": []} if not needs_annotations else {}
    no_lists = [key for key in LISTS if not isinstance((optional | content).get(key), list)]
    if no_lists:
        raise InputError(
            f"{json_file}: is not a COCO instances file: no list of {join_some(no_lists)}"
        )
    for key in ("images", "categories"):
        if not content[key]:
            raise InputError(f"{json_file}: the list of {key} is empty")
    return content


def is_plain_utf8(json_file: str) -> bool:
    """Tell whether pycocotools can read a json: not with a byte order mark, nor in UTF-16."""
    with open(json_file, "rb") as file:
        return json.detect_encoding(file.read(4)) == "utf-8"


def id_order(value: int | str) -> tuple[bool, int, str]:
    """Return what ids are sorted by: numbers, also those that are text, before other text."""
    if not isinstance(value, str):
        return False, value, ""
    is_number = value.isdecimal() and len(value) < 20
    return not is_number, int(value) if is_number else 0, value


def contiguous_category_ids(content: dict[str, Any]) -> dict[int | str, int]:
    """Map category ids of the json to classes 0..K-1, in ascending order as Detectron2 does."""
    ids = sorted((category["id"] for category in content["categories"]), key=id_order)
    return {category_id: label for label, category_id in enumerate(ids)}


def class_names(content: dict[str, Any]) -> list[str]:
    """Return the names of classes 0..K-1."""
    return [c["name"] for c in sorted(content["categories"], key=lambda c: id_order(c["id"]))]


def is_region_to_ignore(annotation: dict[str, Any]) -> bool:
    """Tell whether objects in there are neither learned nor counted: a crowd, or ``ignore``."""
    return bool(annotation.get("iscrowd", 0) or annotation.get("ignore", 0))


def to_dataset_dicts(content: dict[str, Any], image_root: str) -> list[dict[str, Any]]:
    """Return a checked COCO json as Detectron2's dataset dicts, boxes only.

    Regions to ignore have ``iscrowd`` 1, whichever way the json marks them.
    """
    labels = contiguous_category_ids(content)
    annotations: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for annotation in content["annotations"]:
        annotations[annotation["image_id"]].append(
            {
                "iscrowd": int(is_region_to_ignore(annotation)),
                # Of integers, Detectron2's mapper would make integers again after the resize.
                "bbox": [float(number) for number in annotation["bbox"]],
                "category_id": labels[annotation["category_id"]],
                "bbox_mode": BoxMode.XYWH_ABS,
            }
        )
    return [
        {
            "file_name": os.path.join(image_root, image["file_name"]),
            "height": int(image["height"]),
            "width": int(image["width"]),
            "image_id": image["id"],
            "annotations": annotations[image["id"]],
        }
        for image in sorted(content["images"], key=lambda image: id_order(image["id"]))
    ]


def complete_for_evaluation(content: dict[str, Any]) -> dict[str, Any]:
    """Return a checked COCO json with what its evaluation needs filled in, itself if it has all.

    A missing ``iscrowd`` becomes 0 and a missing ``area`` width times height, either of which
    would be a ``KeyError`` of pycocotools after training, as a missing ``info`` is before its
    version 2.0.11; what is to ignore gets ``iscrowd`` 1, the one mark that it reads. Where an
    annotation id is missing, text, below 1 or used twice, all are numbered anew: the evaluation
    takes a match with id 0 for none, and of two of an id sees one.
    """
    annotations = [
        {"area": a["bbox"][2] * a["bbox"][3], **a, "iscrowd": int(is_region_to_ignore(a))}
        for a in content["annotations"]
    ]
    ids = {annotation.get("id", 0) for annotation in annotations}
    if len(ids) < len(annotations) or any(isinstance(i, str) or i < 1 for i in ids):
        annotations = [{**a, "id": number} for number, a in enumerate(annotations, start=1)]
    if annotations == content["annotations"] and "info" in content:
        return content
    return {"info": {}, **content, "annotations": annotations}


def join_some(items: Iterable[Any], limit: int = 10, *, separator: str = ", ") -> str:
    """Return the first ``limit`` items as text, and how many more there are."""
    items = list(items)
    more = [f"and {len(items) - limit} more"] if len(items) > limit else []
    return separator.join([*map(str, items[:limit]), *more])


def printable(value: Any) -> str:
    """Return text from a json in one line that can be printed."""
    text = str(value)
    return text if text.isprintable() else repr(text)[1:-1]
