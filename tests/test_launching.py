"""train_net.py by every way its processes are started, stopped and started again.

Starting Python and importing torch takes seconds. Where it makes no difference, the process that
launches the others, or the only one, is therefore the test's own.
"""

import atexit
import contextlib
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from detectron2.utils import comm

import stress_kills
from retinanet_ext.engine import launch
from retinanet_ext.errors import DIVERGED, STOPPED, NonFiniteError, StoppedError
from training import CONFIG, no_cuda, run_train_net, start_train_net

LAUNCH = sys.modules[launch.__module__]
ITERATIONS = 18
TRAINING = ["SOLVER.MAX_ITER", ITERATIONS, "SOLVER.CHECKPOINT_PERIOD", stress_kills.PERIOD]


def start(*argv, **kwargs):
    """Start train_net.py with its output in a file: a pipe that nobody reads would fill up."""
    output = tempfile.TemporaryFile("w+")  # noqa: SIM115
    process = start_train_net(*argv, stdout=output, stderr=subprocess.STDOUT, **kwargs)
    process.output = output
    return process


def run_here(*argv):
    """Run train_net.py with this process as its launcher, and return the exit code."""
    with no_cuda():
        return run_train_net("--config-file", CONFIG, *argv)


def read_output(process, code):
    """Return the output of a process, which must end with an exit code."""
    process.wait(timeout=240)
    with process.output as file:
        file.seek(0)
        output = file.read()
    assert process.returncode == code, output
    return output


def finish(*processes, code=0):
    """Return the last line of each process, all of which must end with an exit code."""
    lines = []
    for process in processes:
        output = read_output(process, code)
        # Python's resource tracker, which outlives the process, may have a word after its last.
        said = [line for line in output.strip().splitlines() if "resource_tracker" not in line]
        lines.append(said[-1])
    return lines


def wait_for_checkpoint(process, folder):
    deadline = time.monotonic() + 240
    while not (folder / "last_checkpoint").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def children(pid):
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def free_port():
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def torchrun(*flags):
    run = [sys.executable, "-m", "torch.distributed.run", *flags]
    return [*run, "--master-port", str(free_port()), "train_net.py"]


def differences(*folders):
    """Compare the checkpoints of two runs bit for bit: weights, optimizer, place in the data."""
    return stress_kills.differences(*(folder / "model_final.pth" for folder in folders))


def starts(folder):
    return json.loads((folder / "run_info.json").read_text())


@pytest.fixture(scope="module")
def two_machines(tmp_path_factory):
    """A run on two machines, both of them this one."""
    folder = tmp_path_factory.mktemp("launching") / "machines"
    flags = ["--num-machines", 2, "--dist-url", f"tcp://127.0.0.1:{free_port()}"]
    other = start(*flags, "--machine-rank", 1, "OUTPUT_DIR", folder, *TRAINING)
    assert run_here(*flags, "--machine-rank", 0, "OUTPUT_DIR", folder, *TRAINING) == 0
    finish(other)
    return folder


def test_two_machines(two_machines):
    assert torch.load(two_machines / "model_final.pth")["iteration"] == ITERATIONS - 1
    (only,) = starts(two_machines)
    assert only["processes"] == 2


def test_a_kill_at_a_random_moment_changes_nothing(two_machines, tmp_path, restore_logging):
    """A small form of ``stress_kills.py``: killed while a checkpoint is being written."""
    for attempt in range(4):  # the few moments of writing can be missed
        folder, delay = tmp_path / f"{attempt}", random.uniform(0, 0.1)
        with contextlib.suppress(RuntimeError):
            stress_kills.kill(folder, 5, delay, in_writing=True, iterations=ITERATIONS)
            break
    else:
        pytest.fail("no kill met a checkpoint that was being written")
    assert run_here(*stress_kills.arguments(folder, ITERATIONS)) == 0
    assert differences(folder, two_machines) == []


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_torchrun_starts_a_killed_process_again_to_the_same_bits(two_machines, tmp_path):
    folder = tmp_path / "run"
    command = torchrun("--nproc-per-node", "2", "--max-restarts", "2")
    run = start("OUTPUT_DIR", folder, *TRAINING, command=command)
    wait_for_checkpoint(run, folder)
    os.kill(children(run.pid)[-1], signal.SIGKILL)
    finish(run)
    assert differences(folder, two_machines) == []
    first, second = starts(folder)
    assert not first["resumed"] and second["resumed"]
    assert first["config"]["sha256"] == second["config"]["sha256"]


def test_torchrun_does_not_go_on_with_what_another_run_left(two_machines):
    before = {path: path.read_bytes() for path in two_machines.iterdir() if path.is_file()}
    run = start("OUTPUT_DIR", two_machines, *TRAINING, command=torchrun("--max-restarts", "1"))
    output = read_output(run, code=1)
    assert output.count("train_net.py: error:") == 2  # one per start
    assert output.count(f"OUTPUT_DIR {two_machines} holds an earlier run") == 2
    assert output.count("Traceback") == 1  # torchrun's own
    assert {path: path.read_bytes() for path in two_machines.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_launcher_asks_its_processes_to_stop(number):
    process = multiprocessing.get_context("fork").Process(target=signal.pause)
    process.start()
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
    with LAUNCH._forwarded_signals() as received:
        os.kill(os.getpid(), number)
        process.join(60)
        assert process.exitcode == -signal.SIGTERM and received == [number]
        if number == signal.SIGINT:
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
                time.sleep(60)
    signal.signal(signal.SIGINT, earlier)


def test_the_launcher_waits_for_processes_that_save(tmp_path):
    run = start("--num-gpus", 2, "OUTPUT_DIR", tmp_path, "SOLVER.MAX_ITER", 10000)
    wait_for_checkpoint(run, tmp_path)
    run.send_signal(signal.SIGINT)
    (line,) = finish(run, code=143)
    assert line.startswith("train_net.py: error: stopped by SIGTERM after iteration")
    assert (tmp_path / (tmp_path / "last_checkpoint").read_text()).is_file()


@pytest.fixture
def kill_a_process(tmp_path):
    """Once there is a checkpoint, kill the last child of this process that has such a command."""
    threads = []

    def start(command):
        def kill():
            while not (tmp_path / "last_checkpoint").exists():
                time.sleep(0.05)
            found = [
                pid
                for pid in children(os.getpid())
                if command in Path(f"/proc/{pid}/cmdline").read_text()
            ]
            os.kill(found[-1], signal.SIGKILL)

        threads.append(threading.Thread(target=kill, daemon=True))
        threads[0].start()

    yield start
    threads[0].join(1)
    # What is raised at the death of a child may come while a no_grad begins, which then never ends.
    torch.set_grad_enabled(True)


def test_a_process_ended_by_the_system_is_said_so(tmp_path, kill_a_process, capfd):
    kill_a_process("spawn_main")
    opts = ["OUTPUT_DIR", tmp_path, "SOLVER.MAX_ITER", 10000]
    assert run_here("--num-gpus", 2, *opts) == 1
    line = capfd.readouterr().err.splitlines()[-1]
    assert "ended by SIGKILL, as by a system out of memory" in line and "--resume" in line


def test_a_process_that_loads_images_ended_by_the_system_is_said_so(
    tmp_path, kill_a_process, capfd, restore_logging
):
    kill_a_process("")
    opts = ["SOLVER.MAX_ITER", 10000, "DATALOADER.NUM_WORKERS", 2]
    assert run_here("OUTPUT_DIR", tmp_path, *opts) == 1
    errors = capfd.readouterr().err
    assert "a process that loads images was ended by the system" in errors.splitlines()[-1]
    assert "Traceback" not in errors


def gloo_threads():
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]


def write_threads_at_the_end(folder, error):
    comm.all_gather(comm.get_rank())
    file = folder / f"rank{comm.get_rank()}"
    file.write_text(f"{len(gloo_threads()) > 0}")
    atexit.register(lambda: file.write_text(f"{file.read_text()} {gloo_threads()}"))
    if error:
        raise error("over")


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
@pytest.mark.parametrize(
    ("error", "code"), [(None, 0), (StoppedError, STOPPED), (NonFiniteError, DIVERGED)]
)
def test_no_thread_of_a_connection_is_left_when_python_ends(
    tmp_path, error, code, restore_logging, capfd
):
    """It would abort a process that has done its work, now and then."""
    with no_cuda():
        assert launch(write_threads_at_the_end, 2, args=(tmp_path, error)) == code
    assert capfd.readouterr().err.count("error: over") == (error is not None)
    # After an error the launcher ends the other process as soon as one has ended.
    ends = [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)]
    assert ends.count("True []") >= (1 if error else 2)


def test_processes_that_do_not_meet(monkeypatch, capsys, restore_logging):
    """Machine 1 is missing."""
    monkeypatch.setattr(LAUNCH, "RENDEZVOUS_TIMEOUT", 2)
    url = f"tcp://127.0.0.1:{free_port()}"
    with no_cuda():
        assert launch(print, num_machines=2, dist_url=url) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"the 2 processes did not meet at {url}: 2 seconds passed; check that" in line


def test_machines_with_other_configs(tmp_path, capfd):
    flags = ["--num-machines", 2, "--dist-url", f"tcp://127.0.0.1:{free_port()}"]
    flags += ["OUTPUT_DIR", tmp_path]
    other = start("--machine-rank", 1, *flags, "SOLVER.BASE_LR", "0.5")
    assert run_here("--machine-rank", 0, *flags) == 2
    for line in (capfd.readouterr().err.splitlines()[-1], *finish(other, code=2)):
        assert "SOLVER.BASE_LR is 0.005 in process 0 and 0.5 in process 1" in line
    assert not list(tmp_path.glob("model_*"))


def test_the_same_bits_on_one_process(tmp_path, restore_logging):
    """With a seed that is drawn, recorded, and given to the second run."""
    one, two = tmp_path / "one", tmp_path / "two"
    training = [*TRAINING, "DETERMINISTIC", True]
    assert run_here("OUTPUT_DIR", one, *training, "SEED", -1) == 0
    seed = starts(one)[0]["seed"]
    assert seed >= 0
    assert run_here("OUTPUT_DIR", two, *training, "SEED", seed) == 0
    assert differences(one, two) == []
    # Resumed, it goes on with its own, whatever the config says by now.
    longer = [*training, "SEED", seed + 1, "SOLVER.MAX_ITER", ITERATIONS + 1]
    assert run_here("--resume", "OUTPUT_DIR", one, *longer) == 0
    assert torch.load(one / "model_final.pth")["trainer"]["data"]["seed"] == seed
    assert [(run["seed"], run["resumed"]) for run in starts(one)] == [(seed, False), (seed, True)]
    torch.use_deterministic_algorithms(False)
