"""The figure of films: shares of loss and gradient over a training, one column per run.

Shapes: T records.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from retinanet_ext.analysis.film import EARLY, GROUPS, QUANTITIES, Film, Shares
from retinanet_ext.analysis.plots import COLOURS

GROUP_COLOURS = (COLOURS[3], COLOURS[1], "#C8C8C8")
MAX_PARTS = len(COLOURS)  # levels or classes in a panel
TITLE_WIDTH = 38  # characters that fit above a panel


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
    lines = (f"{film.name}{ap}", film.cls_loss)
    return "\n".join(textwrap.fill(line, TITLE_WIDTH) for line in lines)


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
