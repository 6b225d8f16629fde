"""Annotation files in COCO's format: reading, and conversion for Detectron2 and COCO's evaluation.

Segmentations are not converted, because Detectron2's own loader drops a box whose segmentation is
malformed, although a box detector needs none. :mod:`retinanet_ext.data.validation` checks a file.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from detectron2.structures import BoxMode

from retinanet_ext.errors import InputError

LISTS = ("images", "categories", "annotations")


class AnnotationFile(NamedTuple):
    """Annotations of any format as the content of a COCO json; entries are not checked.

    Attributes:
        path: a COCO json, a YOLO ``data.yaml`` or a folder of Pascal VOC XML.
        image_root: folder that ``file_name`` entries are relative to.
        content: the lists of a COCO json, in which test data may lack the annotations.
        box_format: what the four numbers of a ``bbox`` are.
        faults: a sentence about each label that cannot be read.
        notes: other sentences about the file.
    """

    path: str
    image_root: str
    content: dict[str, Any]
    box_format: str = "xywh"
    faults: Sequence[str] = ()
    notes: Sequence[str] = ()


def read_coco_json(json_file: str, *, needs_annotations: bool = True) -> dict[str, Any]:
    """Read a json file that has the lists of COCO's instances format; entries are not checked.

    The encoding may be UTF-8, UTF-16 or UTF-32, with or without a byte order mark. Unless
    ``needs_annotations``, their list may be missing, as in COCO's image info format.

    Raises:
        InputError: the file cannot be read, a list is missing, or there are no images or
            categories.
    """
    try:
        with open(json_file, "rb") as file:
            content = json.load(file)
    except OSError as error:
        raise InputError(f"{json_file}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{json_file}: is not JSON: {error}") from error
    content = content if isinstance(content, dict) else {}
    needed = [key for key in LISTS if needs_annotations or key != "annotations" or key in content]
    no_lists = [key for key in needed if not isinstance(content.get(key), list)]
    if no_lists:
        raise InputError(
            f"{json_file}: is not a COCO instances file: no list of {join_some(no_lists)}"
        )
    for key in ("images", "categories"):
        if not content[key]:
            raise InputError(f"{json_file}: the list of {key} is empty")
    return content


def id_order(value: int | str) -> tuple[bool, int, str]:
    """Return a sort key for ids: numbers and texts of digits come before other texts."""
    if not isinstance(value, str):
        return False, value, ""
    is_number = value.isdecimal() and len(value) < 20
    return not is_number, int(value) if is_number else 0, value


def contiguous_category_ids(content: dict[str, Any]) -> dict[int | str, int]:
    """Map category ids to classes 0..K-1 in ascending order, as Detectron2 does."""
    ids = sorted((category["id"] for category in content["categories"]), key=id_order)
    return {category_id: label for label, category_id in enumerate(ids)}


def class_names(content: dict[str, Any]) -> list[str]:
    """Return the names of classes 0..K-1."""
    return [c["name"] for c in sorted(content["categories"], key=lambda c: id_order(c["id"]))]


def is_ignore_region(annotation: dict[str, Any]) -> bool:
    """Return whether objects in an annotation's box are neither learned nor counted as errors."""
    return bool(annotation.get("iscrowd") or annotation.get("ignore"))


def to_dataset_dicts(content: dict[str, Any], image_root: str) -> list[dict[str, Any]]:
    """Convert a checked COCO json to Detectron2's dataset dicts, with boxes only.

    Ignore regions have ``iscrowd`` 1, whether the json marks them by ``iscrowd`` or ``ignore``.
    """
    labels = contiguous_category_ids(content)
    annotations: dict[int | str, list[dict[str, Any]]] = defaultdict(list)
    for annotation in content["annotations"]:
        annotations[annotation["image_id"]].append(
            {
                "iscrowd": int(is_ignore_region(annotation)),
                # Because Detectron2's mapper would round boxes of integers after the resize.
                "bbox": list(map(float, annotation["bbox"])),
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
    """Return a checked json with what the evaluation needs filled in.

    A missing ``iscrowd`` becomes 0, and a missing ``area`` becomes width times height, because
    pycocotools would raise a ``KeyError`` after training; before version 2.0.11 it needs ``info``
    too. Ignore regions get ``iscrowd`` 1, the only mark that pycocotools reads. If an annotation
    id is missing, a text, below 1 or used twice, all annotations are numbered anew, because
    pycocotools treats a match with id 0 as no match and keeps one of two equal ids.
    """
    annotations = [
        {"area": a["bbox"][2] * a["bbox"][3], **a, "iscrowd": int(is_ignore_region(a))}
        for a in content["annotations"]
    ]
    ids = {annotation.get("id", 0) for annotation in annotations}
    if len(ids) < len(annotations) or any(isinstance(i, str) or i < 1 for i in ids):
        annotations = [{**a, "id": number} for number, a in enumerate(annotations, start=1)]
    return {"info": {}, **content, "annotations": annotations}


def join_some(items: Iterable[Any], limit: int = 10, *, separator: str = ", ") -> str:
    """Join the first ``limit`` items, and add how many more there are."""
    items = list(items)
    more = [f"and {len(items) - limit} more"] if len(items) > limit else []
    return separator.join([*map(str, items[:limit]), *more])


def count(number: int, noun: str, plural: str = "") -> str:
    """Return "1 seed", "2 seeds"; the plural is given if it does not only add an s."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def printable(value: Any) -> str:
    """Return a value as text in one line, with characters that cannot be printed escaped."""
    text = str(value)
    return text if text.isprintable() else repr(text)[1:-1]
