"""The recorded runs of docs/results, reported again: every table of replication.md is theirs."""

import re
import runpy
from pathlib import Path

import pytest

from experiments.campaigns import add_run, make_campaign
from retinanet_ext.evaluation.bootstrap import welch_interval
from retinanet_ext.experiments.gradient_share import share_of_row
from retinanet_ext.experiments.measured_losses import (
    DEFAULT,
    one_loss_everywhere,
    read_measurements,
)
from retinanet_ext.experiments.tables import TABLES

DOCS = Path(__file__).parents[2] / "docs"
PAGE = runpy.run_path(str(DOCS / "make_results.py"))
TEXT = PAGE["PAGE"].read_text(encoding="utf-8")
tables = PAGE["tables"]


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """The text of the report on the recorded runs of each campaign."""
    runs = PAGE["read_runs"]()
    reports = {}
    for name in {run["campaign"] for run in runs}:
        folder = tmp_path_factory.mktemp("report")
        report = PAGE["report"]((run for run in runs if run["campaign"] == name), folder)
        reports[name] = report.read_text(encoding="utf-8")
    return reports


def test_claims_of_the_paper(reported):
    (paper,) = (table for table in tables(TEXT) if table[0][-1] == "in the paper")
    assert len(paper) == 1 + 24
    assert paper == tables(reported["bccd"])[0]
    words = [row[2] for row in paper[1:]]
    assert (words.count("holds"), words.count("is not decided")) == (5, 19)
    assert "5 hold, none does not hold and 19 are not decided" in TEXT


def fill_heads(text, reported):
    """The tables of a document, made again from their heads alone."""
    heads = PAGE["TABLE"].sub(lambda block: "".join(block[0].splitlines(True)[:2]), text)
    return tables(PAGE["fill"](heads, PAGE["read_runs"](), reported))


def test_tables_beyond_the_paper(reported):
    top, _ = TEXT.split("## The paper's own tables")
    made = fill_heads(top, reported)
    assert made == tables(top)
    (claims,) = (table for table in made if table[0][-1] == "p (Holm)")
    words = [row[2] for row in claims[1:]]
    counts = [words.count(said) for said in ("holds", "does not hold", "is not decided")]
    said = "Of the {} claims of the tables here {} hold, {} do not and {} are not decided"
    assert said.format(len(words), *counts) in " ".join(TEXT.split())


def test_tables_and_sentences_of_the_adviser(reported):
    top, _ = PAGE["ADVICE"].read_text(encoding="utf-8").split("## The film")
    made = fill_heads(top, reported)
    assert made == tables(top)
    regrets = made[0]
    *_, ap, default = regrets[-1]
    said = (
        f"Following it costs {ap} AP in the mean of these {len(regrets) - 2} settings, the default"
    )
    assert f"{said} {default}." in top
    everything = read_measurements()[0]
    settings = [setting for setting in everything if setting.best() != DEFAULT]
    bounds = [welch_interval(own.rows[own.best()], own.rows[DEFAULT]) for own in settings]
    decided = sum(low > 0 for low, _ in filter(None, bounds))
    said = f"in {len(settings)} of the {len(everything)} settings below another loss than the"
    said += f" default is the best, and the seeds decide that in {decided}"
    assert said in " ".join(top.split())
    lost = one_loss_everywhere(everything)
    safest = sorted(lost[f"{DEFAULT}, weight auto"].values())
    assert f"on the {len(safest)} settings that have all three" in top
    assert f"loses no more than {safest[-2]:.1f} AP but in the shortest training" in top
    page = " ".join(TEXT.split())
    assert f"in the mean of {len(safest)} settings" in page
    assert f"loses {safest[-1]:.1f} in the shortest training" in page
    assert f"at most {safest[-2]:.1f} in all others" in page


def test_tables_of_the_paper(reported):
    own = [table for table in tables(TEXT) if table[0][-1] == "seeds"]
    assert len(own) == 7
    reports = tables(reported["bccd"])
    for head, *rows in own:
        columns = [*head[:-1], "runs"]
        wanted = [[*row[:-1], "1 seed" if row[-1] == "1" else f"{row[-1]} seeds"] for row in rows]
        candidates = [table for table in reports if set(columns) <= set(table[0])]
        assert wanted in [
            [[row[table[0].index(column)] for column in columns] for row in table[1:]]
            for table in candidates
        ], head


def numbers(text):
    return set(re.findall(r"(?<![\d.])\d+\.\d(?!\d)", text))


@pytest.mark.parametrize(
    ("section", "campaigns"),
    [
        ("In short", tuple(PAGE["FIGURES"])),
        ("Initial weights", ("init",)),
        ("Budget", ("budget", "budget-1:300")),
        ("Step size", ("fair-steps",)),
        ("Imbalance", ("dial",)),
        ("Losses published later", ("descendants", "descendants-1:300")),
    ],
)
def test_numbers_of_the_sentences_are_the_reports(reported, section, campaigns):
    (body,) = re.findall(rf"^## {section}\n(.*?)(?=^## )", TEXT, re.MULTILINE | re.DOTALL)
    sentences = re.sub(r"^(\||    ).*\n", "", body, flags=re.MULTILINE)
    assert numbers(sentences)
    known = [reported[name] for name in campaigns] + PAGE["TABLE"].findall(TEXT)
    assert numbers(sentences) <= numbers("".join(known))


def test_a_recorded_run_is_replaced_by_one_of_its_row_and_seed(tmp_path):
    campaign = make_campaign(tmp_path / "small-0")
    add_run(campaign, "dial", "focal-1:30", 1, 20.0)
    add_run(
        *(campaign, "dial", "focal-1:30", 2, 10.0),
        **{"key": "earlier", "ended": "2026-11-20T20:00:00"},
    )
    add_run(campaign, "1a", "alpha.75", 1, 30.0)
    focal = {"campaign": "dial", "rows": ["dial/focal-1:30"], "seed": 1}
    kept = [
        {**focal, "campaign": "bccd"},
        {**focal, "rows": ["dial/ohem-1:30"]},
        {**focal, "seed": 3},
    ]
    shared = {**focal, "rows": ["dial/focal-1:30", "budget/focal.25-1x"], "AP": 10.0}
    before = [*kept, {**focal, "AP": 10.0}, shared]
    *others, added = PAGE["add"](before, "dial", campaign, "dial")
    assert others == [*kept, {**shared, "rows": ["budget/focal.25-1x"]}]
    assert (added["rows"], added["seed"], added["AP"]) == (["dial/focal-1:30"], 1, 20.0)
    other = [{**focal, "seed": 3, "key": "another"}]
    with pytest.raises(SystemExit, match=r"focal-1:30 with the config .*, and seed 3 was recorded"):
        PAGE["add"](other, "dial", campaign, "dial")
    with pytest.raises(SystemExit, match="has no run of table init"):
        PAGE["add"](before, "dial", campaign, "init")


def test_predicted_shares_of_the_dial():
    (table,) = (t for t in tables((DOCS / "dial.md").read_text(encoding="utf-8")) if t[0][0] == "R")
    assert table[0][1:4] == ["CE", "α-CE", "focal"]
    for background, *printed in table[1:]:
        ce, alpha_ce, focal = (
            share_of_row(TABLES["dial"][f"{row}-1:{background}"].overrides, float(background), 5)
            for row in ("ce", "alpha-ce", "focal")
        )
        shares = (ce, alpha_ce, focal, focal - ce, focal - alpha_ce)
        assert printed == [f"{share:.3f}".removeprefix("0") for share in shares]
