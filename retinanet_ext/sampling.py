"""Which anchors count in the loss: all of them, or the hardest (OHEM, sections 3 and 5.3).

Shapes: N images, R anchors over all levels, K classes. Boxes: XYXY in input pixels. Labels:
-1 ignore, 0..K-1 class, K background.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import floor
from typing import ClassVar

import torch
from torch import Tensor
from torchvision.ops import box_iou, nms

from retinanet_ext.errors import InputError
from retinanet_ext.losses.registry import Interval

__all__ = ["OHEM", "SELECTIONS", "SelectAll"]

NMS_BOXES = ("anchors", "predictions")
SCOPES = ("image", "process")

# Candidates per block of the NMS, and kept boxes compared with them at a time: large enough to fill
# a device, small enough that their IoU matrix stays in the tens of megabytes.
_FIRST_BLOCK, _LARGEST_BLOCK, _COMPARED = 1024, 4096, 1024


@dataclass(frozen=True)
class SelectAll:
    """Select every anchor that is not ignored, easy ones too, as the focal loss does.

    Example:
        >>> labels = torch.tensor([[0, -1, 80]])  # foreground, ignored, background
        >>> SelectAll()(torch.zeros(1, 3), labels, torch.zeros(3, 4), num_classes=80)
        tensor([[ True, False,  True]])
    """

    nms_boxes: ClassVar[str] = "anchors"

    def __call__(self, losses: Tensor, labels: Tensor, boxes: Tensor, num_classes: int) -> Tensor:
        """Return the mask of the selected anchors, (N, R)."""
        return labels >= 0


@dataclass(frozen=True)
class OHEM:
    """Online hard example mining for a dense detector (sections 3 and 5.3).

    Anchors are scored by their loss and pass non-maximum suppression (NMS). The ``batch_size``
    anchors with the highest loss form the mini-batch; all others are discarded. An ``InputError``
    names an argument that is out of range.

    Attributes:
        batch_size: number of anchors in a mini-batch, 1 or more
        nms_thresh: IoU above which the anchor with the lower loss is suppressed, in (0, 1]
        neg_pos_ratio: 0 for no constraint; r > 0 selects positives and negatives in the ratio 1:r
            (SSD's variant, r = 3). With few positives there are fewer negatives too; an image
            without positives keeps r negatives.
        nms_boxes: boxes that the NMS compares, the ``anchors`` or the ``predictions``
        scope: one mini-batch per ``image``, or one for all images of a ``process``

    Example:
        >>> losses = torch.tensor([[0.9, 0.8, 0.1, 0.2]])
        >>> boxes = torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 8], [20, 0, 29, 9], [40, 0, 49, 9]])
        >>> OHEM(batch_size=2)(losses, torch.tensor([[0, 0, 1, 1]]), boxes, num_classes=1)
        tensor([[ True, False, False,  True]])
    """

    batch_size: int = 128
    nms_thresh: float = 0.5
    neg_pos_ratio: float = 0.0
    nms_boxes: str = "anchors"
    scope: str = "image"

    def __post_init__(self) -> None:
        Interval("[1, inf)").check("OHEM batch_size", self.batch_size)
        Interval("(0, 1]").check("OHEM nms_thresh", self.nms_thresh)
        Interval("[0, inf)").check("OHEM neg_pos_ratio", self.neg_pos_ratio)
        if self.nms_boxes not in NMS_BOXES:
            raise InputError(f"OHEM nms_boxes must be one of {NMS_BOXES}, got {self.nms_boxes!r}")
        if self.scope not in SCOPES:
            raise InputError(f"OHEM scope must be one of {SCOPES}, got {self.scope!r}")

    @torch.compiler.disable  # the search branches on values
    @torch.no_grad()
    def __call__(self, losses: Tensor, labels: Tensor, boxes: Tensor, num_classes: int) -> Tensor:
        """Return the mask of the selected anchors, (N, R).

        Args:
            losses: classification loss of each anchor, summed over classes, (N, R)
            labels: (N, R)
            boxes: boxes for the NMS, (N, R, 4), or the same for every image, (R, 4)
            num_classes: K
        """
        num_images, num_anchors = labels.shape
        boxes = boxes.expand(num_images, num_anchors, 4)
        positive = labels != num_classes
        groups = [
            i * num_anchors + self._survivors(losses[i], labels[i] >= 0, positive[i], boxes[i])
            for i in range(num_images)
        ]
        losses, positive = losses.flatten(), positive.flatten()
        if self.scope == "process":
            group = torch.cat(groups)
            groups = [group[losses[group].argsort(descending=True, stable=True)]]
        mask = torch.zeros_like(positive)
        for group in groups:
            mask[self._hardest(group, positive[group])] = True
        return mask.view(num_images, num_anchors)

    def _survivors(self, losses: Tensor, valid: Tensor, positive: Tensor, boxes: Tensor) -> Tensor:
        """Return the anchors that survive the NMS of one image, hardest first.

        Greedy NMS decides in order of loss, so it can stop as soon as the mini-batch is decided:
        when it is full and, with a ratio, all positives that it can take are known. The selection
        is that of a full NMS.
        """
        ranked = valid.nonzero().squeeze(1)
        ranked = ranked[losses[ranked].argsort(descending=True, stable=True)]
        pending = positive[ranked].nonzero().squeeze(1)  # ranks of the undecided positives
        boxes, losses = boxes.float(), losses.float()

        kept = ranked[:0]
        start, size = 0, _FIRST_BLOCK
        while start < len(ranked) and not self._is_full(positive[kept], len(pending)):
            block = ranked[start : start + size]
            start, size = start + size, min(2 * size, _LARGEST_BLOCK)
            block = block[~self._suppressed(boxes[block], boxes[kept])]
            block = block[nms(boxes[block], losses[block], self.nms_thresh)]
            kept = torch.cat([kept, block])
            if self.neg_pos_ratio > 0:
                pending = pending[pending >= start]
                pending = pending[~self._suppressed(boxes[ranked[pending]], boxes[block])]
        return kept

    def _suppressed(self, boxes: Tensor, kept: Tensor) -> Tensor:
        """Return the mask of the boxes whose IoU with a kept box exceeds the threshold."""
        suppressed = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
        for start in range(0, len(kept), _COMPARED):
            part = kept[start : start + _COMPARED]
            suppressed |= box_iou(boxes, part).amax(1) > self.nms_thresh
        return suppressed

    def _is_full(self, positive: Tensor, num_pending: int) -> bool:
        """Tell whether the survivors so far decide the mini-batch."""
        if self.neg_pos_ratio == 0:
            return len(positive) >= self.batch_size
        num_positive = int(positive.sum())
        enough_positives = num_positive >= self._most_positives() or num_pending == 0
        return enough_positives and len(positive) - num_positive >= self.batch_size

    def _most_positives(self) -> int:
        return max(1, floor(self.batch_size / (1 + self.neg_pos_ratio)))

    def _hardest(self, group: Tensor, positive: Tensor) -> Tensor:
        """Return the mini-batch from survivors sorted by loss."""
        if self.neg_pos_ratio == 0:
            return group[: self.batch_size]
        positives = group[positive][: self._most_positives()]
        negatives = floor(max(len(positives), 1) * self.neg_pos_ratio)
        negatives = min(negatives, self.batch_size - len(positives))
        return torch.cat([positives, group[~positive][:negatives]])


SELECTIONS: dict[str, type[SelectAll] | type[OHEM]] = {"all": SelectAll, "ohem": OHEM}
