"""train_net.py from the outside: two processes train, stop, go on and evaluate."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from training import start_train_net

CONFIG = "tests/engine/tiny.yaml"
NORMALIZER = "criterion.loss_normalizer"


def train_net(*argv):
    """Run train_net.py and return its end."""
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    run = start_train_net(*argv, config=CONFIG, **output)
    stdout, stderr = run.communicate(timeout=300)
    return subprocess.CompletedProcess(run.args, run.returncode, stdout, stderr)


def last_line(run):
    return run.stderr.splitlines()[-1]


def read_metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


def hashes(folder):
    return {
        path: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Three iterations on two processes."""
    folder = tmp_path_factory.mktemp("train_net") / "run"
    run = train_net("--num-gpus", "2", "OUTPUT_DIR", str(folder))
    assert run.returncode == 0, run.stderr
    return run, folder


def test_two_processes_train_and_evaluate(trained):
    run, folder = trained
    assert run.stdout.count("No CUDA device: running on the CPU") == 1
    assert run.stdout.count("custom_train: 3 images, 35 boxes") == 1
    assert "Traceback" not in run.stdout + run.stderr
    files = {path.name for path in folder.iterdir()}
    assert files >= {"config.yaml", "log.txt", "metrics.json", "model_final.pth", "detections.png"}
    assert any(name.startswith("events.out.tfevents") for name in files)
    metrics = read_metrics(folder)
    assert metrics[0]["iteration"] == 2 and metrics[0]["total_loss"] > 0
    assert "bbox/AP50" in metrics[-1]
    # The result ends the output.
    _, _, end = run.stdout.partition("Finished.")
    assert re.search(r"AP +AP50 +AP75 +APs +APm +APl|custom_test: no detections", end)
    assert str(folder / "detections.png") in end and str(folder / "model_final.pth") in end


def test_resuming_goes_on_where_the_run_ended(trained, tmp_path):
    _, ended = trained
    folder = shutil.copytree(ended, tmp_path / "run")
    # As if it had been stopped after its second iteration.
    (folder / "model_final.pth").unlink()
    (folder / "metrics.json").unlink()
    (folder / "last_checkpoint").write_text("model_0000001.pth")
    run = train_net("--num-gpus", "2", "--resume", "OUTPUT_DIR", str(folder))
    assert run.returncode == 0, run.stderr
    assert "Starting training from iteration 2" in run.stdout
    before, after = (torch.load(folder / f"model_{name}.pth") for name in ("0000001", "final"))
    assert (before["iteration"], after["iteration"]) == (1, 2)
    step = read_metrics(folder)[0]
    assert step["iteration"] == 2
    assert step["lr"] == read_metrics(ended)[0]["lr"]
    # One iteration of an image a process later, the moving average has moved by one step: of the
    # mean over both, of which the metrics hold the first process's.
    moved = after["model"][NORMALIZER] - 0.9 * before["model"][NORMALIZER]
    assert moved >= 0.1 * step["num_pos_anchors"] / 2
    assert moved * 20 == pytest.approx(round(moved.item() * 20))  # half a whole number of anchors
    assert min(momenta(before)) > 0
    assert momenta(before) != momenta(after)


def momenta(checkpoint):
    states = checkpoint["trainer"]["_trainer"]["optimizer"]["state"].values()
    return [state["momentum_buffer"].norm().item() for state in states]


@pytest.mark.parametrize(
    "opts", [["SOLVER.BIAS_LR_FACTOR", "2.0"], ["MODEL.FPN.OUT_CHANNELS", "32"]]
)
def test_resuming_with_another_config_is_refused_before_anything_is_written(trained, opts):
    _, folder = trained
    before = hashes(folder)
    run = train_net("--resume", "OUTPUT_DIR", str(folder), *opts)
    assert run.returncode == 2
    assert "the config the run was started with" in last_line(run)
    assert hashes(folder) == before


def test_evaluation_leaves_the_run_as_it_was(trained):
    _, folder = trained
    before = hashes(folder)
    run = train_net("--eval-only", "--resume", "OUTPUT_DIR", str(folder))
    assert run.returncode == 0, run.stderr
    after = hashes(folder)
    assert {path: after.get(path) for path in before} == before
    (new,) = {path.relative_to(folder).parts[0] for path in after.keys() - before.keys()}
    assert re.fullmatch(r"eval-\d{8}-\d{6}", new)
    assert f"Results go to {folder / new}" in run.stdout
    assert (folder / new / "detections.png").is_file()


def test_results_that_were_not_expected_are_said_so(trained, tmp_path):
    """By the first of two processes; Detectron2 ends it without a word."""
    _, folder = trained
    weights = ["MODEL.WEIGHTS", folder / "model_final.pth", "OUTPUT_DIR", tmp_path]
    expected = ["TEST.EXPECTED_RESULTS", "[['bbox', 'AP', 99.0, 0.5]]"]
    run = train_net("--eval-only", "--num-gpus", 2, *weights, *expected)
    assert run.returncode == 1
    assert "error: the results are not those of TEST.EXPECTED_RESULTS" in last_line(run)
    assert "99.0" in run.stdout and "Traceback" not in run.stdout + run.stderr


def test_divergence_on_two_processes_is_one_line(tmp_path):
    opts = ["OUTPUT_DIR", str(tmp_path / "run"), "SOLVER.BASE_LR", "1e6", "SOLVER.MAX_ITER", "20"]
    run = train_net("--num-gpus", "2", *opts)
    assert run.returncode == 3, run.stderr
    assert re.match(
        r"train_net\.py: error: diverged at iteration \d+: loss_cls \S+, loss_box", last_line(run)
    )
    assert "Traceback" not in run.stdout + run.stderr
    assert not (tmp_path / "run/inference").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal is Linux's")
def test_killed_launcher_leaves_no_process_behind(tmp_path):
    """Started as a background job of a script is, with SIGINT ignored."""
    launcher = start_train_net(
        *("--num-gpus", 2, "OUTPUT_DIR", tmp_path, "SOLVER.MAX_ITER", 10000),
        config=CONFIG,
        interrupts=False,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 240
    while not (tmp_path / "last_checkpoint").exists() and time.monotonic() < deadline:
        assert launcher.poll() is None
        time.sleep(0.1)
    processes = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    launcher.kill()
    launcher.wait()
    time.sleep(2)

    def is_alive(pid):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return False
        return state != "Z"  # ended, and not yet asked for by its new parent

    assert len(processes) >= 2
    assert not [pid for pid in processes if is_alive(pid)]
