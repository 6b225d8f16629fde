"""Views of an image that the detector sees one by one, and the merge of their detections.

A view is the whole image, a tile of it, or one of these flipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from detectron2.layers import batched_nms
from detectron2.structures import Boxes, Instances, pairwise_ioa
from torch import Tensor

CUT_MARGIN = 0.01
"""Distance to a tile's inner border, as a fraction of the tile's side, of a box that it cuts."""
CUT_OVERLAP = 0.5
"""Fraction of a cut box within another box of its class that drops it."""


@dataclass(frozen=True)
class View:
    """A part of an image as the detector sees it.

    Attributes:
        box: the part, XYXY in pixels
        flipped: mirrored left to right
        smallest: boxes whose sides are no longer, in pixels, are left to other views
    """

    box: tuple[int, int, int, int]
    flipped: bool = False
    smallest: int = 0

    def crop(self, image: np.ndarray) -> np.ndarray:
        """Return the view's pixels of an image, (H, W, C)."""
        left, top, right, bottom = self.box
        pixels = image[top:bottom, left:right]
        return pixels[:, ::-1] if self.flipped else pixels

    def to_image(self, boxes: Tensor) -> Tensor:
        """Return boxes of the view, (M, 4), in pixels of the image."""
        if self.flipped:
            width = self.box[2] - self.box[0]
            boxes = torch.stack(
                [width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1
            )
        return boxes + boxes.new_tensor([*self.box[:2], *self.box[:2]])

    def cuts(self, boxes: Tensor, size: tuple[int, int]) -> Tensor:
        """Return which boxes, (M, 4) in pixels of the image, reach an inner border of the view.

        Args:
            size: (height, width) of the image
        """
        left, top, right, bottom = self.box
        height, width = size
        x, y = CUT_MARGIN * (right - left), CUT_MARGIN * (bottom - top)
        return (
            ((boxes[:, 0] < left + x) & (left > 0))
            | ((boxes[:, 1] < top + y) & (top > 0))
            | ((boxes[:, 2] > right - x) & (right < width))
            | ((boxes[:, 3] > bottom - y) & (bottom < height))
        )


def make_views(
    size: tuple[int, int], *, tile: int = 0, overlap: float = 0.2, tta: bool = False
) -> list[View]:
    """Return the views of an image, the whole image first.

    Tiles of an image that does not fit in one follow. Neighbours share at least ``overlap`` of
    their side; the last of a row or column ends with the image and has the full size too, unless
    the image is smaller.

    Args:
        size: (height, width) of the image
        tile: side of a tile in pixels; 0: no tiles
        overlap: fraction of a tile's side in [0, 1)
        tta: see each of these flipped too

    Example:
        >>> [view.box for view in make_views((480, 1000), tile=640, overlap=0.2)]
        [(0, 0, 1000, 480), (0, 0, 640, 480), (360, 0, 1000, 480)]
    """
    height, width = size
    views = [View((0, 0, width, height))]
    if tile and max(size) > tile:
        # What is no longer than the overlap is whole in a tile, which shows it larger.
        views = [replace(views[0], smallest=int(tile * overlap))]
        views += [
            View((left, top, min(left + tile, width), min(top + tile, height)))
            for top in _starts(height, tile, overlap)
            for left in _starts(width, tile, overlap)
        ]
    if not tta:
        return views
    return [replace(view, flipped=flipped) for view in views for flipped in (False, True)]


def _starts(side: int, tile: int, overlap: float) -> list[int]:
    """Return where tiles begin along a side of the image."""
    last = max(side - tile, 0)
    step = max(int(tile * (1 - overlap)), 1)
    return [*range(0, last, step), last]


def merge_views(
    views: Sequence[View], found: Sequence[Instances], size: tuple[int, int], iou_thresh: float
) -> Instances:
    """Return the detections of an image from those of its views; those of one view unchanged.

    Boxes of the whole image that are no longer than the tiles' overlap are left out. Two rules per
    class follow, to which the best score comes first:

    1. Of boxes that no tile cuts, non-maximum suppression keeps one.
    2. A box that an inner border of its tile cuts is kept if less than :data:`CUT_OVERLAP` of its
       area lies in a box that is kept already.

    An object that is no longer than the tiles' overlap is whole in a tile, so its cut boxes go. If
    an object up to three times as long is whole in no view, one of its cut boxes remains, because
    two of them share at least half of the smaller one's area.

    Args:
        views: the views
        found: detections of each, in its own pixels, on the CPU
        size: (height, width) of the image
        iou_thresh: boxes of a class that overlap by more IoU are one object
    """
    if len(views) == 1:
        return found[0]
    found = [
        f[(f.pred_boxes.tensor[:, 2:] - f.pred_boxes.tensor[:, :2]).amax(1) > v.smallest]
        for v, f in zip(views, found, strict=True)
    ]
    boxes = [v.to_image(f.pred_boxes.tensor) for v, f in zip(views, found, strict=True)]
    cut = torch.cat([v.cuts(b, size) for v, b in zip(views, boxes, strict=True)])
    merged = Instances(size)
    merged.pred_boxes = Boxes(torch.cat(boxes))
    merged.scores = torch.cat([f.scores for f in found])
    merged.pred_classes = torch.cat([f.pred_classes for f in found])

    whole = merged[~cut]
    kept = batched_nms(whole.pred_boxes.tensor, whole.scores, whole.pred_classes, iou_thresh)
    result = Instances.cat([whole[kept], _keep_cut(merged[cut], whole[kept])])
    return result[result.scores.argsort(descending=True, stable=True)]


def _keep_cut(cut: Instances, whole: Instances) -> Instances:
    """Return the cut boxes of which less than :data:`CUT_OVERLAP` lies in a kept box."""
    cut = cut[cut.scores.argsort(descending=True, stable=True)]
    every = Instances.cat([cut, whole])
    # The smaller of two cut boxes may be the better one, so their overlap is of the smaller area.
    inside = pairwise_ioa(every.pred_boxes, cut.pred_boxes)
    inside[: len(cut)] = inside[: len(cut)].maximum(inside[: len(cut)].T)
    covers = (inside >= CUT_OVERLAP) & (every.pred_classes[:, None] == cut.pred_classes)
    kept = torch.zeros(len(every), dtype=torch.bool)
    kept[len(cut) :] = True
    for index in range(len(cut)):
        kept[index] = not (covers[:, index] & kept).any()
    return cut[kept[: len(cut)]]
