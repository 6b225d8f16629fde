"""The report on data as one HTML page: counts, sizes against anchors, positions, pictures."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from retinanet_ext.analysis.plots import COLOURS, LABEL_SIZE, save_figure
from retinanet_ext.data.anchor_coverage import SIZES
from retinanet_ext.data.coco_json import count, printable
from retinanet_ext.data.validation_report import Report
from retinanet_ext.evaluation.pictures import draw_ground_truth
from retinanet_ext.files import write_file
from retinanet_ext.page import escape, markdown_table, render_page

NUM_PICTURES = 16  # of all data sets together
MAX_PAIRS = 20  # of images that look alike
MAX_DRAWN_PAIRS = 4

SIDE = "side, root of width x height (pixels)"
RATIO = "aspect ratio, height / width"

_CELLS = 16  # of a heat map, along each side
_SIZE = (5.5, 3.2)  # inches

_Record = dict[str, Any]


def write_data_page(report: Report, path: Path) -> None:
    """Write a report on data as a page that needs no other file.

    Args:
        report: of :func:`~retinanet_ext.data.validation_report.check_data`.
        path: HTML file to write.

    Raises:
        InputError: the file cannot be written.
    """
    content = report.content
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        parts = [
            "# Data",
            f"> {_escape(content['conclusion'])}",
            *_first_refused(content["data_sets"]),
            "## Counts",
            *_counts(content["data_sets"]),
            "## Images that look alike",
            *_duplicates(report, folder),
            "## Sizes and shapes against the anchors",
            *_shapes(content["data_sets"], folder),
            "## Positions",
            "Centres of the boxes, in fractions of the image's width and height.",
            _gallery(_positions(report.records, folder), folder, "centres of the boxes"),
            "## Pictures",
            *_pictures(report, folder),
            "## Findings",
            "As `retinanet-ext check-data` prints them; `--output` writes all of them.",
            "\n".join(f"    {line}" for line in report.text.splitlines()),
        ]
        names = ", ".join(content["name"] for content in content["data_sets"])
        write_file(path, render_page("\n\n".join(parts) + "\n", folder, title=f"Data: {names}"))


def _first_refused(data_sets: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a sentence that names the first finding that is refused, if there is one."""
    findings = [found for content in data_sets for found in content["findings"]]
    refused = [found["items"][0]["message"] for found in findings if found["policy"] == "refuse"]
    return [f"The first fault: {_escape(message)}." for message in refused[:1]]


def _escape(text: Any) -> str:
    return escape(printable(text))


def _table(rows: Sequence[Sequence[Any]]) -> str:
    """Return a Markdown table; the first row is the head."""
    return markdown_table(rows[0], [[*map(_escape, row)] for row in rows[1:]])


def _gallery(files: Iterable[Path], folder: Path, text: str) -> str:
    """Return pictures side by side; the text stands for each of them where it cannot be seen."""
    return " ".join(f"![{_escape(text)}]({file.relative_to(folder)})" for file in files)


def _counts(data_sets: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a table of the data sets, and one of boxes (and images) by class."""
    heads = ["", *(content["name"] for content in data_sets)]
    facts = [content["facts"] for content in data_sets]
    rows = [
        ["images", *(fact["images"] for fact in facts)],
        ["without boxes", *(fact["empty_images"] for fact in facts)],
        ["boxes", *(fact["boxes"] for fact in facts)],
        ["boxes per image", *(f"{fact['boxes_an_image']['mean']:.1f}" for fact in facts)],
        ["most in an image", *(fact["boxes_an_image"]["max"] for fact in facts)],
        ["regions to ignore", *(fact["regions_to_ignore"] for fact in facts)],
        ["image sizes", *(", ".join(list(fact["image_sizes"])[:3]) for fact in facts)],
    ]
    names = dict.fromkeys(name for fact in facts for name in fact["classes"])
    by_class = [[name, *(_class_cell(fact, name) for fact in facts)] for name in names]
    return [
        _table([heads, *rows]),
        "Boxes by class, with the number of images that have one and the share of all boxes:",
        _table([["class", *heads[1:]], *by_class]),
    ]


def _class_cell(facts: Mapping[str, Any], name: str) -> str:
    row = facts["classes"].get(name)
    if row is None:
        return "not listed"
    share = 100 * row["boxes"] / max(facts["boxes"], 1)
    return f"{row['boxes']} in {count(row['images'], 'image')}, {share:.1f} %"


def _duplicates(report: Report, folder: Path) -> list[str]:
    """Return the sentences, a table of the pairs, and pictures of the first ones."""
    content = report.content
    pairs = content["near_duplicates"]
    sentences = [_escape(sentence) for sentence in content["shared_images"]]
    if not pairs:
        return [*sentences, "No two images look alike."]
    heads = ["image", "in", "looks like", "in", "distance"]
    rows = [
        [
            Path(pair["image"]).name,
            pair["data_set"],
            Path(pair["other"]).name,
            pair["other_data_set"],
            "copy" if pair["equal"] else f"{pair['distance']:.2f}",
        ]
        for pair in pairs[:MAX_PAIRS]
    ]
    by_file = {r["file_name"]: r for group in report.records.values() for r in group}
    names = _class_names(content["data_sets"])
    drawn = []
    for index, pair in enumerate(pairs[:MAX_DRAWN_PAIRS]):
        two = [by_file[pair["image"]], by_file[pair["other"]]]
        place = folder / f"pair_{index}"
        files = draw_ground_truth(two, names, place, num_images=2, reader=report.reader)
        drawn.append(_gallery(files, folder, "one of two images that look alike"))
    more = [f"And {len(pairs) - MAX_PAIRS} more."] if len(pairs) > MAX_PAIRS else []
    return [
        *sentences,
        "The distance is 0 for equal images and about 0.5 for unrelated ones.",
        _table([heads, *rows]),
        *more,
        *drawn,
    ]


def _class_names(data_sets: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the longest list of class names, so that each class of any data set has a name."""
    return max((list(content["facts"]["classes"]) for content in data_sets), key=len)


def _shapes(data_sets: Sequence[Mapping[str, Any]], folder: Path) -> list[str]:
    """Return figures and a table of the anchor coverage of the training data."""
    parts = []
    for content in (content for content in data_sets if "coverage" in content):
        coverage = content["coverage"]
        name = content["name"]
        sides, ratios = (folder / f"{what}_{len(parts)}.svg" for what in ("sides", "ratios"))
        save_figure(_draw_histogram(coverage["sides"], SIDE), sides)
        save_figure(_draw_histogram(coverage["aspect_ratios"], RATIO), ratios)
        whole = coverage["all"]
        groups = {**coverage["by_class"], **coverage["by_size"], "all": whole}
        heads = ["", "boxes", f"reached at IoU {coverage['thresholds'][1]}", "mean best IoU"]
        rows = [
            [name, row["boxes"], f"{100 * row['reached']:.1f} %", f"{row['mean_best_iou']:.2f}"]
            for name, row in groups.items()
        ]
        size = f"short side {', '.join(map(str, coverage['short_sides']))}"
        parts += [
            f"{_escape(name)} after the training resize ({size}, long side at most "
            f"{coverage['max_size']}): an anchor reaches {100 * whole['reached']:.1f} % of the "
            f"boxes at IoU {coverage['thresholds'][1]}. Lines mark the anchors; "
            f"{', '.join(SIZES)} are COCO's sizes after the resize.",
            _gallery([sides, ratios], folder, f"boxes of {name} and anchors"),
            _table([heads, *rows]),
        ]
    return parts or ["There are no training boxes."]


def _draw_histogram(histogram: Mapping[str, Any], label: str) -> Figure:
    """Draw a histogram over a logarithmic axis, with a line for each anchor."""
    edges, counts = histogram["edges"], histogram["counts"]
    figure, axes = _figure()
    axes.stairs(counts, edges, fill=True, color=COLOURS[0], alpha=0.75, label="boxes")
    lines = axes.vlines(histogram["anchors"], 0, 1, transform=axes.get_xaxis_transform())
    lines.set(color=COLOURS[3], linewidth=0.8, linestyle="--", label="anchors")
    filled = np.flatnonzero(counts)
    shown = [edges[filled[0]], edges[filled[-1] + 1], *histogram["anchors"]]
    axes.set_xscale("log", base=2)
    axes.set(xlim=(min(shown) / 1.1, max(shown) * 1.1), xlabel=label, ylabel="boxes")
    axes.xaxis.set_major_locator(LogLocator(base=2))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.legend(frameon=False, fontsize=LABEL_SIZE)
    return figure


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _positions(records: Mapping[str, list[_Record]], folder: Path) -> list[Path]:
    """Draw a heat map of box centres per data set."""
    files = []
    for name, images in records.items():
        centers = [
            ((x + w / 2) / image["width"], (y + h / 2) / image["height"])
            for image in images
            for x, y, w, h in (a["bbox"] for a in image["annotations"] if not a["iscrowd"])
        ]
        if not centers:
            continue
        x, y = np.clip(np.transpose(centers), 0, 1)
        counts, _, _ = np.histogram2d(y, x, bins=_CELLS, range=((0, 1), (0, 1)))
        figure, axes = _figure()
        shown = axes.imshow(counts, extent=(0, 1, 1, 0), cmap="viridis", aspect="auto")
        figure.colorbar(shown, label="boxes per cell")
        axes.set(title=name, xlabel="x", ylabel="y")
        files.append(folder / f"positions_{len(files)}.svg")
        save_figure(figure, files[-1])
    return files


def _pictures(report: Report, folder: Path) -> list[str]:
    """Return pictures spread over each data set, with their ground truth."""
    data_sets = report.content["data_sets"]
    parts = []
    for index, content in enumerate(data_sets):
        name = content["name"]
        number = max(1, NUM_PICTURES // len(data_sets))
        files = draw_ground_truth(
            report.records[name],
            list(content["facts"]["classes"]),
            folder / f"pictures_{index}",
            num_images=number,
            reader=report.reader,
        )
        shown = _gallery(files, folder, f"an image of {name} with its boxes")
        parts += [f"{_escape(name)}, with the number of boxes:", shown]
    return parts
