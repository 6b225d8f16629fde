"""The loss of all anchors and its gradient in one pass, over the logits as the head left them.

Nothing is permuted, concatenated or made one-hot. What is kept for backward is the gradient alone,
once the size of the logits in their type (float32 for float16, which would lose it before it is
scaled); intermediate values exist for a block at a time.

Shapes: N images, A anchors a cell, K classes, H x W cells of a level, R anchors over all levels.
Labels: -1 ignore, 0..K-1 class, K background.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from retinanet_ext.errors import InputError
from retinanet_ext.losses.functional import upcast_to_float32
from retinanet_ext.losses.registry import BoundLoss

HAS_TRITON = find_spec("triton") is not None

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
    Within a function that torch.compile generates code for, it is a formula like any other.

    Args:
        loss: of x_t
        levels: logits of each level (N, A K, H, W), any float type and memory format
        labels: (N, R) int64, levels in order, and in a level row by row, anchors last
        image_weights: what each image's sum is multiplied by, (N,)
        alpha_weights: alpha and 1 - alpha, (2,) or (2, K); None for no balancing
        num_classes: K
        compiled: generate code for it at the first call, which takes half a minute; for a loss
            whose derivative is registered

    Returns:
        a scalar, float32 or wider

    Raises:
        InputError: logits, labels, weights and K do not fit together, or a label is out of range
            (on a GPU, where the host would wait, and in generated code labels are not looked at:
            -2 is taken for ignored, K + 1 for background)
    """
    _check(levels, labels, image_weights, num_classes)
    if alpha_weights is None:
        alpha_weights = image_weights.new_ones(2)
    if torch.compiler.is_compiling():
        return _formula(loss, levels, labels, image_weights, alpha_weights, num_classes)
    compute = _way(labels.device, compiled)
    return _DenseLoss.apply(
        compute, loss, labels, image_weights, alpha_weights, num_classes, *levels
    )


def _check(
    levels: Sequence[Tensor], labels: Tensor, image_weights: Tensor, num_classes: int
) -> None:
    num_anchors = 0
    for index, logits in enumerate(levels):
        if logits.dim() != 4 or not logits.is_floating_point() or logits.shape[1] % num_classes:
            raise InputError(
                f"logits of level {index} are {tuple(logits.shape)} of {logits.dtype}; floats of "
                f"(N, A x {num_classes}, H, W) are needed"
            )
        num_anchors += logits.shape[1] // num_classes * logits.shape[2:].numel()
    expected = (len(levels[0]) if levels else 0, num_anchors)
    if labels.shape != expected or any(len(logits) != len(labels) for logits in levels):
        raise InputError(
            f"labels are {tuple(labels.shape)}, but the logits are those of {expected[0]} images "
            f"with {num_anchors} anchors"
        )
    if labels.dtype != torch.int64 or image_weights.shape != labels.shape[:1]:
        raise InputError(
            f"labels of {labels.dtype} and image weights of shape {tuple(image_weights.shape)}; "
            f"int64 and a weight for each of {len(labels)} images are needed"
        )
    devices = {str(tensor.device) for tensor in (*levels, labels, image_weights)}
    if len(devices) > 1:
        raise InputError(f"logits, labels and weights are on {' and '.join(sorted(devices))}")
    if labels.device.type == "cpu" and labels.numel() and not torch.compiler.is_compiling():
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
        gradients = []
        for logits, level_labels in _by_level(levels, labels, num_classes):
            value, gradient = compute(
                loss, logits.detach(), level_labels, image_weights, alpha_weights
            )
            total = total + value
            gradients.append(gradient.flatten(1, 2))
        ctx.gradients = gradients
        ctx.dtypes = [logits.dtype for logits in levels]
        return total.to(_sum_dtype(levels))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("dense_loss: backward runs once; forward stored one gradient")
        gradients, ctx.gradients = ctx.gradients, None
        if grad_output.device.type != "cpu" or grad_output != 1:  # a pass over them is saved
            gradients = [gradient.mul_(grad_output) for gradient in gradients]
        typed = [gradients.pop(0).to(dtype) for dtype in ctx.dtypes]  # one in two types at a time
        return (None,) * 6 + tuple(typed)


def _by_level(
    levels: Sequence[Tensor], labels: Tensor, num_classes: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield logits (N, A, K, H, W) and labels (N, A, H, W) of each level, views both."""
    first = 0
    for logits in levels:
        num_images, channels, height, width = logits.shape
        num_anchors = channels // num_classes
        count = num_anchors * height * width
        level_labels = labels[:, first : first + count]
        first += count
        yield (
            logits.unflatten(1, (num_anchors, num_classes)),
            level_labels.view(num_images, height, width, num_anchors).permute(0, 3, 1, 2),
        )


def _formula(
    loss: BoundLoss,
    levels: Sequence[Tensor],
    labels: Tensor,
    image_weights: Tensor,
    alpha_weights: Tensor,
    num_classes: int,
) -> Tensor:
    """Return :func:`dense_loss` as one expression: the compiler derives and fuses it."""
    total = image_weights.new_zeros((), dtype=torch.float64)
    classes = torch.arange(num_classes, device=labels.device).view(-1, 1, 1)
    for logits, level_labels in _by_level(levels, labels, num_classes):
        block = upcast_to_float32(logits)
        label = level_labels.unsqueeze(2)
        positive, ignored = label == classes, label < 0
        alpha, one_minus_alpha = alpha_weights.to(block.dtype).view(2, -1, 1, 1).unbind()
        weights = image_weights.to(block.dtype).view(-1, 1, 1, 1, 1)
        # Ignored logits are replaced, not their loss alone: its gradient could be 0 times infinity.
        x_t = torch.where(ignored, 0, torch.where(positive, block, -block))
        value = loss(x_t) * torch.where(positive, alpha, one_minus_alpha) * weights
        total = total + torch.where(ignored, 0, value).sum(dtype=torch.float64)
    return total.to(_sum_dtype(levels))


def _sum_dtype(levels: Sequence[Tensor]) -> torch.dtype:
    dtypes = (logits.dtype for logits in levels)
    return functools.reduce(torch.promote_types, dtypes, torch.float32)


def _gradient_dtype(logits: Tensor) -> torch.dtype:
    """Return the type that the gradient is kept in: float16 would lose it before it is scaled."""
    return torch.float32 if logits.dtype == torch.float16 else logits.dtype


def _way(device: torch.device, compiled: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return how a level's loss and gradient are computed.

    Each takes loss, logits (N, A, K, H, W), labels (N, A, H, W), and the weights of images and
    alpha as in :func:`dense_loss`.
    """
    if device.type == "cpu":
        eager = _level_as_background_first
        return functools.partial(_level_compiled, eager=eager) if compiled else eager
    # Of a GPU's labels, the host would have to wait to know where the positives are.
    eager = _level_by_entry
    without = functools.partial(_level_compiled, eager=eager) if compiled else eager
    return functools.partial(_level_by_kernel, without=without)


def _level_by_kernel(
    loss: BoundLoss,
    logits: Tensor,
    labels: Tensor,
    image_weights: Tensor,
    alpha_weights: Tensor,
    *,
    without: Callable[..., tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """Run the kernel, which is a third of generated code's time; ``without`` one for the loss."""
    if HAS_TRITON and logits.numel():
        from retinanet_ext import kernels

        if kernels.can_compute(loss, logits):
            dtype = _gradient_dtype(logits)
            return kernels.dense_loss_of_level(
                loss, logits, labels, image_weights, alpha_weights, dtype
            )
    return without(loss, logits, labels, image_weights, alpha_weights)


def _level_as_background_first(
    loss: BoundLoss, logits: Tensor, labels: Tensor, image_weights: Tensor, alpha_weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Take every entry for background, block by block, then compute the anchors that are not."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    gradient = torch.empty_like(logits, dtype=_gradient_dtype(logits))
    num_classes = logits.shape[2]
    weights = image_weights.to(dtype).view(-1, 1, 1, 1).expand(labels.shape)
    alpha_weights = alpha_weights.to(dtype)
    one_minus_alpha = alpha_weights[1]
    by_class = one_minus_alpha.expand(num_classes).view(-1, 1, 1)
    later = labels != num_classes

    total = weights.new_zeros((), dtype=torch.float64)
    size = BLOCK_OF_A_THREAD * torch.get_num_threads()
    for image in range(len(logits)):
        for anchors, classes, rows in _blocks(logits[image], size):
            block = upcast_to_float32(logits[image, anchors, classes, rows])
            weight = weights[image, anchors, None, rows]
            value, derivative = loss.value_and_grad(-block)
            if alpha_weights.dim() > 1:
                value = value * by_class[classes]
                derivative = derivative * by_class[classes]
            else:
                weight = weight * one_minus_alpha
            summed = value.sum(1, keepdim=True).mul_(weight)
            # Not subtracted later: a large one would leave its rounding.
            summed.masked_fill_(later[image, anchors, None, rows], 0)
            total += summed.sum(dtype=torch.float64)
            torch.mul(derivative, -weight, out=gradient[image, anchors, classes, rows])
    for cells in later.nonzero().split(max(1, size // num_classes)):
        image, anchor, y, x = cell = cells.unbind(1)
        value, row = _value_and_gradient(
            loss.value_and_grad,
            logits[image, anchor, :, y, x].unsqueeze(2),
            labels[cell].view(-1, 1, 1),
            weights[cell].view(-1, 1, 1),
            alpha_weights,
            gradient.dtype,
        )
        total += value
        gradient[image, anchor, :, y, x] = row.squeeze(2)
    return total, gradient


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
    loss: BoundLoss,
    logits: Tensor,
    labels: Tensor,
    image_weights: Tensor,
    alpha_weights: Tensor,
    *,
    eager: Callable[..., tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """Run generated code; a small level, whose shape may need code of its own, goes without."""
    if logits.numel() < BLOCK_OF_A_THREAD:
        return eager(loss, logits, labels, image_weights, alpha_weights)
    return _level_by_entry(loss, logits, labels, image_weights, alpha_weights, compute=_compiled())


def _level_by_entry(
    loss: BoundLoss,
    logits: Tensor,
    labels: Tensor,
    image_weights: Tensor,
    alpha_weights: Tensor,
    *,
    compute: Callable[..., tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute entry by entry: at once by ``compute``, by default in blocks."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    weights = image_weights.to(dtype).view(-1, 1, 1, 1).expand(labels.shape)
    if not labels.numel():
        return weights.sum(dtype=torch.float64), torch.empty_like(logits)
    if logits.stride(2) == 1 and logits.shape[2] > 1:  # channels last
        order, num_cells = (0, 3, 4, 1, 2), 1  # its own inverse
    else:
        order, num_cells = (0, 1, 2, 3, 4), logits.shape[3] * logits.shape[4]

    def flat(tensor: Tensor) -> Tensor:  # (N, A, C, H, W) -> (P, C, S), a view where dense
        return tensor.permute(order).reshape(-1, tensor.shape[2], num_cells)

    rows, row_labels, row_weights = (
        flat(tensor) for tensor in (logits, labels.unsqueeze(2), weights.unsqueeze(2))
    )
    alpha_weights, gradient_dtype = alpha_weights.to(dtype), _gradient_dtype(logits)
    if compute is not None:
        total, gradient = compute(
            *(loss.value_and_grad, rows, row_labels, row_weights),
            *(alpha_weights, gradient_dtype),
        )
    else:
        total = weights.new_zeros((), dtype=torch.float64)
        gradient = torch.empty_like(rows, dtype=gradient_dtype)
        step = max(1, BLOCK_GPU // rows[0].numel())
        for first in range(0, len(rows), step):
            block = slice(first, first + step)
            value, gradient[block] = _value_and_gradient(
                *(loss.value_and_grad, rows[block], row_labels[block], row_weights[block]),
                *(alpha_weights, gradient_dtype),
            )
            total += value
    return total, gradient.view([logits.shape[i] for i in order]).permute(order)


@functools.cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(_value_and_gradient, dynamic=True, fullgraph=True)


def _value_and_gradient(
    value_and_grad: Callable[[Tensor], tuple[Tensor, Tensor]],
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    alpha_weights: Tensor,
    gradient_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return the loss and its gradient, which a compiler fuses into one loop.

    Args:
        logits: (P, K, S), S neighbouring cells
        labels, weights: (P, 1, S)
        alpha_weights: (2,) or (2, K)
    """
    num_classes = logits.shape[1]
    classes = torch.arange(num_classes, device=labels.device).view(-1, 1)
    positive = labels == classes
    block = upcast_to_float32(logits)
    alpha, one_minus_alpha = alpha_weights.view(2, -1, 1).unbind()
    weight = weights * torch.where(positive, alpha, one_minus_alpha)
    value, derivative = value_and_grad(torch.where(positive, block, -block))
    ignored = labels < 0
    total = torch.where(ignored, 0, value * weight).sum(dtype=torch.float64)
    gradient = torch.where(positive, derivative, -derivative) * weight
    return total, torch.where(ignored, 0, gradient).to(gradient_dtype)
