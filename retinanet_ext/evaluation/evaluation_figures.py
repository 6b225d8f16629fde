"""Drawings of an evaluation as SVG: curves, confusion matrix, kinds of error, calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from retinanet_ext.analysis.plots import COLOURS, encode_figure
from retinanet_ext.evaluation.detection_matches import Matches
from retinanet_ext.evaluation.detector_report import Report
from retinanet_ext.evaluation.fonts import choose_fonts
from retinanet_ext.evaluation.score_curves import FROC_RATES, score_curve

MAX_CLASSES = 6
"""Number of classes that a figure can tell apart; of more, those with the lowest AP are drawn."""

MAX_NAME = 18  # characters
GREY, PALE = "#8a8a8a", "#d8d8d8"
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e5e5e5",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.3,
    "text.parse_math": False,
}


def draw_evaluation(matches: Matches, report: Report) -> dict[str, list[bytes]]:
    """Return the figures of a report by their names, each as one SVG or several side by side.

    A figure that would be illegible with that many classes is left out.

    Args:
        matches: of all detections
        report: from :func:`~retinanet_ext.evaluation.detector_report.evaluate_detections`
    """
    names, families = choose_fonts([each["name"] for each in report["classes"]])
    classes = zip(report["classes"], names, strict=True)
    report = {**report, "classes": [{**each, "name": name} for each, name in classes]}
    bins = [each for each in report["calibration"]["bins"] if each["count"]]
    with mpl.rc_context({**STYLE, "font.family": families}):
        drawn = {
            "precision_recall": [_draw_precision_recall(report)],
            "scores": [_draw_scores(matches, report, label) for label in weakest(report)],
            "errors": [_draw_errors(report)],
            "calibration": [_draw_reliability(bins), _draw_numbers(bins)],
            "froc": [_draw_froc(report)],
        }
        if len(report["classes"]) <= 2 * MAX_CLASSES:
            drawn["confusion"] = [_draw_confusion(report)]
        return {
            name: [encode_figure(figure, ".svg") for figure in figures]
            for name, figures in drawn.items()
        }


def weakest(report: Report, number: int = MAX_CLASSES) -> list[int]:
    """Return the indices of the classes with the lowest AP; all in their order if there are few."""
    classes = report["classes"]
    if len(classes) <= number:
        return list(range(len(classes)))
    with_ap = [label for label, each in enumerate(classes) if not np.isnan(each["AP"])]
    return sorted(with_ap, key=lambda label: classes[label]["AP"])[:number]


def short_name(name: str) -> str:
    """Return a class name of at most ``MAX_NAME`` characters."""
    return name if len(name) <= MAX_NAME else name[: MAX_NAME - 1] + "…"


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    """Return a figure of that size in inches, and its axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _draw_precision_recall(report: Report) -> Figure:
    """Draw precision against recall at IoU 0.5, of each class and their mean."""
    figure, axes = _figure(5.6, 3.4)
    recalls = np.linspace(0, 1, 101)
    curves = {k: c["precision_at_recall"] for k, c in enumerate(report["classes"])}
    curves = {label: curve for label, curve in curves.items() if curve}
    chosen = [label for label in weakest(report) if label in curves]
    for label in sorted(curves.keys() - set(chosen)):
        axes.plot(recalls, curves[label], color=PALE, linewidth=0.7)
    for colour, label in zip(COLOURS, chosen, strict=False):
        each = report["classes"][label]
        name = f"{short_name(each['name'])} ({each['AP50']:.1f})"
        axes.plot(recalls, curves[label], color=colour, label=name)
    if len(curves) > 1:
        mean = np.mean(list(curves.values()), axis=0)
        name = f"mean of {len(curves)} ({report['metrics']['AP50']:.1f})"
        axes.plot(recalls, mean, color="black", linestyle="--", label=name)
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    figure.legend(loc="outside right upper", title="class (AP50)")
    return figure


def _draw_scores(matches: Matches, report: Report, label: int) -> Figure:
    """Draw precision, recall and F1 of a class against the threshold."""
    figure, axes = _figure(3.2, 2.6)
    curve = score_curve(matches, label)
    for colour, name in zip(COLOURS, ("precision", "recall", "f1"), strict=False):
        # From a score down to the next lower one the same detections count.
        text = name.replace("f1", "F1")
        axes.step(curve.scores, getattr(curve, name), where="post", color=colour, label=text)
    threshold = report["classes"][label]["threshold"]["threshold"]
    axes.axvline(threshold, color=GREY, linestyle=":")
    name = short_name(report["classes"][label]["name"])
    axes.set(title=f"{name}: {threshold:.2f}", xlim=(0, 1), ylim=(0, 1.02), xlabel="threshold")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    return figure


def _draw_confusion(report: Report) -> Figure:
    """Draw the confusion matrix: numbers, and as shades the shares of each row."""
    matrix = np.array(report["confusion"], float)
    names = [*(short_name(each["name"]) for each in report["classes"]), "background"]
    size = 1.6 + 0.62 * len(names)
    figure, axes = _figure(size + 0.8, size)
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1.2)
    for row, column in np.ndindex(matrix.shape):
        if row < len(names) - 1 or column < len(names) - 1:
            text = f"{matrix[row, column]:.0f}"
            colour = "white" if shares[row, column] > 0.7 else "black"
            axes.text(column, row, text, ha="center", va="center", color=colour)
    positions = range(len(names))
    axes.set_xticks(positions, names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(positions, names)
    axes.set(xlabel="detected as", ylabel="ground truth")
    axes.grid(False)
    axes.spines[:].set_visible(False)
    return figure


def _draw_errors(report: Report) -> Figure:
    """Draw what each kind of error costs."""
    figure, axes = _figure(5.6, 2.4)
    errors = report["errors"]
    costs = [each["cost"] for each in errors.values()]
    axes.barh(range(len(errors)), costs, color=COLOURS[0], height=0.65)
    axes.set_yticks(range(len(errors)), list(errors))
    for position, each in enumerate(errors.values()):
        text = f" {each['cost']:.1f}  ({each['count']})"
        axes.text(each["cost"], position, text, va="center", fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="AP50 that is lost (number of errors)", xlim=(0, 1.25 * max(*costs, 1.0)))
    axes.grid(axis="y", visible=False)
    return figure


def _draw_reliability(bins: Sequence[Mapping[str, float]]) -> Figure:
    """Draw precision against score."""
    figure, axes = _figure(3.6, 3.0)
    accuracies = [each["avg_accuracy"] for each in bins]
    _draw_bars(axes, bins, accuracies, color=COLOURS[5], alpha=0.8)
    confidences = [each["avg_confidence"] for each in bins]
    axes.plot(confidences, accuracies, "o", color=COLOURS[0], markersize=3.5)
    axes.plot([0, 1], [0, 1], color=GREY, linestyle="--")
    axes.set(xlabel="score", ylabel="share that is right", xlim=(0, 1), ylim=(0, 1))
    return figure


def _draw_numbers(bins: Sequence[Mapping[str, float]]) -> Figure:
    """Draw the number of detections by score."""
    figure, axes = _figure(3.6, 3.0)
    _draw_bars(axes, bins, [each["count"] for each in bins], color=PALE)
    axes.set(xlabel="score", ylabel="detections", xlim=(0, 1))
    return figure


def _draw_bars(
    axes: Axes, bins: Sequence[Mapping[str, float]], heights: Sequence[float], **style: Any
) -> None:
    centres = [(each["bin_lower"] + each["bin_upper"]) / 2 for each in bins]
    widths = [0.92 * (each["bin_upper"] - each["bin_lower"]) for each in bins]
    axes.bar(centres, heights, width=widths, **style)


def _draw_froc(report: Report) -> Figure:
    """Draw recall against false positives per image, of classes and of all at one threshold."""
    figure, axes = _figure(5.6, 3.0)
    for colour, label in zip(COLOURS, weakest(report), strict=False):
        each = report["classes"][label]
        _plot_froc(axes, each["froc"], color=colour, label=short_name(each["name"]))
    if len(report["classes"]) > 1:
        _plot_froc(axes, report["froc"], color="black", linestyle="--", label="all together")
    axes.set_xscale("log", base=2)
    axes.set_xticks(FROC_RATES, [f"{rate:g}" for rate in FROC_RATES])
    axes.set(xlabel="false positives per image", ylabel="recall", ylim=(0, 1.02))
    figure.legend(loc="outside right upper")
    return figure


def _plot_froc(axes: Axes, froc: Mapping[str, float], **style: Any) -> None:
    axes.plot(FROC_RATES, list(froc.values()), marker="o", markersize=3, **style)
