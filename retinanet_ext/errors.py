"""The expected ends of a run: its errors, and the exit code and the line that each ends with."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

import yaml


class InputError(ValueError):
    """A config, data set, checkpoint or argument that cannot be used.

    The message is one sentence that names the file, key or id, what was found there and what is
    allowed instead.
    """


class StoppedError(RuntimeError):
    """A training that was told to stop (SIGTERM) and has saved its state to go on from."""


class LostWorkerError(RuntimeError):
    """The end of a process that loads images, at the hands of the system."""

    def __str__(self) -> str:
        return (
            "a process that loads images was ended by the system, as one out of memory does; lower "
            "DATALOADER.NUM_WORKERS or INPUT.MAX_SIZE_TRAIN, or give a container more /dev/shm; "
            "--resume goes on from the last checkpoint"
        )


INPUT_ERROR = 2
DIVERGED = 3
FAILED = 1
STOPPED = 143  # as a shell says of a process that SIGTERM has ended


class NonFiniteError(FloatingPointError):
    """A loss or gradient that is not finite, raised on all processes before the weights change.

    The message is one line: the iteration and the rank that saw it, the losses, the likely cause
    and the file that says more.
    """


class UnexpectedResultsError(RuntimeError):
    """An evaluation that ``TEST.EXPECTED_RESULTS`` does not allow, or an exported file that differs
    from its model."""


NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}
"""Of an error of the system: no file can be written there."""


def explain(error: BaseException) -> tuple[int, str] | None:
    """Return the exit code and the one line for an expected end, None for any other error."""
    if isinstance(error, InputError):
        # Raised in a worker of a data loader, the message comes as the last line of a traceback.
        return INPUT_ERROR, first_line(str(error).rpartition("InputError: ")[2])
    if isinstance(error, FloatingPointError):
        return DIVERGED, first_line(error)
    if isinstance(error, StoppedError):
        return STOPPED, first_line(error)
    if isinstance(error, UnexpectedResultsError | LostWorkerError):
        return FAILED, first_line(error)
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return INPUT_ERROR, f"{error.filename or 'a file'} cannot be written: {error.strerror}"
    if isinstance(error, PermissionError) and error.filename:
        return INPUT_ERROR, f"{error.filename}: {error.strerror}"
    text = str(error)
    is_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if is_memory or "DefaultCPUAllocator" in text:
        return FAILED, (
            f"out of memory ({first_line(error)[:200]}): lower INPUT.MAX_SIZE_TRAIN or "
            "SOLVER.IMS_PER_BATCH (of predict: --batch), or raise SOLVER.GRAD_ACCUM_STEPS, which "
            "takes a batch in parts"
        )
    # What gloo (the first three) and NCCL say when another process has ended.
    if isinstance(error, RuntimeError) and re.search(
        r"closed by peer|Connection reset|Broken pipe|ncclRemoteError|NCCL \w+ was aborted", text
    ):
        return FAILED, "the connection to another process is lost, whose own message says why"
    # Which torch raises wherever this process is when it hears of it.
    if re.search(r"DataLoader worker .*(killed by signal|exited unexpectedly)", text):
        return FAILED, str(LostWorkerError())
    return None


@contextmanager
def yaml_errors(path: str) -> Iterator[None]:
    """Turn errors of a YAML file's text into an InputError that names the file and the line."""
    try:
        yield
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{mark.name}, line {mark.line + 1}" if mark else path
        raise InputError(f"{where}: not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid YAML: {first_line(error)}") from None


def first_line(error: object) -> str:
    """Return the first line of a message, or the type's name where there is none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
