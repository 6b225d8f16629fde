"""Annotation files of three formats, read as the content of a COCO json.

A path is a COCO json, a YOLO ``data.yaml``, or a folder of Pascal VOC XML.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from typing import Any

from retinanet_ext.data import yolo_labels
from retinanet_ext.data.box_format import is_relative
from retinanet_ext.data.coco_json import join_some, printable, read_coco_json
from retinanet_ext.data.voc_xml import VocFolder, read_voc
from retinanet_ext.data.yolo_labels import find_orphan_labels, find_yolo_root, read_yolo
from retinanet_ext.errors import InputError
from retinanet_ext.files import sha256_of


def is_voc(path: str) -> bool:
    """Return whether a path is a folder, which Pascal VOC alone has."""
    return os.path.isdir(path)


def is_yolo(path: str) -> bool:
    """Return whether a path is the ``data.yaml`` of YOLO labels."""
    return path.lower().endswith((".yaml", ".yml"))


def is_json(path: str) -> bool:
    """Return whether a path is neither of the other formats."""
    return not is_voc(path) and not is_yolo(path)


def find_image_root(path: str) -> str:
    """Return the image folder that YOLO or Pascal VOC data name themselves.

    Raises:
        InputError: the data do not name it, or it does not exist.
    """
    return find_yolo_root(path) if is_yolo(path) else str(VocFolder.find(path).images)


def box_format_of(path: str, box_format: str) -> str:
    """Return the format of a file's boxes.

    Args:
        path: the annotation file.
        box_format: ``DATASETS.CUSTOM.BOX_FORMAT``, which counts for COCO jsons, and for YOLO labels
            if it is relative.
    """
    if is_yolo(path):
        return box_format if is_relative(box_format) else yolo_labels.BOX_FORMAT
    return "xywh" if is_voc(path) else box_format


def read_annotations(
    path: str, image_root: str, split: str, *, box_format: str, related: Iterable[str] = ()
) -> dict[str, Any]:
    """Return the content of a COCO json, or of other data in its form; entries are not checked.

    Of other data, the list ``faults`` has a sentence about each label that cannot be read.

    Args:
        path: the annotation file.
        image_root: its image folder; of a ``data.yaml`` the folder that its entries start from.
        split: "TRAIN" or "TEST". A COCO json of test data may lack the list of annotations.
        box_format: of :func:`box_format_of`.
        related: all paths of a config; the Pascal VOC folders among them share their classes.

    Raises:
        InputError: the file cannot be read, or is not of its format.
    """
    if is_yolo(path):
        return read_yolo(path, image_root, split, box_format=box_format)
    if is_voc(path):
        if not os.path.isdir(image_root):
            raise InputError(f"the image folder {image_root} does not exist")
        return read_voc(path, image_root, split, related=filter(is_voc, related))
    return read_coco_json(path, needs_annotations=split == "TRAIN")


def describe_orphan_labels(path: str, content: dict[str, Any], image_root: str) -> list[str]:
    """Return a note about the YOLO label files without image, if there are any.

    Args:
        path, image_root: as for :func:`read_annotations`.
        content: what it returned.
    """
    if not is_yolo(path):
        return []
    orphans = find_orphan_labels((image["file_name"] for image in content["images"]), image_root)
    if not orphans:
        return []
    what = "1 label file has" if len(orphans) == 1 else f"{len(orphans)} label files have"
    return [f"{what} no image: {join_some(map(printable, orphans), 3)}"]


def digest_annotations(path: str, content: dict[str, Any] | None) -> str:
    """Return the SHA-256 of a COCO json's bytes, or of the content of other data."""
    if is_json(path):
        return sha256_of(path)
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
