"""The hinge loss on p_t (section 5.1)."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from retinanet_ext.losses.functional import elementwise_loss
from retinanet_ext.losses.registry import LOSSES, Interval, register_loss


def hinge_value_and_grad(x_t: Tensor, *, margin: float = 0.5) -> tuple[Tensor, Tensor]:
    """Return the hinge loss and its derivative, -p_t (1 - p_t) up to the margin."""
    p_t = x_t.sigmoid()
    value = (margin - p_t).clamp(min=0)
    return value, torch.where(p_t <= margin, p_t * (p_t - 1), 0)


@register_loss("hinge", reference="section 5.1", value_and_grad=hinge_value_and_grad)
def hinge(x_t: Tensor, *, margin: Annotated[float, Interval("(0, 1]")] = 0.5) -> Tensor:
    """max(0, margin - p_t): no loss above a certain value of p_t.

    The paper gives no margin. The default is the decision boundary, p_t = 1/2.
    """
    return (margin - x_t.sigmoid()).clamp(min=0)


def sigmoid_hinge_loss(
    inputs: Tensor, targets: Tensor, margin: float = 0.5, reduction: str = "none"
) -> Tensor:
    """Return the hinge loss on p_t, max(0, margin - p_t) (section 5.1).

    The paper reports no meaningful results for it. It takes no alpha; other arguments, result and
    errors are those of :func:`sigmoid_focal_loss`.

    Args:
        margin: value of p_t from which on the loss is 0, in (0, 1]

    Example:
        >>> sigmoid_hinge_loss(torch.tensor([-2.0, 0.5]), torch.tensor([1.0, 1.0]))
        tensor([0.3808, 0.0000])
    """
    formula = LOSSES["hinge"].bind(margin=margin)
    return elementwise_loss(formula, inputs, targets, reduction=reduction)
