"""The gradient harmonised classification loss, GHM-C (arXiv 1811.05181)."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from retinanet_ext.losses.functional import log_sigmoid
from retinanet_ext.losses.module import Entries, StatefulLoss
from retinanet_ext.losses.registry import Interval, register_loss


@register_loss("ghm_c", reference="arXiv 1811.05181, section GHM-C Loss")
class GHMCLoss(StatefulLoss):
    """Cross entropy, divided by the gradient density: by how many entries have a similar gradient.

    The gradient norm g = |p - y| is cut into ``bins`` of equal width. Of S_j entries in bin j, a
    moving average over the batches, each has the weight F / (n S_j): n is the number of bins that
    are not empty, and F the moving average of the number of foreground anchors. Divided by the
    criterion's normaliser, which counts the foreground too, the loss is the paper's
    sum of CE / (n S_j), in which the paper's own divisor, the number of entries, cancels.

    As in the authors' code, the average of a bin rests while the bin is empty, and n counts the
    bins of the batch.
    """

    state = "density"
    density: Tensor

    def __init__(
        self,
        num_classes: int,
        *,
        bins: Annotated[int, Interval("[1, 10000]")] = 30,
        momentum: Annotated[float, Interval("[0, 1)")] = 0.75,
    ) -> None:
        # The last number is that of foreground anchors.
        super().__init__(num_classes, torch.zeros(bins + 1, dtype=torch.float64))
        self.bins = bins
        self.momentum = momentum

    def next_state(self, sums: Tensor) -> Tensor:
        average = self.momentum * self.density + (1 - self.momentum) * sums
        bins = torch.where(sums[:-1] > 0, average[:-1], self.density[:-1])
        return torch.cat([bins, average[-1:]])

    def value_and_grad(self, entries: Entries) -> tuple[Tensor, Tensor]:
        """Return GHM-C and its gradient, w (p - y), because the weight w is a constant."""
        x, positive = entries.logits, entries.positive
        x_t = torch.where(positive, x, -x)
        norm = (-x_t).sigmoid()  # |p - y|
        index = (norm * self.bins).long().clamp(max=self.bins - 1)
        # A norm that is not a number has no bin.
        index = torch.where(norm.isnan(), 0, index)
        counted = entries.counted.expand_as(index)
        sums = torch.zeros(self.bins + 1, dtype=torch.int64, device=x.device)
        sums.index_add_(0, index.flatten(), counted.flatten().long())
        sums[-1] = positive.sum()
        sums = sums.double()
        state = self.observe(sums)
        num_filled = (sums[:-1] if self.training else state[:-1]).count_nonzero().clamp(min=1)
        state = state.clamp(min=1 - self.momentum)  # a single entry's, of one batch
        weights = state[-1] / (num_filled * state[:-1])
        weight = weights.to(x.dtype)[index]
        return -weight * log_sigmoid(x_t), weight * torch.where(positive, -norm, norm)
