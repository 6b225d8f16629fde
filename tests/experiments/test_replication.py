"""The recorded runs of docs/results, reported again: every table of replication.md is theirs."""

import re
import runpy
from pathlib import Path

import pytest

from experiments.campaigns import add_run, make_campaign

DOCS = Path(__file__).parents[2] / "docs"
PAGE = runpy.run_path(str(DOCS / "make_results.py"))
GRIDS = ("init", "budget", "dial", "descendants")
TEXT = (DOCS / "results/replication.md").read_text(encoding="utf-8")


def tables(text):
    """Return the rows of cells of each table, head first and without the rule."""
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    tables = [[line.strip("| ").split(" | ") for line in block.splitlines()] for block in blocks]
    return [[head, *rows] for head, _, *rows in tables]


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """The tables of the report on the recorded runs of each campaign."""
    runs = PAGE["read_runs"]()
    reports = {}
    for name in {run["campaign"] for run in runs}:
        folder = tmp_path_factory.mktemp("report")
        report = PAGE["report"]((run for run in runs if run["campaign"] == name), folder)
        reports[name] = tables(report.read_text(encoding="utf-8"))
    return reports


def test_claims(reported):
    grids, paper = (table for table in tables(TEXT) if table[0][1] == "claim")
    assert len(paper) == 1 + 24
    assert paper == reported["bccd"][0]
    words = [row[2] for row in paper[1:]]
    assert (words.count("holds"), words.count("is not decided")) == (5, 19)
    assert "5 hold, none does not hold and 19 are not decided" in TEXT
    known = [row[:5] for name in GRIDS for row in reported[name][0][1:]]
    assert grids[1:] == [row for row in known if row[2] != "not measured"]


def test_tables_beyond_the_paper(reported):
    own = [table for table in tables(TEXT) if table[0][-1] == "AP of each seed"]
    for (head, *rows), name in zip(own, GRIDS, strict=True):
        found = reported[name][1]
        columns = [found[0].index(column) for column in head]
        measured = [row for row in found[1:] if row[found[0].index("AP")] != "–"]
        assert rows == [[row[column] for column in columns] for row in measured]
    for table in ("film_table", "costs"):
        assert PAGE[table](PAGE["read_runs"]()) in TEXT


def test_tables_of_the_paper(reported):
    own = [table for table in tables(TEXT) if table[0][-1] == "seeds"]
    assert len(own) == 7
    for head, *rows in own:
        columns = [*head[:-1], "runs"]
        wanted = [[*row[:-1], "1 seed" if row[-1] == "1" else f"{row[-1]} seeds"] for row in rows]
        candidates = [table for table in reported["bccd"] if set(columns) <= set(table[0])]
        assert wanted in [
            [[row[table[0].index(column)] for column in columns] for row in table[1:]]
            for table in candidates
        ], head


def test_runs_are_recorded_without_those_of_an_earlier_config(tmp_path):
    campaign = make_campaign(tmp_path / "small-0")
    add_run(campaign, "dial", "focal-1:30", 1, 20.0)
    add_run(
        *(campaign, "dial", "focal-1:30", 2, 10.0),
        **{"key": "earlier", "ended": "2026-11-20T20:00:00"},
    )
    add_run(campaign, "1a", "alpha.75", 1, 30.0)
    kept = {"campaign": "bccd", "rows": ["dial/focal-1:30"]}
    before = [kept, {"campaign": "dial", "rows": ["dial/ohem-1:30"]}]
    first, second = PAGE["add"](before, "dial", campaign, "dial")
    assert first == kept
    assert (second["rows"], second["seed"], second["AP"]) == (["dial/focal-1:30"], 1, 20.0)
    with pytest.raises(SystemExit, match="has no run of table init"):
        PAGE["add"](before, "dial", campaign, "init")
