"""A cache on disk for facts about files, so that unchanged files are not read again."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from retinanet_ext.errors import InputError
from retinanet_ext.files import write_file

FOLDER_VARIABLE = "RETINANET_EXT_CACHE"
"""Environment variable with the cache folder; empty switches the cache off."""

FORMAT = 2
"""Raise it when cached values change their meaning."""

_MIN_AGE = 2.0  # seconds; a younger file may change again without a new modification time

logger = logging.getLogger(__name__)


class FileCache:
    """Values by file and key, valid while the file's size and modification time stay the same.

    The cache is one JSON file in ``$RETINANET_EXT_CACHE``, by default
    ``$XDG_CACHE_HOME/retinanet_ext`` or ``~/.cache/retinanet_ext``. A cache file that cannot be
    read or written is ignored, because everything in it can be computed again.

    Args:
        identity: what the values depend on besides the files, such as the settings of a reader.
            Each identity has its own cache file.
    """

    def __init__(self, *identity: Any) -> None:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        folder = os.environ.get(FOLDER_VARIABLE, os.path.join(base, "retinanet_ext"))
        name = hashlib.sha256(repr((FORMAT, identity)).encode(errors="replace")).hexdigest()[:24]
        self._path = Path(folder, f"{name}.json") if folder else None
        self._entries: dict[str, list[Any]] = {}  # path -> [size, mtime_ns, {key: value}]
        self._is_changed = False
        try:
            self._entries = json.loads(self._path.read_bytes()) if self._path else {}
        except FileNotFoundError:
            pass  # the first start with these data
        except (OSError, ValueError) as error:
            logger.debug("The cache %s is not read: %s", self._path, error)

    def get(
        self,
        path: str,
        key: str,
        compute: Callable[[], Any],
        keep: Callable[[Any], bool] = lambda value: True,
    ) -> Any:
        """Return the cached value, or compute it.

        Args:
            path: path of an existing file.
            key: name of the value.
            compute: returns the value, which JSON must be able to hold.
            keep: whether a computed value is cached.
        """
        stat = os.stat(path)
        size, time_of_change, values = self._entries.get(path, (None, None, {}))
        if (size, time_of_change) != (stat.st_size, stat.st_mtime_ns):
            values = {}
        if key in values:
            return values[key]
        value = compute()
        if keep(value) and time.time() - stat.st_mtime > _MIN_AGE:
            values[key] = value
            self._entries[path] = [stat.st_size, stat.st_mtime_ns, values]
            self._is_changed = True
        return value

    def save(self) -> None:
        """Write the cache file if there are new values."""
        if self._path is None or not self._is_changed:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_file(self._path, json.dumps(self._entries, allow_nan=False))
            self._is_changed = False
        except (OSError, ValueError, InputError) as error:
            logger.debug("The cache %s is not written: %s", self._path, error)
