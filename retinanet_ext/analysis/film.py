"""The film of figure 4: which entries carry loss and gradient in the course of a training.

An entry is an anchor and a class. It is positive if the anchor is foreground of this class, and
negative otherwise; a negative is hard if its probability is above :data:`HARD`. Entries of ignored
anchors and of anchors that are not selected carry nothing.

Shapes: N images, R anchors, K classes, T records.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from torch import Tensor

from retinanet_ext.analysis.plots import COLOURS
from retinanet_ext.losses.dense import signed_logits
from retinanet_ext.losses.functional import upcast_to_float32
from retinanet_ext.losses.registry import BoundLoss

GROUPS = ("positives", "hard negatives", "easy negatives")
QUANTITIES = ("loss", "gradient")
HARD = 0.1
"""Probability above which a negative is hard."""

EARLY = 0.1
"""Share of the iterations whose records :func:`early_shares` averages."""

MIN_RUNS = 4
"""Runs that a rank correlation needs: of three, any order is likely by chance."""

GROUP_COLOURS = (COLOURS[3], COLOURS[1], "#C8C8C8")
MAX_PARTS = len(COLOURS)  # levels or classes in a panel


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
    """Return the mean shares of the groups over the first tenth of the training, (3,) each."""
    early = film.iterations < max(EARLY * film.num_iterations, 1)
    return {quantity: shares[early].mean(0) for quantity, shares in film.shares.items()}


def rank_correlations(films: Sequence[Film]) -> dict[tuple[str, str], tuple[float, float]]:
    """Return whether an early share predicts the order of the final APs.

    Args:
        films: of :data:`MIN_RUNS` runs or more, all with an AP on the same test data

    Returns:
        quantity and group -> Spearman's rank correlation and its two-sided p-value; NaN if all runs
        have the same share
    """
    early = [early_shares(film) for film in films]
    found = {}
    for quantity in QUANTITIES:
        for index, group in enumerate(GROUPS):
            shares = [float(numbers[quantity][index]) for numbers in early]
            constant = len(set(shares)) == 1 or len({film.ap for film in films}) == 1
            result = (math.nan,) * 2 if constant else spearmanr(shares, [f.ap for f in films])
            found[quantity, group] = (float(result[0]), float(result[1]))
    return found


def film_figure(films: Sequence[Film]) -> Figure:
    """Draw shares of loss and gradient over the iterations, one column per run.

    A single run also gets a column by level and one by class.
    """
    panels: list[tuple[str, Film, Mapping[str, Shares] | None]]
    panels = [(_title(film), film, None) for film in films]
    if len(films) == 1:
        (film,) = films
        panels += [("by level", film, film.levels), ("by class", film, film.classes)]
    figure = Figure(figsize=(0.9 + 2.6 * len(panels), 5.2), layout="constrained")
    grid = figure.subplots(2, len(panels), sharex="col", sharey=True, squeeze=False)
    for index, (title, film, parts) in enumerate(panels):
        column = grid[:, index]
        column[0].set_title(title, fontsize=8)
        for axes, quantity in zip(column, QUANTITIES, strict=True):
            stacks = _group_stacks(film, quantity) if parts is None else _stacks(parts, quantity)
            _stack(axes, film, stacks, GROUP_COLOURS if parts is None else COLOURS)
        column[1].set_xlabel("iteration", fontsize=8)
        if parts is not None or index == 0:
            column[1].legend(
                loc="upper left",
                bbox_to_anchor=(-0.05, -0.2),
                fontsize=7,
                frameon=False,
                ncols=3,
                columnspacing=0.8,
                handlelength=1,
            )
    for axes, quantity in zip(grid[:, 0], QUANTITIES, strict=True):
        axes.set_ylabel(f"share of {quantity}", fontsize=8)
    return figure


def _title(film: Film) -> str:
    ap = "" if film.ap is None else f", AP {film.ap:.1f}"
    return f"{film.name}{ap}\n{film.cls_loss}"


def _group_stacks(film: Film, quantity: str) -> dict[str, np.ndarray]:
    return dict(zip(GROUPS, film.shares[quantity].T, strict=True))


def _stacks(parts: Mapping[str, Shares], quantity: str) -> dict[str, np.ndarray]:
    """Return the share of each part; the smallest of many parts are summed as "others"."""
    shares = {name: groups[quantity].sum(1) for name, groups in parts.items()}
    if len(shares) <= MAX_PARTS:
        return shares
    order = sorted(shares, key=lambda name: -np.nanmean(shares[name]))
    kept = {name: shares[name] for name in shares if name in order[: MAX_PARTS - 1]}
    others = np.sum([shares[name] for name in order[MAX_PARTS - 1 :]], axis=0)
    return {**kept, "others": others}


def _stack(
    axes: Axes, film: Film, stacks: Mapping[str, np.ndarray], colours: Sequence[str]
) -> None:
    axes.stackplot(
        film.iterations, np.stack(list(stacks.values())), labels=list(stacks), colors=colours
    )
    axes.axvline(EARLY * film.num_iterations, color="black", linewidth=0.6, linestyle=":")
    axes.set_ylim(0, 1)
    axes.margins(x=0)
    axes.tick_params(labelsize=7)
