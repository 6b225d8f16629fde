"""The runner: a real run killed and continued; the rest with a program in train_net.py's place."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import retinanet_ext
from retinanet_ext import cli
from retinanet_ext.errors import InputError
from retinanet_ext.experiments import plan as planning
from retinanet_ext.experiments import record, runner
from retinanet_ext.experiments.figures import _read_curve
from retinanet_ext.experiments.presets import list_tables
from retinanet_ext.experiments.tables import TABLES

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests/fixtures/bccd_mini"
OPTS = [
    *("DATASETS.CUSTOM.TRAIN_JSON", str(DATA / "instances_train_raw.json")),
    *("DATASETS.CUSTOM.TRAIN_IMAGES", str(DATA / "images")),
    *("DATASETS.CUSTOM.TEST_JSON", str(DATA / "instances_val.json")),
    *("DATASETS.CUSTOM.TEST_IMAGES", str(DATA / "images")),
    *("INPUT.MIN_SIZE_TRAIN", "(96,)", "INPUT.MIN_SIZE_TEST", "96", "SOLVER.IMS_PER_BATCH", "2"),
    *("MODEL.FPN.OUT_CHANNELS", "64", "TEST.DETECTION_GRID.NUM_IMAGES", "1"),
]

# Behaves like train_net.py by the row: alpha .10 fails, .25 diverges, .99 waits for a file "go".
STAND_IN = """
import json, signal, sys, time
from pathlib import Path
folder = Path(sys.argv[-1])
folder.mkdir(exist_ok=True)
alpha = float(sys.argv[sys.argv.index("MODEL.RETINANET.CLS_LOSS.CROSS_ENTROPY.ALPHA") + 1])
print("arguments", sys.argv[1:4], "--resume" in sys.argv, flush=True)

def stop(*_):
    time.sleep(0.3)
    (folder / "saved").touch()
    sys.exit(143)

step = {"iteration": 19, "total_loss": 1.5}
(folder / "metrics.json").write_text(json.dumps(step) + "\\n")
if alpha == 0.1:
    sys.exit("train_net.py: error: no such thing")
if alpha == 0.25:
    print("train_net.py: error: diverged at iteration 37: loss_cls inf; a lower rate helps",
          file=sys.stderr)
    sys.exit(3)
if alpha == 0.99:
    (folder / "last_checkpoint").write_text("model_0000001.pth")
    signal.signal(signal.SIGTERM, stop)
    (folder / "model_0000001.pth").write_text("weights")
    while not (folder.parents[3] / "go").exists():
        time.sleep(0.05)
final = {"iteration": 29, "bbox/AP": 100 * alpha, "bbox/APs": None,
         "inference/ms_per_image": 4.5}
with open(folder / "metrics.json", "a") as file:
    file.write(json.dumps(final) + "\\n")
(folder / "model_final.pth").write_text("weights")
"""


@pytest.fixture
def root(tmp_path):
    """A checkout whose train_net.py is the stand-in."""
    root = tmp_path / "root"
    root.mkdir()
    (root / "configs").symlink_to(ROOT / "configs")
    (root / "train_net.py").write_text(STAND_IN)
    return root


def plan(root, output, *rows, seeds: int | None = 1, opts=OPTS, tables=("1a",), **more):
    arguments = {"tables": tables, "rows": rows, "seeds": seeds, "opts": opts, **more}
    return planning.plan("quick", root=root, output=output, **arguments)


def hashes(folder):
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_killed_and_started_again(tmp_path, capsys, restore_logging):
    """SIGKILL of the runner ends its run as well; the same command resumes that run."""
    command = [
        *("experiments", "run", "--preset", "quick", "--table", "3", "--row", "focal"),
        *("--output", str(tmp_path)),
        *(*OPTS, "SOLVER.MAX_ITER", "8", "SOLVER.CHECKPOINT_PERIOD", "2"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    start = [sys.executable, "-m", "retinanet_ext", *command]
    first = subprocess.Popen(start, cwd=ROOT, env=environment, stdout=subprocess.PIPE)
    cut = lambda: list(tmp_path.glob("*/runs/1b_gamma2.0_seed1/last_checkpoint"))  # noqa: E731
    deadline = time.monotonic() + 240
    while not cut() and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    first.kill()
    first.wait()
    (campaign,) = tmp_path.iterdir()
    half = campaign / "runs/1b_gamma2.0_seed1"
    assert record.read_record(half).status == "unfinished"
    time.sleep(0.5)
    progress = hashes(half)
    time.sleep(1)
    assert hashes(half) == progress  # the row's process ended with the runner

    assert cli.main(command) == 0
    output = capsys.readouterr().out
    assert "0 of 1 runs are done" in output and "resumed" in output
    (focal,) = record.read_records(campaign)
    assert focal.num_starts == 2 and focal.status == "finished" and focal.iterations == 8
    assert focal.rows[0] == "1b/gamma2.0" and "3/focal" in focal.rows
    assert set(focal.metrics) >= {"AP", "AP50", "AP75"} and focal.inference_ms > 0
    assert [line["iteration"] for line in record.read_metrics(half)] == sorted(
        {line["iteration"] for line in record.read_metrics(half)}
    )
    assert not list(half.glob("model_0*.pth")) and (half / "model_final.pth").exists()
    assert "| FL | 2.0 |" in (campaign / "report.md").read_text()
    assert (campaign / "report.html").stat().st_size > 10_000


def test_failure_and_divergence_do_not_end_the_others(root, tmp_path):
    rows = ("alpha.10", "alpha.25", "alpha.50")
    campaign, runs = plan(root, tmp_path / "out", *rows, seeds=2)
    lines = []
    records = runner.run_campaign(campaign, runs, root=root, log=lines.append)
    by_row = {(one.rows[0], one.seed): one for one in records}
    assert len(by_row) == 6
    for seed in (1, 2):
        failed, diverged, fine = (by_row[f"1a/{row}", seed] for row in rows)
        assert (failed.status, failed.message) == ("failed", "no such thing")
        assert diverged.status == "diverged"
        assert diverged.message == "diverged at iteration 37: loss_cls inf"
        assert fine.metrics == {"AP": 50.0, "APs": None} and fine.inference_ms == 4.5
        assert fine.iterations == 20 and fine.rows[:2] == ["1a/alpha.50", "prior/pi.01"]
    assert len(record.read_records(campaign.folder)) == 6
    assert any("no such thing (see " in line for line in lines)
    assert any("diverged at iteration 37" in line for line in lines)

    # What failed is tried again, the others stay.
    before = hashes(by_row["1a/alpha.25", 1].folder), hashes(by_row["1a/alpha.50", 1].folder)
    lines.clear()
    runner.run_campaign(campaign, runs, root=root, log=lines.append)
    assert lines[0].startswith("4 of 6 runs are done") and len(lines) == 5
    assert lines[1].startswith("[5/6] 1a/alpha.10 seed 1 resumed; 2 left, about ")
    assert before == (
        hashes(by_row["1a/alpha.25", 1].folder),
        hashes(by_row["1a/alpha.50", 1].folder),
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_run_is_resumed_and_its_time_counted(number, root, tmp_path):
    campaign, runs = plan(root, tmp_path / "out", "alpha.99")
    folder = campaign.folder / "runs/1a_alpha.99_seed1"

    def interrupt():
        while not (folder / "model_0000001.pth").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        runner.run_campaign(campaign, runs, root=root, log=lambda line: None)
    thread.join()
    signal.signal(signal.SIGINT, earlier)
    assert (folder / "saved").exists(), "the run was left the time to save"
    assert record.read_record(folder).status == "unfinished"
    (tmp_path / "go").touch()
    start = time.time() - 3600  # an hour ago, and its last line of output 5 s later
    os.utime(folder / "record.json", (start, start))
    os.utime(folder / "output.txt", (start + 5, start + 5))
    (one,) = runner.run_campaign(campaign, runs, root=root, log=lambda line: None)
    assert one.num_starts == 2 and one.status == "finished"
    # Both parts count, and the time in between does not.
    assert 5 < one.wall_seconds < 20
    assert "True" in (folder / "output.txt").read_text()  # --resume
    assert not (folder / "model_0000001.pth").exists() and (folder / "model_final.pth").exists()


def test_jobs_run_side_by_side_and_end_together(root, tmp_path):
    campaign, runs = plan(root, tmp_path / "out", "alpha.99", seeds=3)
    folders = [campaign.folder / "runs" / f"1a_alpha.99_seed{seed}" for seed in (1, 2, 3)]

    def stop():
        while not all((folder / "model_0000001.pth").exists() for folder in folders[:2]):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        runner.run_campaign(campaign, runs, root=root, jobs=2, log=lambda line: None)
    thread.join()
    assert [(folder / "saved").exists() for folder in folders] == [True, True, False]
    (tmp_path / "go").touch()
    lines = []
    records = runner.run_campaign(campaign, runs, root=root, jobs=2, log=lines.append)
    assert [one.status for one in records] == ["finished"] * 3
    assert [one.num_starts for one in records] == [2, 2, 1]
    with pytest.raises(InputError, match="--jobs must be at least 1"):
        runner.run_campaign(campaign, runs, root=root, jobs=0)


def test_second_runner_is_refused_until_the_first_and_its_run_have_ended(root, tmp_path):
    campaign, runs = plan(root, tmp_path / "out", "alpha.99")
    refused = pytest.raises(InputError, match=r"another runner is using .*quick-")
    with runner._open_campaign(campaign) as lock:
        run_of_it = os.dup(lock.fileno())
    with refused:  # a run that has outlived its runner
        runner.run_campaign(campaign, runs, root=root, log=lambda line: None)
    os.close(run_of_it)
    assert not list((campaign.folder / "runs").iterdir())
    (tmp_path / "go").touch()
    assert runner.run_campaign(campaign, runs, root=root, log=lambda line: None)


def test_a_row_that_cannot_be_started_does_not_end_the_others(root, tmp_path):
    campaign, runs = plan(root, tmp_path / "out", "alpha.50", "alpha.75")
    folder = campaign.folder / "runs" / runs[0].name
    folder.parent.mkdir(parents=True)
    folder.write_text("a file")
    lines = []
    records = runner.run_campaign(campaign, runs, root=root, log=lines.append)
    assert [one.rows[0] for one in records] == ["1a/alpha.75"]
    assert any("1a/alpha.50" in line and "cannot be run" in line for line in lines)


@pytest.mark.parametrize(("iterations", "warned"), [(9, True), (10, False)])
def test_a_training_within_its_warm_up_is_announced(root, tmp_path, iterations, warned):
    """Preset quick has ten iterations of it."""
    opts = [*OPTS, "SOLVER.MAX_ITER", str(iterations)]
    campaign, runs = plan(root, tmp_path / "out", "alpha.50", opts=opts)
    lines = []
    runner.run_campaign(campaign, runs, root=root, log=lines.append)
    said = "1a/alpha.50: SOLVER.WARMUP_ITERS 10 is longer than SOLVER.MAX_ITER 9"
    assert lines[0].startswith(said) == warned


def test_a_new_row_of_the_same_config_is_credited(root, tmp_path):
    campaign, (one,) = plan(root, tmp_path / "out", "alpha.50")
    less = planning.Run(one.rows[:1], *(one.key, 1, one.config_file, one.arguments))
    runner.run_campaign(campaign, [less], root=root, log=lambda line: None)
    (found,) = runner.run_campaign(campaign, [one], root=root, log=lambda line: None)
    shared = ["1a/alpha.50", "prior/pi.01", "budget/ce.50-1x", "fair-steps/ce.50-common"]
    assert record.read_record(found.folder).rows == shared


def test_other_versions_configs_and_data_are_kept_apart(root, tmp_path, monkeypatch):
    output = tmp_path / "out"
    campaign, runs = plan(root, output, "alpha.50")
    runner.run_campaign(campaign, runs, root=root, log=lambda line: None)
    before = hashes(campaign.folder)

    same_data = tmp_path / "copy.json"
    same_data.write_bytes((DATA / "instances_train_raw.json").read_bytes())
    same, _ = plan(root, output, opts=["DATASETS.CUSTOM.TRAIN_JSON", str(same_data), *OPTS[2:]])
    assert same.folder == campaign.folder
    content = json.loads(same_data.read_text())
    content["annotations"].pop()
    same_data.write_text(json.dumps(content))
    others = [
        plan(root, output, opts=["DATASETS.CUSTOM.TRAIN_JSON", str(same_data), *OPTS[2:]])[0],
        plan(root, output, opts=[*OPTS, "SOLVER.MAX_ITER", "9"])[0],
    ]
    monkeypatch.setattr(retinanet_ext, "__version__", "99")
    others.append(plan(root, output)[0])
    others.append(plan(root, output, num_gpus=2)[0])
    folders = {other.folder for other in others}
    assert len(folders) == 4 and campaign.folder not in folders
    changed, runs = plan(root, output, "alpha.50")
    runner.run_campaign(changed, runs, root=root, log=lambda line: None)
    assert hashes(campaign.folder) == before


def test_a_row_whose_definition_changed_gets_a_folder_of_its_own(root, tmp_path):
    campaign, (one,) = plan(root, tmp_path / "out", "alpha.50")
    runner.run_campaign(campaign, [one], root=root, log=lambda line: None)
    changed = planning.Run(one.rows, "another", 1, one.config_file, one.arguments)
    runner.run_campaign(campaign, [changed], root=root, log=lambda line: None)
    folders = sorted(path.name for path in (campaign.folder / "runs").iterdir())
    assert folders == ["1a_alpha.50_seed1", "1a_alpha.50_seed1-2"]


@pytest.mark.parametrize("seeds", [None, 3])
def test_rows_that_tables_share_are_run_once(seeds, tmp_path):
    _, runs = plan(ROOT, tmp_path, seeds=seeds, tables=("1a", "1b", "3", "prior"))
    expected = 7 + 7 + 2 + 3  # of 7 + 8 + 4 + 4 rows
    assert len(runs) == expected * (seeds or 1)
    assert [one.seed for one in runs] == sorted(one.seed for one in runs)
    assert len({one.name for one in runs}) == len(runs)


@pytest.mark.parametrize(
    ("change", "answer"),
    [
        (["SOLVER.BASE_LR", "nan"], "SOLVER.BASE_LR"),
        (["SOLVER.NO_SUCH_KEY", "1"], "unknown key SOLVER.NO_SUCH_KEY"),
        (["SEED", "3"], "SEED is set by the runner"),
        (["1c"], "several tables are given as --table A --table B"),
        (["MODEL.RETINANET.CLS_LOSS.NAME", "hinge"], "is what table 1a itself sets"),
        (["MODEL.RETINANET.LOSS_NORMALIZER", "foo"], "LOSS_NORMALIZER"),
        (["MODEL.WEIGHTS", "/nowhere.pth"], "/nowhere.pth"),
        (["DATASETS.TEST", "('coco_2017_val', 'coco_2017_test')"], "one data set"),
        (["DATASETS.CUSTOM.TRAIN_IMAGES", "/nowhere"], "/nowhere"),
        (["DATASETS.CUSTOM.TEST_JSON", "/nowhere.json"], "/nowhere.json"),
    ],
)
def test_what_no_row_could_run_with_is_refused_before_anything_is_written(
    change, answer, root, tmp_path
):
    with pytest.raises(InputError, match=answer):
        campaign, runs = plan(root, tmp_path / "out", opts=[*OPTS, *change])
        runner.run_campaign(campaign, runs, root=root, log=lambda line: None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("tables", "opts", "answer"),
    [
        (["init"], [], "table init needs MODEL.TIMM.WEIGHTS FILE"),
        (["init"], ["MODEL.TIMM.WEIGHTS", "/nowhere.pth"], "/nowhere.pth, which is not a file"),
        (["init", "budget"], ["MODEL.TIMM.WEIGHTS", "a.pth"], "init cannot be run by one command"),
    ],
)
def test_weights_that_a_table_needs(tables, opts, answer, root, tmp_path):
    with pytest.raises(InputError, match=answer):
        campaign, runs = plan(root, tmp_path / "out", tables=tables, opts=[*OPTS, *opts])
        runner.run_campaign(campaign, runs, root=root, log=lambda line: None)
    assert not (tmp_path / "out").exists()


def test_weights_are_told_apart_by_content(tmp_path):
    keys = []
    for name, content in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name).write_bytes(content)
        opts = [*OPTS, "MODEL.TIMM.WEIGHTS", str(tmp_path / name)]
        _, runs = plan(ROOT, tmp_path, "ce.50-imagenet", tables=["init"], opts=opts)
        keys += [run.key for run in runs]
    assert keys[0] == keys[1] != keys[2]


def test_grids_share_the_rows_of_one_config(tmp_path):
    """At 1 x the budget and at the common rate, four losses are those of tables 1a, 1b and 1d."""
    _, runs = plan(ROOT, tmp_path, tables=("budget", "fair-steps", "1a", "1b"))
    of = {name: run.key for run in runs for name in run.rows}
    for name, paper in (("ce.50", "1a/alpha.50"), ("ce.75", "1b/gamma0"), ("focal.25", "3/focal")):
        assert of[f"budget/{name}-1x"] == of[f"fair-steps/{name}-common"] == of[paper]
    assert len(runs) == 18 + 18 - 6 + 7 + 8 - 1 - 4


def test_more_seeds_are_runs_of_the_same_campaign(tmp_path):
    campaign, runs = plan(ROOT, tmp_path, "alpha.99", seeds=5)
    other, more = plan(ROOT, tmp_path, "alpha.99", first_seed=4, seeds=2)
    assert other == campaign and more == runs[3:]


@pytest.mark.parametrize("name", ["seeds", "first_seed", "num_gpus"])
def test_numbers_of_nothing(name, tmp_path):
    option = f"--{name.replace('_', '-')}"
    with pytest.raises(InputError, match=f"{option} must be at least 1"):
        plan(ROOT, tmp_path, **{name: 0})


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        ("{", "cannot be read"),
        ("[]", "JSON object"),
        ('{"format": 99}', "format 99"),
        ('{"format": 1, "stray": 1}', "not a run's record"),
    ],
)
def test_broken_records_are_named(content, answer, tmp_path):
    folder = tmp_path / "runs/x"
    folder.mkdir(parents=True)
    (folder / "record.json").write_text(content)
    with pytest.raises(InputError, match=answer) as raised:
        record.read_records(tmp_path)
    assert str(folder / "record.json") in str(raised.value)


def test_list_shows_every_table_and_every_row():
    text = list_tables()
    assert all(f"\n{name} " in text for name in TABLES)
    rows = list_tables(["1d"])
    assert all(row.name in rows for row in TABLES["1d"].rows) and "36.0" in rows
    with pytest.raises(InputError, match="there are 1a, 1b"):
        list_tables(["9"])


@pytest.mark.parametrize("value", ["null", "NaN"])
def test_ap_that_is_not_defined_is_none(value, tmp_path):
    """Runs of this version write null, earlier ones wrote NaN."""
    lines = [
        f'{{"iteration": 9, "total_loss": {value}, "loss_cls": 1.0}}',
        f'{{"iteration": 10, "bbox/AP": 1.5, "bbox/APs": {value}, "inference/ms_per_image": 4.0}}',
    ]
    (tmp_path / "metrics.json").write_text("\n".join(lines))
    assert record.final_metrics(tmp_path) == ({"AP": 1.5, "APs": None}, 4.0)
    curve = _read_curve(tmp_path)
    assert curve.T[0].tolist()[::2] == [9.0, 1.0] and np.isnan(curve.T[0][1])
