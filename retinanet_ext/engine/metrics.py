"""metrics.json: strict JSON, one line per iteration that is written."""

from __future__ import annotations

import json
import math
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from detectron2.utils.events import EventStorage, JSONWriter, get_event_storage

from retinanet_ext.files import atomic_write


class StrictJSONWriter(JSONWriter):
    """Detectron2's ``JSONWriter``, with null for NaN and infinity, which strict readers refuse.

    The file is opened with the first line that is written.
    """

    def __init__(self, json_file: str, window_size: int = 20) -> None:
        self._path = json_file
        self._window_size = window_size
        self._last_write = -1

    @cached_property
    def _file_handle(self) -> IO[str]:
        return open(self._path, "a", encoding="utf-8")

    def write(self) -> None:
        with _NullForNonFinite(get_event_storage()):
            super().write()

    def close(self) -> None:
        if "_file_handle" in self.__dict__:
            super().close()


class _NullForNonFinite(EventStorage):
    """The latest scalars of a storage, with None for those that are not finite."""

    def __init__(self, storage: EventStorage) -> None:
        super().__init__(storage.iter)
        self._storage = storage

    def latest_with_smoothing_hint(self, window_size: int = 20) -> dict[str, tuple[Any, int]]:
        latest = self._storage.latest_with_smoothing_hint(window_size)
        return {
            name: (value if math.isfinite(value) else None, iteration)
            for name, (value, iteration) in latest.items()
        }


def archive_superseded_metrics(
    metrics: Path, start_iter: int, *, is_extended: bool = False
) -> None:
    """Move the lines of iterations that will run again to ``<name>_superseded.json``.

    Args:
        metrics: the file of a :class:`StrictJSONWriter`, or another of lines with "iteration"
        start_iter: the first iteration that will run
        is_extended: whether the run had ended. Its last line is then the final evaluation, which
            Detectron2 writes under the iteration after the last.
    """
    lines = metrics.read_bytes().splitlines(keepends=True) if metrics.exists() else []
    kept, superseded = [], []
    for number, line in enumerate(lines, 1):
        is_last = is_extended and number == len(lines)
        (kept if _is_before(line, start_iter + is_last) else superseded).append(line)
    if not superseded:
        return
    aside = metrics.with_name(f"{metrics.stem}_superseded.json")
    earlier = aside.read_bytes() if aside.exists() else b""
    for path, content in ((aside, [earlier, *superseded]), (metrics, kept)):
        with atomic_write(path) as file:
            file.writelines(content)


def _is_before(line: bytes, start_iter: int) -> bool:
    try:
        return json.loads(line)["iteration"] < start_iter
    except ValueError:
        return False  # cut off by a kill
