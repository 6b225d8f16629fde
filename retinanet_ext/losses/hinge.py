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

    The paper gives no margin; one half asks for the right side of the decision boundary.
    """
    return (margin - x_t.sigmoid()).clamp(min=0)


def sigmoid_hinge_loss(
    inputs: Tensor, targets: Tensor, margin: float = 0.5, reduction: str = "none"
) -> Tensor:
    """Return max(0, margin - p_t), with which the paper got no meaningful results (section 5.1).

    Arguments, result and errors: see :func:`~retinanet_ext.losses.functional.elementwise_loss`.
    """
    formula = LOSSES["hinge"].bind(margin=margin)
    return elementwise_loss(formula, inputs, targets, reduction=reduction)
