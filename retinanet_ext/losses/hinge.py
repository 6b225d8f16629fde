"""The hinge loss on p_t (section 5.1)."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from retinanet_ext.losses.functional import elementwise_loss
from retinanet_ext.losses.registry import LOSSES, Interval, register_loss


@register_loss("hinge", reference="section 5.1")
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
