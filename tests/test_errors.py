"""The line that ends a run."""

import errno
import os
import pickle

import pytest
import torch
from PIL import Image

from retinanet_ext.errors import (
    DIVERGED,
    FAILED,
    INPUT_ERROR,
    STOPPED,
    InputError,
    LostWorkerError,
    NonFiniteError,
    StoppedError,
    explain,
)
from retinanet_ext.files import atomic_write, write_file


@pytest.mark.parametrize(
    ("error", "code"),
    [(InputError, INPUT_ERROR), (NonFiniteError, DIVERGED), (StoppedError, STOPPED)],
)
def test_expected_ends_are_their_message_from_another_process_too(error, code):
    received = pickle.loads(pickle.dumps(error("at iteration 41: loss_cls nan")))
    assert explain(received) == (code, "at iteration 41: loss_cls nan")


def allocate_too_much():
    torch.empty(2**48, dtype=torch.uint8)


@pytest.mark.parametrize(
    "fail",
    [
        allocate_too_much,
        lambda: bytearray(2**62),
        lambda: exec("raise torch.OutOfMemoryError('CUDA out of memory. Tried 2 GiB')", globals()),
    ],
)
def test_memory_that_runs_out_is_one_line_with_a_way_out(fail):
    with pytest.raises((RuntimeError, MemoryError)) as raised:
        fail()
    code, line = explain(raised.value)
    assert code == FAILED and "\n" not in line
    assert line.startswith("out of memory (") and "SOLVER.GRAD_ACCUM_STEPS" in line


def test_a_lost_worker_is_told_however_torch_tells_it():
    line = str(LostWorkerError())
    for text in (
        "DataLoader worker (pid 12) is killed by signal: Killed. ",
        "DataLoader worker (pid(s) 12, 13) exited unexpectedly",
    ):
        assert explain(RuntimeError(text)) == (FAILED, line)
    assert explain(pickle.loads(pickle.dumps(LostWorkerError()))) == (FAILED, line)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_without_room_is_named(number):
    error = OSError(number, os.strerror(number), "run/metrics.json")
    expected = f"run/metrics.json cannot be written: {os.strerror(number)}"
    assert explain(error) == (INPUT_ERROR, expected)


def test_a_file_without_permission_is_named():
    error = OSError(errno.EACCES, os.strerror(errno.EACCES), "/root/run")
    assert explain(error) == (INPUT_ERROR, "/root/run: Permission denied")


def test_an_error_of_what_is_read_is_not_blamed_on_the_file_that_is_written(tmp_path):
    output, missing, torn = (tmp_path / name for name in ("output", "missing", "torn.png"))
    Image.effect_noise((64, 64), 50).save(torn)
    torn.write_bytes(torn.read_bytes()[:900])
    with pytest.raises(FileNotFoundError, match="missing"), atomic_write(output):
        missing.read_bytes()
    with pytest.raises(OSError, match="truncated") as raised, atomic_write(output):
        Image.open(torn).load()
    assert not isinstance(raised.value, InputError) and not output.exists()
    with (
        pytest.raises(InputError, match="output cannot be written: No space"),
        atomic_write(output),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(InputError, match=r"no/file cannot be written: No such file or directory"):
        write_file(tmp_path / "no/file", "")
    (output / "folder").mkdir(parents=True)
    with pytest.raises(InputError, match="output cannot be written: Is a directory"):
        write_file(output, "")


def test_other_errors_are_not_explained():
    assert explain(OSError(errno.ENOENT, "such as a defect")) is None
    assert explain(ValueError("a defect of the program")) is None
