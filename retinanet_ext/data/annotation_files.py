"""Annotation files of three formats, told apart by their path and read in one form.

A path is a COCO json, a YOLO ``data.yaml``, or a folder of Pascal VOC XML.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from retinanet_ext.data import yolo_labels
from retinanet_ext.data.box_format import is_relative
from retinanet_ext.data.coco_json import AnnotationFile, read_coco_json
from retinanet_ext.data.voc_xml import find_voc_folder, read_voc


def is_yolo(path: str) -> bool:
    """Return whether a path is the ``data.yaml`` of YOLO labels."""
    return path.lower().endswith((".yaml", ".yml"))


def is_json(path: str) -> bool:
    """Return whether a path is neither of the other formats."""
    return not os.path.isdir(path) and not is_yolo(path)


def find_image_root(path: str) -> str:
    """Return the image folder that YOLO or Pascal VOC data name themselves.

    Raises:
        InputError: the data do not name it, or it does not exist.
    """
    return yolo_labels.find_yolo_root(path) if is_yolo(path) else str(find_voc_folder(path).images)


def read_annotations(
    path: str, image_root: str, split: str, *, box_format: str, related: Iterable[str] = ()
) -> AnnotationFile:
    """Read an annotation file of any format; entries are not checked.

    Args:
        path: the annotation file.
        image_root: its image folder; of a ``data.yaml`` the folder that its entries start from.
        split: "TRAIN" or "TEST". A COCO json of test data may lack the list of annotations.
        box_format: ``DATASETS.CUSTOM.BOX_FORMAT``, which counts for COCO jsons, and for YOLO labels
            if it is relative.
        related: all paths of a config; the Pascal VOC folders among them share their classes.

    Raises:
        InputError: the file cannot be read, or is not of its format.
    """
    if is_yolo(path):
        box_format = box_format if is_relative(box_format) else yolo_labels.BOX_FORMAT
        return yolo_labels.read_yolo(path, image_root, split, box_format=box_format)
    if os.path.isdir(path):
        return read_voc(path, image_root, split, related=filter(os.path.isdir, related))
    content = read_coco_json(path, needs_annotations=split == "TRAIN")
    return AnnotationFile(path, image_root, content, box_format)
