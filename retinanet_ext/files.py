"""Writing a file whole or not at all, and JSON that strict readers take."""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from retinanet_ext.errors import InputError


@contextmanager
def atomic_write(path: Path, *, part: Path | None = None) -> Iterator[IO[bytes]]:
    """Open a file that takes the place of an earlier one once it is whole and on the disk.

    Args:
        path: the file
        part: where it grows, in the same folder; a fresh name by default. What a killed process
            leaves there stays, or is overwritten by the next one to use the name.

    Raises:
        InputError: a full disk, a folder that cannot be written; an earlier file is intact
    """
    part = part or path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        try:
            with open(part, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:
        # torch.save raises an error of its own from the system's.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise InputError(f"{path} cannot be written: {cause.strerror or cause}") from error


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all, in place of an earlier one.

    Raises:
        InputError: a full disk, a folder that cannot be written; an earlier file is intact
    """
    with atomic_write(path) as file:
        # A name of a file need not be UTF-8.
        is_text = isinstance(content, str)
        file.write(content.encode(errors="backslashreplace") if is_text else content)


def to_json(content: Any, **options: Any) -> str:
    """Return strict JSON: null in place of NaN and infinity, for which JSON has no number.

    Args:
        content: as for ``json.dumps``
        options: of ``json.dumps``
    """
    return json.dumps(_without_non_finite(content), allow_nan=False, **options)


def _without_non_finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_non_finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_non_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
