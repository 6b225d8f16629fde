"""The equalised focal loss, EFL (arXiv 2201.02593)."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from retinanet_ext.losses.functional import log_sigmoid
from retinanet_ext.losses.module import Entries, StatefulLoss
from retinanet_ext.losses.registry import Interval, register_loss


@register_loss("equalized_focal", reference="arXiv 2201.02593, section 3.2")
class EqualizedFocalLoss(StatefulLoss):
    """EFL = -alpha_t (gamma_k / gamma) (1 - p_t)^gamma_k log(p_t), with a gamma_k for each class.

    gamma_k = gamma + scale (1 - g_k). g_k in [0, 1] is the gradient that the positives of class k
    have had in the training so far, over that of its negatives. Before the first step it is 1,
    where EFL is the focal loss. A step uses the ratio of the steps before it.
    """

    state = "class_gradients"  # K of positives, then K of negatives
    class_gradients: Tensor

    def __init__(
        self,
        num_classes: int,
        *,
        alpha: Annotated[float, Interval("[0, 1]")] = 0.25,
        gamma: Annotated[float, Interval("(0, inf)")] = 2.0,
        scale: Annotated[float, Interval("[0, inf)")] = 8.0,
    ) -> None:
        super().__init__(num_classes, torch.zeros(2 * num_classes, dtype=torch.float64))
        self.alpha = alpha
        self.gamma = gamma
        self.scale = scale

    def gammas(self) -> Tensor:
        """Return the focusing parameter of each class, (K,)."""
        of_positives, of_negatives = self.class_gradients.view(2, -1)
        ratio = torch.where(of_negatives > 0, of_positives / of_negatives, 1).clamp(max=1)
        return self.gamma + self.scale * (1 - ratio)

    def next_state(self, sums: Tensor) -> Tensor:
        return self.class_gradients + sums

    def value_and_grad(self, entries: Entries) -> tuple[Tensor, Tensor]:
        """Return EFL and its gradient, the focal loss's (equation 10 of 1708.02002) at gamma_k."""
        x, positive = entries.logits, entries.positive
        x_t = torch.where(positive, x, -x)
        gammas = self.gammas().to(x.dtype)
        weight = torch.where(positive, self.alpha, 1 - self.alpha) * (gammas / self.gamma)
        weight = weight * (gammas * log_sigmoid(-x_t)).exp()
        cross_entropy = -log_sigmoid(x_t)
        slope = -(gammas * x_t.sigmoid() * cross_entropy + (-x_t).sigmoid()) * weight
        steepness = torch.where(entries.counted, -slope, 0)
        sums = [
            torch.where(group, steepness, 0).sum((0, 1), dtype=torch.float64)
            for group in (positive, ~positive)
        ]
        self.observe(torch.cat(sums))
        return weight * cross_entropy, torch.where(positive, slope, -slope)
