"""Drawings of losses in the paper's figures: 1, 5 and 6 (curves), 4 (cumulative loss).

Figures are made without pyplot, so no global state changes. The colours are Okabe and Ito's, which
are distinguishable with any colour vision.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from retinanet_ext.analysis.curves import FIGURE_1, FIGURES_5_AND_6, Curve, loss_curve
from retinanet_ext.analysis.loss_cdf import FRACTIONS, PAPER, PAPER_FRACTIONS, READINGS, LossCurve
from retinanet_ext.errors import InputError
from retinanet_ext.files import make_folder, write_file

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
GAMMA_COLOURS = dict(zip((0.0, 0.5, 1.0, 2.0, 5.0), COLOURS, strict=False))
"""The same colour for the same gamma in all figures."""

METADATA = {".svg": {"Date": None, "Creator": None}, ".png": {"Software": None}}
"""Metadata that is left out, because it differs between runs and between machines."""

DASHES = ("-", "--", "-.", ":")
LABEL_SIZE = 9
GROUND = {"positive": "foreground", "negative": "background"}


def draw_losses(what: Sequence[str]) -> tuple[str, Figure]:
    """Draw one of the paper's figures, or any registered losses.

    Args:
        what: ``1``, ``5`` or ``6`` alone, or specs such as ``focal:gamma=3``

    Returns:
        a file name without its suffix, and the figure

    Raises:
        InputError: an unknown loss or parameter, or a value out of range
    """
    known = {
        "1": figure_1,
        "5": lambda: figure_5_or_6("value", 5),
        "6": lambda: figure_5_or_6("gradient", 10),
    }
    measured = {"2": "experiments report", "4": "analyze-loss", "7": "experiments report"}
    for item in what:
        if item in measured:
            command = f"retinanet-ext {measured[item]}"
            raise InputError(f"figure {item} is drawn from measurements by {command}")
        if item in known and len(what) > 1:
            raise InputError(f"figure {item} is drawn alone, got {' '.join(what)}")
    if what[0] in known:
        return f"figure_{what[0]}", known[what[0]]()
    return "losses", losses_figure(what)


def figure_1() -> Figure:
    """Draw the focal loss against p_t for five gamma (figure 1)."""
    p_t = torch.linspace(0.001, 1 - 1e-6, 1000, dtype=torch.float64)
    figure, (axes,) = _figure(5.0, 3.6)
    for index, curve in enumerate(_curves(FIGURE_1, p_t.logit())):
        axes.plot(
            curve.x_t.sigmoid().numpy(),
            curve.value.numpy(),
            color=COLOURS[index],
            label=curve.label,
        )
    axes.axvspan(0.6, 1, color="#009E73", alpha=0.1, linewidth=0)
    axes.text(0.8, 1.55, "well-classified\nexamples", ha="center", fontsize=LABEL_SIZE)
    axes.set(xlim=(0, 1), ylim=(0, 5))
    axes.set(xlabel="probability of the ground-truth class, $p_t$", ylabel="loss")
    axes.set_title(r"FL = $-(1 - p_t)^\gamma\,\log(p_t)$", fontsize=LABEL_SIZE + 1)
    _add_legend(axes)
    return figure


def figure_5_or_6(attribute: str, limit: float) -> Figure:
    """Draw the loss ("value", figure 5) or gradient ("gradient", figure 6) of CE, FL and FL*."""
    figure, (axes,) = _figure(5.0, 3.6)
    _plot(axes, _curves(FIGURES_5_AND_6, _x_t(limit)), attribute)
    _add_legend(axes)
    return figure


def losses_figure(specs: Sequence[str]) -> Figure:
    """Draw loss and gradient of registered losses against x_t.

    ``specs`` and errors are those of :func:`~retinanet_ext.analysis.curves.parse_spec`.
    """
    figure, panels = _figure(9.0, 3.6, columns=2)
    _plot(panels[0], [loss_curve(spec, _x_t(5)) for spec in specs], "value")
    _plot(panels[1], [loss_curve(spec, _x_t(10)) for spec in specs], "gradient")
    _add_legend(panels[0])
    return figure


def figure_4(curves: Sequence[LossCurve]) -> Figure:
    """Draw the cumulative loss of positives and negatives, one row per reading (figure 4).

    Circles are measured in the paper's drawing. The paper does not say which reading is its own.
    """
    readings = [reading for reading in READINGS if any(c.reading == reading for c in curves)]
    figure, panels = _figure(7.8, 3.7 * len(readings), rows=len(readings), columns=2)
    cells = [(reading, side) for reading in readings for side in GROUND]
    for axes, (reading, side) in zip(panels, cells, strict=True):
        chosen = [c for c in curves if (c.reading, c.side) == (reading, side)]
        for index, curve in enumerate(chosen):
            _plot_cdf(axes, curve, index, len(chosen))
        axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        axes.set(xlabel=f"fraction of {GROUND[side]} windows, easiest first")
        axes.set(ylabel="cumulative share of the loss")
        axes.set_title(f"{GROUND[side]} (window: {READINGS[reading]})", fontsize=LABEL_SIZE)
        axes.scatter([], [], s=16, facecolors="none", edgecolors="#888888", label="paper")
        _add_legend(axes, loc="upper left", handletextpad=0.1)
    return figure


def _plot_cdf(axes: Axes, curve: LossCurve, index: int, num_curves: int) -> None:
    colour = GAMMA_COLOURS[curve.gamma]
    cdf = np.array(curve.cdf)
    axes.plot(FRACTIONS, cdf, color=colour)
    paper = PAPER[curve.side][curve.gamma]
    axes.scatter(PAPER_FRACTIONS, paper, s=16, facecolors="none", edgecolors=colour, alpha=0.6)
    # A CDF of sorted losses stays below the diagonal, so labels above it are never covered. A line
    # across the diagonal connects each label to its curve.
    level = 1.3 - 0.45 * index / max(num_curves - 1, 1)
    x = np.interp(level, FRACTIONS + cdf, FRACTIONS)
    axes.annotate(
        f"γ = {curve.gamma:g}",
        xy=(x, level - x),
        xytext=(level / 2 - 0.1, level / 2 + 0.1),
        color=colour,
        fontsize=LABEL_SIZE,
        ha="right",
        va="center",
        arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkB": 0},
    )


def _x_t(limit: float) -> torch.Tensor:
    return torch.linspace(-limit, limit, 1001, dtype=torch.float64)


def _curves(specs: Mapping[str, str], x_t: torch.Tensor) -> list[Curve]:
    return [loss_curve(spec, x_t, label) for label, spec in specs.items()]


def _plot(axes: Axes, curves: Sequence[Curve], attribute: str) -> None:
    """Plot losses ("value") or derivatives ("gradient") against x_t."""
    for index, curve in enumerate(curves):
        axes.plot(
            curve.x_t.numpy(),
            getattr(curve, attribute).numpy(),
            color=COLOURS[index % len(COLOURS)],
            linestyle=DASHES[index % len(DASHES)],
            label=curve.label,
        )
    axes.margins(x=0)
    axes.set(xlabel="$x_t$")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if attribute == "value":
        axes.set(ylabel="loss", ylim=(0, None))
    else:
        axes.set(ylabel="derivative by $x_t$")


def _add_legend(axes: Axes, **kwargs: Any) -> None:
    axes.legend(frameon=False, fontsize=LABEL_SIZE, **kwargs)


def _figure(
    width: float, height: float, *, rows: int = 1, columns: int = 1
) -> tuple[Figure, list[Axes]]:
    """Return a figure of that size in inches and its axes, row by row."""
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#E5E5E5", linewidth=0.6)
        axes.set_axisbelow(True)
    return figure, panels


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure as ``.svg`` or ``.png``, the same bytes for the same figure.

    Raises:
        InputError: another suffix, the file exists, or it cannot be written
    """
    path = Path(path)
    if path.suffix not in METADATA:
        raise InputError(f"{path}: figures are written as .svg or .png")
    if os.path.exists(path):  # False where the name itself is not possible
        raise InputError(f"{path} exists; choose another name")
    content = encode_figure(figure, path.suffix)
    make_folder(path.parent)
    write_file(path, content)


def encode_figure(figure: Figure, suffix: str) -> bytes:
    """Return a figure as ``.svg`` or ``.png``, the same bytes for the same figure."""
    content = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "retinanet_ext"}):
        figure.savefig(content, format=suffix[1:], dpi=150, metadata=METADATA[suffix])
    return content.getvalue()
