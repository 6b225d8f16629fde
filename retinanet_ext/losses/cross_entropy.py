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

    The row alpha = .50 of the paper's table 1a carries the factor 1/2.

    Args:
        inputs: logits of any shape and float dtype
        targets: 1 for the object's class and 0 otherwise, in the shape of ``inputs``
        alpha: weight in [0, 1] of targets that are 1 (others get 1 - alpha), or K weights for the
            last dimension; -1 for no balancing
        reduction: ``"none"``, ``"mean"`` or ``"sum"``

    Returns:
        float32 (float64 for float64 inputs), in the shape of ``inputs`` or a scalar

    Raises:
        InputError: if shapes differ, a target is neither 0 nor 1, or alpha or reduction is invalid

    Example:
        >>> import torch
        >>> sigmoid_cross_entropy_loss(torch.zeros(2), torch.tensor([1.0, 0.0]), alpha=0.25)
        tensor([0.1733, 0.5199])
    """
    return elementwise_loss(LOSSES["cross_entropy"].bind(), inputs, targets, alpha, reduction)
