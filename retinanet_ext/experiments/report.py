"""The report of a campaign: ``report.md`` with figures, ``report.html`` and ``runs.csv``."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from urllib.parse import quote

from detectron2.config import get_cfg

from retinanet_ext import add_retinanet_ext_config
from retinanet_ext.errors import InputError
from retinanet_ext.experiments.figures import Drawing, draw_figures
from retinanet_ext.experiments.grid_report import grid_blocks
from retinanet_ext.experiments.record import read_json
from retinanet_ext.experiments.results import Results, flatten, read_results
from retinanet_ext.experiments.statistics import (
    RULE,
    TableResult,
    duration,
    probability,
)
from retinanet_ext.files import make_folder, write_file
from retinanet_ext.page import anchor, escape, markdown_table, number, render_page, signed


def write_reports(output: Path) -> Iterator[Path]:
    """Write the report of every campaign in a folder, and yield the path of each file.

    Raises:
        InputError: no campaign, or, once all others are written, those that have no report
    """
    campaigns = sorted(path.parent for path in output.glob("*/campaign.json"))
    if not campaigns:
        raise InputError(f"{output} holds no experiments; --output names their folder")
    errors = []
    for campaign in campaigns:
        try:
            yield from write_report(campaign)
        except InputError as error:
            errors.append(str(error))
    if errors:
        raise InputError("; ".join(errors))


def write_report(campaign: Path) -> tuple[Path, Path, Path]:
    """Write ``runs.csv``, ``report.md``, ``report.html`` and ``figures/*.svg`` of a campaign.

    They depend only on the records and replace earlier ones: the same records give the same bytes.
    The page needs no other file.

    Raises:
        InputError: no run has ended, a record cannot be read, or the report cannot be written,
            in which case earlier files are intact
    """
    results = read_results(campaign)
    figures = draw_figures(results.tables)
    markdown = render_markdown(results, figures)
    make_folder(campaign / "figures")
    for drawing in (drawing for drawings in figures.values() for drawing in drawings):
        write_file(campaign / "figures" / f"{drawing.name}.svg", drawing.svg)
    paths = tuple(campaign / name for name in ("runs.csv", "report.md", "report.html"))
    contents = (
        render_csv(results),
        markdown,
        render_page(markdown, campaign, title="Focal loss, measured"),
    )
    for path, content in zip(paths, contents, strict=True):
        write_file(path, content)
    return paths


def render_csv(results: Results) -> str:
    """Return a line per run: record, metrics, and each config key that some run changes."""
    cfg = get_cfg()
    add_retinanet_ext_config(cfg)
    defaults = flatten(cfg)
    settings = {
        key: None
        for config in results.configs.values()
        for key, value in config.items()
        if value != defaults.get(key)
    }
    lines = []
    for run in results.runs:
        line = {**asdict(run), "folder": run.folder.name, "rows": " ".join(run.rows)}
        for name in ("metrics", "versions", "hardware"):
            line |= line.pop(name)
        config = results.configs[run.folder]
        lines.append(line | {key: config.get(key) for key in settings})
    file = io.StringIO()
    columns = dict.fromkeys(key for line in lines for key in line)
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return file.getvalue()


def render_markdown(results: Results, figures: Mapping[str, Sequence[Drawing]]) -> str:
    """Return the report in GitHub's Markdown, with links to the figures."""
    blocks = ["# The experiments of *Focal Loss for Dense Object Detection*, measured"]
    blocks.append("\n".join(f"- **{k}**: {escape(v)}" for k, v in results.facts.items()))
    blocks += [f"> **Note.** {escape(warning)}" for warning in results.warnings]
    blocks += _findings(results)
    for table in results.tables:
        blocks += _table(table, figures[table.table.name])
    blocks += _loss_cdfs(results)
    blocks += _pictures(results)
    blocks += _runs(results)
    titles = [block.removeprefix("## ") for block in blocks if block.startswith("## ")]
    contents = " · ".join(f"[{title}](#{anchor(title)})" for title in titles)
    return "\n\n".join([blocks[0], contents, *blocks[1:]]) + "\n"


def _findings(results: Results) -> Iterator[str]:
    yield "## Findings"
    yield results.headline
    rows = [
        (
            table.table.name,
            escape(verdict.text),
            verdict.word,
            verdict.measured,
            probability(verdict.p),
            signed(verdict.paper_difference),
        )
        for table in results.tables
        for verdict in table.verdicts
    ]
    if rows:
        numbers = ("difference in AP (95 % interval)", "p (Holm)", "in the paper")
        head = ("table", "claim", "here", *numbers)
        yield markdown_table(head, rows, numbers=(3, 4, 5))
        yield RULE


def _table(result: TableResult, drawings: Sequence[Drawing]) -> Iterator[str]:
    """Yield the answer in words, its figures, the table, and then the training curves."""
    table = result.table
    yield f"## {escape(result.heading)}"
    if result.summary:
        yield "\n".join(f"- {escape(sentence)}" for sentence in result.summary)
    yield from grid_blocks(result)
    for drawing in drawings:
        if not drawing.is_detail:
            yield from _drawing(drawing)
    yield escape(f"{table.source[0].upper()}{table.source[1:]}. {table.note}".strip())
    yield _numbers(result)
    for drawing in drawings:
        if drawing.is_detail:
            yield from _drawing(drawing)


def _drawing(drawing: Drawing) -> Iterator[str]:
    caption = escape(drawing.caption)
    yield f"![{caption}](figures/{drawing.name}.svg)"
    yield f"*{caption}*"


def _numbers(result: TableResult) -> str:
    """Return a table with a line per row: the paper's numbers and those measured."""
    table, metrics = result.table, result.metrics
    settings = list(dict.fromkeys(name for row in table.rows for name in row.settings))
    paper = [f"paper {metric}" for metric in metrics]
    if not any(row.paper for row in table.rows):
        paper = ["paper"] if any(row.outcome for row in table.rows) else []
    rows = []
    for row in result.rows:
        printed = [number(row.row.paper.get(metric)) for metric in metrics]
        if not row.row.paper:
            printed = [escape(row.row.outcome), *[""] * len(paper)]
        seeds = ", ".join(map(number, row.values("AP")))
        names = [escape(row.row.settings.get(name, "")) for name in settings]
        cells = [*names, *printed[: len(paper)], *row.cells(metrics), seeds, escape(row.status)]
        rows.append(cells)
    head = [*settings, *paper, *metrics, "AP of each seed", "runs"]
    return markdown_table(head, rows, numbers=range(len(settings), len(head) - 1))


def _loss_cdfs(results: Results) -> Iterator[str]:
    files = [
        path for run in results.runs for path in sorted(run.folder.glob("loss_cdf*/loss_cdf.json"))
    ]
    if files:
        yield "## Cumulative loss (figure 4)"
    for path in files:
        content = read_json(path)
        if path.with_suffix(".svg").is_file():
            name = f"{path.parent.parent.name}, {path.parent.name}"
            yield _picture(f"Cumulative loss of {name}", path.with_suffix(".svg"), results.folder)
        yield "\n".join(f"    {line}" for line in str(content.get("text", "")).splitlines())
        yield escape(str(content.get("conclusion", "")))


def _pictures(results: Results) -> Iterator[str]:
    pictures = {}
    for table in results.tables:
        for run in table.best.finished[:1] if table.best else ():
            caption = f"{table.best.label}, seed {run.seed}, AP {number(run.metrics.get('AP'))}"
            pictures.setdefault(run.folder / "detections.png", caption)
    pictures = {path: caption for path, caption in pictures.items() if path.is_file()}
    if pictures:
        yield "## Sample detections"
        yield "The best row of each table: ground truth on the left, detections on the right."
    for path, caption in pictures.items():
        yield f"{escape(caption)}:"
        yield _picture(caption, path, results.folder)


def _picture(caption: str, path: Path, folder: Path) -> str:
    return f"![{escape(caption)}]({quote(path.relative_to(folder).as_posix())})"


def _runs(results: Results) -> Iterator[str]:
    yield "## Every run"
    text = "All settings and metrics of each run are in `runs.csv`."
    if results.sparse:
        names = ", ".join(results.sparse)
        text += (
            " Tables of which one row was run, or rows of other tables alone, are left out: "
            f"{names}."
        )
    yield text
    yield markdown_table(
        ("folder", "rows", "seed", "status", "iterations", "starts", "wall time", "commit"),
        [
            (
                f"runs/{escape(run.folder.name)}",
                escape(", ".join(run.rows)),
                str(run.seed),
                escape(f"{run.status}: {run.message}" if run.message else run.status),
                str(run.iterations),
                str(run.num_starts),
                duration(run.wall_seconds),
                escape(run.commit),
            )
            for run in results.runs
        ],
    )
