"""Pictures of errors: whole images with their ground truth and detections, and doubtful boxes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from retinanet_ext.data.images import ImageReader
from retinanet_ext.evaluation.detection_matches import Matches
from retinanet_ext.evaluation.error_examples import is_counted
from retinanet_ext.evaluation.fonts import choose_fonts
from retinanet_ext.evaluation.pictures import Box, draw_panel, read_picture, save_grid

CROP = 2.5
"""Side of the picture of a box, as a multiple of the box's longer side."""

MIN_CROP = 64  # pixels
MAX_DRAWN_DOUBTS = 4


class ErrorPictures:
    """Draws images of an evaluation."""

    def __init__(
        self,
        matches: Matches,
        thresholds: Sequence[float],
        files: Mapping[Any, str],
        reader: ImageReader,
    ) -> None:
        """
        Args:
            matches: of all detections
            thresholds: lowest score of the detections that are drawn, per class
            files: image id -> file
            reader: reads images of their format
        """
        self._matches = matches
        self._counted = is_counted(matches.data, thresholds) & ~matches.is_ignored
        self._files = files
        self._reader = reader
        self._names, self._families = choose_fonts(matches.data.class_names)

    def draw_image(self, image: Mapping[str, Any], path: Path) -> None:
        """Draw the ground truth at the left and the detections at the right.

        Nothing is drawn if the image cannot be read.

        Args:
            image: an entry of ``worst_images``
            path: PNG file to write
        """
        matches, data = self._matches, self._matches.data
        picture = read_picture(self._reader, self._files[image["image_id"]])
        if picture is None:
            return
        found = set(matches.gt_of_dt[self._counted & matches.is_right].tolist())
        in_image = (data.gt_images == image["index"]) & ~data.gt_is_crowd
        objects = [
            self._object(gt, "" if gt in found else " missed")
            for gt in np.flatnonzero(in_image).tolist()
        ]
        of_image = np.flatnonzero((data.dt_images == image["index"]) & self._counted)
        detections = [
            self._detection(dt, "" if matches.is_right[dt] else " wrong") for dt in of_image[::-1]
        ]
        titles = (
            f"image {image['image_id']}, objects: {len(objects)}, missed: {image['missed']}",
            f"detections: {len(detections)}, wrong: {image['false_positives']}",
        )
        panels = [
            self._draw(picture, title, boxes)
            for title, boxes in zip(titles, (objects, detections), strict=True)
        ]
        save_grid(panels, path)

    def draw_doubts(self, doubts: Sequence[Mapping[str, Any]], path: Path) -> None:
        """Draw the surroundings of doubtful boxes, with all ground truth there.

        Args:
            doubts: records of ``label_doubts``; the first few are drawn, without those whose image
                cannot be read
            path: PNG file to write
        """
        panels = []
        for doubt in doubts[:MAX_DRAWN_DOUBTS]:
            dt, gt = doubt["dt"], doubt["gt"]
            picture = read_picture(self._reader, self._files[doubt["image_id"]])
            if picture is None:
                continue
            data = self._matches.data
            chosen = data.dt_boxes[dt] if dt >= 0 else data.gt_boxes[gt]
            start, end = _crop(chosen, picture.size)
            image = data.dt_images[dt] if dt >= 0 else data.gt_images[gt]
            gts = np.flatnonzero((data.gt_images == image) & ~data.gt_is_crowd).tolist()
            boxes = [self._object(i, " in doubt" if i == gt else " labelled") for i in gts]
            boxes += [self._detection(dt)] if dt >= 0 else []
            boxes = [
                (label, np.subtract(box, (*start, *start)), text) for label, box, text in boxes
            ]
            boxes = [b for b in boxes if (b[1][2:] > 0).all() and (b[1][:2] < end - start).all()]
            title = f"image {doubt['image_id']} at x {start[0]}, y {start[1]}"
            panels.append(self._draw(picture.crop((*start, *end)), title, boxes))
        if panels:
            save_grid(panels, path)

    def _draw(self, picture: Image.Image, title: str, boxes: Sequence[Box]) -> Any:
        return draw_panel(picture, title, boxes, self._names, self._families)

    def _object(self, gt: int, note: str) -> Box:
        data = self._matches.data
        return int(data.gt_classes[gt]), _xyxy(data.gt_boxes[gt]), note

    def _detection(self, dt: int, note: str = "") -> Box:
        data = self._matches.data
        text = f" {data.scores[dt]:.2f}{note}"
        return int(data.dt_classes[dt]), _xyxy(data.dt_boxes[dt]), text


def _xyxy(box: np.ndarray) -> list[float]:
    return [*box[:2], *(box[:2] + box[2:])]


def _crop(box: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the corners of a square around a box (XYWH), moved and cut to lie in the image."""
    side = np.minimum(np.ceil(max(CROP * max(box[2:]), MIN_CROP)), size)
    start = np.clip(np.floor(box[:2] + box[2:] / 2 - side / 2), 0, np.subtract(size, side))
    return start.astype(int), (start + side).astype(int)
