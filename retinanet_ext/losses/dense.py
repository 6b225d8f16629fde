"""The loss of all anchors and its gradient in one pass, over the logits as the head left them.

Nothing is permuted, concatenated or made one-hot. What is kept for backward is the gradient alone,
once the size of the logits; intermediate values exist for a block at a time.

Shapes: N images, A anchors a cell, K classes, H x W cells of a level, R anchors over all levels.
Labels: -1 ignore, 0..K-1 class, K background.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from retinanet_ext.errors import InputError
from retinanet_ext.losses.functional import at_least_float32
from retinanet_ext.losses.registry import BoundLoss

BLOCK_OF_A_THREAD, BLOCK_GPU = 2**16, 2**24
"""Logits at a time: what a core's cache holds, what fills a GPU."""


def dense_loss(
    loss: BoundLoss,
    levels: Sequence[Tensor],
    labels: Tensor,
    image_weights: Tensor,
    alpha_weights: Tensor | None = None,
    *,
    num_classes: int,
    compiled: bool = False,
) -> Tensor:
    """Return the weighted sum of the loss over all anchors that are not ignored, and classes.

    Differentiable once by the logits, and backward runs once: it hands out what forward stored.

    Args:
        loss: of x_t
        levels: logits of each level (N, A K, H, W), any float type and memory format
        labels: (N, R) int64, levels in order, and in a level row by row, anchors last
        image_weights: what each image's sum is multiplied by, (N,)
        alpha_weights: alpha and 1 - alpha, (2,) or (2, K); None for no balancing
        num_classes: K
        compiled: generate code for it at the first call, which takes half a minute

    Returns:
        a scalar, float32 or wider

    Raises:
        InputError: logits, labels and K do not fit together, or a label is out of range (on a GPU
            labels are not looked at: the host would wait)
    """
    _check(levels, labels, num_classes)
    if alpha_weights is None:
        alpha_weights = image_weights.new_ones(2)
    compute = _level_compiled if compiled else _level_in_blocks
    return _DenseLoss.apply(
        compute, loss, labels, image_weights, alpha_weights, num_classes, *levels
    )


def _check(levels: Sequence[Tensor], labels: Tensor, num_classes: int) -> None:
    num_anchors = 0
    for index, logits in enumerate(levels):
        if logits.dim() != 4 or not logits.is_floating_point() or logits.shape[1] % num_classes:
            raise InputError(
                f"logits of level {index} are {tuple(logits.shape)} of {logits.dtype}; floats of "
                f"(N, A x {num_classes}, H, W) are needed"
            )
        num_anchors += logits.shape[1] // num_classes * logits.shape[2:].numel()
    expected = (len(levels[0]), num_anchors)
    if labels.shape != expected or any(len(logits) != len(labels) for logits in levels):
        raise InputError(
            f"labels are {tuple(labels.shape)}, but the logits are those of {expected[0]} images "
            f"with {num_anchors} anchors"
        )
    devices = {str(tensor.device) for tensor in (*levels, labels)}
    if len(devices) > 1:
        raise InputError(f"logits and labels are on {' and '.join(sorted(devices))}")
    if labels.device.type == "cpu" and labels.numel():
        least, most = labels.aminmax()
        if least < -1 or most > num_classes:
            raise InputError(
                f"labels go from {least} to {most}; -1 (ignore) to {num_classes} (background) "
                "are allowed"
            )


class _DenseLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        compute: Callable[..., tuple[Tensor, Tensor]],
        loss: BoundLoss,
        labels: Tensor,
        image_weights: Tensor,
        alpha_weights: Tensor,
        num_classes: int,
        *levels: Tensor,
    ) -> Tensor:
        total = image_weights.new_zeros((), dtype=torch.float64)
        gradients, first = [], 0
        for logits in levels:
            num_images, channels, height, width = logits.shape
            num_anchors = channels // num_classes
            count = num_anchors * height * width
            level_labels = labels[:, first : first + count]
            first += count
            value, gradient = compute(
                loss,
                logits.detach().unflatten(1, (num_anchors, num_classes)),
                level_labels.view(num_images, height, width, num_anchors).permute(0, 3, 1, 2),
                image_weights,
                alpha_weights,
            )
            total = total + value
            gradients.append(gradient.flatten(1, 2))
        ctx.gradients = gradients
        ctx.dtypes = [logits.dtype for logits in levels]
        return total.to(torch.promote_types(levels[0].dtype, torch.float32))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("dense_loss: backward runs once; forward stored one gradient")
        gradients, ctx.gradients = ctx.gradients, None
        if grad_output.device.type != "cpu" or grad_output != 1:  # a pass over them is saved
            gradients = [gradient.mul_(grad_output) for gradient in gradients]
        typed = [g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True)]
        return (None,) * 6 + tuple(typed)


def _gradient_dtype(logits: Tensor) -> torch.dtype:
    """Return the type that the gradient is kept in: float16 would lose it before it is scaled."""
    return torch.float32 if logits.dtype == torch.float16 else logits.dtype


def _level_in_blocks(
    loss: BoundLoss, logits: Tensor, labels: Tensor, image_weights: Tensor, alpha_weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Return a level's loss and gradient: every entry as a negative, then the positives.

    Args:
        logits: (N, A, K, H, W)
        labels: (N, A, H, W)
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    gradient = torch.empty_like(logits, dtype=_gradient_dtype(logits))
    ignored = labels < 0
    weights = image_weights.to(dtype).view(-1, 1, 1, 1).expand(labels.shape)
    weights = weights.masked_fill(ignored, 0)
    one_minus_alpha = alpha_weights[1].to(dtype)
    by_class = one_minus_alpha.expand(logits.shape[2]).view(-1, 1, 1)

    total = weights.new_zeros((), dtype=torch.float64)
    size = BLOCK_GPU if logits.is_cuda else BLOCK_OF_A_THREAD * torch.get_num_threads()
    for image in range(len(logits)):
        for anchors, classes, rows in _blocks(logits[image], size):
            block = at_least_float32(logits[image, anchors, classes, rows])
            weight = weights[image, anchors, None, rows]
            value, derivative = loss.value_and_derivative(-block)
            if alpha_weights.dim() > 1:
                value = value * by_class[classes]
                derivative = derivative * by_class[classes]
            else:
                weight = weight * one_minus_alpha
            summed = value.sum(1, keepdim=True).mul_(weight)
            # Not by the weight 0 alone: an infinite loss would become NaN.
            summed.masked_fill_(ignored[image, anchors, None, rows], 0)
            total += summed.sum(dtype=torch.float64)
            torch.mul(derivative, -weight, out=gradient[image, anchors, classes, rows])
    return total + _correct_own_class(
        loss, logits, labels, weights, alpha_weights.to(dtype), gradient
    ), gradient


def _correct_own_class(
    loss: BoundLoss,
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    alpha_weights: Tensor,
    gradient: Tensor,
) -> Tensor:
    """Make positives of the entries that are, and return the change of the loss."""
    num_classes = logits.shape[2]
    alpha_weights = alpha_weights.view(2, -1).expand(2, num_classes)

    def correct(x_t: Tensor, label: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        x_t = at_least_float32(x_t)
        value, derivative = loss.value_and_derivative(x_t)
        as_negative, _ = loss.value_and_derivative(-x_t)
        alpha, one_minus_alpha = alpha_weights[:, label]
        change = weight * (alpha * value - one_minus_alpha * as_negative)
        return change, (weight * alpha * derivative).to(gradient.dtype)

    positive = (labels >= 0) & (labels < num_classes)
    if labels.device.type == "cpu":
        image, anchor, y, x = cell = positive.nonzero(as_tuple=True)
        entry = (image, anchor, labels[cell], y, x)
        change, gradient[entry] = correct(logits[entry], labels[cell], weights[cell])
        return change.sum(dtype=torch.float64)
    # One entry of every anchor: how many are positives, the host would have to wait to know.
    label = labels.clamp(0, num_classes - 1)
    own = label.unsqueeze(2)
    change, corrected = correct(logits.gather(2, own).squeeze(2), label, weights)
    corrected = torch.where(positive, corrected, gradient.gather(2, own).squeeze(2))
    gradient.scatter_(2, own, corrected.unsqueeze(2))
    return torch.where(positive, change, 0).sum(dtype=torch.float64)


def _blocks(logits: Tensor, size: int) -> Iterator[tuple[slice, slice, slice]]:
    """Yield slices of A, K and H: neighbours in memory of (A, K, H, W), about ``size`` entries."""
    num_anchors, num_classes, height, width = logits.shape

    def steps(length: int, entries: int) -> Iterator[slice]:
        step = max(1, size // max(1, entries))
        return (slice(start, min(start + step, length)) for start in range(0, length, step))

    if logits.stride(1) == 1 and num_classes > 1:  # channels last
        for rows in steps(height, num_anchors * num_classes * width):
            yield slice(None), slice(None), rows
        return
    for anchors in steps(num_anchors, num_classes * height * width):
        for classes in steps(num_classes, (anchors.stop - anchors.start) * height * width):
            yield anchors, classes, slice(None)


def _level_compiled(
    loss: BoundLoss, logits: Tensor, labels: Tensor, image_weights: Tensor, alpha_weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what :func:`_level_in_blocks` does, by generated code."""
    if not labels.numel():
        return _level_in_blocks(loss, logits, labels, image_weights, alpha_weights)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    weights = image_weights.to(dtype).view(-1, 1, 1, 1).expand(labels.shape)
    if logits.stride(2) == 1 and logits.shape[2] > 1:  # channels last
        order, num_cells = (0, 3, 4, 1, 2), 1  # its own inverse
    else:
        order, num_cells = (0, 1, 2, 3, 4), logits.shape[3] * logits.shape[4]

    def flat(tensor: Tensor) -> Tensor:  # (N, A, C, H, W) -> (P, C, S), a view where dense
        return tensor.permute(order).reshape(-1, tensor.shape[2], num_cells)

    total, gradient = _compiled(loss.loss.name)(
        loss.value_and_derivative,
        flat(logits),
        flat(labels.unsqueeze(2)),
        flat(weights.unsqueeze(2)),
        alpha_weights.to(dtype),
        _gradient_dtype(logits),
    )
    return total, gradient.view([logits.shape[i] for i in order]).permute(order)


@cache
def _compiled(name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(_level, dynamic=True, fullgraph=True)


def _level(
    value_and_derivative: Callable[[Tensor], tuple[Tensor, Tensor]],
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    alpha_weights: Tensor,
    gradient_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return loss and gradient entry by entry, which a compiler fuses into one loop.

    Args:
        logits: (P, K, S), S neighbouring cells
        labels, weights: (P, 1, S)
        alpha_weights: (2,) or (2, K)
    """
    num_classes = logits.shape[1]
    classes = torch.arange(num_classes, device=labels.device).view(-1, 1)
    positive = labels == classes
    block = at_least_float32(logits)
    alpha, one_minus_alpha = alpha_weights.view(2, -1, 1).unbind()
    weight = weights * torch.where(positive, alpha, one_minus_alpha)
    value, derivative = value_and_derivative(torch.where(positive, block, -block))
    ignored = labels < 0
    total = torch.where(ignored, 0, value * weight).sum(dtype=torch.float64)
    gradient = torch.where(positive, derivative, -derivative) * weight
    return total, torch.where(ignored, 0, gradient).to(gradient_dtype)
