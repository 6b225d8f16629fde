"""The quality focal loss, QFL (arXiv 2006.04388)."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from retinanet_ext.losses.functional import log_sigmoid
from retinanet_ext.losses.module import Entries, LossModule
from retinanet_ext.losses.registry import Interval, register_loss


@register_loss("quality_focal", reference="arXiv 2006.04388, section 3, equation 2")
class QualityFocalLoss(LossModule):
    """QFL = -abs(y - p)^beta ((1 - y) log(1 - p) + y log(p)).

    The target y is the IoU of the decoded box at a positive, and 0 at a negative.
    """

    needs_quality = True

    def __init__(
        self, num_classes: int, *, beta: Annotated[float, Interval("[1, inf)")] = 2.0
    ) -> None:
        super().__init__(num_classes)
        self.beta = beta

    def value_and_grad(self, entries: Entries) -> tuple[Tensor, Tensor]:
        """Return QFL and |d|^beta d + beta |d|^(beta - 1) sign(d) p (1 - p) CE, d = p - y."""
        x = entries.logits
        y = torch.where(entries.positive, entries.quality, 0)
        p, q = x.sigmoid(), (-x).sigmoid()
        cross_entropy = -y * log_sigmoid(x) - (1 - y) * log_sigmoid(-x)
        distance = torch.where(x > 0, (1 - y) - q, p - y)  # from the one that does not round to 1
        power = distance.abs() ** (self.beta - 1)
        value = power * distance.abs()
        slope = self.beta * power * distance.sign() * p * q
        return value * cross_entropy, value * distance + slope * cross_entropy
