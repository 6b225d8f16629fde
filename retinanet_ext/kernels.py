"""Triton kernels for a GPU: the dense loss with its gradient, and the labels of anchors.

They compute what plain torch does in :mod:`retinanet_ext.losses.dense` and
:mod:`retinanet_ext.modeling.matching`, and are tested against it in Triton's interpreter and on a
device. Triton comes with torch for CUDA.

Shapes: N images, A anchors per cell, K classes, H x W cells per level, R anchors over all levels,
M boxes per image (the largest number in the batch). Boxes: XYXY in input pixels. Labels: -1 ignore,
0..K-1 class, K background.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from retinanet_ext.losses.registry import LOSSES, BoundLoss

FORMULAS = {"focal": 0, "cross_entropy": 1, "focal_star": 2, "hinge": 3}
"""Losses with a kernel, and their number in :func:`_value_and_grad`."""

BLOCK_CELLS_FIRST, BLOCK_CLASSES_FIRST = (128, 4), (32, 16)
"""Cells and classes per block, for contiguous logits and for channels last."""


@triton.jit
def _value_and_grad(x_t, gamma, shift, FORMULA: tl.constexpr, GAMMA: tl.constexpr):
    """Return a loss and its derivative, as the ``value_and_grad`` of each loss does.

    GAMMA is gamma if that is 0, 1 or 2, else -1. ``shift`` is beta or the margin.
    """
    if FORMULA == 2:
        x_t = gamma * x_t + shift
    small = tl.exp(-tl.abs(x_t))
    large = 1 / (1 + small)  # the larger of p_t and q_t = 1 - p_t
    p = tl.where(x_t >= 0, large, small * large)
    q = tl.where(x_t >= 0, small * large, large)
    if FORMULA == 3:
        return tl.maximum(shift - p, 0), tl.where(p <= shift, -p * q, 0)
    # log1p(small) = 2 artanh(r), r <= 1/3. Nine terms of the series are exact to float32 and keep
    # the digits that 1 + small would round away.
    r = small / (2 + small)
    square = r * r
    series = 1.0 / 17
    for i in tl.static_range(7):
        series = series * square + 1.0 / (15 - 2 * i)
    log1p = 2 * r * (series * square + 1)
    log_p = tl.minimum(x_t, 0) - log1p
    if FORMULA == 2:
        return -log_p / gamma, -q
    if FORMULA == 1 or GAMMA == 0:
        return -log_p, -q
    if GAMMA == 1:
        power = q
    elif GAMMA == 2:
        power = q * q
    else:
        power = tl.exp(gamma * (tl.minimum(-x_t, 0) - log1p))
    return -log_p * power, power * (gamma * p * log_p - q)


@triton.jit
def _dense_loss_kernel(
    logits,
    labels,
    image_weights,
    alphas,
    gradient,
    sums,
    gamma,
    shift,
    label_stride,
    num_cells,
    num_anchors,
    image_stride,
    channel_stride,
    cell_stride,
    num_classes: tl.constexpr,
    ALPHA_PER_CLASS: tl.constexpr,
    FORMULA: tl.constexpr,
    GAMMA: tl.constexpr,
    CELLS: tl.constexpr,
    CLASSES: tl.constexpr,
):
    """Compute CELLS cells of one image and one anchor shape, CLASSES classes at a time."""
    program = tl.program_id(0)
    num_blocks = tl.cdiv(num_cells, CELLS)
    cell = program % num_blocks * CELLS + tl.arange(0, CELLS)
    anchor = program // num_blocks % num_anchors
    image = program // (num_blocks * num_anchors)
    inside = cell < num_cells

    label = image.to(tl.int64) * label_stride + cell * num_anchors + anchor
    label = tl.load(labels + label, mask=inside, other=-1)
    label = label.to(tl.int32)[:, None]
    counts = label >= 0
    weight = tl.load(image_weights + image)
    if not ALPHA_PER_CLASS:
        alpha = tl.load(alphas)
        one_minus_alpha = tl.load(alphas + 1)

    start = image.to(tl.int64) * image_stride
    cell_offset = cell.to(tl.int64)[:, None] * cell_stride
    total = tl.zeros((CELLS, CLASSES), tl.float32)
    for first in range(0, num_classes, CLASSES):
        k = first + tl.arange(0, CLASSES)
        mask = inside[:, None] & (k < num_classes)[None, :]
        offset = start + cell_offset + (anchor * num_classes + k)[None, :] * channel_stride
        x = tl.load(logits + offset, mask=mask, other=0).to(tl.float32)
        positive = label == k[None, :]
        value, slope = _value_and_grad(tl.where(positive, x, -x), gamma, shift, FORMULA, GAMMA)
        if ALPHA_PER_CLASS:
            alpha = tl.load(alphas + k, mask=k < num_classes, other=0)[None, :]
            one_minus_alpha = tl.load(alphas + num_classes + k, mask=k < num_classes, other=0)[
                None, :
            ]
        factor = weight * tl.where(positive, alpha, one_minus_alpha)
        total += tl.where(counts & mask, value * factor, 0)
        slope = tl.where(counts, tl.where(positive, slope, -slope) * factor, 0)
        tl.store(gradient + offset, slope.to(gradient.dtype.element_ty), mask=mask)
    tl.store(sums + program, tl.sum(total))


def can_compute(loss: BoundLoss, logits: Tensor) -> bool:
    """Tell whether :func:`dense_loss_of_level` supports a loss and the logits' dtype."""
    has_code = loss.loss.name in FORMULAS and loss.loss is LOSSES[loss.loss.name]
    return has_code and logits.dtype in (torch.float16, torch.bfloat16, torch.float32)


def dense_loss_of_level(
    loss: BoundLoss,
    logits: Tensor,
    labels: Tensor,
    image_weights: Tensor,
    alpha_weights: Tensor,
    gradient_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return the images' weighted losses on a level, (N,) float64, and their gradient.

    A sum has a fixed order, so that equal inputs give equal bits.

    Args:
        loss: a loss that :func:`can_compute` supports
        logits: (N, A, K, H, W), contiguous or channels last
        labels: (N, A, H, W) int64, a view of (N, R)
        image_weights: factor of each image's loss, (N,)
        alpha_weights: alpha and 1 - alpha, (2,) or (2, K)
        gradient_dtype: dtype of the gradient, which has the logits' shape and memory format
    """
    gradient = torch.empty_like(logits, dtype=gradient_dtype)
    num_images, num_anchors, num_classes, height, width = logits.shape
    if gradient.stride() != logits.stride() or logits.stride(3) != width * logits.stride(4):
        logits = logits.contiguous()
        gradient = torch.empty_like(logits, dtype=gradient_dtype)
    num_cells = height * width
    # Neighbours in memory, cells or the classes of a cell, are neighbours in a block.
    cells, classes = BLOCK_CELLS_FIRST if logits.stride(4) == 1 else BLOCK_CLASSES_FIRST
    cells = min(triton.next_power_of_2(num_cells), cells)
    classes = min(triton.next_power_of_2(num_classes), classes)
    num_programs = num_images * num_anchors * triton.cdiv(num_cells, cells)
    sums = torch.empty(num_programs, device=logits.device)
    parameters = {name: p.default for name, p in loss.loss.parameters.items()} | dict(loss.values)
    gamma = parameters.get("gamma", 0.0)
    _dense_loss_kernel[(num_programs,)](
        logits,
        labels,
        image_weights.float(),
        alpha_weights.float(),
        gradient,
        sums,
        gamma,
        parameters.get("beta", parameters.get("margin", 0.0)),
        labels.stride(0),
        num_cells,
        num_anchors,
        logits.stride(0),
        logits.stride(2),
        logits.stride(4),
        num_classes,
        ALPHA_PER_CLASS=alpha_weights.dim() > 1,
        FORMULA=FORMULAS[loss.loss.name],
        GAMMA=int(gamma) if gamma in (0, 1, 2) else -1,
        CELLS=cells,
        CLASSES=classes,
    )
    return sums.view(num_images, -1).sum(1, dtype=torch.float64), gradient


@triton.jit
def _iou(left, top, right, bottom, area, box):
    """Return the IoU of anchors with the box at a pointer, rounded as Detectron2 does."""
    box_left, box_top = tl.load(box), tl.load(box + 1)
    box_right, box_bottom = tl.load(box + 2), tl.load(box + 3)
    width = tl.maximum(tl.minimum(box_right, right) - tl.maximum(box_left, left), 0)
    height = tl.maximum(tl.minimum(box_bottom, bottom) - tl.maximum(box_top, top), 0)
    common = width * height
    union = (box_right - box_left) * (box_bottom - box_top) + area - common
    # Two boxes without area would give 0 / 0.
    return tl.div_rn(common, tl.maximum(union, 1.1754943508222875e-38))


@triton.jit
def _load_anchors(anchors, anchor, inside):
    left = tl.load(anchors + 4 * anchor, mask=inside, other=0)
    top = tl.load(anchors + 4 * anchor + 1, mask=inside, other=0)
    right = tl.load(anchors + 4 * anchor + 2, mask=inside, other=0)
    bottom = tl.load(anchors + 4 * anchor + 3, mask=inside, other=0)
    return left, top, right, bottom, (right - left) * (bottom - top)


@triton.jit
def _best_ious_kernel(
    anchors, boxes, counts, best_ious, num_anchors, num_boxes, ANCHORS: tl.constexpr
):
    """Update the best IoU of each box with ANCHORS anchors."""
    image = tl.program_id(1).to(tl.int64)
    anchor = tl.program_id(0) * ANCHORS + tl.arange(0, ANCHORS)
    left, top, right, bottom, area = _load_anchors(anchors, anchor, anchor < num_anchors)
    box = image * num_boxes
    end = box + tl.load(counts + image)
    while box < end:  # Triton's interpreter has no range over a loaded value
        best = tl.max(_iou(left, top, right, bottom, area, boxes + 4 * box), axis=0)
        if best > 0:
            tl.atomic_max(best_ious + box, best)
        box += 1


@triton.jit
def _label_kernel(
    anchors,
    boxes,
    classes,
    counts,
    best_ious,
    labels,
    matched_idxs,
    num_anchors,
    num_boxes,
    num_classes,
    THRESHOLDS: tl.constexpr,
    LABELS: tl.constexpr,
    LOW_QUALITY: tl.constexpr,
    ANCHORS: tl.constexpr,
):
    """Label ANCHORS anchors of one image. LOW_QUALITY: 0 none, 1 only ignored anchors, 2 all."""
    image = tl.program_id(1).to(tl.int64)
    anchor = tl.program_id(0) * ANCHORS + tl.arange(0, ANCHORS)
    inside = anchor < num_anchors
    left, top, right, bottom, area = _load_anchors(anchors, anchor, inside)
    best = tl.full((ANCHORS,), -1.0, tl.float32)
    match = tl.zeros((ANCHORS,), tl.int64)
    is_best_of_box = tl.zeros((ANCHORS,), tl.int1)
    first = image * num_boxes
    count = tl.load(counts + image)
    box, end = first, first + count
    while box < end:
        iou = _iou(left, top, right, bottom, area, boxes + 4 * box)
        match = tl.where(iou > best, box - first, match)
        best = tl.maximum(iou, best)
        if LOW_QUALITY > 0:
            is_best_of_box = is_best_of_box | ((iou == tl.load(best_ious + box)) & (iou > 0))
        box += 1
    kind = tl.full((ANCHORS,), LABELS[0], tl.int32)
    for i in tl.static_range(len(THRESHOLDS)):
        kind = tl.where(best >= THRESHOLDS[i], LABELS[i + 1], kind)
    if LOW_QUALITY == 1:
        kind = tl.where(is_best_of_box & (kind != 0), 1, kind)
    if LOW_QUALITY == 2:
        kind = tl.where(is_best_of_box, 1, kind)
    label = tl.load(classes + first + match, mask=inside & (count > 0), other=0)
    label = tl.where((kind == 0) | (count == 0), num_classes, tl.where(kind < 0, -1, label))
    place = image * num_anchors + anchor
    tl.store(labels + place, label, mask=inside)
    tl.store(matched_idxs + place, match, mask=inside)


def label_anchors(
    anchors: Tensor,
    boxes: Tensor,
    classes: Tensor,
    *,
    num_classes: int,
    thresholds: Sequence[float],
    threshold_labels: Sequence[int],
    low_quality: int,
) -> tuple[Tensor, Tensor]:
    """Compute :func:`retinanet_ext.modeling.matching.label_padded`.

    Args:
        anchors: (R, 4) float32
        boxes: (N, M, 4) float32, padded
        classes: (N, M) int64, padded with -1
        num_classes: K
        thresholds: IoU thresholds in rising order
        threshold_labels: label of each interval: 0 background, -1 ignore, 1 foreground
        low_quality: 2: a box's best anchor is foreground at any IoU; 1: if it would be ignored
            otherwise; 0: never
    """
    num_images, num_boxes = classes.shape
    anchors, boxes, classes = anchors.contiguous(), boxes.contiguous(), classes.contiguous()
    counts = (classes >= 0).sum(1)
    labels = torch.empty(num_images, len(anchors), dtype=torch.int64, device=anchors.device)
    matched_idxs = torch.empty_like(labels)
    block = 512
    grid = (triton.cdiv(len(anchors), block), num_images)
    best_ious = torch.zeros(num_images, num_boxes, device=anchors.device)
    # Fused multiply-adds would round differently from Detectron2 and from the other kernel.
    options = {"ANCHORS": block, "enable_fp_fusion": False}
    if low_quality:
        _best_ious_kernel[grid](
            anchors, boxes, counts, best_ious, len(anchors), num_boxes, **options
        )
    _label_kernel[grid](
        anchors,
        boxes,
        classes,
        counts,
        best_ious,
        labels,
        matched_idxs,
        len(anchors),
        num_boxes,
        num_classes,
        THRESHOLDS=tuple(thresholds),
        LABELS=tuple(threshold_labels),
        LOW_QUALITY=low_quality,
        **options,
    )
    return labels, matched_idxs
