"""What a person reads when a run ends early."""

from __future__ import annotations

import re

from retinanet_ext.errors import InputError

INPUT_ERROR = 2
DIVERGED = 3


def explain(error: BaseException) -> tuple[int, str] | None:
    """Return the exit code and the one line for an expected end, None for any other error."""
    if isinstance(error, InputError):
        # Raised in a worker of a data loader, the message comes as the last line of a traceback.
        return INPUT_ERROR, first_line(str(error).rpartition("InputError: ")[2])
    if isinstance(error, FloatingPointError):
        return DIVERGED, _divergence(str(error))
    return None


def _divergence(message: str) -> str:
    """Put Detectron2's message (iteration, then a dict of losses) in one line."""
    iteration = re.search(r"iteration=(\d+)", message)
    losses = re.findall(r"'(\w+)': (?:np\.float64\()?(-?(?:inf|nan|[\d.e+-]+))", message)
    if not iteration or not losses:
        return first_line(message)
    values = ", ".join(f"{name} {float(value):.4g}" for name, value in losses)
    return (
        f"diverged at iteration {iteration[1]}: {values}; "
        "a lower SOLVER.BASE_LR or a longer warm-up is the usual remedy"
    )


def first_line(error: object) -> str:
    """Return the first line of a message, or the type's name where there is none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
