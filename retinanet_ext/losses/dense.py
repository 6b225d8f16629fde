"""The classification loss of all anchors and its gradient in one pass over the head's logits.

Logits are read in the layout that the head returns: no permutation, no concatenation, no one-hot
targets. Forward also computes the gradient and saves only that: one tensor of the logits' shape and
dtype (float32 for float16 logits, because an unscaled float16 gradient underflows).

Shapes: N images, R anchors over all levels, A anchors per cell, K classes, H x W cells per level.
Labels: -1 ignore, 0..K-1 class, K background.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from retinanet_ext.errors import InputError
from retinanet_ext.losses.functional import upcast_to_float32
from retinanet_ext.losses.registry import LOSSES, BoundLoss

HAS_TRITON = find_spec("triton") is not None

BLOCK_PER_THREAD, BLOCK_GPU = 2**16, 2**24
"""Logits per block: small enough for a CPU core's cache, large enough to fill a GPU."""


def dense_loss(
    loss: BoundLoss,
    levels: Sequence[Tensor],
    labels: Tensor,
    image_weights: Tensor,
    alpha_weights: Tensor | None = None,
    *,
    num_classes: int,
) -> Tensor:
    """Return the weighted sum of the loss over all classes and all anchors that are not ignored.

    It is differentiable once with respect to the logits, and backward runs once because it hands
    out the gradient that forward saved. A Triton kernel computes the paper's losses on a GPU.
    Under ``torch.compile`` see :func:`dense_loss_per_image`.

    Args:
        loss: a loss of x_t
        levels: logits of each level, (N, A K, H, W), of any float dtype and memory format
        labels: (N, R) int64, ordered by level, row, column and anchor
        image_weights: factor of each image's summed loss, (N,)
        alpha_weights: alpha and 1 - alpha, (2,) or (2, K); None for no balancing
        num_classes: K

    Returns:
        a scalar, float32 or wider

    Raises:
        InputError: if labels and logits do not fit together, or a label is out of range. The range
            is not checked on a GPU, where the host would have to wait, nor in compiled code.
    """
    _check(levels, labels, num_classes)
    if torch.compiler.is_compiling():
        sums = dense_loss_per_image(loss, levels, labels, alpha_weights, num_classes=num_classes)
        return (sums * image_weights).sum().to(_sum_dtype(levels))
    if alpha_weights is None:
        alpha_weights = image_weights.new_ones(2)
    return _DenseLoss.apply(loss, labels, image_weights, alpha_weights, num_classes, *levels)


def dense_loss_per_image(
    loss: BoundLoss,
    levels: Sequence[Tensor],
    labels: Tensor,
    alpha_weights: Tensor | None = None,
    *,
    num_classes: int,
) -> Tensor:
    """Return the loss of each image, (N,) float64, for code that is compiled.

    The sums and the gradient are those of :func:`dense_loss`, computed by one operator that the
    compiler does not look into. A loss without a closed form of its derivative is a plain
    expression, which the compiler differentiates.
    """
    if alpha_weights is None:
        alpha_weights = labels.new_ones(2, dtype=torch.float64)
    if loss.loss.value_and_grad is not None and loss.loss is LOSSES.get(loss.loss.name):
        values = [loss.values.get(name, p.default) for name, p in loss.loss.parameters.items()]
        sums, _ = _sums_and_grads_op(
            list(levels), labels, alpha_weights, num_classes, loss.loss.name, values
        )
        return sums
    total = alpha_weights.new_zeros(len(labels), dtype=torch.float64)
    for logits, level_labels in _by_level(levels, labels, num_classes):
        weights = torch.ones_like(level_labels, dtype=torch.float32)
        x_t, weight, _ = signed_logits(logits, level_labels, weights, alpha_weights)
        total = total + (loss(x_t) * weight).sum((1, 2, 3, 4), dtype=torch.float64)
    return total


def _check(levels: Sequence[Tensor], labels: Tensor, num_classes: int) -> None:
    shapes = [tuple(logits.shape) for logits in levels]
    num_anchors = sum(a_k // num_classes * h * w for _, a_k, h, w in shapes)
    expected = (shapes[0][0] if shapes else 0, num_anchors)
    if labels.shape != expected or any(
        n != len(labels) or a_k % num_classes for n, a_k, *_ in shapes
    ):
        raise InputError(
            f"labels {tuple(labels.shape)} do not fit logits {shapes} of {num_classes} classes; "
            f"logits (N, A x {num_classes}, H, W) and labels (N, sum of A H W) are needed"
        )
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
        loss: BoundLoss,
        labels: Tensor,
        image_weights: Tensor,
        alpha_weights: Tensor,
        num_classes: int,
        *levels: Tensor,
    ) -> Tensor:
        sums, ctx.gradients = _sums_and_grads(
            loss, levels, labels, image_weights, alpha_weights, num_classes
        )
        ctx.dtypes = [logits.dtype for logits in levels]
        return sums.sum().to(_sum_dtype(levels))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("dense_loss: backward runs once; forward stored one gradient")
        gradients, ctx.gradients = ctx.gradients, None
        if grad_output.device.type != "cpu" or grad_output != 1:  # otherwise a pass is saved
            gradients = [gradient.mul_(grad_output) for gradient in gradients]
        # Popped one by one, so that only one gradient exists in two dtypes at a time.
        return (None,) * 5 + tuple(gradients.pop(0).to(dtype) for dtype in ctx.dtypes)


def _sums_and_grads(
    loss: BoundLoss,
    levels: Sequence[Tensor],
    labels: Tensor,
    image_weights: Tensor,
    alpha_weights: Tensor,
    num_classes: int,
) -> tuple[Tensor, list[Tensor]]:
    """Return the weighted loss of each image, (N,) float64, and the gradient of each level."""
    total = image_weights.new_zeros(len(labels), dtype=torch.float64)
    gradients = []
    for logits, level_labels in _by_level(levels, labels, num_classes):
        sums, gradient = _level_sums_and_grad(
            loss, logits.detach(), level_labels, image_weights, alpha_weights
        )
        total = total + sums
        gradients.append(gradient.flatten(1, 2))
    return total, gradients


@torch.library.custom_op(
    "retinanet_ext::dense_loss_per_image",
    mutates_args=(),
    schema="(Tensor[] levels, Tensor labels, Tensor alpha_weights, int num_classes, str name, "
    "float[] values) -> (Tensor, Tensor[])",
)
def _sums_and_grads_op(
    levels: list[Tensor],
    labels: Tensor,
    alpha_weights: Tensor,
    num_classes: int,
    name: str,
    values: list[float],
) -> tuple[Tensor, list[Tensor]]:
    loss = LOSSES[name]
    ones = alpha_weights.new_ones(len(labels))
    return _sums_and_grads(
        loss.bind(**dict(zip(loss.parameters, values, strict=True))),
        *(levels, labels, ones, alpha_weights, num_classes),
    )


@_sums_and_grads_op.register_fake
def _(levels: list[Tensor], labels: Tensor, alpha_weights: Tensor, *_: Any) -> Any:
    sums = alpha_weights.new_empty(labels.shape[0], dtype=torch.float64)
    return sums, [torch.empty_like(logits, dtype=_grad_dtype(logits)) for logits in levels]


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    ctx.dtypes = [logits.dtype for logits in inputs[0]]
    ctx.has_values = bool(inputs[-1])
    ctx.save_for_backward(*output[1])


def _scale_gradients(ctx: Any, grad_sums: Tensor, _: Any) -> tuple[Any, ...]:
    scale = grad_sums.view(-1, 1, 1, 1)
    gradients = [
        (gradient * scale.to(upcast_to_float32(gradient).dtype)).to(dtype)
        for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
    ]
    # torch wants an empty list for an empty list, and None for each other argument.
    return gradients, None, None, None, None, None if ctx.has_values else []


_sums_and_grads_op.register_autograd(_scale_gradients, setup_context=_save_gradients)


def _by_level(
    levels: Sequence[Tensor], labels: Tensor, num_classes: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield views of each level's logits, (N, A, K, H, W), and labels, (N, A, H, W)."""
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


def _sum_dtype(levels: Sequence[Tensor]) -> torch.dtype:
    dtypes = (logits.dtype for logits in levels)
    return functools.reduce(torch.promote_types, dtypes, torch.float32)


def _grad_dtype(logits: Tensor) -> torch.dtype:
    return torch.float32 if logits.dtype == torch.float16 else logits.dtype


def _level_sums_and_grad(
    loss: BoundLoss, logits: Tensor, labels: Tensor, image_weights: Tensor, alpha_weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Return each image's weighted loss on a level, (N,) float64, and the logits' gradient."""
    grad_dtype = _grad_dtype(logits)
    if HAS_TRITON and logits.is_cuda and logits.numel():
        from retinanet_ext import kernels

        if kernels.can_compute(loss, logits):
            return kernels.dense_loss_of_level(
                loss, logits, labels, image_weights, alpha_weights, grad_dtype
            )
    return _sums_and_grad_in_blocks(loss, logits, labels, image_weights, alpha_weights, grad_dtype)


def _sums_and_grad_in_blocks(
    loss: BoundLoss,
    logits: Tensor,
    labels: Tensor,
    image_weights: Tensor,
    alpha_weights: Tensor,
    grad_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Compute :func:`_level_sums_and_grad` in plain torch; temporaries are as large as a block."""
    total = image_weights.new_zeros(len(labels), dtype=torch.float64)
    gradient = torch.empty_like(logits, dtype=grad_dtype)
    weights = image_weights.view(-1, 1, 1, 1).expand(labels.shape)
    for images, anchors, rows in _blocks(labels, logits.shape[2]):
        block = images, anchors, rows
        entries = images, anchors, slice(None), rows
        x_t, weight, positive = signed_logits(
            logits[entries], labels[block], weights[block], alpha_weights
        )
        value, grad = loss.value_and_grad(x_t)
        total[images] += (value * weight).sum(2).sum((1, 2, 3), dtype=torch.float64)
        torch.mul(torch.where(positive, grad, -grad), weight, out=gradient[entries])
    return total, gradient


def _blocks(labels: Tensor, num_classes: int) -> Iterator[tuple[slice, ...]]:
    """Yield slices of labels, (N, A, H, W), along N, A and H: blocks of similar size."""
    size = BLOCK_PER_THREAD * torch.get_num_threads() if labels.device.type == "cpu" else BLOCK_GPU
    entries = max(1, num_classes * labels.shape[3])
    slices = []
    for length in (labels.shape[2], labels.shape[1], labels.shape[0]):
        step = max(1, size // entries)
        slices.append([slice(start, start + step) for start in range(0, length, step)])
        entries *= max(1, length)
    rows, anchors, images = slices
    yield from product(images, anchors, rows)


def signed_logits(
    logits: Tensor, labels: Tensor, weights: Tensor, alpha_weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return x_t, the weight of each entry's loss, and whether its target is 1: (N, A, K, H, W).

    The weight of ignored anchors is 0.

    Args:
        logits: (N, A, K, H, W)
        labels: (N, A, H, W)
        weights: weight of each anchor, (N, A, H, W)
        alpha_weights: (2,) or (2, K)
    """
    logits = upcast_to_float32(logits)
    classes = torch.arange(logits.shape[2], device=labels.device).view(-1, 1, 1)
    label = labels.unsqueeze(2)
    positive, ignored = label == classes, label < 0
    # Ignored logits are replaced because 0 times an infinite loss would be NaN.
    x_t = torch.where(ignored, 0, torch.where(positive, logits, -logits))
    alpha, one_minus_alpha = alpha_weights.to(x_t.dtype).view(2, -1, 1, 1).unbind()
    weights = torch.where(ignored, 0, weights.unsqueeze(2).to(x_t.dtype))
    return x_t, torch.where(positive, alpha, one_minus_alpha) * weights, positive
