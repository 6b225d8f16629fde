"""The report says what the records say: means, verdicts, what is missing, and nothing else."""

import csv
import math
import re
import resource
from contextlib import contextmanager
from urllib.parse import unquote
from xml.etree import ElementTree

import pytest

from experiments.campaigns import add_run, make_campaign
from retinanet_ext.errors import InputError
from retinanet_ext.experiments.report import write_report, write_reports
from retinanet_ext.experiments.results import read_results
from retinanet_ext.experiments.statistics import (
    FAILS,
    HOLDS,
    ONE_SEED,
    UNDECIDED,
    UNMEASURED,
    holm,
    judge,
    probability,
    with_spread,
)
from retinanet_ext.experiments.tables import TABLES, Claim
from retinanet_ext.page import signed

HOSTILE = "<script>alert(1)</script> a|b \"quoted\" & 'x'\n# *bold* `code` [link](http://a.b)"


@pytest.fixture
def campaign(tmp_path):
    return make_campaign(tmp_path / "small-0123abcd")


def table(campaign, name):
    return next(one for one in read_results(campaign).tables if one.table.name == name)


def row(campaign, name, of="1b"):
    return next(one for one in table(campaign, of).rows if one.row.name == name)


def verdict(campaign, text, of="1b"):
    return next(one for one in table(campaign, of).verdicts if text in one.claim.text)


def test_mean_and_spread_are_over_seeds(campaign):
    for seed, ap in enumerate((30.0, 31.0, 33.5), start=1):
        add_run(campaign, "1b", "gamma2.0", seed, ap)
    add_run(campaign, "1b", "gamma5.0", 1, 20.0)
    # (30 + 31 + 33.5) / 3 = 31.5; sqrt((2.25 + 0.25 + 4) / 2) = 1.803
    assert row(campaign, "gamma2.0").cells(["AP", "AP75", "ms"]) == [
        "31.5 ± 1.8",
        "15.8 ± 0.9",
        "41.2",
    ]
    assert row(campaign, "gamma5.0").cells(["AP", "APs"]) == ["20.0", "–"]
    assert with_spread([]) == "–"


def test_holm_by_hand():
    """The example of four hypotheses: .005 x 4, .01 x 3, then never below the one before."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []
    assert [probability(p) for p in (0.0312, 0.0004, None)] == [".031", "< .001", "–"]


def test_more_claims_need_more_evidence(campaign):
    """A difference that decides a claim alone does not decide it among five."""
    aps = {"gamma2.0": [33, 34], "gamma0": [28, 29]}
    for name, values in aps.items():
        for seed, ap in enumerate(values, start=1):
            add_run(campaign, "1b", name, seed, ap)
    alone = verdict(campaign, "γ = 2 ahead of γ = 0")
    for name in ("gamma.50", "gamma1.0", "gamma5.0", "gamma2.0-alpha.50"):
        for seed, ap in enumerate((28.0, 33.0), start=1):
            add_run(campaign, "1b", name, seed, ap)
    among_five = verdict(campaign, "γ = 2 ahead of γ = 0")
    assert (alone.word, among_five.word) == (HOLDS, UNDECIDED)
    assert alone.interval == among_five.interval
    assert among_five.p == pytest.approx(5 * alone.p)


def test_a_claim_about_leads(campaign):
    """Focal's lead over cross entropy at 1:300 against the one at 1:30."""
    aps = {
        "focal-1:300": (30, 31),
        "ce-1:300": (20, 21),
        "focal-1:30": (50, 51),
        "ce-1:30": (55, 56),
    }
    for name, values in aps.items():
        for seed, ap in enumerate(values, start=1):
            add_run(campaign, "dial", name, seed, ap)
    rows = {row.row.name: row for row in table(campaign, "dial").rows}
    claim = Claim("the lead grows", ("focal-1:300",), ("ce-1:300",), ("focal-1:30", "ce-1:30"))
    (found,) = judge([claim], rows)
    assert (found.word, found.difference, found.paper_difference) == (HOLDS, 15.0, None)


@pytest.mark.parametrize(
    ("better", "worse", "word", "measured"),
    [
        # Equal variances of .5: t with 2 degrees of freedom, 4.30 sqrt(.5)
        ([33, 34], [28, 29], HOLDS, "+5.0 (+2.0 to +8.0)"),
        ([30, 31], [28, 29], UNDECIDED, "+2.0 (−1.0 to +5.0)"),
        ([28, 29], [33, 34], FAILS, "−5.0 (−8.0 to −2.0)"),
        ([31, 31], [31, 31], UNDECIDED, "+0.0 (+0.0 to +0.0)"),
        ([31.5, 31.5], [31, 31], HOLDS, "+0.5 (+0.5 to +0.5)"),
        ([30, 32], [29], ONE_SEED, "+2.0"),
        ([30], [31], ONE_SEED, "−1.0"),
        ([30, 32], [], UNMEASURED, "–"),
    ],
)
def test_verdict(campaign, better, worse, word, measured):
    for name, aps in (("gamma2.0", better), ("gamma0", worse)):
        for seed, ap in enumerate(aps, start=1):
            add_run(campaign, "1b", name, seed, ap)
    found = verdict(campaign, "γ = 2 ahead of γ = 0")
    assert (found.word, found.measured) == (word, measured)
    assert signed(found.paper_difference) == "+2.9"
    assert found.remarks == (() if worse else ("γ 0, α .75: not run",))


def test_a_difference_that_rounds_to_zero_keeps_its_sign():
    values = (0.0, -0.0, 0.04, -0.04, -0.06)
    assert [signed(value) for value in values] == ["+0.0", "+0.0", "+0.0", "−0.0", "−0.1"]


@pytest.mark.parametrize(
    ("diverging", "seeds", "word"),
    [("none", 2, HOLDS), ("pi.01", 2, FAILS), ("none", 1, ONE_SEED), ("both", 2, UNMEASURED)],
)
def test_divergence_loses(campaign, diverging, seeds, word):
    for name in ("pi.01", "none"):
        for seed in range(1, seeds + 1):
            if diverging in (name, "both"):
                add_run(campaign, "prior", name, seed, status="diverged", message="diverged: inf")
            else:
                add_run(campaign, "prior", name, seed, 30.0)
    found = verdict(campaign, "without the prior", of="prior")
    assert (found.word, found.difference) == (word, None)
    assert any("diverged: inf" in remark for remark in found.remarks)


def test_a_failed_run_is_no_result(campaign):
    add_run(campaign, "prior", "pi.01", 1, 30.0)
    add_run(campaign, "prior", "pi.01", 2, 31.0)
    for seed in (1, 2):
        add_run(campaign, "prior", "none", seed, status="failed", message="killed")
    assert verdict(campaign, "without the prior", of="prior").word == UNMEASURED


def test_seeds_that_diverged_are_named_beside_the_mean_of_the_others(campaign):
    add_run(campaign, "1b", "gamma2.0", 1, 30.0)
    for seed in (2, 3):
        add_run(campaign, "1b", "gamma2.0", seed, status="diverged", message="diverged at 37: inf")
    found = row(campaign, "gamma2.0")
    assert found.cells(["AP"]) == ["30.0"]
    assert found.status == "1 of 3 finished; seeds 2, 3: diverged at 37: inf"


def test_a_run_stands_in_every_table_that_it_belongs_to(campaign):
    add_run(campaign, "1a", "alpha.75", 1, 31.0)
    for of, name in (("1a", "alpha.75"), ("1b", "gamma0"), ("3", "ce")):
        assert row(campaign, name, of).values("AP") == [31.0]


def test_tables_with_one_shared_row_are_left_out_and_claim_nothing(campaign):
    add_run(campaign, "1a", "alpha.75", 1, 31.0)
    add_run(campaign, "1a", "alpha.50", 1, 30.0)
    results = read_results(campaign)
    assert [one.table.name for one in results.tables] == ["1a"]
    assert results.sparse == ("1b", "3", "prior")
    assert results.headline == ("The claims (4): is not decided (one seed) 1, not measured 3.")
    markdown = write_report(campaign)[1].read_text(encoding="utf-8")
    assert "rows of other tables alone, are left out: 1b, 3, prior." in markdown


def test_the_best_row_is_that_of_the_highest_mean(campaign):
    for name, aps in {"gamma2.0": (34, 35), "gamma1.0": (33.5, 35), "gamma5.0": (20, 21)}.items():
        for seed, ap in enumerate(aps, start=1):
            add_run(campaign, "1b", name, seed, ap)
    assert table(campaign, "1b").best.row.name == "gamma2.0"


def test_rows_of_different_data_have_no_best(campaign):
    add_run(campaign, "dial", "focal-1:30", 1, 90.0)
    add_run(campaign, "dial", "focal-1:100", 1, 80.0)
    assert table(campaign, "dial").best is None


def test_facts_and_warnings(campaign):
    add_run(campaign, "1a", "alpha.50", 1, 30.0)
    assert read_results(campaign).warnings == []
    add_run(campaign, "1a", "alpha.75", 1, 31.0, commit="ffff000011")
    results = read_results(campaign)
    (mixed,) = results.warnings
    assert "0a1b2c3d4e, ffff000011" in mixed
    budget = "160 px, 350 iterations of 4 images, learning rate 0.02"
    assert results.facts == {
        "Preset": "small",
        "Data": "train: cells/train.json; test: cells/val.json",
        "Model and budget": f"ResNet-18-FPN, {budget}",
        "Options": "SOLVER.CLIP 1.0",
        "Runs": "2 finished",
        "Seeds": "1",
        "Wall time": "3 min in all",
        "Dates": "2026-11-21",
        "Hardware": "Intel(R) Xeon(R), 1 thread, no GPU",
        "Versions": "retinanet_ext 0.3.0, torch 2.11.0",
        "Commit": "0a1b2c3d4e, ffff000011",
    }
    # A model that is not a ResNet, or no config at all.
    (results.runs[0].folder / "config.yaml").write_text("MODEL: {BACKBONE: {NAME: other}}")
    (results.runs[1].folder / "config.yaml").unlink()
    assert "Model and budget" not in read_results(campaign).facts
    write_report(campaign)


def test_csv_has_a_line_per_run_with_settings_and_metrics(campaign):
    add_run(campaign, "1a", "alpha.50", 1, 30.0, picture=None)
    add_run(campaign, "1a", "alpha.75", 2, status="failed", message='no "space", left\nhere')
    (campaign / "runs/1a_alpha.75_seed2/config.yaml").unlink()
    path = write_report(campaign)[0]
    with open(path, newline="", encoding="utf-8") as file:
        fine, failed = csv.DictReader(file)
    assert (fine["rows"], fine["seed"], fine["status"]) == (
        "1a/alpha.50 prior/pi.01",
        "1",
        "finished",
    )
    assert (fine["AP"], fine["AP50"], fine["AP-disc"]) == ("30.0", "60.0", "31.0")
    assert (fine["inference_ms"], fine["torch"], fine["threads"]) == ("41.25", "2.11.0", "1")
    # Keys that differ from the defaults, those alone.
    assert (fine["SOLVER.MAX_ITER"], fine["SOLVER.IMS_PER_BATCH"]) == ("350", "4")
    assert fine["INPUT.MIN_SIZE_TRAIN"] == "[160]"
    assert "MODEL.RESNETS.NUM_GROUPS" not in fine  # 1, as by default
    assert (failed["message"], failed["AP"]) == ('no "space", left\nhere', "")
    assert failed["SOLVER.MAX_ITER"] == ""


def test_undefined_metrics_are_dashes(campaign):
    add_run(campaign, "1a", "alpha.50", 1, metrics={"AP": None, "AP50": 40.0, "APs": None})
    found = add_run(campaign, "1a", "alpha.75", 1, metrics={"AP": 30.0, "AP50": 40.0})
    file = found.folder / "record.json"
    file.write_text(file.read_text().replace("30.0", "NaN"))
    for name in ("alpha.50", "alpha.75"):
        assert row(campaign, name, "1a").cells(["AP", "AP50"]) == ["–", "40.0"]
    assert verdict(campaign, "α = .75 is ahead", "1a").word == UNMEASURED
    _, markdown, page = write_report(campaign)
    for path in (markdown, page):
        assert not re.search(r"\bnan\b", path.read_text(encoding="utf-8"), re.IGNORECASE)


def test_every_kind_of_row_is_said(campaign):
    add_run(campaign, "1a", "alpha.50", 1, 30.0)
    add_run(campaign, "1a", "alpha.75", 1, status="diverged", message="diverged at iteration 37")
    add_run(campaign, "1a", "alpha.90", 1, status="failed", message="no space left")
    _, markdown, page = (path.read_text(encoding="utf-8") for path in write_report(campaign))
    lines = {line.split("|")[1].strip(): line for line in section(markdown, "Table 1a")}
    assert "| 30.2 | 46.7 | 32.8 | 30.0 | 60.0 | 15.0 | 30.0 | 1 seed |" in lines[".50"]
    assert "seed 1: diverged at iteration 37 |" in lines[".75"]
    assert "seed 1: failed: no space left |" in lines[".90"]
    assert lines[".99"].endswith("| not run |")
    for text in (
        "seed 1: diverged at iteration 37",
        "seed 1: failed: no space left",
        "<td>not run</td>",
    ):
        assert text in page


def section(markdown, heading):
    """The lines of the first table below a heading."""
    below = markdown[markdown.index(f"# {heading}") :]
    first = next(block for block in below.split("\n\n") if block.startswith("|"))
    return first.splitlines()


def test_texts_from_outside_are_escaped(campaign):
    record = add_run(campaign, "1a", "alpha.50", 1, 30.0, commit=HOSTILE, message=HOSTILE)
    add_run(campaign, "1a", "alpha.75", 1, status="failed", message=HOSTILE)
    add_run(campaign, "1a", "alpha.90", 1, metrics={"AP": 1.0, f"AP-{HOSTILE}": 2.0})
    info = campaign / "campaign.json"
    info.write_text(info.read_text().replace("cells/train.json", "<script>x</script>"))
    folder = record.folder.rename(record.folder.with_name("<img src=x onerror=alert(1)>"))
    assert folder.is_dir()
    _, markdown, page = (path.read_text(encoding="utf-8") for path in write_report(campaign))
    for text in (markdown, page):
        assert "<script" not in text
        assert "<img src=x" not in text
        assert "&lt;script&gt;" in text
    assert_tables_are_well_formed(markdown)
    assert "[link](http" not in markdown


def assert_tables_are_well_formed(markdown):
    number = 0
    for block in markdown.split("\n\n"):
        if block.startswith("|"):
            number += 1
            widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
            assert len(widths) == 1, block
            assert re.fullmatch(r"(\| -{3}:? )+\|", block.splitlines()[1])
    assert number >= 3


@pytest.fixture
def everything(campaign):
    """Runs of each table that has a figure of its own."""
    losses = [2.0, 1.5, 1.2]
    for seed in (1, 2):
        for of, name, ap in (
            ("1a", "alpha.50", 30.0),
            ("1a", "alpha.75", 32.0),
            ("1e", "depth50-scale400", 30.0),
            ("1e", "depth101-scale800", 36.0),
            ("2", "R101", 38.0),
            ("2", "X101", 39.0),
            ("fig7", "gamma2-beta1", 30.0),
            ("fig7", "gamma3-beta0", 33.0),
            ("dial", "ce-1:30", 50.0),
            ("dial", "focal-1:30", 51.0),
        ):
            add_run(campaign, of, name, seed, ap + seed, losses=losses, picture=(1500, 30))
        add_run(
            campaign, "fig7", "gamma2-beta4", seed, status="diverged", losses=[3, 1e9, math.inf]
        )
    cdf = campaign / "runs" / "1a_alpha.50_seed1" / "loss_cdf-test"
    cdf.mkdir()
    (cdf / "loss_cdf.json").write_text('{"text": "γ 2: 99 %", "conclusion": "Take <γ> = 2."}')
    (cdf / "loss_cdf.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg" width="9"/>')
    return campaign


def test_figures_and_pictures(everything):
    _, markdown, page = (path.read_text(encoding="utf-8") for path in write_report(everything))
    names = {path.stem for path in (everything / "figures").iterdir()}
    assert names == {
        *(f"training_{name}" for name in ("1a", "1e", "2", "3", "fig7", "dial")),
        *(f"claims_{name}" for name in ("1a", "2", "3", "dial")),
        *("figure_2", "figure_7", "dial"),
    }
    for path in (everything / "figures").iterdir():
        assert ElementTree.parse(path).getroot().tag.endswith("svg")
    targets = re.findall(r"!\[[^]]*\]\(([^)]+)\)", markdown)
    assert len(targets) == len(set(targets)) == len(names) + 1 + 4  # figure 4, best rows
    assert all((everything / target).is_file() for target in targets)
    assert page.count("data:image/svg+xml;base64,") == len(names) + 1
    assert page.count("data:image/jpeg;base64,") == 4
    assert "Take &lt;γ&gt; = 2." in page
    assert "Take &lt;γ&gt; = 2." in markdown
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids)) > 6
    links = re.findall(r'href="#([^"]+)"', page)
    assert len(links) == 6 + 4  # the tables; findings, figure 4, detections, runs
    assert set(map(unquote, links)) <= set(ids)
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', page)
    assert_tables_are_well_formed(markdown)


def test_the_report_depends_on_the_records_alone(everything):
    def contents():
        files = [*write_report(everything), *sorted((everything / "figures").iterdir())]
        return {path.name: path.read_bytes() for path in files}

    assert contents() == contents()
    assert not list(everything.rglob(".*"))


def test_nothing_to_report(campaign, tmp_path):
    with pytest.raises(InputError, match=r"small-0123abcd: no run has ended"):
        write_report(campaign)
    with pytest.raises(InputError, match=r"nowhere: there is no such folder"):
        write_report(tmp_path / "nowhere")
    assert not (campaign / "report.md").exists()


def test_a_campaign_without_a_report_does_not_keep_the_others_from_theirs(campaign):
    add_run(campaign, "1a", "alpha.50", 1, 30.0)
    empty = make_campaign(campaign.with_name("quick-0123abcd"))
    written = []
    with pytest.raises(InputError, match="quick-0123abcd: no run has ended"):
        written += write_reports(campaign.parent)
    assert (campaign / "report.html").is_file() and not (empty / "report.md").exists()
    with pytest.raises(InputError, match="holds no experiments"):
        list(write_reports(empty))


def test_a_picture_that_cannot_be_read_leaves_its_caption(campaign):
    record = add_run(campaign, "1a", "alpha.50", 1, 30.0)
    add_run(campaign, "1a", "alpha.75", 1, 20.0)
    (record.folder / "detections.png").write_text("no picture")
    page = write_report(campaign)[2].read_text(encoding="utf-8")
    assert '<img src="data:," alt="α .50, seed 1, AP 30.0"' in page


@contextmanager
def files_of_at_most(num_bytes):
    """Let writing fail as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_earlier_report(campaign):
    add_run(campaign, "1a", "alpha.50", 1, 30.0)
    paths = write_report(campaign)
    before = [path.read_bytes() for path in paths]
    add_run(campaign, "1a", "alpha.75", 1, 31.0)
    with files_of_at_most(100), pytest.raises(InputError, match=r"svg cannot be written"):
        write_report(campaign)
    assert [path.read_bytes() for path in paths] == before
    assert not list(campaign.rglob(".*"))


def test_a_claim_against_several_rows_is_held_against_the_highest(campaign):
    for seed in (1, 2):
        add_run(campaign, "1d", "focal", seed, 29 + seed / 10)
        add_run(campaign, "1d", "ohem-128-nms.5", seed, 14 + seed / 10)
        add_run(campaign, "1d", "ohem-512-nms.7", seed, 33 + seed / 10)
    found = verdict(campaign, "beats every OHEM", "1d")
    assert found.word == FAILS and found.measured.startswith("−4.0")
    chosen, missing = found.remarks
    assert "batch 512, nms .7" in chosen
    assert missing.startswith("not run: ") and "OHEM, batch 256, nms .5" in missing
    assert not any(f"OHEM, batch {row}" in missing for row in ("512, nms .7", "128, nms .5"))
    assert found.paper_difference == pytest.approx(36.0 - 32.8)


def test_a_published_difference_is_within_one_publication(campaign):
    add_run(campaign, "descendants", "varifocal", 1, 31.0)
    add_run(campaign, "descendants", "focal", 1, 30.0)
    found = verdict(campaign, "the varifocal loss", "descendants")
    assert signed(found.paper_difference) == "+0.9"  # not 37.4 of one paper less 34.0 of another
    for row in TABLES["descendants"].rows:
        assert row.settings["FL there"] == ("–" if row.baseline is None else str(row.baseline))


@pytest.mark.parametrize(("ap", "word"), [(25.0, HOLDS), (30.0, UNDECIDED), (35.0, FAILS)])
def test_a_claim_that_nothing_is_gained_is_judged_like_the_others(ap, word, campaign):
    for seed in (1, 2):
        add_run(campaign, "1c", "scales3-aspects3", seed, 30 + seed / 10)
        add_run(campaign, "1c", "scales4-aspects3", seed, ap + seed / 10)
    assert verdict(campaign, "beyond 9 anchors", "1c").word == word


def test_runs_of_a_row_that_has_changed_are_left_out(campaign):
    add_run(campaign, "1a", "alpha.50", 1, 50.0, key="old")
    add_run(campaign, "1a", "alpha.50", 2, 30.0, key="new", ended="2026-11-22T00:00:00")
    assert row(campaign, "alpha.50", "1a").values("AP") == [30.0]
    _, markdown, _ = write_report(campaign)
    assert "Left out, because their rows have changed since" in markdown.read_text(encoding="utf-8")


def test_seeds_that_disagree_about_the_configuration_are_refused(campaign):
    first, second = (add_run(campaign, "1a", "alpha.50", seed, 30.0) for seed in (1, 2))
    config = second.folder / "config.yaml"
    config.write_text(config.read_text() + "SEED: 2\n")
    write_report(campaign)
    config.write_text(config.read_text().replace("0.02", "0.04"))
    named = f"SOLVER.BASE_LR is 0.02 in {first.folder} and 0.04 in {second.folder}"
    with pytest.raises(InputError, match=f"seeds of 1a/alpha.50 disagree .*{re.escape(named)}"):
        write_report(campaign)
