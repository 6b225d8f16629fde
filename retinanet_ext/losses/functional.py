"""What turns a formula of x_t into a loss of logits and targets: sign, alpha and reduction."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from retinanet_ext.errors import InputError
from retinanet_ext.losses.registry import ALPHA_RANGE, UNBALANCED, check_alpha

Alpha = float | Sequence[float] | Tensor


def upcast_to_float32(x: Tensor) -> Tensor:
    """Return ``x`` in float32 or wider, because half precision has too few digits for long sums."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def log_sigmoid(x: Tensor) -> Tensor:
    """Return log(sigmoid(x)) without autograd, in half the time of torch's on the CPU."""
    return x.clamp(max=0).sub_(x.abs().neg_().exp_().log1p_())


def elementwise_loss(
    formula: Callable[[Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
    alpha: Alpha = UNBALANCED,
    reduction: str = "none",
) -> Tensor:
    """Return ``alpha_t * formula(x_t)``; the public losses document arguments and result.

    Compiled code cannot raise an error that depends on values. There a target other than 0 and 1
    gives NaN, and so does a tensor ``alpha`` that is out of range.
    """
    if reduction not in ("none", "mean", "sum"):
        raise InputError(f'reduction must be "none", "mean" or "sum", got {reduction!r}')
    if inputs.shape != targets.shape:
        raise InputError(
            f"inputs {tuple(inputs.shape)} and targets {tuple(targets.shape)} differ in shape"
        )
    positive = targets == 1
    defined = positive | (targets == 0)
    if not torch.compiler.is_compiling() and not defined.all():
        raise InputError("targets must be 0 or 1: this loss is not defined on soft labels")

    inputs = upcast_to_float32(inputs)
    loss = formula(torch.where(positive, inputs, -inputs))
    if torch.compiler.is_compiling():
        loss = torch.where(defined, loss, torch.nan)
    weights = class_weights(alpha, inputs.shape[-1] if inputs.dim() else 0)
    if weights is not None:
        foreground, background = weights.to(inputs).unbind()
        loss = torch.where(positive, foreground, background) * loss
    if reduction == "mean":
        return loss.mean()
    return loss.sum() if reduction == "sum" else loss


def class_weights(alpha: Alpha, num_classes: int) -> Tensor | None:
    """Return alpha and 1 - alpha after checking them.

    Args:
        alpha: one number for all classes, or one per class; -1 for no balancing
        num_classes: K

    Returns:
        (2,) or (2, K) in float64, because 1 - .999 is off by 1e-5 in float32; None for no balancing
    """
    if isinstance(alpha, Tensor) and torch.compiler.is_compiling():
        return _compiled_class_weights(alpha, num_classes)
    values = alpha.tolist() if isinstance(alpha, Tensor) else alpha
    if isinstance(values, (int, float)):
        if check_alpha("alpha", values) == UNBALANCED:
            return None
        values = float(values)
    else:
        values = list(values)
        if len(values) != num_classes:
            raise InputError(f"alpha has {len(values)} values for {num_classes} classes")
        for index, value in enumerate(values):
            ALPHA_RANGE.check(f"alpha[{index}]", value)
    alphas = torch.tensor(values, dtype=torch.float64)
    return torch.stack([alphas, 1 - alphas])


def _compiled_class_weights(alpha: Tensor, num_classes: int) -> Tensor:
    """Return :func:`class_weights`, but NaN for values that are out of range."""
    if alpha.dim() and alpha.shape != (num_classes,):
        raise InputError(f"alpha has {alpha.numel()} values for {num_classes} classes")
    alpha = alpha.double()
    weights = torch.stack([alpha, 1 - alpha])
    weights = torch.where(
        (alpha >= ALPHA_RANGE.low) & (alpha <= ALPHA_RANGE.high), weights, torch.nan
    )
    return weights if alpha.dim() else torch.where(alpha == UNBALANCED, 1, weights)
