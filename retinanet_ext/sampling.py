"""Which anchors count in the loss: all of them, or the hardest (OHEM, sections 3 and 5.3).

Shapes: N images, R anchors over all levels, K classes. Labels: -1 ignore, 0..K-1 class,
K background. Boxes: XYXY in input pixels.
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

# Candidates a block of the NMS, and boxes they are compared with at a time: large enough to fill a
# device, small enough that their IoU stays in the tens of megabytes.
_FIRST_BLOCK, _LARGEST_BLOCK, _COMPARED = 1024, 4096, 1024


@dataclass(frozen=True)
class SelectAll:
    """Every anchor that is not ignored counts, easy ones too (the focal loss's choice)."""

    nms_boxes: ClassVar[str] = "anchors"

    def __call__(self, losses: Tensor, labels: Tensor, boxes: Tensor, num_classes: int) -> Tensor:
        """Return the mask of the anchors that count, (N, R)."""
        return labels >= 0


@dataclass(frozen=True)
class OHEM:
    """Online hard example mining for a dense detector (section 5.3).

    Anchors are scored by their loss, non-maximum suppression is applied, and the ``batch_size``
    anchors of highest loss make the mini-batch; all others are discarded.

    Attributes:
        batch_size: anchors in a mini-batch
        nms_thresh: IoU above which the anchor of lower loss is suppressed
        neg_pos_ratio: 0 for no constraint; r > 0 builds the mini-batch from positives and
            negatives in the ratio 1:r (SSD's variant, r = 3). Where positives are few, negatives
            are fewer too; an image without positives keeps r negatives.
        nms_boxes: which boxes stand for the anchors in the NMS, ``anchors`` or the ``predictions``
        scope: one mini-batch an ``image``, or one for all images of a ``process``
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

    @torch.compiler.disable  # the search goes by values
    @torch.no_grad()
    def __call__(self, losses: Tensor, labels: Tensor, boxes: Tensor, num_classes: int) -> Tensor:
        """Return the mask of the anchors that count.

        Args:
            losses: classification loss of each anchor, summed over classes, (N, R)
            labels: (N, R)
            boxes: boxes for the NMS, (N, R, 4), or the same for every image, (R, 4)
            num_classes: K

        Returns:
            boolean mask, (N, R)
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
        """Return what survives the NMS of one image, hardest first, as far down as it matters.

        Greedy NMS decides in order of score, so it can stop as soon as the mini-batch is full, or,
        where positives are counted, as soon as all positives further down are suppressed. The
        result is that of a full NMS.
        """
        ranked = valid.nonzero().squeeze(1)
        ranked = ranked[losses[ranked].argsort(descending=True, stable=True)]
        pending = positive[ranked].nonzero().squeeze(1)  # ranks of positives not decided yet
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
        """Tell which boxes overlap one of those kept by more than the threshold."""
        suppressed = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
        for part in kept.split(_COMPARED):
            if len(part):
                suppressed |= box_iou(boxes, part).amax(1) > self.nms_thresh
        return suppressed

    def _is_full(self, positive: Tensor, num_pending: int) -> bool:
        """Tell whether the survivors so far decide the mini-batch, whatever comes after them."""
        if self.neg_pos_ratio == 0:
            return len(positive) >= self.batch_size
        num_positive = int(positive.sum())
        enough_positives = num_positive >= self._most_positives() or num_pending == 0
        return enough_positives and len(positive) - num_positive >= self.batch_size

    def _most_positives(self) -> int:
        return max(1, floor(self.batch_size / (1 + self.neg_pos_ratio)))

    def _hardest(self, group: Tensor, positive: Tensor) -> Tensor:
        """Return the mini-batch out of survivors ordered by loss."""
        if self.neg_pos_ratio == 0:
            return group[: self.batch_size]
        positives = group[positive][: self._most_positives()]
        negatives = floor(max(len(positives), 1) * self.neg_pos_ratio)
        negatives = min(negatives, self.batch_size - len(positives))
        return torch.cat([positives, group[~positive][:negatives]])


SELECTIONS: dict[str, type[SelectAll] | type[OHEM]] = {"all": SelectAll, "ohem": OHEM}
