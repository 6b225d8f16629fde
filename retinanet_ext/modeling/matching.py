"""Labels of anchors by their IoU with the ground-truth boxes (section 4).

Shapes: N images, R anchors over all levels, S anchors per block, K classes, M boxes per image.
Boxes: XYXY in input pixels. Labels: -1 ignore, 0..K-1 class, K background.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, Instances, pairwise_ioa
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from retinanet_ext.errors import InputError
from retinanet_ext.losses.dense import HAS_TRITON

LOW_QUALITY_MATCHES = ("all", "ignored_band", "none")

# (box, anchor) pairs per block: small enough for a CPU core's cache, large enough to fill a GPU.
PAIRS_CPU, PAIRS_GPU = 2**18, 2**24
MIN_BLOCK = 256  # anchors; in smaller blocks the overhead of a call exceeds its work


class AnchorMatcher:
    """Detectron2's ``Matcher``, by blocks of anchors so that no M x R matrix is held.

    The policy for low-quality matches decides about a box with no anchor at the highest threshold:
    ``all`` and ``none`` are Detectron2's ``allow_low_quality_matches``. With ``ignored_band``, the
    rule in the authors' code, its best anchor becomes foreground only if it would be ignored
    otherwise. A box that overlaps no anchor matches none; in Detectron2 it matches every anchor
    that it does not overlap.

    Example:
        >>> matcher = AnchorMatcher([0.4, 0.5], [0, -1, 1], "none")
        >>> anchors = torch.tensor([[0.0, 0, 10, 10], [5, 0, 15, 10], [20, 0, 30, 10]])
        >>> matched_idxs, labels = matcher(torch.tensor([[0.0, 0, 10, 9]]), anchors)
        >>> labels.tolist()
        [1, 0, 0]
    """

    def __init__(
        self, thresholds: list[float], labels: list[int], low_quality_matches: str = "all"
    ) -> None:
        """
        Args:
            thresholds: IoU thresholds in rising order, in the paper [0.4, 0.5]
            labels: label of each interval between them: 0 background, -1 ignore, 1 foreground
            low_quality_matches: ``all``, ``ignored_band`` or ``none``

        Raises:
            InputError: if an argument is invalid; the message names its config key
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
        """Return a matcher with the rule of Detectron2's."""
        policy = "all" if matcher.allow_low_quality_matches else "none"
        return cls(matcher.thresholds[1:-1], matcher.labels, policy)  # the outer ones are infinite

    def __call__(self, boxes: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
        """Match each anchor to the box with the highest IoU, the first among equals.

        Args:
            boxes: (M, 4), M > 0
            anchors: (R, 4)

        Returns:
            indices of boxes, (R,) int64, and 0 background, -1 ignore or 1 foreground, (R,) int8
        """
        pairs = PAIRS_CPU if shapes_may_follow_values(anchors) else PAIRS_GPU
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
    """Tell whether to select by value: a GPU's host would wait."""
    return tensor.device.type == "cpu"


def _boxes_near(boxes: Tensor, block: Tensor) -> Tensor:
    """Return the rising indices of the boxes that may overlap a block of anchors, (4, S).

    They include box 0, because it is the match of anchors that overlap no box.
    """
    if not shapes_may_follow_values(block):
        return torch.arange(len(boxes), device=boxes.device)
    lower, upper = block[:2].amin(1), block[2:].amax(1)
    near = (torch.minimum(boxes[:, 2:], upper) > torch.maximum(boxes[:, :2], lower)).all(1)
    near[0] = True
    return near.nonzero()[:, 0]


def _best_of_a_box(
    boxes: Tensor, blocks: Sequence[Tensor], near: list[Tensor], box_ious: list[Tensor]
) -> Tensor:
    """Return the mask of the anchors that are the best of some box, ties included, (R,).

    Args:
        boxes: (M, 4)
        blocks: the anchors, (4, S) each
        near: indices of the boxes compared with each block
        box_ious: highest IoU of each of these boxes within the block
    """
    best = box_ious[0].new_zeros(len(boxes))
    for index, iou in zip(near, box_ious, strict=True):
        best[index] = torch.maximum(best[index], iou)
    best.masked_fill_(best == 0, torch.inf)  # a box that overlaps no anchor has no best one
    masks = []
    for block, index, iou in zip(blocks, near, box_ious, strict=True):
        if shapes_may_follow_values(block):
            index = index[iou == best[index]]  # the boxes whose best anchor is in this block
        masks.append((_pairwise_iou(boxes[index], block) == best[index, None]).any(dim=0))
    return torch.cat(masks)


def _pairwise_iou(boxes: Tensor, block: Tensor) -> Tensor:
    """Return the IoU of boxes, (M, 4), with anchors, (4, S): (M, S).

    It equals Detectron2's ``pairwise_iou`` bit by bit and has no (M, S, 2) temporaries.
    """
    left, top, right, bottom = boxes.T.unsqueeze(2)
    a_left, a_top, a_right, a_bottom = block
    areas = (right - left) * (bottom - top)
    a_areas = (a_right - a_left) * (a_bottom - a_top)
    iou = torch.minimum(right, a_right).sub_(torch.maximum(left, a_left)).clamp_(min=0)
    iou *= torch.minimum(bottom, a_bottom).sub_(torch.maximum(top, a_top)).clamp_(min=0)
    # Two boxes without area would give 0 / 0.
    union = (areas + a_areas).sub_(iou).clamp_(min=torch.finfo(iou.dtype).tiny)
    return iou.div_(union)


def is_foreground(labels: Tensor, num_classes: int) -> Tensor:
    """Return the mask of the labels that are a class."""
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
        matcher: this plugin's matcher or Detectron2's
        anchors: the R anchors of all levels
        gt_instances: ``gt_boxes`` and ``gt_classes`` of each image, which may have no boxes
        num_classes: K

    Returns:
        labels, (N, R) int64, and the index of each anchor's matched box among the concatenated
        boxes of all images, (N, R) int64 (meaningless for background)
    """
    if isinstance(matcher, Matcher):
        matcher = AnchorMatcher.from_detectron2(matcher)
    boxes, classes = pad_targets(gt_instances, max(map(len, gt_instances)) or 1)
    labels, matched_idxs = label_padded(matcher, anchors.tensor, boxes, classes, num_classes)
    counts = (classes >= 0).sum(1)
    first = (counts.cumsum(0) - counts).masked_fill(counts == 0, 0)
    return labels, matched_idxs + first.unsqueeze(1)


def pad_targets(gt_instances: Sequence[Instances], num_boxes: int) -> tuple[Tensor, Tensor]:
    """Return boxes, (N, M, 4), padded with zeros, and classes, (N, M) int64, padded with -1.

    A box of zeros has an IoU of 0 with every anchor, so it is matched by none.

    Args:
        gt_instances: ``gt_boxes`` and ``gt_classes`` of each image
        num_boxes: M, at least 1 and the largest number of boxes of an image
    """
    boxes = pad_sequence([each.gt_boxes.tensor for each in gt_instances], batch_first=True)
    classes = [each.gt_classes for each in gt_instances]
    missing = num_boxes - boxes.shape[1]
    return (
        pad(boxes, (0, 0, 0, missing)),
        pad(pad_sequence(classes, batch_first=True, padding_value=-1), (0, missing), value=-1),
    )


def label_padded(
    matcher: AnchorMatcher, anchors: Tensor, boxes: Tensor, classes: Tensor, num_classes: int
) -> tuple[Tensor, Tensor]:
    """Label every anchor of every image, from padded ground truth.

    In compiled code it is one operator, which the compiler does not look into: its rounding would
    part anchors whose IoUs with a box are equal.

    Args:
        matcher: its thresholds, labels and policy
        anchors: (R, 4)
        boxes: (N, M, 4), see :func:`pad_targets`
        classes: (N, M)
        num_classes: K

    Returns:
        labels, (N, R) int64, and the index of each anchor's matched box among the M of its image,
        (N, R) int64 (meaningless for background)
    """
    policy = matcher.low_quality_matches
    label = _label_op if torch.compiler.is_compiling() else _label
    return label(anchors, boxes, classes, num_classes, matcher.thresholds, matcher.labels, policy)


@torch.no_grad()
def _label(
    anchors: Tensor,
    boxes: Tensor,
    classes: Tensor,
    num_classes: int,
    thresholds: list[float],
    threshold_labels: list[int],
    low_quality_matches: str,
) -> tuple[Tensor, Tensor]:
    if HAS_TRITON and anchors.is_cuda and anchors.dtype == torch.float32:
        from retinanet_ext import kernels

        return kernels.label_anchors(
            *(anchors, boxes, classes),
            num_classes=num_classes,
            thresholds=thresholds,
            threshold_labels=threshold_labels,
            low_quality={"none": 0, "ignored_band": 1, "all": 2}[low_quality_matches],
        )
    matcher = AnchorMatcher(thresholds, threshold_labels, low_quality_matches)
    labels, matched_idxs = [], []
    for image_boxes, image_classes in zip(boxes, classes, strict=True):
        match, kind = matcher(image_boxes, anchors)
        label = image_classes[match].masked_fill_(kind == -1, -1)
        label.masked_fill_((kind == 0) | (image_classes[0] < 0), num_classes)
        labels.append(label)
        matched_idxs.append(match)
    return torch.stack(labels), torch.stack(matched_idxs)


_label_op = torch.library.custom_op(
    "retinanet_ext::label_anchors",
    _label,
    mutates_args=(),
    schema="(Tensor anchors, Tensor boxes, Tensor classes, int num_classes, float[] thresholds, "
    "int[] threshold_labels, str low_quality_matches) -> (Tensor, Tensor)",
)


@_label_op.register_fake
def _(anchors: Tensor, boxes: Tensor, classes: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    shape = classes.shape[0], anchors.shape[0]
    return classes.new_empty(shape), classes.new_empty(shape)


def pad_regions(
    regions: Sequence[Tensor | None], image_sizes: Sequence[tuple[int, int]]
) -> tuple[Tensor, Tensor]:
    """Return regions, (N, M, 4), padded with zeros, and the lower right corners of the images.

    Args:
        regions: regions of each image, (M, 4) on any device, or None
        image_sizes: (height, width) of each image before padding

    Returns:
        M is a power of two, at least 8; corners are (width, height, width, height), (N, 4); both
        are on the regions' device
    """
    device = next((each.device for each in regions if each is not None), None)
    boxes = [torch.zeros(0, 4, device=device) if each is None else each for each in regions]
    padded = pad_sequence(boxes, batch_first=True)
    missing = num_padded(padded.shape[1], 8) - padded.shape[1]
    corners = torch.empty(len(boxes), 4, device=device)
    for corner, (height, width) in zip(corners, image_sizes, strict=True):
        corner[0::2], corner[1::2] = width, height  # a tensor of a list would be copied to a GPU
    return pad(padded, (0, 0, 0, missing)), corners


def num_padded(count: int, least: int) -> int:
    """Return the smallest power of two that is not below ``count`` and ``least``."""
    return 1 << (max(count, least) - 1).bit_length()


@torch.no_grad()
def ignore_anchors(
    labels: Tensor,
    anchors: Tensor,
    regions: Tensor,
    corners: Tensor,
    num_classes: int,
    ioa_thresh: float,
) -> tuple[Tensor, Tensor]:
    """Return labels with -1 for background anchors inside a region to ignore, and their number.

    Like COCO's evaluation, it compares the share of the anchor's area that one region covers (IoA).
    Only the part of the anchor inside the image counts.

    Args:
        labels: (N, R)
        anchors: (R, 4)
        regions: (N, M, 4), see :func:`pad_regions`
        corners: (N, 4)
        num_classes: K
        ioa_thresh: lowest IoA of an ignored anchor, in (0, 1]

    Returns:
        labels, (N, R), and the number of anchors of each image that became -1, (N,)
    """
    inside = []
    for boxes, corner in zip(regions.to(anchors), corners.to(anchors), strict=True):
        visible = Boxes(torch.minimum(anchors, corner).clamp(min=0))
        inside.append((pairwise_ioa(Boxes(boxes), visible) >= ioa_thresh).any(0))
    ignored = torch.stack(inside) & (labels == num_classes)
    return labels.masked_fill(ignored, -1), ignored.sum(1)


def undefined_targets(instances: Instances, num_classes: int) -> tuple[Tensor, Tensor]:
    """Return the masks of the boxes and of the classes that the loss is undefined on, (M,) each."""
    boxes = instances.gt_boxes.tensor
    degenerate = ~((boxes[:, 2:] > boxes[:, :2]).all(1) & boxes.isfinite().all(1))
    return degenerate, ~is_foreground(instances.gt_classes, num_classes)


def check_targets(batched_inputs: list[dict], num_classes: int) -> None:
    """Refuse boxes and classes that would make the loss infinite, NaN or silently wrong.

    Args:
        batched_inputs: a batch from Detectron2's ``DatasetMapper``
        num_classes: K

    Raises:
        InputError: names the image and the box, and says what is wrong with it
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
            raise InputError(f"{where}, is degenerate (zero area, inverted or not finite)")
        raise InputError(
            f"{where}, has class {int(classes[index])}; "
            f"MODEL.RETINANET.NUM_CLASSES allows 0 to {num_classes - 1}"
        )
