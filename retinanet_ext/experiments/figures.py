"""Figures of a campaign: training curves, figures 2 and 7 of the paper, the imbalance dial.

Each is an SVG whose bytes depend on its data alone.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from retinanet_ext.analysis.curves import loss_curve
from retinanet_ext.experiments.record import DIVERGED, read_metrics
from retinanet_ext.experiments.results import Results, RowResult, TableResult, spread

WIDTH = 8.6  # inches; 72 points each, as wide as a page's column

INK, GREY, PALE = "#222222", "#8a8a8a", "#d8d8d8"
BLUE, RED, GREEN, PURPLE, ORANGE = "#0072b2", "#d55e00", "#009e73", "#a8578f", "#c98a00"
PALETTE = (BLUE, RED, GREEN, PURPLE, ORANGE, INK)

STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that the layout is the same anywhere
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "text.color": INK,
    "text.parse_math": False,
    "svg.fonttype": "none",
}

# AP on COCO and milliseconds on an Nvidia M40 of figure 2's other detectors; YOLOv2 is not plotted.
FIGURE_2_OTHERS = {
    "SSD321": (28.0, 61),
    "DSSD321": (28.0, 85),
    "R-FCN": (29.9, 85),
    "SSD513": (31.2, 125),
    "DSSD513": (33.2, 156),
    "FPN FRCN": (36.2, 172),
}

MAX_POINTS = 150  # of a curve
MAX_LOSS = 100  # times the median: the end of the axis of training curves


@dataclass(frozen=True)
class Drawing:
    """A figure: the name of its file, what it shows, and the SVG."""

    name: str
    caption: str
    svg: str

    @property
    def inline(self) -> str:
        """The SVG as part of an HTML page, as wide as its place."""
        svg = self.svg[self.svg.index("<svg") :]
        head, body = svg.split(">", 1)
        head = re.sub(r' (width|height)="[^"]*"', "", head)
        # Presentation attributes in place of a style sheet, which would hold for the whole page.
        body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)
        head += ' stroke-linejoin="round" stroke-linecap="butt"'
        used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', body))
        body = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", body)
        body = re.sub(r'( id="|href="#|url\(#)', lambda match: f"{match[0]}{self.name}-", body)
        return f"{head}>{body}"


def draw_figures(results: Results) -> dict[str, list[Drawing]]:
    """Return the figures of each table that was run, by the table's name."""
    figures: dict[str, list[Drawing]] = {table.table.name: [] for table in results.tables}
    tables = {table.table.name: table for table in results.tables}

    def add(table: str, name: str, caption: str, draw: Callable[[], Figure]) -> None:
        figures[table].append(Drawing(name, caption, _svg(name, draw)))

    speed = [tables[name] for name in ("1e", "2") if name in tables]
    if any(_speed_points(table) for table in speed):
        caption = (
            "Accuracy against the time of an image. Left: measured here; right: the paper's, with "
            "the other detectors of its figure 2. The times are of different machines and cannot "
            "be compared between the panels."
        )
        add(speed[0].table.name, "figure_2", caption, lambda: draw_speed(speed))
    if "fig7" in tables:
        caption = (
            "FL* at the settings of figure 7, without α. Left: as in the paper, blue where AP is "
            "above 33.5, grey where it is below or training did not converge. Middle: coloured by "
            "the AP measured here, dotted where it diverged. Right: mean AP of each setting, in a "
            "frame of the paper's colour."
        )
        add("fig7", "figure_7", caption, lambda: draw_focal_star(tables["fig7"]))
    if "imbalance" in tables and any(row.values("AP") for row in tables["imbalance"].rows):
        caption = (
            "AP against the number of background anchors to a foreground one. A dot is a seed, "
            "a line the mean, the band one standard deviation to each side. Right: the mean's "
            "distance from the best loss at the same imbalance."
        )
        add("imbalance", "imbalance", caption, lambda: draw_imbalance(tables["imbalance"]))
    for name, table in tables.items():
        curves = {row: _curves(row) for row in table.measured}
        if any(curves.values()):
            caption = (
                "Training curves, a panel for each row and a line for each seed: the whole loss "
                "and the classification loss, in pale grey the whole loss of the other rows. "
                "Losses with different settings have different scales."
            )
            add(name, f"training_{name}", caption, lambda c=curves: draw_training(c))
    return figures


def draw_training(curves: Mapping[RowResult, Sequence[Mapping[str, np.ndarray]]]) -> Figure:
    """Draw the losses of each row by iteration, small multiples on common axes."""
    columns = min(4, len(curves))
    lines = math.ceil(len(curves) / columns)
    height = 0.85 + 1.4 * lines  # inches
    figure = Figure(figsize=(WIDTH, height))
    figure.subplots_adjust(
        left=0.6 / WIDTH,
        right=1 - 0.1 / WIDTH,
        bottom=0.45 / height,
        top=1 - 0.5 / height,
        hspace=0.42,
        wspace=0.1,
    )
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    firsts = {row: runs[0] for row, runs in curves.items() if runs}
    for axes, (row, runs) in zip(grid.flat, curves.items(), strict=False):
        others = [
            np.column_stack([run["iteration"], run["total_loss"]])
            for other, run in firsts.items()
            if other is not row
        ]
        axes.add_collection(LineCollection(others, colors=PALE, linewidths=0.7, zorder=1))
        for run in runs:
            axes.plot(run["iteration"], run["total_loss"], color=INK, lw=0.9, zorder=2)
            axes.plot(run["iteration"], run["loss_cls"], color=BLUE, lw=1.2, zorder=3)
        if any(run.status == DIVERGED for run in row.runs):
            all_of_them = "" if row.has_diverged else "a seed "
            axes.text(0.97, 0.93, f"{all_of_them}diverged", color=RED, fontsize=8,
                      ha="right", va="top", transform=axes.transAxes)  # fmt: skip
        axes.set_title(row.label, fontsize=8)
        axes.set_yscale("log")
        _plain_log_ticks(axes)
    losses = np.concatenate([run[name] for runs in curves.values() for run in runs for name in run
                             if name != "iteration"])  # fmt: skip
    if not np.isnan(losses).all():  # the others would be flat beside a run that diverged
        top = min(1.2 * np.nanmax(losses), MAX_LOSS * np.nanmedian(losses))
        grid[0, 0].set_ylim(top=top)
    for axes in list(grid.flat)[len(curves) :]:
        axes.set_visible(False)
    for axes in list(grid.flat)[max(0, len(curves) - columns) : len(curves)]:
        axes.tick_params(labelbottom=True)
    figure.supxlabel("iteration", fontsize=9, y=0.03 / height)
    figure.supylabel("loss", fontsize=9, x=0.04 / WIDTH)
    handles = [Line2D([], [], color=INK, lw=0.9), Line2D([], [], color=BLUE, lw=1.2)]
    names = ["whole loss", "classification loss"]
    figure.legend(handles, names, loc="upper left", ncols=2, borderaxespad=0.2)
    return figure


def draw_speed(tables: Sequence[TableResult]) -> Figure:
    """Draw AP against milliseconds an image: what was measured, and the paper's figure 2."""
    figure = Figure(figsize=(WIDTH, 3.3), layout="constrained")
    measured, paper = figure.subplots(1, 2)
    colours = iter(PALETTE)
    for table in tables:
        groups: dict[str, list[tuple[float, float, RowResult]]] = {}
        for milliseconds, ap, row in _speed_points(table):
            groups.setdefault(next(iter(row.row.settings.values())), []).append(
                (milliseconds, ap, row)
            )
        paper_groups: dict[str, list[tuple[float, float, str]]] = {}
        for row in table.table.rows:
            if "ms" in row.paper:
                depth, *scale = row.settings.values()
                paper_groups.setdefault(depth, []).append(
                    (row.paper["ms"], row.paper["AP"], " ".join(scale))
                )
        for group in dict.fromkeys([*paper_groups, *groups]):
            colour = next(colours)
            name = f"RetinaNet-{group}" if group.isdigit() else group
            points = groups.get(group, [])
            if points:
                x, y, rows = zip(*points, strict=True)
                errors = [spread(row.values("AP")) or 0 for row in rows]
                measured.errorbar(x, y, errors, color=colour, marker="o", ms=4, capsize=2,
                                  elinewidth=0.7, label=name)  # fmt: skip
                for row, *point in zip(rows, x, y, strict=True):
                    _label(measured, point, " ".join(list(row.row.settings.values())[1:]), colour)
            points = paper_groups.get(group, [])
            if points:
                x, y, scales = zip(*points, strict=True)
                paper.plot(x, y, color=colour, marker="o", ms=4, label=name)
                for scale, *point in zip(scales, x, y, strict=True):
                    _label(paper, point, scale, colour)
    for name, (ap, milliseconds) in FIGURE_2_OTHERS.items():
        paper.plot(milliseconds, ap, marker="D", ms=3.5, color=GREY, lw=0)
        _label(paper, (milliseconds, ap), name, GREY)
    for axes, title in ((measured, "measured here"), (paper, "the paper (Nvidia M40, COCO)")):
        axes.set_title(title)
        axes.set_xlabel("ms an image")
        axes.set_ylabel("AP")
        axes.margins(0.12)
        axes.legend(loc="lower right")
    return figure


def draw_focal_star(table: TableResult) -> Figure:
    """Draw FL* over x_t at each setting, by the paper's outcome and by the measured AP."""
    figure = Figure(figsize=(WIDTH, 3.8), layout="constrained")
    paper, measured, plane = figure.subplots(1, 3)
    aps = {row: fmean(row.values("AP")) for row in table.rows if row.values("AP")}
    colours = mpl.colormaps["viridis_r"]
    low, high = (min(aps.values()), max(aps.values())) if aps else (0.0, 1.0)
    scale = Normalize(low, high if high > low else low + 1)
    x = torch.linspace(-5, 5, 101, dtype=torch.float64)
    for row in sorted(table.rows, key=lambda row: "above" in row.row.outcome):
        gamma, beta = _gamma_beta(row)
        loss = loss_curve(f"focal_star:gamma={gamma:g},beta={beta:g}", x).value
        above = "above" in row.row.outcome
        paper.plot(x, loss, color=BLUE if above else "#b5b5b5", lw=1.1, zorder=2 + above)
        text, colour = ("div.", RED) if row.has_diverged else ("–", GREY)
        if row in aps:
            text, colour = f"{aps[row]:.1f}", INK
            of_ap = colours(scale(aps[row]))
            measured.plot(x, loss, color=of_ap, lw=1.1, zorder=2 + aps[row] / 1000)
        elif row.has_diverged:
            measured.plot(x, loss, color=RED, lw=1.1, ls=":", zorder=4)
        plane.plot(gamma, beta, ",", color="none")  # for the limits of the axes
        plane.text(gamma, beta, text, color=colour, fontsize=7, ha="center", va="center",
                   weight="bold" if aps.get(row) == high else "normal",
                   bbox={"boxstyle": "round,pad=0.25", "fc": "white", "lw": 1,
                         "ec": BLUE if above else "#b5b5b5"})  # fmt: skip
    for axes, title in ((paper, "the paper"), (measured, "measured here")):
        axes.set(title=title, xlabel="x_t", ylabel="FL*", xlim=(-5, 5), ylim=(0, 8))
    if aps:
        bar = figure.colorbar(mpl.cm.ScalarMappable(scale, colours), ax=measured, pad=0.02,
                              aspect=30)  # fmt: skip
        bar.set_label("AP")
        bar.outline.set_visible(False)
    plane.set(title="AP by γ and β", xlabel="γ", ylabel="β")
    plane.margins(0.16, 0.08)
    return figure


def draw_imbalance(table: TableResult) -> Figure:
    """Draw AP of each loss against the imbalance, and its distance from the best loss."""
    figure = Figure(figsize=(WIDTH, 3.3), layout="constrained")
    absolute, relative = figure.subplots(1, 2)
    losses: dict[str, dict[float, list[float]]] = {}
    for row in table.rows:
        if values := row.values("AP"):
            losses.setdefault(row.row.settings["loss"], {})[imbalance(row)] = values
    ratios = sorted({ratio for points in losses.values() for ratio in points})
    best = {
        ratio: max(fmean(points[ratio]) for points in losses.values() if ratio in points)
        for ratio in ratios
    }
    for (loss, points), colour in zip(losses.items(), PALETTE, strict=False):
        x = sorted(points)
        y = np.array([fmean(points[ratio]) for ratio in x])
        sd = np.array([spread(points[ratio]) or 0 for ratio in x])
        absolute.fill_between(x, y - sd, y + sd, color=colour, alpha=0.13, lw=0)
        absolute.plot(x, y, color=colour, label=loss)
        for ratio in x:
            absolute.plot([ratio] * len(points[ratio]), points[ratio], ".", ms=5, color=colour)
        gap = y - [best[ratio] for ratio in x]
        relative.errorbar(x, gap, sd, color=colour, marker="o", ms=3.5, elinewidth=0.7, capsize=2)
    for axes in (absolute, relative):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(ratios))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("background anchors to one foreground")
    absolute.set(title="AP by imbalance", ylabel="AP")
    relative.set(title="behind the best loss", ylabel="AP minus the best mean")
    relative.axhline(0, color=PALE, lw=0.8, zorder=0)
    figure.legend(loc="outside upper left", ncols=len(losses))
    return figure


def imbalance(row: RowResult) -> float:
    """Return how many background anchors stand to a foreground one in a row of the dial."""
    one, other = map(float, row.row.settings["background : foreground"].split(":"))
    return max(one, other) / min(one, other)


def _svg(name: str, draw: Callable[[], Figure]) -> str:
    with mpl.rc_context({**STYLE, "svg.hashsalt": name}):
        buffer = io.StringIO()
        unknown: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        draw().savefig(buffer, format="svg", metadata=unknown)
    # Hundredths of a point are fine enough.
    return re.sub(
        r' (d|x|y|points)="[^"]*"',
        lambda match: re.sub(r"(\.\d\d)\d+", r"\1", match[0]),
        buffer.getvalue(),
    )


def _curves(row: RowResult) -> list[dict[str, np.ndarray]]:
    curves = (_read_curve(run.folder) for run in row.runs)
    return [curve for curve in curves if curve]


def _read_curve(run: Path) -> dict[str, np.ndarray]:
    """Return iterations and losses, thinned by means; empty where there are none."""
    points = [
        (line["iteration"], line["total_loss"], line.get("loss_cls", math.nan))
        for line in read_metrics(run)
        if "total_loss" in line
    ]
    if not points:
        return {}
    table = np.array(points, dtype=float)
    table[~np.isfinite(table)] = np.nan
    parts = np.array_split(table, min(len(table), MAX_POINTS))
    means = np.array([part.mean(axis=0) for part in parts])
    return dict(zip(("iteration", "total_loss", "loss_cls"), means.T, strict=True))


def _speed_points(table: TableResult) -> list[tuple[float, float, RowResult]]:
    return [
        (fmean(row.values("ms")), fmean(row.values("AP")), row)
        for row in table.rows
        if row.values("ms") and row.values("AP")
    ]


def _gamma_beta(row: RowResult) -> tuple[float, float]:
    overrides = row.row.overrides
    key = "MODEL.RETINANET.CLS_LOSS.FOCAL_STAR"
    return overrides[f"{key}.GAMMA"], overrides[f"{key}.BETA"]


def _label(axes: Axes, point: Sequence[float], text: str, colour: str) -> None:
    axes.annotate(text, tuple(point), (-4, 4), textcoords="offset points", ha="right",
                  color=colour, fontsize=7)  # fmt: skip


def _plain_log_ticks(axes: Axes) -> None:
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=7))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
