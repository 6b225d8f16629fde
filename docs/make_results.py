"""Draw the figures of docs/results/replication.md from its recorded runs, and make it an HTML page.

    python docs/make_results.py [--add CAMPAIGN FOLDER TABLE] [--page output/replication.html]

The runs are in docs/results/replication_runs.json, a line each. ``--add`` records those of a table
first: FOLDER is one that ``retinanet-ext experiments run`` wrote, and CAMPAIGN the name under which
they are reported together. Runs of that name and table that were recorded before are replaced.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from retinanet_ext.experiments.record import DIVERGED, FINISHED, Record, read_records, write_json
from retinanet_ext.experiments.report import write_report
from retinanet_ext.files import make_folder, write_file
from retinanet_ext.page import render_page

RESULTS = Path(__file__).parent / "results"
RUNS = RESULTS / "replication_runs.json"
PAGE = RESULTS / "replication.md"
METRICS = ("AP", "AP50", "AP75")
FIELDS = ("rows", "seed", "status", "message", "iterations", "wall_seconds", "num_starts", "commit")
FIGURES = {"init": "init", "budget": "budget", "descendants": "claims_descendants"}
"""Campaign -> name of the figure in its report that the page shows."""


def read_runs() -> list[dict[str, Any]]:
    """Return the recorded runs: what :func:`describe` gives, with the name of their campaign."""
    return json.loads(RUNS.read_text(encoding="utf-8"))


def write_runs(runs: Iterable[dict[str, Any]]) -> None:
    """Record runs, one a line."""
    lines = ",\n".join(json.dumps(run, ensure_ascii=False) for run in runs)
    write_file(RUNS, f"[\n{lines}\n]\n")


def describe(record: Record, table: str) -> dict[str, Any]:
    """Return what is recorded of a run as one of a table."""
    fields = {name: getattr(record, name) for name in FIELDS}
    fields["rows"] = [row for row in record.rows if row.startswith(f"{table}/")]
    return fields | {metric: record.metrics.get(metric) for metric in METRICS}


def add(runs: Sequence[dict[str, Any]], campaign: str, folder: Path, table: str) -> list[dict]:
    """Return ``runs`` with those of a table in a campaign's folder."""
    kept = [
        run
        for run in runs
        if run["campaign"] != campaign or not run["rows"][0].startswith(f"{table}/")
    ]
    for record in read_records(folder):
        found = describe(record, table)
        if found["rows"] and record.status in (FINISHED, DIVERGED):
            kept.append({"campaign": campaign, **found})
    return kept


def report(runs: Iterable[dict[str, Any]], folder: Path) -> Path:
    """Write recorded runs of one campaign into a new folder, and return the report on them."""
    names = {side: {"name": "", "sha256": ""} for side in ("train", "test")}
    make_folder(folder / "runs")
    write_json(
        folder / "campaign.json", {"format": 1, "preset": "small", "opts": [], "data": names}
    )
    for number, run in enumerate(runs):
        fields = {name: run[name] for name in FIELDS}
        metrics = {metric: run[metric] for metric in METRICS}
        path = folder / "runs" / f"{number:03}"
        path.mkdir()
        Record(**fields, key=run["rows"][0], metrics=metrics, folder=path).write()
    return write_report(folder)[1]


def draw(runs: Sequence[dict[str, Any]]) -> None:
    """Write the page's figures into docs/results/figures."""
    with tempfile.TemporaryDirectory() as folder:
        for campaign, name in FIGURES.items():
            own = [run for run in runs if run["campaign"] == campaign]
            figures = report(own, Path(folder) / campaign).parent / "figures"
            shutil.copy(figures / f"{name}.svg", RESULTS / "figures")


def main() -> None:
    """Add runs if asked to, and write figures and page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--add", nargs=3, metavar=("CAMPAIGN", "FOLDER", "TABLE"), action="append")
    parser.add_argument("--page", type=Path, help="HTML page to write")
    args = parser.parse_args()
    runs = read_runs()
    for campaign, folder, table in args.add or ():
        runs = add(runs, campaign, Path(folder), table)
    if args.add:
        write_runs(runs)
    draw(runs)
    if args.page:
        text = PAGE.read_text(encoding="utf-8")
        title = text.splitlines()[0].removeprefix("# ")
        make_folder(args.page.parent)
        write_file(args.page, render_page(text, RESULTS, title=title))


if __name__ == "__main__":
    main()
