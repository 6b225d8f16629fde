"""Ground-truth boxes and detections of a data set as flat arrays, from COCO's two JSON formats."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retinanet_ext.data.box_format import BOX_FORMATS, BoxTable, explain_other_format, is_number
from retinanet_ext.data.coco_json import (
    contiguous_category_ids,
    id_order,
    is_ignore_region,
    join_some,
    printable,
)
from retinanet_ext.errors import InputError

Records = Sequence[Mapping[str, Any]]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BoxData:
    """M ground-truth boxes and D detections of N images and K classes.

    Boxes are XYWH in pixels. Both are sorted by image, and the detections of an image by score, the
    highest first; equal ones keep the order of the file.

    Attributes:
        image_ids: ids of images 0..N-1, ascending
        class_names: names of classes 0..K-1, in the order of their category ids
        gt_ids: annotation ids (M); the position in the file where an annotation has none
        gt_images: index of the image, (M,)
        gt_classes: index of the class, (M,)
        gt_boxes: (M, 4)
        gt_areas: the annotation's ``area`` where it has one, (M,)
        gt_is_crowd: whether a detection in the box is neither right nor wrong, (M,)
        dt_images: index of the image, (D,)
        dt_classes: index of the class, (D,)
        dt_boxes: (D, 4)
        scores: (D,)
    """

    image_ids: list[int | str]
    class_names: list[str]
    gt_ids: list[int | str]
    gt_images: np.ndarray
    gt_classes: np.ndarray
    gt_boxes: np.ndarray
    gt_areas: np.ndarray
    gt_is_crowd: np.ndarray
    dt_images: np.ndarray
    dt_classes: np.ndarray
    dt_boxes: np.ndarray
    scores: np.ndarray

    @classmethod
    def from_coco(
        cls,
        content: Mapping[str, Any],
        detections: Records,
        *,
        gt_file: str | Path = "the ground truth",
        dt_file: str | Path = "the detections",
    ) -> BoxData:
        """Return the data of an instances json and of a list of results.

        Args:
            content: in COCO's instances format
            detections: records with ``image_id``, ``category_id``, ``bbox`` (XYWH) and ``score``
            gt_file: name of the first in messages
            dt_file: name of the second in messages

        Raises:
            InputError: an entry lacks a field, has a number that is not finite, or names an image
                or category that the ground truth does not list
        """
        annotations = content["annotations"]
        _require_ids(content, gt_file)
        labels = contiguous_category_ids(dict(content))
        ids = sorted({image["id"] for image in content["images"]}, key=id_order)
        images = {image_id: index for index, image_id in enumerate(ids)}
        names = {labels[c["id"]]: str(c.get("name", c["id"])) for c in content["categories"]}
        gt, dt = (annotations, "annotation", gt_file), (detections, "detection", dt_file)
        gt_boxes, dt_boxes = (_numbers(*each, "bbox", (4,)) for each in (gt, dt))
        scores = _numbers(*dt, "score", ())
        gt_images, dt_images = (_indices(*each, "image_id", images, gt_file) for each in (gt, dt))
        gt_classes, dt_classes = (
            _indices(*each, "category_id", labels, gt_file) for each in (gt, dt)
        )
        given = (a.get("area") for a in annotations)
        box_areas = gt_boxes[:, 2] * gt_boxes[:, 3]
        areas = [
            area if isinstance(area, int | float) else box_area
            for area, box_area in zip(given, box_areas, strict=True)
        ]
        by_image = np.argsort(gt_images, kind="stable")
        by_score = np.lexsort((-scores, dt_images))
        return cls(
            image_ids=ids,
            class_names=[names[label] for label in range(len(labels))],
            gt_ids=[annotations[i].get("id", i) for i in by_image.tolist()],
            gt_images=gt_images[by_image],
            gt_classes=gt_classes[by_image],
            gt_boxes=gt_boxes[by_image],
            gt_areas=np.array(areas, float)[by_image],
            gt_is_crowd=np.array([is_ignore_region(a) for a in annotations], bool)[by_image],
            dt_images=dt_images[by_score],
            dt_classes=dt_classes[by_score],
            dt_boxes=dt_boxes[by_score],
            scores=scores[by_score],
        )

    @classmethod
    def read(cls, content: Mapping[str, Any], gt_file: str | Path, dt_file: str | Path) -> BoxData:
        """Return the data of an instances json and of a file of detections.

        A warning says so if the detections' boxes look like another format than COCO's.

        Args:
            content: of ``gt_file``
            gt_file: the ground truth, for messages
            dt_file: detections in COCO's results format

        Raises:
            InputError: as for :meth:`from_coco`, or the file of detections cannot be read
        """
        detections = read_detections(dt_file)
        data = cls.from_coco(content, detections, gt_file=gt_file, dt_file=dt_file)
        if fault := _explain_box_format(content, data):
            logger.warning("%s: %s", dt_file, fault)
        return data

    @property
    def num_objects(self) -> np.ndarray:
        """Number of ground-truth boxes per class, without crowd regions (K,)."""
        return np.bincount(self.gt_classes[~self.gt_is_crowd], minlength=len(self.class_names))

    def require_objects(self) -> None:
        """Raise an InputError if there are no objects."""
        if not self.num_objects.sum():
            raise InputError("the ground truth has no objects, so there is nothing to evaluate")


def read_detections(path: str | Path) -> list[dict[str, Any]]:
    """Return the records of a file in COCO's results format, of scores in [0, 1].

    Raises:
        InputError: the file cannot be read, or holds something else
    """
    try:
        content = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, list):
        raise InputError(
            f"{path} is no file of detections in COCO's results format, which is a list of "
            "{image_id, category_id, bbox, score}"
        )
    scores = _numbers(content, "detection", path, "score", ())
    beyond = np.flatnonzero((scores < 0) | (scores > 1))
    if len(beyond):
        position = int(beyond[0])
        raise InputError(
            f"{path}: score {scores[position]:g} of detection {position} is not in [0, 1]"
        )
    return content


def _explain_box_format(content: Mapping[str, Any], data: BoxData) -> str | None:
    """Return why detections do not look like XYWH in pixels, or None."""
    sizes = {
        image["id"]: [
            side if is_number(side := image.get(key)) else np.nan for key in ("width", "height")
        ]
        for image in content["images"]
    }
    by_index = np.array([sizes[image_id] for image_id in data.image_ids])
    num_boxes = len(data.dt_boxes)
    boxes = BoxTable(
        list(range(num_boxes)),
        data.dt_boxes,
        by_index[data.dt_images],
        np.full(num_boxes, np.nan),
    )
    reason = explain_other_format(boxes, "xywh")
    return reason and f"{reason}; COCO's results format has {BOX_FORMATS['xywh']} in pixels"


def _require_ids(content: Mapping[str, Any], file: str | Path) -> None:
    for key in ("images", "categories"):
        for position, entry in enumerate(content[key]):
            if not isinstance(entry, Mapping) or not isinstance(entry.get("id"), int | str):
                raise InputError(f"{file}: entry {position} of {key} has no id")


def _numbers(
    records: Records, what: str, file: str | Path, key: str, shape: tuple[int, ...]
) -> np.ndarray:
    """Return a column of finite numbers, (number of records, *shape)."""
    try:
        column = np.array([record[key] for record in records], float)
        column = column.reshape(len(records), *shape) if not len(records) else column
        if column.shape == (len(records), *shape) and np.isfinite(column).all():
            return column
    except (KeyError, TypeError, ValueError):
        pass
    if len(records) > 1:  # find the first that does not fit
        for position in range(len(records)):
            _numbers(records[position : position + 1], f"{what} {position}", file, key, shape)
    wanted = "four finite numbers" if shape else "a finite number"
    raise InputError(f"{file}: {what} has no {key} of {wanted}")


def _written(value: Any) -> str:
    """Return an id as JSON writes it, because the text "7" is not the number 7."""
    return f'"{printable(value)}"' if isinstance(value, str) else printable(value)


def _indices(
    records: Records,
    what: str,
    file: str | Path,
    key: str,
    known: Mapping[Any, int],
    known_in: str | Path,
) -> np.ndarray:
    """Return the index of an id of each record, (number of records,)."""
    ids = [record.get(key) for record in records]
    unknown = [each for each in ids if not isinstance(each, int | str) or each not in known]
    if unknown:
        some = join_some(dict.fromkeys(map(_written, unknown)), 5)
        raise InputError(
            f"{file}: the {key} of {len(unknown)} of {len(records)} {what}s is not listed in "
            f"{known_in}: {some}"
        )
    return np.array([known[each] for each in ids], np.int64)
