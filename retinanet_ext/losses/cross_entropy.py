"""Cross entropy, plain and alpha-balanced (section 3.1)."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from retinanet_ext.losses.functional import Alpha, elementwise_loss, log_sigmoid
from retinanet_ext.losses.registry import LOSSES, UNBALANCED, register_loss


def cross_entropy_value_and_grad(x_t: Tensor) -> tuple[Tensor, Tensor]:
    """Return CE and dCE/dx_t = p_t - 1 (equation 9)."""
    return log_sigmoid(x_t).neg_(), x_t.neg().sigmoid_().neg_()


@register_loss(
    "cross_entropy",
    reference="section 3.1, equations 1 to 3",
    alpha=UNBALANCED,
    value_and_grad=cross_entropy_value_and_grad,
)
def cross_entropy(x_t: Tensor) -> Tensor:
    """CE = -log(p_t)."""
    return -logsigmoid(x_t)


def sigmoid_cross_entropy_loss(
    inputs: Tensor, targets: Tensor, alpha: Alpha = UNBALANCED, reduction: str = "none"
) -> Tensor:
    """Return the cross entropy, CE = -alpha_t log(p_t) (equation 3; equation 1 for alpha = -1).

    Arguments, result and errors are those of :func:`sigmoid_focal_loss`. The row alpha = .50 of the
    paper's table 1a carries the factor 1/2.

    Example:
        >>> import torch
        >>> sigmoid_cross_entropy_loss(torch.zeros(2), torch.tensor([1.0, 0.0]), alpha=0.25)
        tensor([0.1733, 0.5199])
    """
    return elementwise_loss(LOSSES["cross_entropy"].bind(), inputs, targets, alpha, reduction)
