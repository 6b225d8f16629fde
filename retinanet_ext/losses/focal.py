"""The focal loss (section 3.2)."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from retinanet_ext.losses.functional import Alpha, elementwise_loss
from retinanet_ext.losses.registry import LOSSES, Interval, register_loss


def focal_value_and_grad(x_t: Tensor, *, gamma: float = 2.0) -> tuple[Tensor, Tensor]:
    """Return FL and dFL/dx_t = q_t^gamma (gamma p_t log(p_t) - q_t), q_t = 1 - p_t (eq. 10)."""
    # Computing -p_t and -(1 - p_t) takes one pass less.
    minus_q = (-1 - x_t.exp()).reciprocal_()
    minus_p = -1 - minus_q
    # log(p_t) = min(x_t, 0) + log(max(p_t, q_t)), which log1p(-min(p_t, q_t)) computes exactly.
    log_max = torch.maximum(minus_p, minus_q).log1p_()
    log_p = x_t.clamp(max=0).add_(log_max)
    if gamma == 2:
        power = minus_q * minus_q
    elif gamma == 0:
        power = torch.ones_like(x_t)
    else:  # log(q_t) is log(p_t) at -x_t
        power = x_t.neg().clamp_(max=0).add_(log_max).mul_(gamma).exp_()
    slope = torch.addcmul(minus_q, minus_p, log_p, value=-gamma)
    return log_p.mul_(power).neg_(), slope.mul_(power)


@register_loss(
    "focal",
    reference="section 3.2, equations 4 and 5",
    alpha=0.25,
    value_and_grad=focal_value_and_grad,
)
def focal(x_t: Tensor, *, gamma: Annotated[float, Interval("[0, inf)")] = 2.0) -> Tensor:
    """FL = -(1 - p_t)^gamma log(p_t).

    The power is taken in log space, log(1 - p_t) = logsigmoid(-x_t), because the gradient of the
    textbook form is NaN for 0 < gamma < 1 once 1 - p_t rounds to 0 (|x| of about 17 in float32).
    """
    cross_entropy = -logsigmoid(x_t)
    return cross_entropy if gamma == 0 else cross_entropy * (gamma * logsigmoid(-x_t)).exp()


def sigmoid_focal_loss(
    inputs: Tensor,
    targets: Tensor,
    alpha: Alpha = 0.25,
    gamma: float = 2.0,
    reduction: str = "none",
) -> Tensor:
    """Return the focal loss, FL = -alpha_t (1 - p_t)^gamma log(p_t) (equation 5).

    Value and gradient are finite for every gamma >= 0 and for ``inputs`` from -1e4 to 1e4.

    Args:
        inputs: logits of any shape and float dtype
        targets: 1 for the object's class and 0 otherwise, in the shape of ``inputs``
        alpha: weight in [0, 1] of targets that are 1 (others get 1 - alpha), or K weights for the
            last dimension; -1 for no balancing
        gamma: focusing parameter, 0 or more; 0 is the cross entropy
        reduction: ``"none"``, ``"mean"`` or ``"sum"``

    Returns:
        float32 (float64 for float64 inputs), in the shape of ``inputs`` or a scalar

    Raises:
        InputError: if shapes differ, a target is neither 0 nor 1, or a parameter is out of range

    Example:
        >>> sigmoid_focal_loss(torch.tensor([-2.0, 3.0]), torch.tensor([0.0, 1.0]))
        tensor([1.3527e-03, 2.7321e-05])
    """
    return elementwise_loss(LOSSES["focal"].bind(gamma=gamma), inputs, targets, alpha, reduction)
