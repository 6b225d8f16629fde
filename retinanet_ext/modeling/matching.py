"""Labels of anchors by IoU with the ground truth (section 4).

Shapes: N images, R anchors over all levels, S of a block of them, K classes, M boxes of an image.
Boxes: XYXY in input pixels. Labels: -1 ignore, 0..K-1 class, K background.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from retinanet_ext.errors import InputError
from retinanet_ext.losses.dense import HAS_TRITON

LOW_QUALITY_MATCHES = ("all", "ignored_band", "none")

# Pairs of a box and an anchor looked at together: what a core's cache holds, what fills a GPU.
PAIRS_CPU, PAIRS_GPU = 2**18, 2**24
MIN_BLOCK = 256  # anchors; in smaller blocks the calls cost more than the work


class AnchorMatcher:
    """Detectron2's ``Matcher`` block of anchors by block, so that no M x R matrix is held.

    It has a policy for the boxes that no anchor reaches: ``all`` and ``none`` are Detectron2's
    ``allow_low_quality_matches``; ``ignored_band`` is the authors' code, in which a box's best
    anchor becomes foreground only where it would otherwise be ignored. Unlike Detectron2's, a
    box that overlaps no anchor at all matches none, instead of every anchor it does not overlap.
    """

    def __init__(
        self, thresholds: list[float], labels: list[int], low_quality_matches: str = "all"
    ) -> None:
        """
        Args:
            thresholds: IoU limits in rising order, the paper's [0.4, 0.5]
            labels: 0 background, -1 ignore, 1 foreground; one more than thresholds
            low_quality_matches: one of :data:`LOW_QUALITY_MATCHES`
        """
        if low_quality_matches not in LOW_QUALITY_MATCHES:
            raise InputError(
                f"MODEL.RETINANET.LOW_QUALITY_MATCHES must be one of {LOW_QUALITY_MATCHES}, "
                f"got {low_quality_matches!r}"
            )
        rising = all(0 < t <= 1 for t in thresholds) and sorted(thresholds) == list(thresholds)
        if not rising or len(labels) != len(thresholds) + 1 or not set(labels) <= {-1, 0, 1}:
            raise InputError(
                "MODEL.RETINANET.IOU_THRESHOLDS must rise within (0, 1] and IOU_LABELS give a -1, "
                f"0 or 1 to each interval between them, got {thresholds} and {labels}"
            )
        self.thresholds = list(thresholds)
        self.labels = list(labels)
        self.low_quality_matches = low_quality_matches

    @classmethod
    def from_detectron2(cls, matcher: Matcher) -> AnchorMatcher:
        """Return the same rule as Detectron2's matcher, whose thresholds end in infinities."""
        policy = "all" if matcher.allow_low_quality_matches else "none"
        return cls(matcher.thresholds[1:-1], matcher.labels, policy)

    def __call__(self, boxes: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
        """Match every anchor to the box it overlaps most, of equals the first.

        Args:
            boxes: (M, 4), one at least
            anchors: (R, 4)

        Returns:
            indices of boxes, (R,) int64, and 0 background, -1 ignore or 1 foreground, (R,) int8
        """
        pairs = PAIRS_CPU if shapes_may_follow_values(anchors) else PAIRS_GPU
        # Coordinates as rows, each contiguous.
        blocks = anchors.T.contiguous().split(max(MIN_BLOCK, pairs // len(boxes)), dim=1)
        near = [_boxes_near(boxes, block) for block in blocks]
        ious, matched_idxs, box_ious = [], [], []
        for block, index in zip(blocks, near, strict=True):
            iou = _pairwise_iou(boxes[index], block)
            best, match = iou.max(dim=0)
            ious.append(best)
            matched_idxs.append(index[match])
            box_ious.append(iou.amax(dim=1))

        best = torch.cat(ious)
        labels = torch.full_like(best, self.labels[0], dtype=torch.int8)
        for threshold, label in zip(self.thresholds, self.labels[1:], strict=True):
            labels.masked_fill_(best >= threshold, label)
        if self.low_quality_matches != "none":
            best_of_a_box = _best_of_a_box(boxes, blocks, near, box_ious)
            if self.low_quality_matches == "ignored_band":
                best_of_a_box &= labels != 0
            labels.masked_fill_(best_of_a_box, 1)
        return torch.cat(matched_idxs), labels


def shapes_may_follow_values(tensor: Tensor) -> bool:
    """Tell whether to list what counts, or to compute all of it.

    To list, the host would wait for a GPU; code that torch.compile generates has fixed shapes.
    """
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _boxes_near(boxes: Tensor, block: Tensor) -> Tensor:
    """Return the indices, rising, of the boxes that may overlap a block of anchors, (4, S).

    The first is always among them: it is the match of anchors that overlap none.
    """
    if not shapes_may_follow_values(block):  # how many are near, it would have to wait to know
        return torch.arange(len(boxes), device=boxes.device)
    lower, upper = block[:2].amin(1), block[2:].amax(1)
    near = (torch.minimum(boxes[:, 2:], upper) > torch.maximum(boxes[:, :2], lower)).all(1)
    near[0] = True
    return near.nonzero()[:, 0]


def _best_of_a_box(
    boxes: Tensor, blocks: Sequence[Tensor], near: list[Tensor], box_ious: list[Tensor]
) -> Tensor:
    """Return which anchors no other overlaps any one box more than, equals included, (R,).

    Args:
        boxes: (M, 4)
        blocks: the anchors, (4, S) each
        near: indices of the boxes looked at in each block
        box_ious: the best IoU of each of these boxes within the block
    """
    best = box_ious[0].new_zeros(len(boxes))
    for index, iou in zip(near, box_ious, strict=True):
        best[index] = torch.maximum(best[index], iou)
    best.masked_fill_(best == 0, torch.inf)  # which no anchor reaches
    masks = []
    for block, index, iou in zip(blocks, near, box_ious, strict=True):
        if shapes_may_follow_values(block):
            index = index[iou == best[index]]  # few boxes have their best anchor in this block
        masks.append((_pairwise_iou(boxes[index], block) == best[index, None]).any(dim=0))
    return torch.cat(masks)


def _pairwise_iou(boxes: Tensor, block: Tensor) -> Tensor:
    """Return the IoU of boxes, (M, 4), and anchors, (4, S): (M, S).

    Equal to Detectron2's ``pairwise_iou`` in every bit, without its (M, S, 2) temporaries.
    """
    left, top, right, bottom = boxes.T.unsqueeze(2)
    a_left, a_top, a_right, a_bottom = block
    areas = (right - left) * (bottom - top)
    a_areas = (a_right - a_left) * (a_bottom - a_top)
    iou = torch.minimum(right, a_right).sub_(torch.maximum(left, a_left)).clamp_(min=0)
    iou *= torch.minimum(bottom, a_bottom).sub_(torch.maximum(top, a_top)).clamp_(min=0)
    # Boxes without area, which overlap nothing, must not make 0 / 0.
    union = (areas + a_areas).sub_(iou).clamp_(min=torch.finfo(iou.dtype).tiny)
    return iou.div_(union)


def is_foreground(labels: Tensor, num_classes: int) -> Tensor:
    """Return the mask of labels that are a class."""
    return (labels >= 0) & (labels < num_classes)


@torch.no_grad()
def label_anchors(
    matcher: AnchorMatcher | Matcher,
    anchors: Boxes,
    gt_instances: list[Instances],
    num_classes: int,
) -> tuple[Tensor, Tensor]:
    """Label every anchor of every image.

    Args:
        matcher: IoU to label, this plugin's or Detectron2's
        anchors: the R anchors of all levels
        gt_instances: ``gt_boxes`` and ``gt_classes`` of each image; images without boxes are fine
        num_classes: K

    Returns:
        labels, (N, R) int64, and the box each anchor matches best as an index into the boxes of
        all images concatenated, (N, R) int64 (of no meaning where the anchor is background)
    """
    if isinstance(matcher, Matcher):
        matcher = AnchorMatcher.from_detectron2(matcher)
    has_kernel = HAS_TRITON and anchors.tensor.is_cuda and anchors.tensor.dtype == torch.float32
    if has_kernel and not torch.compiler.is_compiling():
        return _label_anchors_by_kernel(matcher, anchors.tensor, gt_instances, num_classes)
    labels, matched_idxs = [], []
    first = 0
    for instances in gt_instances:
        if len(instances) and len(anchors):
            match, match_labels = matcher(instances.gt_boxes.tensor, anchors.tensor)
            match += first
            label = instances.gt_classes[match - first]
            label.masked_fill_(match_labels == 0, num_classes)
            label.masked_fill_(match_labels == -1, -1)
        else:
            match = torch.zeros(len(anchors), dtype=torch.int64, device=anchors.device)
            label = torch.full_like(match, num_classes)
        labels.append(label)
        matched_idxs.append(match)  # of an image without boxes, the batch's first box
        first += len(instances)
    return torch.stack(labels), torch.stack(matched_idxs)


def _label_anchors_by_kernel(
    matcher: AnchorMatcher, anchors: Tensor, gt_instances: list[Instances], num_classes: int
) -> tuple[Tensor, Tensor]:
    from retinanet_ext import kernels

    classes = [instances.gt_classes for instances in gt_instances]
    return kernels.label_anchors(
        anchors,
        pad_sequence([instances.gt_boxes.tensor for instances in gt_instances], batch_first=True),
        pad_sequence(classes, batch_first=True),
        torch.cat([labels.new_full((1,), len(labels)) for labels in classes]),
        num_classes=num_classes,
        thresholds=matcher.thresholds,
        threshold_labels=matcher.labels,
        low_quality={"none": 0, "ignored_band": 1, "all": 2}[matcher.low_quality_matches],
    )


@torch.no_grad()
def ignore_anchors(
    labels: Tensor,
    anchors: Tensor,
    regions: Sequence[Tensor | None],
    image_sizes: Sequence[tuple[int, int]],
    num_classes: int,
    overlap: float,
) -> Tensor:
    """Return labels with -1 for background anchors that lie in a region to ignore.

    As COCO's evaluation forgives a detection there: by the share of its area that one region
    covers, of an anchor the area inside the image.

    Args:
        labels: (N, R)
        anchors: (R, 4)
        regions: boxes of each image's regions, (M, 4) on any device, or None
        image_sizes: (height, width) of each image, unpadded
        num_classes: K
        overlap: share in (0, 1] from which on an anchor is ignored
    """
    inside = torch.zeros_like(labels, dtype=torch.bool)
    for image, (boxes, size) in enumerate(zip(regions, image_sizes, strict=True)):
        if boxes is None or not len(boxes):
            continue
        height, width = size
        # Not by Boxes.clip, which would have the host wait for a GPU.
        x, y = anchors[:, ::2].clamp(0, width), anchors[:, 1::2].clamp(0, height)
        clipped = torch.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], dim=1)
        areas = (clipped[:, 2:] - clipped[:, :2]).prod(1)
        for box in boxes.to(anchors):
            left_top = torch.maximum(clipped[:, :2], box[:2])
            right_bottom = torch.minimum(clipped[:, 2:], box[2:])
            shared = (right_bottom - left_top).clamp(min=0).prod(1)
            inside[image] |= (shared >= overlap * areas) & (shared > 0)
    return labels.masked_fill(inside & (labels == num_classes), -1)


def undefined_targets(instances: Instances, num_classes: int) -> tuple[Tensor, Tensor]:
    """Return which boxes the loss is not defined on, (M,), and which classes, (M,)."""
    boxes = instances.gt_boxes.tensor
    degenerate = ~((boxes[:, 2:] > boxes[:, :2]).all(1) & boxes.isfinite().all(1))
    return degenerate, ~is_foreground(instances.gt_classes, num_classes)


def check_targets(batched_inputs: list[dict], num_classes: int) -> None:
    """Refuse boxes and classes that would make the loss infinite, NaN or silently wrong.

    Args:
        batched_inputs: a batch as Detectron2's ``DatasetMapper`` makes it
        num_classes: K

    Raises:
        InputError: names the image, the box and what is wrong with it
    """
    for inputs in batched_inputs:
        degenerate, unknown = undefined_targets(inputs["instances"], num_classes)
        if not (degenerate | unknown).any():
            continue
        boxes, classes = inputs["instances"].gt_boxes.tensor, inputs["instances"].gt_classes
        index = int((degenerate | unknown).nonzero()[0])
        name = inputs.get("file_name", inputs.get("image_id", "(no file_name)"))
        where = f"image {name}: box {index}, {boxes[index].tolist()} (XYXY, pixels)"
        if degenerate[index]:
            raise InputError(f"{where}, has no area or is not finite")
        raise InputError(
            f"{where}, has class {int(classes[index])}; "
            f"MODEL.RETINANET.NUM_CLASSES allows 0 to {num_classes - 1}"
        )
