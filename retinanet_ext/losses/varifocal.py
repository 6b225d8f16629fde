"""The varifocal loss, VFL (arXiv 2008.13367)."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from retinanet_ext.losses.focal import focal_value_and_grad
from retinanet_ext.losses.functional import log_sigmoid
from retinanet_ext.losses.module import Entries, LossModule
from retinanet_ext.losses.registry import Interval, register_loss


@register_loss("varifocal", reference="arXiv 2008.13367, section 3.2, equation 2")
class VarifocalLoss(LossModule):
    """-y (y log(p) + (1 - y) log(1 - p)) where y > 0, and -alpha p^gamma log(1 - p) elsewhere.

    The target y is the IoU of the decoded box at a positive, and 0 at a negative. A positive whose
    box does not overlap its ground truth thus counts as a negative, as in the authors' code.
    """

    needs_quality = True

    def __init__(
        self,
        num_classes: int,
        *,
        alpha: Annotated[float, Interval("[0, inf)")] = 0.75,
        gamma: Annotated[float, Interval("[0, inf)")] = 2.0,
    ) -> None:
        super().__init__(num_classes)
        self.alpha = alpha
        self.gamma = gamma

    def value_and_grad(self, entries: Entries) -> tuple[Tensor, Tensor]:
        """Return VFL and its gradient, which is y (p - y) where y > 0."""
        x = entries.logits
        y = torch.where(entries.positive, entries.quality, 0)
        cross_entropy = -y * log_sigmoid(x) - (1 - y) * log_sigmoid(-x)
        distance = torch.where(x > 0, (1 - y) - (-x).sigmoid(), x.sigmoid() - y)
        value, grad = focal_value_and_grad(-x, gamma=self.gamma)
        negative = y == 0  # not y <= 0: a quality that is not a number must show
        return (
            torch.where(negative, self.alpha * value, y * cross_entropy),
            torch.where(negative, -self.alpha * grad, y * distance),
        )
