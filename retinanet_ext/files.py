"""Writing a file whole or not at all."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from retinanet_ext.errors import InputError


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all, in place of an earlier one.

    Raises:
        InputError: a full disk, a folder that cannot be written; an earlier file is intact
    """
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        try:
            part.write_bytes(content.encode() if isinstance(content, str) else content)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from error
