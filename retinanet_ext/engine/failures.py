"""What a person reads when a run ends early."""

from __future__ import annotations

import errno
import re

import torch

from retinanet_ext.errors import InputError, LostWorkerError, StoppedError

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
    """An evaluation that ``TEST.EXPECTED_RESULTS`` does not allow."""


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
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in text:
        return FAILED, (
            f"out of memory ({first_line(error)[:200]}): lower INPUT.MAX_SIZE_TRAIN or "
            "SOLVER.IMS_PER_BATCH, or raise SOLVER.ACCUMULATE, which takes a batch in parts"
        )
    # Which torch raises wherever this process is when it hears of it.
    if re.search(r"DataLoader worker .*(killed by signal|exited unexpectedly)", text):
        return FAILED, str(LostWorkerError())
    return None


def first_line(error: object) -> str:
    """Return the first line of a message, or the type's name where there is none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
