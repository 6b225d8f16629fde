"""A comparison of two detectors as text, as a page and as figures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from tabulate import tabulate

from retinanet_ext.analysis.plots import COLOURS, save_figure
from retinanet_ext.data.coco_json import join_some, printable
from retinanet_ext.evaluation.compare import METRICS, Comparison, ImageChange
from retinanet_ext.evaluation.fonts import choose_fonts
from retinanet_ext.page import escape, interval, markdown_table, number, signed, with_interval

NUM_SHOWN = 10
"""Number of images listed on the page that gained most, and that lost most."""

NUM_LINES = 3
"""The same in the text."""

CAPTION = (
    "The difference b - a with its 95 % interval over images, grey if it holds 0. Of many "
    "intervals about one in twenty misses the true difference by chance."
)
FEW_IMAGES = 20
IMAGE_COLUMNS = ("image", "file", "AP of a", "AP of b", "change")
SEED_COLUMNS = (
    *("objects", "metric", "b - a", "over images"),
    *("over images and seeds", "over seeds (Welch)"),
)
FONT_SIZE = 9  # points
WIDTH, ROW_HEIGHT, MARGIN = 3.7, 0.24, 0.9  # inches
MAX_LABEL = 24  # characters


def conclude(comparison: Comparison) -> str:
    """Return in one line which side is ahead in AP, or that the images do not decide.

    The interval is the one over images, or over images and seeds where both sides have several.
    """
    group = comparison.groups[0]
    found = group.metrics["AP"]
    low, high = bounds = found.images_and_seeds or found.images
    numbers = f"(AP {signed(found.difference)}, {interval(bounds)})"
    if group.num_images < FEW_IMAGES:
        return f"Fewer than {FEW_IMAGES} images do not decide between a and b {numbers}."
    if low > 0 or high < 0:
        first, second = ("b", "a") if low > 0 else ("a", "b")
        seeds = ", with other seeds too" if comparison.has_seeds else ""
        return f"{first} is ahead of {second} on images of this kind{seeds} {numbers}."
    seeds = " and seeds" if comparison.has_seeds else ""
    return f"The images{seeds} do not decide between a and b {numbers}."


def explain(comparison: Comparison) -> str:
    """Return what the intervals mean and what they do not cover, in words."""
    text = (
        f"About 95 % of such intervals, each from {comparison.num_images} other images of the same "
        "kind, hold the difference over all images of that kind. They are of the images, not of "
        "the seeds: they do not say what trainings with other seeds would give."
    )
    if comparison.has_seeds:
        numbers = f"{len(comparison.a)} and {len(comparison.b)}"
        text += (
            f" The intervals over images and seeds resample the {numbers} trainings too; Welch's "
            "are over the seeds alone, on these images."
        )
    few = [group.name for group in comparison.groups if 0 < group.num_images < FEW_IMAGES]
    if few:
        text += (
            f" Intervals for objects in fewer than {FEW_IMAGES} images cannot be relied on: "
            f"{join_some(map(printable, few))}."
        )
    return text


def render_text(comparison: Comparison) -> str:
    """Return the comparison as plain text."""
    lines = [
        *(f"{side}: {', '.join(names)}" for side, names in _sides(comparison)),
        "",
        tabulate(list(_rows(comparison)), _columns(comparison), disable_numparse=True),
        "",
        conclude(comparison),
        "",
        explain(comparison),
        "",
        count_images(comparison),
    ]
    gained, lost = extremes(comparison.images, NUM_LINES)
    for image in (*gained, *lost):
        name = f"image {printable(image.image_id)} ({printable(image.file_name)})"
        lines.append(f"  {signed(image.change)}  {image.a:.1f} to {image.b:.1f}  {name}")
    return "\n".join(lines)


def render_markdown(
    comparison: Comparison, folder: Path, pictures: Sequence[tuple[ImageChange, str]] = ()
) -> str:
    """Return the comparison in Markdown.

    Args:
        comparison: what is shown
        folder: folder that the figures are written to
        pictures: images, each with the name of its picture in the folder
    """
    sides = [f"- **{side}**: {escape(', '.join(names))}" for side, names in _sides(comparison)]
    blocks = ["# Two detectors on the same images", "\n".join(sides)]
    blocks += [f"**{escape(conclude(comparison))}**"]
    blocks += [f"> {escape(explain(comparison))}", "## Differences in AP"]
    blocks.append(_table(_columns(comparison), _rows(comparison)))
    for metric in METRICS:
        save_figure(draw_intervals(comparison, metric), folder / f"{metric}.svg")
    blocks.append("\n".join(f"![{metric}]({metric}.svg)" for metric in METRICS))
    blocks.append(f"*{CAPTION}*")
    if comparison.has_seeds:
        blocks += ["## Seeds", _table(SEED_COLUMNS, _seed_rows(comparison))]
    blocks += ["## Images", count_images(comparison)]
    gained, lost = extremes(comparison.images, NUM_SHOWN)
    for title, images in (("Better in b", gained), ("Worse in b", lost)):
        if images:
            blocks += [f"### {title}", _table(IMAGE_COLUMNS, map(_image_row, images))]
    for image, name in pictures:
        caption = f"Image {image.image_id}: AP {image.a:.1f} in a, above; {image.b:.1f} in b, below"
        blocks += [f"![{escape(caption)}]({name})", f"*{escape(caption)}*"]
    if comparison.settings:
        rows = [(key, *values) for key, values in comparison.settings.items()]
        blocks += ["## Settings that differ", _table(("key", "a", "b"), rows)]
    return "\n\n".join(blocks) + "\n"


def draw_intervals(comparison: Comparison, metric: str) -> Figure:
    """Draw the differences in a metric with their intervals over images, one row per group."""
    names, families = choose_fonts([group.name for group in comparison.groups])
    height = MARGIN + ROW_HEIGHT * len(names)
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color="#888888", linewidth=0.8)
    for row, group in enumerate(comparison.groups):
        found = group.metrics[metric]
        if not math.isnan(found.difference):
            low, high = found.images
            colour = "#888888" if low <= 0 <= high else COLOURS[0] if low > 0 else COLOURS[3]
            axes.plot([low, high], [row, row], color=colour, linewidth=2, solid_capstyle="butt")
            axes.plot([found.difference], [row], "o", color=colour, markersize=4)
    axes.set_yticks(range(len(names)))
    labels = [name if len(name) <= MAX_LABEL else name[: MAX_LABEL - 1] + "…" for name in names]
    axes.set_yticklabels(labels, fontfamily=families, parse_math=False, fontsize=FONT_SIZE)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="x", labelsize=FONT_SIZE)
    axes.set_xlabel(f"{metric}: b - a", fontsize=FONT_SIZE)
    axes.grid(axis="x", color="#E5E5E5", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def count_images(comparison: Comparison) -> str:
    """Return how many images are better and worse in b, in words."""
    better = sum(image.change > 0 for image in comparison.images)
    worse = sum(image.change < 0 for image in comparison.images)
    empty = comparison.num_images - len(comparison.images)
    return (
        f"AP of each image by itself: {better} better in b, {worse} worse, "
        f"{len(comparison.images) - better - worse} equal"
        f"{f', {empty} without objects' if empty else ''}."
    )


def _sides(comparison: Comparison) -> tuple[tuple[str, Sequence[str]], ...]:
    return ("a", comparison.a), ("b", comparison.b)


def _columns(comparison: Comparison) -> list[str]:
    columns = ["objects", "images", "AP of a", "AP of b", *(f"{m}: b - a" for m in METRICS)]
    return [*columns, "AP, images and seeds", "AP, seeds"] if comparison.has_seeds else columns


def _rows(comparison: Comparison) -> Iterator[list[str]]:
    """Yield a row per group, with the intervals over images."""
    for group in comparison.groups:
        ap = group.metrics["AP"]
        row = [printable(group.name), str(group.num_images), number(ap.a), number(ap.b)]
        row += [with_interval(d.difference, d.images) for d in group.metrics.values()]
        if comparison.has_seeds:
            row += [interval(ap.images_and_seeds), interval(ap.seeds)]
        yield row


def _seed_rows(comparison: Comparison) -> Iterator[list[str]]:
    for group in comparison.groups:
        for metric, found in group.metrics.items():
            intervals = (found.images, found.images_and_seeds, found.seeds)
            yield [
                printable(group.name),
                metric,
                signed(found.difference),
                *map(interval, intervals),
            ]


def _image_row(image: ImageChange) -> list[str]:
    name = [str(image.image_id), printable(image.file_name)]
    return [*name, number(image.a), number(image.b), signed(image.change)]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return markdown_table(head, [[escape(cell) for cell in row] for row in rows])


def extremes(
    images: Sequence[ImageChange], most: int
) -> tuple[list[ImageChange], list[ImageChange]]:
    """Return the images that gained most and those that lost most, the largest change first."""
    gained = [image for image in images if image.change > 0]
    lost = [image for image in reversed(images) if image.change < 0]
    return gained[:most], lost[:most]
