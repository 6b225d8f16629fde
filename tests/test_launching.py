"""train_net.py by every way its processes are started, stopped and started again."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from retinanet_ext.engine import launch
from training import start_train_net

TRAINING = ["SOLVER.MAX_ITER", "6", "SOLVER.BASE_LR", "0.001", "DETERMINISTIC", "True"]


def start(*argv, **kwargs):
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return start_train_net(*argv, config="tests/engine/tiny.yaml", **output, **kwargs)


def finish(*processes, code=0):
    """Return the last line of each process, all of which must end with an exit code."""
    lines = []
    for process in processes:
        output, _ = process.communicate(timeout=240)
        assert process.returncode == code, output
        # Python's resource tracker, which outlives the process, may have a word after its last.
        said = [line for line in output.strip().splitlines() if "resource_tracker" not in line]
        lines.append(said[-1])
    return lines


def wait_for_checkpoint(process, folder):
    deadline = time.monotonic() + 240
    while not (folder / "last_checkpoint").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def free_port():
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def torchrun(*flags):
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    return [*run, *flags, "--master-port", str(free_port()), "train_net.py"]


def weights(folder):
    return torch.load(folder / "model_final.pth")


def starts(folder):
    return json.loads((folder / "run_info.json").read_text())


def same(one, other):
    """Compare two checkpoints bit for bit: weights, optimizer, place in the data."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.fixture(scope="module")
def two_machines(tmp_path_factory):
    """A run on two machines, both of them this one."""
    folder = tmp_path_factory.mktemp("launching") / "machines"
    flags = ["--num-machines", 2, "--dist-url", f"tcp://127.0.0.1:{free_port()}"]
    runs = [
        start(*flags, "--machine-rank", rank, "OUTPUT_DIR", folder, *TRAINING) for rank in (1, 0)
    ]
    finish(*runs)
    return folder


def test_two_machines(two_machines):
    assert weights(two_machines)["iteration"] == 5
    (only,) = starts(two_machines)
    assert only["processes"] == 2


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_torchrun_starts_a_killed_process_again_to_the_same_bits(two_machines, tmp_path):
    folder = tmp_path / "run"
    run = start("OUTPUT_DIR", folder, *TRAINING, command=torchrun("--max-restarts", "2"))
    wait_for_checkpoint(run, folder)
    workers = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    finish(run)
    assert same(weights(folder), weights(two_machines))
    first, second = starts(folder)
    assert not first["resumed"] and second["resumed"]
    assert first["config"]["sha256"] == second["config"]["sha256"]


def test_torchrun_does_not_go_on_with_what_another_run_left(two_machines):
    before = {path: path.read_bytes() for path in two_machines.iterdir() if path.is_file()}
    run = start("OUTPUT_DIR", two_machines, *TRAINING, command=torchrun("--max-restarts", "1"))
    output, _ = run.communicate(timeout=240)
    assert run.returncode == 1
    assert output.count("train_net.py: error:") == 2  # a line a start, and not a process
    assert output.count(f"OUTPUT_DIR {two_machines} holds an earlier run") == 2
    assert output.count("Traceback") == 1  # torchrun's own
    assert {path: path.read_bytes() for path in two_machines.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_parent_passes_a_signal_on_and_waits(number, tmp_path):
    run = start("--num-gpus", 2, "OUTPUT_DIR", tmp_path, "SOLVER.MAX_ITER", 10000)
    wait_for_checkpoint(run, tmp_path)
    run.send_signal(number)
    (line,) = finish(run, code=143)
    assert line.startswith("train_net.py: error: stopped by SIGTERM after iteration")
    assert (tmp_path / (tmp_path / "last_checkpoint").read_text()).is_file()


def test_a_process_ended_by_the_system_is_said_so(tmp_path):
    run = start("--num-gpus", 2, "OUTPUT_DIR", tmp_path, "SOLVER.MAX_ITER", 10000)
    wait_for_checkpoint(run, tmp_path)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    names = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in children}
    worker = [pid for pid in children if "spawn_main" in names[pid]][-1]
    os.kill(int(worker), signal.SIGKILL)
    (line,) = finish(run, code=1)
    assert "ended by SIGKILL, as by a system out of memory" in line and "--resume" in line


def test_a_process_that_loads_images_ended_by_the_system_is_said_so(tmp_path):
    opts = ["SOLVER.MAX_ITER", 10000, "DATALOADER.NUM_WORKERS", 2]
    run = start("OUTPUT_DIR", tmp_path, *opts)
    wait_for_checkpoint(run, tmp_path)
    workers = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(workers[0]), signal.SIGKILL)
    output, _ = run.communicate(timeout=240)
    assert run.returncode == 1
    assert "a process that loads images was ended by the system" in output.splitlines()[-1]
    assert "Traceback" not in output


def test_processes_that_do_not_meet(monkeypatch, capsys, restore_logging):
    """Machine 1 is missing."""
    monkeypatch.setattr(sys.modules[launch.__module__], "RENDEZVOUS_TIMEOUT", 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    url = f"tcp://127.0.0.1:{free_port()}"
    assert launch(print, num_machines=2, dist_url=url) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"the 2 processes did not meet at {url}: 8 seconds passed; check that" in line


def test_machines_with_other_configs(tmp_path):
    flags = ["--num-machines", 2, "--dist-url", f"tcp://127.0.0.1:{free_port()}"]
    runs = [
        start(*flags, "--machine-rank", rank, "OUTPUT_DIR", tmp_path, *opts)
        for rank, opts in ((0, []), (1, ["SOLVER.BASE_LR", "0.5"]))
    ]
    for line in finish(*runs, code=2):
        assert "SOLVER.BASE_LR is 0.02 in process 0 and 0.5 in process 1" in line
    assert not list(tmp_path.glob("model_*"))


def test_the_same_bits_on_one_process(tmp_path):
    """With a seed that is drawn, recorded, and given to the second run."""
    one, two = tmp_path / "one", tmp_path / "two"
    finish(start("OUTPUT_DIR", one, *TRAINING, "SEED", -1))
    seed = starts(one)[0]["seed"]
    assert seed >= 0
    finish(start("OUTPUT_DIR", two, *TRAINING, "SEED", seed))
    assert same(weights(one), weights(two))
    # Resumed, it goes on with its own, whatever the config says by now.
    longer = [*TRAINING, "SEED", seed + 1, "SOLVER.MAX_ITER", 7]
    finish(start("--resume", "OUTPUT_DIR", one, *longer))
    assert torch.load(one / "model_final.pth")["trainer"]["data"]["seed"] == seed
    assert [(run["seed"], run["resumed"]) for run in starts(one)] == [(seed, False), (seed, True)]
