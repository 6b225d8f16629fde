"""The tables beyond the paper in a report: where lines cross, best rates, what is predicted."""

import math
import re

import pytest

from experiments.campaigns import add_run, make_campaign
from retinanet_ext.experiments.gradient_share import positive_share, share_of_row
from retinanet_ext.experiments.grid_report import crossings, rate_by_other_seeds
from retinanet_ext.experiments.report import write_report
from retinanet_ext.experiments.results import read_results
from retinanet_ext.experiments.tables import TABLES
from retinanet_ext.losses import bind_loss

REFERENCE = "CE, α = .75"


def test_where_lines_cross():
    """On a log axis: -4 at 100 and +4 at 900 meet at their geometric mean."""
    reference = {100: [30.0, 30.2], 900: [40.0, 40.2]}
    focal = {100: [26.0, 26.2], 900: [44.0, 44.2]}
    (sentence,) = crossings({REFERENCE: reference, "focal": focal})
    assert sentence == (
        "focal crosses CE, α = .75 near 300 iterations, by the means "
        "(−4.0 (−4.6 to −3.4) at 100; +4.0 (+3.4 to +4.6) at 900)."
    )


def test_a_crossing_within_the_interval_is_not_decided():
    reference = {100: [30.0, 30.2], 900: [40.0, 40.2]}
    focal = {100: [26.0, 26.2], 900: [38.0, 43.0]}
    (sentence,) = crossings({REFERENCE: reference, "focal": focal})
    assert sentence.endswith("not decided, because the interval at 900 does not leave out 0.")
    single = {100: [26.0], 900: [44.0]}
    (sentence,) = crossings({REFERENCE: reference, "focal": single})
    assert "the interval at 100 and 900 does not leave out 0" in sentence


def test_lines_that_do_not_cross():
    reference = {100: [30.0, 30.2], 900: [40.0, 40.2]}
    (sentence,) = crossings({REFERENCE: reference, "focal": {100: [20.0], 900: [21.0]}})
    assert "does not cross CE, α = .75: by the means it is behind it at every" in sentence
    assert crossings({REFERENCE: reference, "focal": {100: [20.0]}}) == []
    assert crossings({"focal": {100: [20.0], 900: [21.0]}}) == []


def test_rate_chosen_by_the_other_seeds():
    """Seed 3 likes the first rate by chance; the others choose the second for it."""
    rates = [{1: 20.0, 2: 20.0, 3: 30.0}, {1: 24.0, 2: 24.0, 3: 22.0}]
    # Seeds 2 and 3 choose the first rate for seed 1 (25 against 23), and 1 and 3 do for seed 2.
    assert rate_by_other_seeds(rates) == pytest.approx((20 + 20 + 22) / 3)
    assert rate_by_other_seeds([{1: 20.0}, {1: 24.0}]) is None


@pytest.mark.parametrize("background", [30, 1000])
def test_share_of_positives_by_hand(background):
    """Cross entropy at p = .01: gradients .99 and .01. With alpha .75 positives weigh 3 times."""
    negatives = (background + 1) * 5 - 1
    arguments = {"num_classes": 5, "prior": 0.01}
    found = positive_share(bind_loss("cross_entropy"), -1.0, background, **arguments)
    assert found == pytest.approx(0.99 / (0.99 + negatives * 0.01))
    found = positive_share(bind_loss("cross_entropy"), 0.75, background, **arguments)
    assert found == pytest.approx(3 * 0.99 / (3 * 0.99 + negatives * 0.01))
    # Focal, equation 10: p^2 (p - 2 (1 - p) log(1 - p)) of a negative.
    p = 0.01
    negative = 0.75 * p**2 * (p - 2 * (1 - p) * math.log(1 - p))
    positive = 0.25 * (1 - p) ** 2 * (1 - p - 2 * p * math.log(p))
    row = TABLES["dial"]["matched-1:30"]
    found = share_of_row(row.overrides, background, 5)
    assert found == pytest.approx(positive / (positive + negatives * negative))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A campaign with runs of every row of the tables beyond the paper, two seeds each."""
    campaign = make_campaign(tmp_path_factory.mktemp("report") / "gpu-0123abcd")
    for name in ("budget", "init", "fair-steps", "dial"):
        for index, row in enumerate(TABLES[name].rows):
            times = row.factors.get("SOLVER.MAX_ITER", 1)
            for seed in (1, 2):
                ap = 20 + index % 7 + seed / 5 + times
                path = campaign / "runs" / f"{name}_{row.name}_seed{seed}".replace(":", "-")
                if not path.exists():
                    add_run(campaign, name, row.name, seed, ap, iterations=round(450 * times))
    return write_report(campaign)[1].read_text(encoding="utf-8")


def test_every_question_has_an_answer_a_figure_and_a_table(report):
    for name, sentence in (
        ("budget", "focal, α = .25 crosses CE, α = .75 near|focal, α = .25 does not cross"),
        ("init", r"focal, α = .25, minus CE, α = .75: .* from ImageNet weights, .* from random"),
        ("fair-steps", r"\| focal, matched weight \| [\d.]+ ± "),
        ("dial", "The lead of the focal loss over α-CE, normaliser foreground: .* at 1:3000"),
    ):
        section = report.split(f"## {TABLES[name].title}")[1].split("\n## ")[0]
        assert re.search(sentence, section), name
        files = (name, f"claims_{name}")
        figure, claims = (section.index(f"(figures/{file}.svg)") for file in files)
        assert figure < section.index("AP of each seed") < claims


def test_rows_of_other_tables_do_not_open_a_grid(tmp_path):
    """Of budget, table 1b has the rows at 1 x alone; a run of budget itself shows the table."""
    campaign = make_campaign(tmp_path / "gpu-0123abcd")
    shared = ["1b/gamma0", "budget/ce.75-1x"], ["1b/gamma2.0", "budget/focal.25-1x"]
    for rows in shared:
        add_run(campaign, "1b", rows[0].partition("/")[2], 1, 30.0, rows=rows)
    assert [table.table.name for table in read_results(campaign).tables] == ["1b"]
    add_run(campaign, "budget", "ce.75-3x", 1, 30.0)
    assert [table.table.name for table in read_results(campaign).tables] == ["1b", "budget"]
