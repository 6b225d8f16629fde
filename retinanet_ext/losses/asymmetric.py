"""The asymmetric loss, ASL (arXiv 2009.14119)."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor

from retinanet_ext.losses.focal import focal_value_and_grad
from retinanet_ext.losses.functional import log_sigmoid
from retinanet_ext.losses.module import Entries, LossModule
from retinanet_ext.losses.registry import Interval, register_loss


@register_loss("asymmetric", reference="arXiv 2009.14119, section 2")
class AsymmetricLoss(LossModule):
    """L+ = -(1 - p)^gamma_pos log(p) at positives, L- = -p_m^gamma_neg log(1 - p_m) at negatives.

    p_m = max(p - margin, 0): negatives with a probability below the margin have no loss.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        gamma_pos: Annotated[float, Interval("[0, inf)")] = 0.0,
        gamma_neg: Annotated[float, Interval("[0, inf)")] = 4.0,
        margin: Annotated[float, Interval("[0, 1)")] = 0.05,
    ) -> None:
        super().__init__(num_classes)
        self.gamma_pos = gamma_pos
        self.gamma_neg = gamma_neg
        self.margin = margin

    def value_and_grad(self, entries: Entries) -> tuple[Tensor, Tensor]:
        """Return ASL and its gradient."""
        x, positive = entries.logits, entries.positive
        value, grad = focal_value_and_grad(x, gamma=self.gamma_pos)
        negative_value, negative_grad = self._negatives(x)
        return (
            torch.where(positive, value, negative_value),
            torch.where(positive, grad, negative_grad),
        )

    def _negatives(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return L- and dL-/dx = p_m^gamma p q (1 / (1 - p_m) - gamma log(1 - p_m) / p_m)."""
        if not self.margin:
            value, grad = focal_value_and_grad(-x, gamma=self.gamma_neg)
            return value, -grad
        p, log_q = x.sigmoid(), log_sigmoid(-x)
        p_m = (p - self.margin).clamp(min=0)
        above = p_m > 0
        # Near 1 from q = 1 - p, which keeps its digits there.
        far = torch.logaddexp(log_q, torch.full_like(x, math.log(self.margin)))
        log_m = torch.where(p_m < 0.5, torch.log1p(-p_m.clamp(max=0.5)), far)
        power = torch.where(above, p_m**self.gamma_neg, 0)
        slope = (log_q - log_m).exp() - self.gamma_neg * log_m / p_m.clamp(min=1e-30) * log_q.exp()
        return -power * log_m, power * p * slope
