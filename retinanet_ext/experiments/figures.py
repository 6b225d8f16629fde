"""Figures of a report: claims, training curves, and figures 2 and 7 of the paper."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from textwrap import fill

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from retinanet_ext.analysis.curves import loss_curve
from retinanet_ext.experiments.figure_style import (
    BLUE,
    GREY,
    INK,
    PALE,
    PALETTE,
    RED,
    WIDTH,
    Drawing,
    render_svg,
)
from retinanet_ext.experiments.grid_figures import GRID_FIGURES
from retinanet_ext.experiments.record import read_metrics
from retinanet_ext.experiments.statistics import FAILS, HOLDS, RowResult, TableResult, Verdict
from retinanet_ext.experiments.tables import ABOVE

MAX_POINTS = 150  # of a training curve
MAX_LOSS = 100  # upper limit of the axis of training curves, as a multiple of the median

# AP on COCO and milliseconds on an Nvidia M40 of figure 2's other detectors; YOLOv2 is not plotted.
FIGURE_2_OTHERS = {
    "SSD321": (28.0, 61),
    "DSSD321": (28.0, 85),
    "R-FCN": (29.9, 85),
    "SSD513": (31.2, 125),
    "DSSD513": (33.2, 156),
    "FPN FRCN": (36.2, 172),
}
SPEED = (
    "AP against inference time per image. Left: measured here. Right: the paper, with the other "
    "detectors of its figure 2. The two panels were measured on different machines, so their "
    "times cannot be compared."
)
FOCAL_STAR = (
    "FL* at the settings of figure 7. Left: as in the paper, blue if AP is above 33.5, grey if it "
    "is below or training did not converge. Right: coloured by the mean AP measured here, dotted "
    "if training diverged."
)
CLAIMS = (
    "Difference in AP of each claim with its 95 % interval over seeds. Blue: the claim holds; red: "
    "it does not; grey: it is not decided. A hollow diamond is the paper's difference."
)
TRAINING = (
    "Training curves, one panel per row and one line per seed: total loss (black) and "
    "classification loss (blue). Losses with different settings have different scales."
)


def draw_figures(tables: Sequence[TableResult]) -> dict[str, list[Drawing]]:
    """Return the figures of each table, by the table's name."""
    by_name = {table.table.name: table for table in tables}
    figures: dict[str, list[Drawing]] = {name: [] for name in by_name}
    speed = [
        table for name in ("1e", "2") if (table := by_name.get(name)) and _with_speed(table.rows)
    ]
    if speed:
        drawing = Drawing("figure_2", SPEED, render_svg(lambda: draw_speed(speed)))
        figures[speed[0].table.name].append(drawing)
    for name, table in by_name.items():
        if name == "fig7":
            svg = render_svg(lambda table=table: draw_focal_star(table))
            figures[name].append(Drawing("figure_7", FOCAL_STAR, svg))
        if name in GRID_FIGURES and any(row.values("AP") for row in table.rows):
            caption, draw = GRID_FIGURES[name]
            svg = render_svg(lambda table=table, draw=draw: draw(table))
            figures[name].append(Drawing(name, caption, svg))
        if verdicts := [one for one in table.verdicts if one.difference is not None]:
            svg = render_svg(lambda verdicts=verdicts: draw_claims(verdicts))
            figures[name].append(Drawing(f"claims_{name}", CLAIMS, svg, name in GRID_FIGURES))
        curves = {row: _curves(row) for row in table.measured}
        if any(curves.values()):
            svg = render_svg(lambda curves=curves: draw_training(curves))
            figures[name].append(Drawing(f"training_{name}", TRAINING, svg, is_detail=True))
    return figures


def draw_claims(verdicts: Sequence[Verdict]) -> Figure:
    """Draw the difference of each claim with its interval, beside the paper's difference."""
    texts = [fill(verdict.claim.text, 52) for verdict in verdicts]
    lines = [text.count("\n") + 1 for text in texts]
    figure = Figure(figsize=(WIDTH, 0.8 + 0.2 * (sum(lines) + len(lines))), layout="constrained")
    axes = figure.subplots()
    places = [sum(lines[:i]) + lines[i] / 2 + i for i in range(len(lines))]
    for place, verdict in zip(places, verdicts, strict=True):
        colour = {HOLDS: BLUE, FAILS: RED}.get(verdict.word, GREY)
        axes.plot(verdict.difference, place, "o", ms=5, color=colour)
        if verdict.interval:
            axes.plot(verdict.interval, [place, place], color=colour)
        if verdict.paper_difference is not None:
            axes.plot(verdict.paper_difference, place, "D", ms=5, mfc="none", color=INK)
    axes.axvline(0, color=PALE, lw=0.9, zorder=0)
    axes.set_yticks(places, texts, fontsize=8)
    axes.set_ylim(sum(lines) + len(lines) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("difference in AP")
    return figure


def draw_training(curves: Mapping[RowResult, Sequence[np.ndarray]]) -> Figure:
    """Draw the losses of each row by iteration: one panel per row, with shared axes."""
    columns = min(4, len(curves))
    lines = math.ceil(len(curves) / columns)
    figure = Figure(figsize=(WIDTH, 0.6 + 1.4 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for axes, (row, runs) in zip(grid.flat, curves.items(), strict=False):
        for iteration, total, classification in runs:
            marker = "." if len(iteration) == 1 else ""  # a line of one point is invisible
            axes.plot(iteration, total, marker, color=INK, lw=0.9)
            axes.plot(iteration, classification, marker, color=BLUE)
        if row.has_diverged:
            axes.text(0.97, 0.93, "diverged", color=RED, ha="right", va="top",
                      transform=axes.transAxes)  # fmt: skip
        axes.set_title(row.label, fontsize=8)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=7))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    losses = np.concatenate([run[1:].ravel() for runs in curves.values() for run in runs])
    if not np.isnan(losses).all():  # beside a run that diverged the others would look flat
        top = min(1.2 * np.nanmax(losses), MAX_LOSS * np.nanmedian(losses))
        grid[0, 0].set_ylim(top=top)
    for axes in list(grid.flat)[len(curves) :]:
        axes.set_visible(False)
    figure.supxlabel("iteration", fontsize=9)
    figure.supylabel("loss", fontsize=9)
    return figure


def draw_speed(tables: Sequence[TableResult]) -> Figure:
    """Draw AP against milliseconds per image: what was measured, and the paper's figure 2."""
    figure = Figure(figsize=(WIDTH, 3.3), layout="constrained")
    measured, paper = figure.subplots(1, 2)
    groups: dict[str, list[RowResult]] = {}
    for row in (row for table in tables for row in table.rows):
        group, *_ = row.row.settings.values()
        groups.setdefault(f"RetinaNet-{group}" if group.isdigit() else group, []).append(row)
    for (name, rows), colour in zip(groups.items(), PALETTE, strict=False):
        here = {
            row: (fmean(row.values("ms")), fmean(row.values("AP"))) for row in _with_speed(rows)
        }
        papers = {row: (p["ms"], p["AP"]) for row in rows if "ms" in (p := row.row.paper)}
        for axes, points in ((measured, here), (paper, papers)):
            if points:
                axes.plot(
                    *np.transpose(list(points.values())), "o-", ms=4, color=colour, label=name
                )
            for row, point in points.items():
                _label(axes, point, " ".join(list(row.row.settings.values())[1:]), colour)
    for name, (ap, milliseconds) in FIGURE_2_OTHERS.items():
        paper.plot(milliseconds, ap, "D", ms=3.5, color=GREY)
        _label(paper, (milliseconds, ap), name, GREY)
    for axes, title in ((measured, "measured here"), (paper, "the paper (Nvidia M40, COCO)")):
        axes.set(title=title, xlabel="ms per image", ylabel="AP")
        axes.margins(0.12)
        axes.legend(loc="lower right")
    return figure


def draw_focal_star(table: TableResult) -> Figure:
    """Draw FL* over x_t at each setting, coloured by the paper's outcome and by measured AP."""
    figure = Figure(figsize=(WIDTH, 3.8), layout="constrained")
    paper, measured = figure.subplots(1, 2)
    aps = {row: fmean(row.values("AP")) for row in table.rows if row.values("AP")}
    colours = mpl.colormaps["viridis_r"]
    low, high = min(aps.values(), default=0), max(aps.values(), default=1)
    scale = Normalize(low, high if high > low else low + 1)
    x = torch.linspace(-5, 5, 101, dtype=torch.float64)
    node = "MODEL.RETINANET.CLS_LOSS.FOCAL_STAR"
    for row in table.rows:
        gamma, beta = (row.row.overrides[f"{node}.{name}"] for name in ("GAMMA", "BETA"))
        loss = loss_curve(f"focal_star:gamma={gamma:g},beta={beta:g}", x).value
        is_above = row.row.outcome == ABOVE
        paper.plot(x, loss, color=BLUE if is_above else PALE, zorder=3 if is_above else 2)
        if row in aps:
            measured.plot(x, loss, color=colours(scale(aps[row])))
        elif row.has_diverged:
            measured.plot(x, loss, color=RED, ls=":")
    for axes, title in ((paper, "the paper"), (measured, "measured here")):
        axes.set(title=title, xlabel="x_t", ylabel="FL*", xlim=(-5, 5), ylim=(0, 8))
    if aps:
        figure.colorbar(ScalarMappable(scale, colours), ax=measured, aspect=30, label="AP")
    return figure


def _curves(row: RowResult) -> list[np.ndarray]:
    curves = (_read_curve(run.folder) for run in row.runs)
    return [curve for curve in curves if len(curve)]


def _read_curve(run: Path) -> np.ndarray:
    """Return iterations, total and classification loss, averaged to few points; may be empty."""
    names = ("iteration", "total_loss", "loss_cls")
    lines = [line for line in read_metrics(run) if "total_loss" in line]
    if not lines:
        return np.empty((0, 3))
    values = [[line.get(name) for name in names] for line in lines]
    table = np.array(values, dtype=float)  # None, as not finite, is nan
    table[~np.isfinite(table)] = np.nan
    parts = np.array_split(table, min(len(table), MAX_POINTS))
    return np.array([part.mean(axis=0) for part in parts]).T


def _with_speed(rows: Sequence[RowResult]) -> list[RowResult]:
    return [row for row in rows if row.values("ms") and row.values("AP")]


def _label(axes: Axes, point: Sequence[float], text: str, colour: str) -> None:
    axes.annotate(text, tuple(point), (-4, 4), textcoords="offset points", ha="right",
                  color=colour, fontsize=7)  # fmt: skip
