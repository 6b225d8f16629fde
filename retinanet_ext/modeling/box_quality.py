"""How well predicted boxes overlap their ground truth.

Shapes: N images, R anchors over all levels, M boxes, F pairs of a box and its ground truth. Boxes:
XYXY in input pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from torch import Tensor
from torchvision.ops import box_iou

from retinanet_ext.losses.functional import upcast_to_float32


@torch.no_grad()
def box_quality(
    transform: Box2BoxTransform,
    anchors: Tensor,
    deltas: Tensor,
    foreground: Tensor,
    matched_idxs: Tensor,
    gt_boxes: Tensor,
) -> Tensor:
    """Return the IoU of each foreground anchor's decoded box with its ground truth, (N, R).

    It is computed for every anchor, because listing the foreground would make the host wait for a
    GPU. The others' is that of an anchor with itself.

    Args:
        transform: decodes ``deltas``
        anchors: (R, 4)
        deltas: predicted box regression, (N, R, 4)
        foreground: which anchors are foreground, (N, R)
        matched_idxs: index of each anchor's box in ``gt_boxes``, (N, R)
        gt_boxes: boxes of all images, (M, 4)
    """
    if not len(gt_boxes):
        return torch.zeros_like(foreground, dtype=torch.float32)
    marked = foreground.unsqueeze(2)
    boxes = transform.apply_deltas(
        upcast_to_float32(deltas).masked_fill(~marked, 0).flatten(0, 1),
        anchors.expand(len(deltas), -1, -1).flatten(0, 1),
    )
    targets = torch.where(marked, gt_boxes[matched_idxs], anchors).flatten(0, 1)
    return iou_of_pairs(box_iou, boxes, targets).view_as(foreground)


def iou_of_pairs(
    iou: Callable[[Tensor, Tensor], Tensor], boxes: Tensor, gt_boxes: Tensor
) -> Tensor:
    """Return torchvision's IoU of each box with its ground truth, both (F, 4): (F,).

    Its loss functions index the boxes that overlap, which waits for a GPU. Those of fvcore and
    Detectron2 also assert that boxes are valid, which would end a diverging run unexplained.
    """
    return torch.vmap(lambda box, gt_box: iou(box[None], gt_box[None])[0, 0])(boxes, gt_boxes)
