"""Figures of the tables beyond the paper: AP by budget, initial weights, rate and imbalance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from retinanet_ext.data.sample_set import CLASSES
from retinanet_ext.experiments.figure_style import GREY, PALETTE, WIDTH
from retinanet_ext.experiments.gradient_share import share_of_row
from retinanet_ext.experiments.grids import REFERENCE_LABEL
from retinanet_ext.experiments.statistics import RowResult, TableResult, lead, mean_interval

_BARS = "A long interval leaves the frame; a single seed has none."
_LEADS = (
    "Left: AP, the mean over seeds with its 95 % interval. Right: the lead over cross entropy "
    f"(α = .75), with Welch's 95 % interval. {_BARS}"
)
BUDGET = f"By iterations. {_LEADS}"
INIT = f"By initial weights. {_LEADS}"
RATES = f"By the learning rate, as a multiple of the common one. {_LEADS}"
DIAL = (
    "Above: AP against background anchors per foreground anchor, the mean over seeds with its 95 % "
    "interval, with either normaliser (OHEM has its own). Below, left: the lead of the focal loss "
    f"with the moving average, and Welch's 95 % interval. {_BARS} Right: the curve that the "
    "paper's argument predicts, the focal loss's lead in the share of the gradient that positives "
    "have at the start. It is no difference in AP: only its shape can be right."
)

Points = Mapping[str, Mapping[float, Sequence[float]]]
"""Label of a line -> x -> AP of each seed."""

Line = Mapping[float, tuple[float, tuple[float, float] | None]]
"""x -> a mean or a difference of means, and its interval unless it comes from a single seed."""


def draw_budget(table: TableResult) -> Figure:
    """Draw AP of each loss, and its lead over the reference, against iterations."""
    return _draw_losses(table, budget_points(table), "iterations")


def draw_init(table: TableResult) -> Figure:
    """Draw AP of each loss, and its lead, from ImageNet weights and from random ones."""
    starts = list(dict.fromkeys(row.row.settings["weights"] for row in table.rows))
    points = _collect(table.rows, lambda row: 1 + starts.index(row.row.settings["weights"]))
    return _draw_losses(table, points, "initial weights", dict(enumerate(starts, 1)))


def draw_rates(table: TableResult) -> Figure:
    """Draw AP of each loss, and its lead over the reference, against the learning rate."""
    return _draw_losses(table, rate_points(table), "learning rate / common rate")


def _draw_losses(
    table: TableResult, points: Points, label: str, names: Mapping[float, str] | None = None
) -> Figure:
    """Draw AP of each loss against the x of its points, and its lead over the reference."""
    figure = Figure(figsize=(WIDTH, 3.8), layout="constrained")
    aps, leads = figure.subplots(1, 2)
    reference = points.get(REFERENCE_LABEL, {})
    colours, places = _colours(table), _asides(table)
    marker = "o" if names else "o-"  # names have no order
    for loss, line in points.items():
        _draw_line(aps, _means(line), colours[loss], loss, places[loss], marker)
        if loss != REFERENCE_LABEL:
            _draw_line(leads, _leads(line, reference), colours[loss], loss, places[loss], marker)
    if reference:
        leads.axhline(0, color=colours[REFERENCE_LABEL])
    for axes, title in ((aps, "AP"), (leads, f"lead over {REFERENCE_LABEL}, in AP")):
        _log_axis(axes, points, label, names)
        axes.set_title(title)
    lines, losses = aps.get_legend_handles_labels()
    figure.legend(lines, losses, loc="outside upper left", ncols=6, columnspacing=1.2)
    return figure


def draw_dial(table: TableResult) -> Figure:
    """Draw AP against imbalance, and the lead of the focal loss, measured and predicted."""
    figure = Figure(figsize=(WIDTH, 6.2), layout="constrained")
    (average, foreground), (measured, predicted) = figure.subplots(2, 2)
    foreground.sharey(average)
    colours, places = _colours(table), _asides(table)
    for axes, normalizer in ((average, "moving average"), (foreground, "foreground")):
        for loss, line in dial_points(table, normalizer).items():
            _draw_line(axes, _means(line), colours[loss], loss, places[loss])
        axes.set_title(f"AP, normaliser {normalizer}")
    lines = dict(zip(*average.get_legend_handles_labels()[::-1], strict=True))
    lines |= dict(zip(*foreground.get_legend_handles_labels()[::-1], strict=True))
    figure.legend(lines.values(), lines, loc="outside upper left", ncols=5)
    ratios = sorted({_background(row) for row in table.rows})
    points = dial_points(table, "moving average")
    for loss in ("CE", "α-CE"):
        leads = _leads(points.get("focal", {}), points.get(loss, {}))
        _draw_line(measured, leads, colours[loss], loss, places[loss])
    measured.axhline(0, color=GREY, lw=0.8)
    measured.set_title("lead of the focal loss over CE and α-CE, in AP")
    shares = {loss: predicted_shares(table, loss) for loss in ("focal", "CE", "α-CE")}
    for loss in ("CE", "α-CE"):
        differences = [shares["focal"][x] - shares[loss][x] for x in ratios]
        predicted.plot(ratios, differences, "o--", ms=4, color=colours[loss])
    predicted.set(title="the same in positives' share of the gradient, computed", ylim=(0, 1.05))
    for axes in (average, foreground, measured, predicted):
        _log_axis(axes, {"": dict.fromkeys(ratios, ())}, "background anchors per foreground anchor")
    return figure


def budget_points(table: TableResult) -> Points:
    """Return AP of each loss by iterations."""
    return _collect(table.rows, lambda row: row.finished[0].iterations)


def rate_points(table: TableResult) -> Points:
    """Return AP of each loss by the factor of the learning rate."""
    return _collect(table.rows, lambda row: row.row.factors["SOLVER.BASE_LR"])


def dial_points(table: TableResult, normalizer: str) -> Points:
    """Return AP of each loss by imbalance; OHEM is there with its own normaliser."""
    rows = [row for row in table.rows if row.row.settings["normaliser"] in (normalizer, "selected")]
    return _collect(rows, _background)


def predicted_shares(table: TableResult, loss: str) -> dict[float, float]:
    """Return the share of the gradient that positives have at the start, by imbalance."""
    rows = {_background(row): row.row for row in table.rows if row.row.settings["loss"] == loss}
    return {x: share_of_row(row.overrides, x, len(CLASSES)) for x, row in rows.items()}


def _background(row: RowResult) -> float:
    return float(row.row.settings["background : foreground"].partition(" ")[0])


def _collect(rows: Sequence[RowResult], place: Callable[[RowResult], float]) -> Points:
    points: dict[str, dict[float, Sequence[float]]] = {}
    for row in rows:
        if values := row.values("AP"):
            points.setdefault(row.row.settings["loss"], {})[place(row)] = values
    return points


def _colours(table: TableResult) -> dict[str, str]:
    """Return a colour per loss, whichever of them were run."""
    labels = dict.fromkeys(row.row.settings["loss"] for row in table.rows)
    return dict(zip(labels, PALETTE, strict=False))


def _asides(table: TableResult) -> dict[str, float]:
    """Return a factor of x per loss, which puts intervals at one x beside each other."""
    labels = list(_colours(table))
    return {label: 1.024 ** (i - (len(labels) - 1) / 2) for i, label in enumerate(labels)}


def _means(line: Mapping[float, Sequence[float]]) -> Line:
    return {x: (fmean(values), mean_interval(values)) for x, values in sorted(line.items())}


def _leads(line: Mapping[float, Sequence[float]], other: Mapping[float, Sequence[float]]) -> Line:
    return {x: lead(line[x], other[x]) for x in sorted(line.keys() & other.keys())}


def _draw_line(
    axes: Axes, line: Line, colour: str, label: str, aside: float, marker: str = "o-"
) -> None:
    """Draw values at ``aside`` times their x, with their intervals, which set no limit of y."""
    places = [x * aside for x in line]
    axes.plot(places, [y for y, _ in line.values()], marker, ms=4, color=colour, label=label)
    for x, (_, interval) in zip(places, line.values(), strict=True):
        if interval:
            axes.add_artist(Line2D([x, x], interval, color=colour, lw=0.9))
    axes.margins(y=0.2)


def _log_axis(
    axes: Axes, points: Points, label: str, names: Mapping[float, str] | None = None
) -> None:
    places = sorted({x for line in points.values() for x in line})
    axes.set_xscale("log")
    if places:
        axes.set_xlim(0.8 * places[0], 1.25 * places[-1])
    axes.set_xticks(places, [(names or {}).get(x, f"{x:g}") for x in places])
    axes.set_xticks([], minor=True)
    axes.set_xlabel(label)


GRID_FIGURES: Mapping[str, tuple[str, Callable[[TableResult], Figure]]] = {
    "budget": (BUDGET, draw_budget),
    "init": (INIT, draw_init),
    "fair-steps": (RATES, draw_rates),
    "dial": (DIAL, draw_dial),
}
"""Name of a table -> caption and drawing of its figure."""
