"""The alternate focal loss FL* (appendix A)."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor
from torch.nn.functional import logsigmoid

from retinanet_ext.losses.functional import Alpha, elementwise_loss, log_sigmoid
from retinanet_ext.losses.registry import LOSSES, Interval, register_loss


def focal_star_value_and_grad(
    x_t: Tensor, *, gamma: float = 2.0, beta: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return FL* and dFL*/dx_t = p_t* - 1 (equation 11)."""
    shifted = gamma * x_t + beta
    return log_sigmoid(shifted).div_(-gamma), shifted.neg_().sigmoid_().neg_()


@register_loss(
    "focal_star", reference="appendix A", alpha=0.25, value_and_grad=focal_star_value_and_grad
)
def focal_star(
    x_t: Tensor,
    *,
    gamma: Annotated[float, Interval("(0, inf)")] = 2.0,
    beta: Annotated[float, Interval("(-inf, inf)")] = 1.0,
) -> Tensor:
    """FL* = -log(sigmoid(gamma x_t + beta)) / gamma: cross entropy, steeper and shifted."""
    return -logsigmoid(gamma * x_t + beta) / gamma


def sigmoid_focal_loss_star(
    inputs: Tensor,
    targets: Tensor,
    alpha: Alpha = 0.25,
    gamma: float = 2.0,
    beta: float = 1.0,
    reduction: str = "none",
) -> Tensor:
    """Return FL* = -alpha_t log(sigmoid(gamma x_t + beta)) / gamma (appendix A).

    Other arguments, result and errors are those of :func:`sigmoid_focal_loss`.

    Args:
        gamma: steepness, above 0
        beta: shift

    Example:
        >>> import torch
        >>> sigmoid_focal_loss_star(torch.zeros(2), torch.tensor([1.0, 0.0]))
        tensor([0.0392, 0.1175])
    """
    formula = LOSSES["focal_star"].bind(gamma=gamma, beta=beta)
    return elementwise_loss(formula, inputs, targets, alpha, reduction)
