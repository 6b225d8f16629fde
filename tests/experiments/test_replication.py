"""The recorded runs of docs/results, reported again: every table of replication.md is theirs."""

import re
import runpy
from pathlib import Path

import pytest

from experiments.campaigns import add_run, make_campaign

DOCS = Path(__file__).parents[2] / "docs"
PAGE = runpy.run_path(str(DOCS / "make_results.py"))
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
    (printed,) = (table for table in tables(TEXT) if table[0][1] == "claim")
    assert len(printed) == 1 + 24
    assert printed == reported["bccd"][0]
    words = [row[2] for row in printed[1:]]
    assert (words.count("holds"), words.count("is not decided")) == (5, 19)
    assert "5 hold, none does not hold and 19 are not decided" in TEXT


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


def test_dial(reported):
    """``mean ± spread (seeds)`` by imbalance and loss."""
    own = [table for table in tables(TEXT) if "foreground : background" in table[0]]
    assert len(own) == 2
    for (head, *rows), name in zip(own, ("dial", "dial, 1050 iterations"), strict=True):
        (found,) = (table for table in reported[name] if "background : foreground" in table[0])
        cells = {}
        for ratio, loss, ap, *_, runs in found[1:]:
            seeds = runs.partition(" ")[0]
            cells[ratio.partition(" ")[0], loss] = "not run" if ap == "–" else f"{ap} ({seeds})"
        for ratio, *printed in rows:
            ratio = ratio.rpartition(" ")[2]
            assert printed == [cells[ratio, loss] for loss in head[1:]]


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
