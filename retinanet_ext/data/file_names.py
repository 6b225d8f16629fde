"""Search for missing image files under the names that other systems and tools give them."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from typing import NamedTuple
from unicodedata import normalize
from urllib.parse import unquote

from retinanet_ext.data.coco_json import join_some, printable

MAX_FOLDERS = 100
"""Most folders below the image folder that are searched."""


class Replacement(NamedTuple):
    """The file that a missing file name probably means.

    Attributes:
        text: a clause that names the file and the difference.
        path: path relative to the image folder; empty if several files may be meant.
        folder: image folder with which the file name would be right; empty if there is none.
    """

    text: str
    path: str = ""
    folder: str = ""


class MisnamedFiles:
    """Finds files by other spellings of their names; each folder is listed once."""

    def __init__(self, image_root: str) -> None:
        self._root = image_root
        self._root_parts = os.path.abspath(image_root).split("/")
        self._names_in = cache(_names_by_fold)
        with os.scandir(image_root) as entries:
            self._subfolders = sorted(entry.name for entry in entries if entry.is_dir())

    def find(self, file_name: str) -> Replacement | None:
        """Return the file that a ``file_name`` of the json probably means, or None."""
        for reason, spelled in _spellings(file_name):
            parts = [part for part in spelled.split("/") if part not in ("", ".")]
            places = [("", 0), *((name, 0) for name in self._subfolders[:MAX_FOLDERS])]
            matches = [(place, path) for place in places for path in self._match(*place, parts)]
            for skipped in range(1, len(parts)):
                matches = matches or [(("", skipped), p) for p in self._match("", skipped, parts)]
            if len(matches) > 1:
                names = join_some((f"`{printable(path)}`" for _, path in matches), 3)
                return Replacement(f"{names} are there, and which is meant cannot be known")
            if matches:
                return self._describe(reason, parts, *matches[0])
        return None

    def _match(self, subfolder: str, skipped: int, parts: Sequence[str]) -> list[str]:
        """Return the files that a name may mean, as paths relative to the image folder."""
        path = subfolder
        for place, part in enumerate(parts[skipped:], start=skipped):
            alike = self._names_in(os.path.join(self._root, path)).get(_fold(part), [])
            paths = [os.path.join(path, name) for name in ([part] if part in alike else alike)]
            if place == len(parts) - 1:
                return [path for path in paths if os.path.isfile(os.path.join(self._root, path))]
            if len(paths) != 1:
                break
            path = paths[0]
        return []

    def _describe(
        self, reason: str, parts: Sequence[str], place: tuple[str, int], path: str
    ) -> Replacement:
        subfolder, skipped = place
        reasons, folder = [reason] if reason else [], ""
        if subfolder:
            reasons.append(f"files are in `{printable(subfolder)}/`")
            folder = os.path.join(self._root, subfolder)
        elif skipped and parts[:skipped] == self._root_parts[-skipped:]:
            reasons.append(f"`{printable('/'.join(parts[:skipped]))}/` is doubled")
            folder = os.path.normpath(os.path.join(self._root, *[".."] * skipped))
        elif skipped:
            reasons.append("files are in another folder")
        by_name = _differences(parts[skipped:], path.split("/")[bool(subfolder) :])
        if reason or by_name:
            folder = ""
        how = " and ".join([*reasons, *by_name]) or "the name is written in another way"
        return Replacement(f"{how}; `{printable(path)}` is there", path, folder)


def _spellings(file_name: str) -> Iterator[tuple[str, str]]:
    """Yield other readings of a name, each with the reason; "" is the name itself."""
    reasons = []
    if "://" not in file_name:
        yield "", file_name
    for mark, reason, read in (
        ("\\", "use backslashes", lambda name: name.replace("\\", "/")),
        ("://", "are URLs", lambda name: name.partition("://")[2].partition("?")[0]),
        ("%", "are percent-encoded", unquote),
    ):
        if mark in file_name:
            reasons.append(f"file names {reason}")
            file_name = read(file_name)
            yield " and ".join(reasons), file_name


def _fold(name: str) -> str:
    """Return a form that names which are easily confused have in common."""
    return normalize("NFC", normalize("NFC", name.strip()).lower())


def _names_by_fold(folder: str) -> Mapping[str, Sequence[str]]:
    """Map the folded form of names to the names in a folder."""
    names = defaultdict(list)
    with suppress(OSError, ValueError):  # no folder
        for name in os.listdir(folder):
            names[_fold(name)].append(name)
    return names


def _differences(names: Sequence[str], others: Sequence[str]) -> list[str]:
    found: dict[str, None] = {}  # in their order
    for name, other in zip(names, others, strict=True):
        if name != name.strip() or other != other.strip():
            found["there are spaces at an end"] = None
        name, other = name.strip(), other.strip()
        if normalize("NFC", name) != normalize("NFC", other):
            found["upper and lower case differ"] = None
        elif name != other:
            found["the Unicode normal form differs"] = None
    return list(found)
