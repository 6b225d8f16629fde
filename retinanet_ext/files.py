"""Atomic writes, strict JSON, and checksums."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from retinanet_ext.errors import InputError


@contextmanager
def atomic_write(path: Path, *, part: Path | None = None) -> Iterator[IO[bytes]]:
    """Open a temporary file that replaces ``path`` once it is complete and on the disk.

    Args:
        path: file to write
        part: temporary file in the same folder; by default a new name. A killed process leaves it
            behind, and the next one that uses the name overwrites it.

    Raises:
        InputError: the disk is full or the folder not writable; an earlier file is intact
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
        # torch.save raises its own error during the handling of the system's.
        cause = error if isinstance(error, OSError) else error.__context__
        # An error of the content, such as of a file that it is read from, stays what it is.
        if not isinstance(cause, OSError) or not cause.errno or not _is_of(cause, part):
            raise
        raise InputError(f"{path} cannot be written: {cause.strerror or cause}") from error


def _is_of(error: OSError, file: Path) -> bool:
    """Tell whether an error is of a file, because it names that file or, as in a write, none."""
    return error.filename is None or str(error.filename) == str(file)


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file atomically.

    Raises:
        InputError: as for :func:`atomic_write`
    """
    if isinstance(content, str):
        content = content.encode(errors="backslashreplace")  # file names need not be UTF-8
    with atomic_write(path) as file:
        file.write(content)


def make_folder(path: Path) -> None:
    """Create a folder and its parents, where they do not exist, and check that it is writable.

    Raises:
        InputError: it cannot be created, or no file can be written there
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise InputError(f"folder {path} cannot be made or written to: {error.strerror}") from error


def check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be written, or cannot be made. Nothing is left there.

    Raises:
        InputError: it is a file, or the system does not allow it
    """
    try:
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise InputError(f"folder {folder} cannot be written: {error.strerror}") from error


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's bytes, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def to_json(content: Any, **options: Any) -> str:
    """Return ``json.dumps(content, **options)`` with null in place of NaN and infinity."""
    return json.dumps(_without_non_finite(content), allow_nan=False, **options)


def _without_non_finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_non_finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_non_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
