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
    # With both signs turned a pass less is needed.
    minus_q = (-1 - x_t.exp()).reciprocal_()
    minus_p = -1 - minus_q
    # log(p_t) = min(x_t, 0) + log(max(p_t, q_t)), the latter from the other, which is exact.
    log_max = torch.maximum(minus_p, minus_q).log1p_()
    log_p = x_t.clamp(max=0).add_(log_max)
    if gamma == 2:
        power = minus_q * minus_q
    elif gamma == 0:
        power = torch.ones_like(x_t)
    else:  # log(q_t) = log(p_t) of -x_t
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

    The power is taken in log space, log(1 - p_t) = logsigmoid(-x_t): the textbook form has a NaN
    gradient for 0 < gamma < 1 once 1 - p_t rounds to zero (|x| of about 17 in float32).
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
    """Return the alpha-balanced focal loss, FL = -alpha_t (1 - p_t)^gamma log(p_t) (equation 5).

    Value and gradient are finite for |inputs| up to 1e4 and every gamma >= 0. Arguments, result
    and errors: see :func:`~retinanet_ext.losses.functional.elementwise_loss`.
    """
    return elementwise_loss(LOSSES["focal"].bind(gamma=gamma), inputs, targets, alpha, reduction)
