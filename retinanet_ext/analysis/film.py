"""The film of figure 4: which entries carry loss and gradient in the course of a training.

An entry is an anchor and a class. It is positive if the anchor is foreground of this class, and
negative otherwise; a negative is hard if its probability is above :data:`HARD`. Entries of ignored
anchors and of anchors that are not selected carry nothing.

Shapes: N images, R anchors, K classes, T records.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from retinanet_ext.losses.dense import signed_logits
from retinanet_ext.losses.functional import upcast_to_float32
from retinanet_ext.losses.registry import BoundLoss

GROUPS = ("positives", "hard negatives", "easy negatives")
QUANTITIES = ("loss", "gradient")
HARD = 0.1
"""Probability above which a negative is hard."""

EARLY = 0.1
"""Share of the iterations whose records :func:`early_shares` averages."""


@torch.no_grad()
def group_sums(
    loss: BoundLoss,
    logits: Tensor,
    labels: Tensor,
    gradient: Tensor,
    anchor_weights: Tensor,
    alpha_weights: Tensor,
) -> Tensor:
    """Return the summed loss and absolute gradient of each group and class, (2, 3, K) float64.

    Args:
        loss: the loss of x_t that is trained
        logits: (N, R, K)
        labels: -1 ignore, 0..K-1 class, K background, (N, R)
        gradient: of the training loss with respect to the logits, (N, R, K)
        anchor_weights: factor of each anchor's loss, 0 if the anchor is not selected, (N, R)
        alpha_weights: alpha and 1 - alpha, (2,) or (2, K)
    """
    x_t, weights, positive = signed_logits(
        logits[..., None, None],
        labels[..., None, None],
        anchor_weights[..., None, None],
        alpha_weights,
    )
    positive = positive.flatten(2)
    hard = upcast_to_float32(logits) > math.log(HARD / (1 - HARD))
    groups = (positive, hard & ~positive, ~(hard | positive))
    values = ((loss(x_t) * weights).flatten(2), upcast_to_float32(gradient).abs())
    sums = [
        torch.stack([torch.where(group, v, 0).sum((0, 1), dtype=torch.float64) for group in groups])
        for v in values
    ]
    return torch.stack(sums)


Shares = Mapping[str, np.ndarray]
"""Quantity (``loss``, ``gradient``) -> share of each group in the whole, (T, 3)."""


@dataclass(frozen=True, eq=False)
class Film:
    """The film of a run.

    Attributes:
        name: the run's folder
        cls_loss: its classification loss and parameters, in words
        iterations: of the records, (T,)
        num_iterations: of the whole training
        shares: of the groups
        levels, classes: of the groups within each level and each class; they sum to ``shares``
        ap: AP of the run's last evaluation; None without one
    """

    name: str
    cls_loss: str
    iterations: np.ndarray
    num_iterations: int
    shares: Shares
    levels: Mapping[str, Shares]
    classes: Mapping[str, Shares]
    ap: float | None = None


def early_shares(film: Film) -> dict[str, np.ndarray]:
    """Return the mean shares of the groups over the first tenth of the training, (3,) each.

    They are NaN for a film that begins later.
    """
    early = film.iterations < max(EARLY * film.num_iterations, 1)
    if not early.any():
        return {quantity: np.full(len(GROUPS), np.nan) for quantity in QUANTITIES}
    return {quantity: shares[early].mean(0) for quantity, shares in film.shares.items()}
