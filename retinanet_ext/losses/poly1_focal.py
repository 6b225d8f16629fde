"""The Poly-1 focal loss (arXiv 2204.12511)."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor
from torch.nn.functional import logsigmoid

from retinanet_ext.losses.focal import focal, focal_value_and_grad
from retinanet_ext.losses.functional import log_sigmoid
from retinanet_ext.losses.registry import Interval, register_loss


def poly1_focal_value_and_grad(
    x_t: Tensor, *, gamma: float = 2.0, epsilon: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return Poly-1 and dFL/dx_t - epsilon (gamma + 1) (1 - p_t)^(gamma + 1) p_t."""
    value, grad = focal_value_and_grad(x_t, gamma=gamma)
    term = log_sigmoid(-x_t).mul_(gamma + 1).exp_().mul_(epsilon)
    return value.add_(term), grad.sub_(term.mul_(gamma + 1).mul_(x_t.sigmoid()))


@register_loss(
    "poly1_focal",
    reference="arXiv 2204.12511, section 4",
    alpha=0.25,
    value_and_grad=poly1_focal_value_and_grad,
)
def poly1_focal(
    x_t: Tensor,
    *,
    gamma: Annotated[float, Interval("[0, inf)")] = 2.0,
    epsilon: Annotated[float, Interval("[-1, inf)")] = 1.0,
) -> Tensor:
    """FL + epsilon (1 - p_t)^(gamma + 1).

    It changes the first coefficient of the focal loss's expansion in powers of 1 - p_t, which is 1.
    The paper tunes epsilon to the task; 1 is the default of its listing.
    """
    return focal(x_t, gamma=gamma) + epsilon * ((gamma + 1) * logsigmoid(-x_t)).exp()
