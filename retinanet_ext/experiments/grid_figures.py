"""Figures of the tables beyond the paper: AP by budget, initial weights, rate and imbalance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from retinanet_ext.data.sample_set import CLASSES
from retinanet_ext.experiments.figure_style import GREY, PALETTE, WIDTH
from retinanet_ext.experiments.gradient_share import share_of_row
from retinanet_ext.experiments.statistics import RowResult, TableResult, lead, mean_interval

BUDGET = (
    "AP against iterations. A dot is the mean over seeds, a bar its 95 % interval; a row with a "
    "single seed has no bar."
)
INIT = "AP of each loss from either start: the seeds, their mean and its 95 % interval."
RATES = (
    "AP against the learning rate, as a multiple of the common one: the mean over seeds and its "
    "95 % interval."
)
DIAL = (
    "Above: AP against background anchors per foreground anchor, with either normaliser (OHEM has "
    "its own). Below, left: the lead of the focal loss, measured, with Welch's 95 % interval. "
    "Right: the curve that the paper's argument predicts, the focal loss's lead in the share of "
    "the gradient that positives have at the start. It is no difference in AP: only its shape can "
    "be right."
)

Points = Mapping[str, Mapping[float, Sequence[float]]]
"""Label of a line -> x -> AP of each seed."""


def draw_budget(table: TableResult) -> Figure:
    """Draw AP of each loss against iterations."""
    return _draw_losses(table, budget_points(table), "iterations")


def draw_init(table: TableResult) -> Figure:
    """Draw AP of each loss from ImageNet weights and from random ones."""
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    axes = figure.subplots()
    labels = list(dict.fromkeys(row.row.settings["loss"] for row in table.rows))
    starts = list(dict.fromkeys(row.row.settings["weights"] for row in table.rows))
    for start, colour in zip(starts, PALETTE, strict=False):
        offset = 0.12 if starts.index(start) else -0.12
        points = {
            labels.index(row.row.settings["loss"]) + offset: row.values("AP")
            for row in table.rows
            if row.row.settings["weights"] == start and row.values("AP")
        }
        _draw_points(axes, points, colour, start, line="")
        for x, values in points.items():
            axes.plot([x] * len(values), values, ".", ms=3, color=GREY, zorder=3)
    axes.set_xticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylabel("AP")
    axes.set_ylim(bottom=0)
    axes.legend(title="initial weights")
    return figure


def draw_rates(table: TableResult) -> Figure:
    """Draw AP of each loss against the learning rate."""
    label = "learning rate, as a multiple of the common one"
    return _draw_losses(table, rate_points(table), label)


def _draw_losses(table: TableResult, points: Points, label: str) -> Figure:
    """Draw AP of each loss against the x of its points, on a logarithmic axis."""
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    axes = figure.subplots()
    _draw_lines(axes, points, _colours(table))
    _log_axis(axes, points, label)
    axes.set_ylabel("AP")
    figure.legend(loc="outside right upper")
    return figure


def draw_dial(table: TableResult) -> Figure:
    """Draw AP against imbalance, and the lead of the focal loss, measured and predicted."""
    figure = Figure(figsize=(WIDTH, 6.2), layout="constrained")
    (average, foreground), (measured, predicted) = figure.subplots(2, 2)
    foreground.sharey(average)
    colours = _colours(table)
    for axes, normalizer in ((average, "moving average"), (foreground, "foreground")):
        points = dial_points(table, normalizer)
        _draw_lines(axes, points, colours)
        axes.set(title=f"normaliser: {normalizer}", ylabel="AP")
    lines = dict(zip(*average.get_legend_handles_labels()[::-1], strict=True))
    lines |= dict(zip(*foreground.get_legend_handles_labels()[::-1], strict=True))
    figure.legend(lines.values(), lines, loc="outside upper left", ncols=5)
    ratios = sorted({_background(row) for row in table.rows})
    _draw_leads(measured, dial_points(table, "moving average"), colours)
    shares = {loss: predicted_shares(table, loss) for loss in ("focal", "CE", "α-CE")}
    for loss in ("CE", "α-CE"):
        leads = [shares["focal"][x] - shares[loss][x] for x in ratios]
        predicted.plot(ratios, leads, "o--", ms=4, color=colours[loss], label=f"over {loss}")
    predicted.set(title="lead in positives' share of the gradient, computed", ylim=(0, 1.05))
    predicted.set_ylabel("difference in share")
    for axes in (average, foreground, measured, predicted):
        _log_axis(axes, {"": dict.fromkeys(ratios, ())}, "background anchors per foreground anchor")
    for axes in (measured, predicted):
        axes.legend()
    return figure


def _draw_leads(axes: Axes, points: Points, colours: Mapping[str, str]) -> None:
    """Draw the lead of the focal loss over either cross entropy at each imbalance."""
    focal = points.get("focal", {})
    for loss in ("CE", "α-CE"):
        colour, other = colours[loss], points.get(loss, {})
        leads = {x: lead(focal[x], other[x]) for x in sorted(focal.keys() & other.keys())}
        means = [value for value, _ in leads.values()]
        axes.plot(list(leads), means, "o-", ms=4, color=colour, label=f"over {loss}")
        for x, (_, interval) in leads.items():
            if interval:
                axes.plot([x, x], interval, color=colour, lw=0.9)
    axes.axhline(0, color=GREY, lw=0.8)
    axes.set(title="lead of the focal loss, measured", ylabel="difference in AP")


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


def _draw_lines(axes: Axes, points: Points, colours: Mapping[str, str]) -> None:
    for label, line in points.items():
        _draw_points(axes, dict(sorted(line.items())), colours[label], label, line="-")
    # Two seeds give intervals that would flatten everything else.
    highest = max((v for line in points.values() for aps in line.values() for v in aps), default=1)
    axes.set_ylim(0, 1.2 * highest or 1)


def _draw_points(
    axes: Axes, points: Mapping[float, Sequence[float]], colour: str, label: str, line: str
) -> None:
    """Draw the mean at each x and its interval."""
    means = [fmean(values) for values in points.values()]
    axes.plot(list(points), means, f"o{line}", ms=4, color=colour, label=label)
    for x, values in points.items():
        if interval := mean_interval(values):
            axes.plot([x, x], interval, color=colour, lw=0.9)


def _log_axis(axes: Axes, points: Points, label: str) -> None:
    places = sorted({x for line in points.values() for x in line})
    axes.set_xscale("log")
    if places:
        axes.set_xlim(0.8 * places[0], 1.25 * places[-1])
    axes.set_xticks(places, [f"{x:g}" for x in places])
    axes.set_xticks([], minor=True)
    axes.set_xlabel(label)


GRID_FIGURES: Mapping[str, tuple[str, Callable[[TableResult], Figure]]] = {
    "budget": (BUDGET, draw_budget),
    "init": (INIT, draw_init),
    "fair-steps": (RATES, draw_rates),
    "dial": (DIAL, draw_dial),
}
"""Name of a table -> caption and drawing of its figure."""
