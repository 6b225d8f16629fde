"""What was measured beside what the paper says, as Markdown and as one HTML page."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from retinanet_ext.errors import InputError
from retinanet_ext.experiments.figures import Drawing, draw_figures
from retinanet_ext.experiments.page import render_page
from retinanet_ext.experiments.results import (
    RULE,
    Results,
    RowResult,
    TableResult,
    duration,
    number,
    read_results,
    signed,
    with_spread,
)
from retinanet_ext.files import write_file


def write_report(campaign: Path) -> tuple[Path, Path]:
    """Write ``report.md``, ``report.html`` and ``figures/*.svg`` of a campaign.

    They follow from the records alone and replace earlier ones; the same records give the same
    bytes. The page needs no other file.

    Args:
        campaign: the folder that the runner wrote

    Returns:
        the paths of ``report.md`` and ``report.html``

    Raises:
        InputError: no run has ended, a record cannot be read, or the report cannot be written,
            in which case earlier files are intact
    """
    results = read_results(campaign)
    figures = draw_figures(results)
    page = render_page(results, figures)
    markdown = render_markdown(results, figures)
    folder = campaign / "figures"
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be made: {error.strerror}") from error
    for drawing in (drawing for drawings in figures.values() for drawing in drawings):
        write_file(folder / f"{drawing.name}.svg", drawing.svg)
    for cdf in results.loss_cdfs:
        write_file(folder / f"{cdf.name}.svg", cdf.svg)
    write_file(campaign / "report.md", markdown)
    write_file(campaign / "report.html", page)
    return campaign / "report.md", campaign / "report.html"


def render_markdown(results: Results, figures: Mapping[str, Sequence[Drawing]]) -> str:
    """Return the report in GitHub's Markdown; figures are named, not contained."""
    blocks = [*_head(results), *_findings(results)]
    for table in results.full_tables:
        blocks += _table(table, figures[table.table.name], level=2)
    if results.sparse_tables:
        blocks.append("## Tables of which one row was run")
        for table in results.sparse_tables:
            blocks += _table(table, figures[table.table.name], level=3)
    blocks += _loss_cdfs(results)
    blocks += _pictures(results)
    blocks += _runs(results)
    return "\n\n".join(blocks) + "\n"


def _head(results: Results) -> Iterator[str]:
    yield "# The experiments of *Focal Loss for Dense Object Detection*, measured"
    yield _list(f"**{name}**: {_escape(value)}" for name, value in results.facts)
    for warning in results.warnings:
        yield f"> **Note.** {_escape(warning)}"


def _findings(results: Results) -> Iterator[str]:
    yield "## Findings"
    yield f"{results.headline} {_escape(results.best_sentence)}".strip()
    if results.verdicts:
        yield _markdown_table(
            ("table", "here", "the paper's claim", "difference in AP", "paper's", "remarks"),
            [
                (
                    table.table.name,
                    f"**{verdict.word}**",
                    _escape(verdict.claim.text),
                    _escape(verdict.measured),
                    signed(verdict.paper_difference),
                    _escape("; ".join(verdict.remarks)),
                )
                for table, verdict in results.verdicts
            ],
        )
        yield RULE
    best = [(table, table.best, table.paper_best) for table in results.full_tables if table.best]
    if best:
        yield _markdown_table(
            ("table", "best row here", "AP", "best row in the paper", "AP"),
            [
                (
                    _escape(f"{table.table.name}: {table.table.title}"),
                    _escape(here.label),
                    _escape(with_spread(here.values("AP"))),
                    _escape(paper.label) if paper else "–",
                    number(paper.row.paper["AP"]) if paper else "–",
                )
                for table, here, paper in best
            ],
        )


def _table(table: TableResult, drawings: Sequence[Drawing], *, level: int) -> Iterator[str]:
    yield f"{'#' * level} {_escape(table.heading)}"
    yield _escape(table.introduction)
    settings = table.settings
    metrics = table.metrics
    paper = [f"paper {column}" for column in table.paper_columns]
    head = [*settings, *paper, *metrics, "AP of each seed", "runs"]
    rows = [
        [
            *(_escape(row.row.settings.get(name, "")) for name in settings),
            *_paper_cells(row, table.paper_columns),
            *(_escape(cell) for cell in row.cells(metrics)),
            ", ".join(number(value) for value in row.values("AP")),
            _escape(row.status),
        ]
        for row in table.rows
    ]
    yield _markdown_table(head, rows, num_text=len(settings))
    for drawing in drawings:
        yield f"![{_escape(drawing.caption)}](figures/{drawing.name}.svg)"
        yield f"*{_escape(drawing.caption)}*"


def _paper_cells(row: RowResult, columns: Sequence[str]) -> list[str]:
    if columns and not row.row.paper:
        return [_escape(row.row.outcome), *[""] * (len(columns) - 1)]
    return [number(row.row.paper.get(metric)) for metric in columns]


def _loss_cdfs(results: Results) -> Iterator[str]:
    if results.loss_cdfs:
        yield "## Cumulative loss (figure 4)"
    for cdf in results.loss_cdfs:
        yield f"![Cumulative loss of {_escape(cdf.run.folder.name)}](figures/{quote(cdf.name)}.svg)"
        if cdf.text:
            yield "\n".join(f"    {line}" for line in cdf.text.splitlines())
        if cdf.conclusion:
            yield _escape(cdf.conclusion)


def _pictures(results: Results) -> Iterator[str]:
    pictures = results.pictures
    if pictures:
        yield "## Sample detections"
    for caption, path in pictures:
        target = path.relative_to(results.folder).as_posix()
        yield f"{_escape(caption)}\n\n![{_escape(caption)}]({quote(target)})"


def _runs(results: Results) -> Iterator[str]:
    yield "## Every run"
    yield _markdown_table(
        ("folder", "rows", "seed", "status", "iterations", "starts", "wall time", "commit"),
        [
            (
                f"runs/{_escape(run.folder.name)}",
                _escape(", ".join(run.rows)),
                str(run.seed),
                _escape(f"{run.status}: {run.message}" if run.message else run.status),
                str(run.iterations),
                str(run.num_starts),
                duration(run.wall_seconds),
                _escape(run.commit),
            )
            for run in results.runs
        ],
    )


def _markdown_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, num_text: int | None = None
) -> str:
    """Return a table whose first ``num_text`` columns are text, the others numbers."""
    num_text = len(head) if num_text is None else num_text
    rule = ["---"] * num_text + ["---:"] * (len(head) - num_text)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (map(_escape, head), rule, *rows))


def _list(items: Iterable[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _escape(text: str) -> str:
    """Return text in one line in which Markdown and HTML mean nothing."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", text)
