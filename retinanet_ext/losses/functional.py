"""From a formula in x_t to a loss of logits and targets: signs, alpha-balancing, reduction."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from retinanet_ext.errors import InputError
from retinanet_ext.losses.registry import UNBALANCED, check_alpha

Alpha = float | Sequence[float] | Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Return ``x`` in float32 or wider: half precision has too few digits for long sums."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def elementwise_loss(
    formula: Callable[[Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
    alpha: Alpha = UNBALANCED,
    reduction: str = "none",
) -> Tensor:
    """Apply ``alpha_t * formula(x_t)`` to each entry.

    Args:
        formula: a loss of x_t
        inputs: logits of any shape and any float type
        targets: 1 for the object's class and 0 otherwise, same shape
        alpha: weight of targets 1 (targets 0 get 1 - alpha); -1 for no balancing. K numbers weigh
            the K classes in the last dimension.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``

    Returns:
        float32 (float64 for float64 inputs): the shape of ``inputs``, or a scalar

    Raises:
        InputError: shapes differ, a target other than 0 and 1, alpha or reduction not allowed
    """
    if reduction not in ("none", "mean", "sum"):
        raise InputError(f'reduction must be "none", "mean" or "sum", got {reduction!r}')
    if inputs.shape != targets.shape:
        raise InputError(
            f"inputs {tuple(inputs.shape)} and targets {tuple(targets.shape)} differ in shape"
        )
    positive = targets == 1
    if not torch.compiler.is_compiling() and not (positive | (targets == 0)).all():
        raise InputError("targets must be 0 or 1: this loss is not defined on soft labels")

    inputs = at_least_float32(inputs)
    loss = formula(torch.where(positive, inputs, -inputs))
    weight = alpha_tensor(alpha, inputs)
    if weight is not None:
        loss = torch.where(positive, weight, 1 - weight) * loss
    if reduction == "mean":
        return loss.mean()
    return loss.sum() if reduction == "sum" else loss


def alpha_tensor(alpha: Alpha, like: Tensor) -> Tensor | None:
    """Return alpha as a checked tensor that broadcasts over the last dimension; None for -1."""
    if isinstance(alpha, (int, float)):
        return None if check_alpha("alpha", alpha) == UNBALANCED else like.new_tensor(alpha)
    values = alpha.tolist() if isinstance(alpha, Tensor) else list(alpha)
    if not isinstance(values, list):
        return alpha_tensor(values, like)
    if like.dim() == 0 or len(values) != like.shape[-1]:
        raise InputError(
            f"alpha has {len(values)} values for {like.shape[-1] if like.dim() else 0} classes"
        )
    for index, value in enumerate(values):
        if check_alpha(f"alpha[{index}]", value) == UNBALANCED:
            raise InputError(f"alpha[{index}] is -1 (no balancing), allowed for all classes only")
    return like.new_tensor(values)
