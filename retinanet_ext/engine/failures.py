"""What a person reads when a run ends early."""

from __future__ import annotations

from retinanet_ext.errors import InputError, StoppedError

INPUT_ERROR = 2
DIVERGED = 3
UNEXPECTED_RESULTS = 1  # as Detectron2 ends then
STOPPED = 143  # as a shell says of a process that SIGTERM has ended


class NonFiniteError(FloatingPointError):
    """A loss or gradient that is not finite, raised on all processes before the weights change.

    The message is one line: the iteration and the rank that saw it, the losses, the likely cause
    and the file that says more.
    """


class UnexpectedResultsError(RuntimeError):
    """An evaluation that ``TEST.EXPECTED_RESULTS`` does not allow."""


def explain(error: BaseException) -> tuple[int, str] | None:
    """Return the exit code and the one line for an expected end, None for any other error."""
    if isinstance(error, InputError):
        # Raised in a worker of a data loader, the message comes as the last line of a traceback.
        return INPUT_ERROR, first_line(str(error).rpartition("InputError: ")[2])
    if isinstance(error, FloatingPointError):
        return DIVERGED, first_line(error)
    if isinstance(error, StoppedError):
        return STOPPED, first_line(error)
    if isinstance(error, UnexpectedResultsError):
        return UNEXPECTED_RESULTS, first_line(error)
    return None


def first_line(error: object) -> str:
    """Return the first line of a message, or the type's name where there is none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
