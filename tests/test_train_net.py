"""train_net.py from the outside: two processes train, stop, go on and evaluate.

Starting Python and importing torch takes seconds. The process that launches the others, or the only
one, is therefore the test's own where that makes no difference.
"""

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
from detectron2.utils.logger import setup_logger

from training import no_cuda, run_train_net, start_train_net

CONFIG = "tests/engine/tiny.yaml"
NORMALIZER = "criterion.loss_normalizer"


@pytest.fixture
def run_here(capfd, restore_logging):
    """Run train_net.py in this process; check the exit code, and return stdout and stderr."""

    def run(*argv, code=0):
        setup_logger.cache_clear()  # it would keep the stdout of an earlier test
        with no_cuda():
            found = run_train_net("--config-file", CONFIG, *argv)
        output = capfd.readouterr()
        assert found == code, output.err
        assert "Traceback" not in output.out + output.err
        return output

    return run


def last_line(output):
    return output.err.splitlines()[-1]


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
    argv = ("--num-gpus", 2, "OUTPUT_DIR", folder)
    run = start_train_net(*argv, config=CONFIG, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output = run.communicate(timeout=300)[0].decode()
    assert run.returncode == 0, output
    return output, folder


def test_two_processes_train_and_evaluate(trained):
    output, folder = trained
    assert output.count("No CUDA device: running on the CPU") == 1
    assert output.count("custom_train: 3 images, 35 boxes") == 1
    assert "Traceback" not in output
    files = {path.name for path in folder.iterdir()}
    assert files >= {"config.yaml", "log.txt", "metrics.json", "model_final.pth", "detections.png"}
    assert any(name.startswith("events.out.tfevents") for name in files)
    metrics = read_metrics(folder)
    assert metrics[0]["iteration"] == 2 and metrics[0]["total_loss"] > 0
    assert "bbox/AP50" in metrics[-1]
    # The result ends the output.
    _, _, end = output.partition("Finished.")
    assert re.search(r"AP +AP50 +AP75 +APs +APm +APl|custom_test: no detections", end)
    assert str(folder / "detections.png") in end and str(folder / "model_final.pth") in end


def test_resuming_goes_on_where_the_run_ended(trained, tmp_path, run_here):
    _, ended = trained
    folder = shutil.copytree(ended, tmp_path / "run")
    # As if it had been stopped after its second iteration.
    (folder / "model_final.pth").unlink()
    (folder / "metrics.json").unlink()
    (folder / "last_checkpoint").write_text("model_0000001.pth")
    auto = ("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "auto")
    output = run_here("--num-gpus", 2, "--resume", "OUTPUT_DIR", folder, *auto)
    assert "PRECISION auto is float32, as in the run that is resumed" in output.out
    assert "Starting training from iteration 2" in output.out
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
def test_resuming_with_another_config_is_refused_before_anything_is_written(
    trained, opts, run_here
):
    _, folder = trained
    before = hashes(folder)
    output = run_here("--resume", "OUTPUT_DIR", folder, *opts, code=2)
    assert "the config the run was started with" in last_line(output)
    assert hashes(folder) == before


def test_evaluation_leaves_the_run_as_it_was(trained, run_here):
    _, folder = trained
    before = hashes(folder)
    output = run_here("--eval-only", "--resume", "OUTPUT_DIR", folder)
    after = hashes(folder)
    assert {path: after.get(path) for path in before} == before
    (new,) = {path.relative_to(folder).parts[0] for path in after.keys() - before.keys()}
    assert re.fullmatch(r"eval-\d{8}-\d{6}", new)
    assert f"Results go to {folder / new}" in output.out
    assert (folder / new / "detections.png").is_file()


def test_results_that_were_not_expected_are_said_so(trained, tmp_path, run_here):
    """By the first of two processes; Detectron2 ends it without a word."""
    _, folder = trained
    weights = ["MODEL.WEIGHTS", folder / "model_final.pth", "OUTPUT_DIR", tmp_path]
    expected = ["TEST.EXPECTED_RESULTS", "[['bbox', 'AP', 99.0, 0.5]]"]
    output = run_here("--eval-only", "--num-gpus", 2, *weights, *expected, code=1)
    assert "error: the results are not those of TEST.EXPECTED_RESULTS" in last_line(output)
    assert "99.0" in output.out


def test_divergence_on_two_processes_is_one_line(tmp_path, run_here):
    opts = ["OUTPUT_DIR", tmp_path / "run", "SOLVER.BASE_LR", "1e6", "SOLVER.MAX_ITER", "20"]
    output = run_here("--num-gpus", 2, *opts, code=3)
    assert re.search(r"error: diverged at iteration \d+: loss_cls \S+, loss_box", last_line(output))
    assert output.err.count("error: ") == 1
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
