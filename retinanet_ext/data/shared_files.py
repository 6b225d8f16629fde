"""Test images that are training images: by path, or by content."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from retinanet_ext.data.coco_json import printable
from retinanet_ext.data.file_cache import FileCache
from retinanet_ext.data.image_files import cached_real_path

_BLOCK = 1 << 16  # bytes


def describe_shared_files(train: Sequence[str], tests: Mapping[str, Sequence[str]]) -> list[str]:
    """Return one sentence for each test set that contains training images.

    Args:
        train: paths of the training images.
        tests: name of each test set -> paths of its images.
    """
    sentences = []
    for name, test in tests.items():
        if not (shared := _find_shared_files(train, test)):
            continue
        first = next(iter(shared))
        other = printable(shared[first])
        other = "" if shared[first] == first else f", which is training image {other}"
        is_one = len(shared) == 1
        are = "is a training image" if is_one else "are training images"
        sentences.append(
            f"{name}: {len(shared)} of {len(test)} test images {are} too, such as test image "
            f"{printable(first)}{other}; AP on {'it' if is_one else 'them'} says little about new "
            "images"
        )
    return sentences


def _find_shared_files(train: Sequence[str], test: Sequence[str]) -> dict[str, str]:
    """Map test images to the training image of the same path or the same content."""
    real_path = cached_real_path()
    by_path = {real_path(path): path for path in train}
    shared = {path: by_path[real_path(path)] for path in test if real_path(path) in by_path}
    left = [path for path in test if path not in shared]
    seen = FileCache("digests", *sorted({os.path.dirname(os.path.abspath(p)) for p in left}))
    # A file is read only if another file on the other side has the same size, and it is read
    # whole only if a block in the middle is the same too.
    steps: tuple[Callable[[str], Any], ...] = (
        os.path.getsize,
        lambda path: seen.get(os.path.abspath(path), "block", lambda: _digest_block(path)),
        lambda path: seen.get(os.path.abspath(path), "digest", lambda: _digest(path)),
    )
    for step in steps:
        of_train: dict[Any, list[str]] = defaultdict(list)
        for path in train:
            of_train[step(path)].append(path)
        of_test = {path: step(path) for path in left}
        left = [path for path, value in of_test.items() if value in of_train]
        wanted = {of_test[path] for path in left}
        train = [path for value, paths in of_train.items() if value in wanted for path in paths]
    seen.save()
    return shared | {path: of_train[of_test[path]][0] for path in left}


def _digest_block(path: str) -> str:
    """Return a digest of the block in the middle of a file, because headers are often alike."""
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - _BLOCK) // 2)
        return hashlib.sha256(file.read(_BLOCK)).hexdigest()


def _digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
