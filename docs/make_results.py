"""Make the tables and figures of docs/results/replication.md, and the tables of docs/advise.md.

    python docs/make_results.py [--add CAMPAIGN FOLDER TABLE] [--page docs/results/replication.html]

They come from the recorded runs and from the adviser's measured losses. The sentences and the
paper's own tables stay. ``--page`` writes replication.md as one HTML file as well.
The runs are in docs/results/replication_runs.json, a line each, with the shares of loss and
gradient over the first tenth of those that have a film. ``--add`` records the runs of a table
first: FOLDER is one that ``retinanet-ext experiments run`` wrote, and CAMPAIGN the name under which
they are reported; what was recorded under it before of the same row and seed is replaced. Seeds of
a row that have another config are refused; the runs that were recorded first do not have theirs.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from retinanet_ext.analysis.film import GROUPS, QUANTITIES, early_shares
from retinanet_ext.engine.loss_film import LOSS_FILM, read_film
from retinanet_ext.experiments.advice import everywhere_table, regret_table
from retinanet_ext.experiments.figure_style import PALE, PALETTE, WIDTH, render_svg
from retinanet_ext.experiments.film_report import rank_correlations
from retinanet_ext.experiments.measured_losses import (
    DEFAULT,
    one_loss_everywhere,
    read_measurements,
)
from retinanet_ext.experiments.record import Record, write_json
from retinanet_ext.experiments.report import write_report
from retinanet_ext.experiments.results import read_results
from retinanet_ext.files import make_folder, write_file
from retinanet_ext.page import NOTHING, markdown_table, number, render_page

RESULTS = Path(__file__).parent / "results"
RUNS = RESULTS / "replication_runs.json"
PAGE = RESULTS / "replication.md"
ADVICE = Path(__file__).parent / "advise.md"
METRICS = ("AP", "AP50", "AP75")
FIELDS = ("rows", "seed", "status", "message", "iterations", "wall_seconds", "num_starts", "commit")
DIGEST = "key"
"""Of a run's config, which the seeds of a row share. Early runs were recorded without it."""

FIGURES = {
    "init": "init",
    "budget": "budget",
    "budget-1:300": "budget",
    "fair-steps": "fair-steps",
    "dial": "dial",
    "descendants": "claims_descendants",
    "descendants-1:300": "claims_descendants",
}
"""Campaign -> the figure of its report that the page shows, under the name of the campaign.

In the order of the page's tables of AP.
"""

FILMED = {
    "ResNet-18, random weights, 350 iterations": ("budget", "-1x"),
    "the same, 1050 iterations": ("budget", "-3x"),
    "the same, 3150 iterations": ("budget", "-9x"),
    "the sample set at 1:300, 160 iterations": ("budget-1:300", "-1x"),
    "the same, 480 iterations": ("budget-1:300", "-3x"),
    "the same, 1440 iterations": ("budget-1:300", "-9x"),
    "MobileNetV2, random weights, 350 iterations": ("init", "-random"),
    "MobileNetV2, ImageNet weights, 350 iterations": ("init", "-imagenet"),
    "the dial at 1:30": ("dial", "-1:30"),
    "the dial at 1:100": ("dial", "-1:100"),
    "the dial at 1:300": ("dial", "-1:300"),
    "the dial at 1:1000": ("dial", "-1:1000"),
    "the dial at 1:3000": ("dial", "-1:3000"),
}
"""Setting of films -> its campaign and the end of its rows' names."""

TABLE = re.compile(r"(?:^\|.*\n)+", re.MULTILINE)


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
    fields[DIGEST] = record.key
    fields |= {metric: record.metrics.get(metric) for metric in METRICS}
    fields["hardware"] = ", ".join(record.hardware["gpus"]) or record.hardware["cpu"]
    if (record.folder / LOSS_FILM).is_file():
        shares = early_shares(read_film(record.folder))
        if not np.isnan(shares["loss"]).any():  # of a film that begins late
            fields |= {name: [round(float(x), 4) for x in shares[name]] for name in QUANTITIES}
    return fields


def add(runs: Sequence[dict[str, Any]], campaign: str, folder: Path, table: str) -> list[dict]:
    """Return ``runs`` and, under a campaign's name, those of a table in a folder.

    A recorded run loses the rows that one of them has with the same seed, and is left out if it has
    no other. Ends the program if the seeds of a row then differ in their config.
    """
    found = [describe(record, table) for record in read_results(folder).runs]
    found = [{"campaign": campaign, **run} for run in found if run["rows"]]
    if not found:
        raise SystemExit(f"{folder} has no run of table {table}")
    new = {(campaign, run["seed"], row) for run in found for row in run["rows"]}
    kept = []
    for run in runs:
        rows = [row for row in run["rows"] if (run["campaign"], run["seed"], row) not in new]
        kept += [{**run, "rows": rows}] if rows else []
    digests = {row: run[DIGEST] for run in found for row in run["rows"]}
    for run in kept:
        if run["campaign"] != campaign or DIGEST not in run:
            continue
        for row in run["rows"]:
            if digests.get(row, run[DIGEST]) != run[DIGEST]:
                raise SystemExit(
                    f"{folder} has {row} with the config {digests[row]}, and seed {run['seed']} "
                    f"was recorded with {run[DIGEST]}: run all seeds of the row again"
                )
    return kept + found


def report(runs: Iterable[dict[str, Any]], folder: Path) -> Path:
    """Write recorded runs of one campaign into a new folder, and return the report on them."""
    data = {side: {"name": "", "sha256": ""} for side in ("train", "test")}
    make_folder(folder / "runs")
    write_json(folder / "campaign.json", {"preset": "small", "opts": [], "data": data})
    for i, run in enumerate(runs):
        fields = {name: run[name] for name in FIELDS}
        metrics = {metric: run[metric] for metric in METRICS}
        path = folder / "runs" / f"{i:03}"
        path.mkdir()
        Record(**fields, key=run["rows"][0], metrics=metrics, folder=path).write()
    return write_report(folder)[1]


def film_table(runs: Sequence[dict[str, Any]]) -> str:
    """Return the rank correlations of early shares with the final AP, over the rows of settings."""
    rows = []
    for setting, (campaign, ending) in FILMED.items():
        seeds: dict[str, list[dict[str, Any]]] = {}
        for run in runs:
            name = run["rows"][0]
            is_filmed = "loss" in run and run["AP"] is not None
            if run["campaign"] == campaign and name.endswith(ending) and is_filmed:
                seeds.setdefault(name, []).append(run)
        early = [
            {name: np.mean([run[name] for run in own], axis=0) for name in QUANTITIES}
            for own in seeds.values()
        ]
        aps = [fmean(run["AP"] for run in own) for own in seeds.values()]
        cells = [
            number(rho, 2).replace("-", "−") for rho, _ in rank_correlations(early, aps).values()
        ]
        rows.append((setting, str(len(seeds)), *cells))
    head = ["setting", "rows", *(f"{name}, {group}" for name in QUANTITIES for group in GROUPS)]
    return markdown_table(head, rows, numbers=range(1, len(head)))


def costs(runs: Sequence[dict[str, Any]]) -> str:
    """Return the runs and hours of training of each campaign, by hardware."""
    found: dict[tuple[str, str], list[float]] = {}
    for run in runs:
        place = run["campaign"], run.get("hardware", "Intel Xeon")
        found.setdefault(place, []).append(run["wall_seconds"] / 3600)
    rows = [(*place, str(len(hours)), f"{sum(hours):.1f}") for place, hours in found.items()]
    return markdown_table(("runs of", "on", "runs", "hours"), rows, numbers=(2, 3))


def tables(text: str) -> list[list[list[str]]]:
    """Return the rows of cells of each table in Markdown, head first and without the rule."""
    blocks = [block.splitlines() for block in TABLE.findall(text)]
    cells = [[line.strip("| ").split(" | ") for line in lines] for lines in blocks]
    return [[head, *rows] for head, _, *rows in cells]


def fill(text: str, runs: Sequence[dict[str, Any]], reports: Mapping[str, str]) -> str:
    """Return a document with each of its tables beyond the paper made again.

    Args:
        text: of :data:`PAGE` or :data:`ADVICE`; the tables of AP keep their columns
        runs: all recorded runs
        reports: campaign -> text of the report on its runs
    """
    campaigns = iter(FIGURES)
    settings = read_measurements()[0]

    def make(block: re.Match[str]) -> str:
        ((head, *_),) = tables(block[0])
        if head[-1] == "AP of each seed":
            found = tables(reports[next(campaigns)])
            names, *rows = next(table for table in found if head[-1] in table[0])
            columns = [names.index(column) for column in head]
            rows = [row for row in rows if row[names.index("AP")] != NOTHING]
            rows = [[row[column] for column in columns] for row in rows]
            made = markdown_table(head, rows, numbers=[head.index("AP"), head.index("AP50")])
        elif head[-1] == "p (Holm)":
            claims = [
                [name, *row[1:-1]] for name in FIGURES for row in tables(reports[name])[0][1:]
            ]
            rows = [row for row in claims if row[2] != "not measured"]
            made = markdown_table(head, rows, numbers=(3, 4))
        elif head[-1] == "AP, rate by other seeds":
            found = tables(reports["fair-steps"])
            _, *rows = next(table for table in found if table[0] == head)
            made = markdown_table(head, rows, numbers=(1, 3, 4))
        elif head[0] == "setting":
            made = film_table(runs)
        elif head[0] == "runs of":
            made = costs(runs)
        elif head[0] == "left out":
            made = markdown_table(head, regret_table(settings)[1:], numbers=(4, 5))
        elif head[-1] == "most":
            made = markdown_table(head, everywhere_table(settings)[1:], numbers=(1, 2))
        else:
            return block[0]
        return made + "\n"

    return TABLE.sub(make, text)


def draw_everywhere(lost: Mapping[str, Mapping[str, float]]) -> Figure:
    """Draw the AP that each loss loses in each setting if it is taken everywhere."""
    settings = list(lost[DEFAULT])
    figure = Figure(figsize=(WIDTH, 1.0 + 0.22 * len(settings)), layout="constrained")
    axes = figure.subplots()
    for i, ((row, aps), colour) in enumerate(zip(lost.items(), PALETTE[:3], strict=True)):
        places = [place + 0.22 * (i - 1) for place in range(len(settings))]
        axes.plot([aps[name] for name in settings], places, "osD"[i], ms=4, color=colour, label=row)
    axes.set_yticks(range(len(settings)), settings)
    axes.invert_yaxis()
    axes.grid(axis="y", color=PALE, lw=0.5)
    axes.set_axisbelow(True)
    axes.set_xlabel("AP behind the best loss of the setting")
    figure.legend(loc="outside upper left", ncols=len(lost))
    return figure


def write_results(runs: Sequence[dict[str, Any]]) -> None:
    """Write the tables of both documents, and the figures into docs/results/figures."""
    reports = {}
    with tempfile.TemporaryDirectory() as folder:
        for campaign, figure in FIGURES.items():
            own = [run for run in runs if run["campaign"] == campaign]
            path = report(own, Path(folder) / campaign)
            reports[campaign] = path.read_text(encoding="utf-8")
            name = f"{campaign.replace(':', '-')}.svg"
            shutil.copy(path.parent / f"figures/{figure}.svg", RESULTS / "figures" / name)
    lost = one_loss_everywhere(read_measurements()[0])
    svg = render_svg(lambda: draw_everywhere(lost))
    (RESULTS / "figures/everywhere.svg").write_bytes(svg)
    for document in (PAGE, ADVICE):
        write_file(document, fill(document.read_text(encoding="utf-8"), runs, reports))


def main() -> None:
    """Add runs if asked to, and write tables and figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--add", nargs=3, metavar=("CAMPAIGN", "FOLDER", "TABLE"), action="append")
    parser.add_argument("--page", type=Path, help="HTML page to write")
    args = parser.parse_args()
    runs = read_runs()
    for campaign, folder, table in args.add or ():
        runs = add(runs, campaign, Path(folder), table)
    if args.add:
        write_runs(runs)
    write_results(runs)
    if args.page:
        text = PAGE.read_text(encoding="utf-8")
        title = text.splitlines()[0].removeprefix("# ")
        make_folder(args.page.parent)
        write_file(args.page, render_page(text, RESULTS, title=title))


if __name__ == "__main__":
    main()
