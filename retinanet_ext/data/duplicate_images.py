"""Test images that are training images, and images of any data set that look alike."""

from __future__ import annotations

import filecmp
import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from retinanet_ext.data.coco_json import printable
from retinanet_ext.data.file_cache import FileCache
from retinanet_ext.data.image_files import cached_real_path
from retinanet_ext.data.images import ImageReader
from retinanet_ext.files import sha256_of

MAX_DISTANCE = 1 / 8
"""Largest distance of images that look alike. On BCCD it lies between copies that were compressed,
scaled or shifted by 8 pixels (at most 0.11) and different images of one microscope (least 0.27)."""

_SIDE = 16  # brightness is compared on a grid of this many cells by as many
_BLOCK = 512  # images compared at a time
_BYTES = 1 << 16  # of a file's middle

_Bits = npt.NDArray[np.float32]


def describe_shared_files(train: Sequence[str], tests: Mapping[str, Sequence[str]]) -> list[str]:
    """Return a sentence for each test set that contains training images, by path or by content.

    Args:
        train: paths of the training images.
        tests: name of each test set -> paths of its images.
    """
    sentences = []
    for name, test in tests.items():
        if shared := _find_shared_files(train, test):
            (first, other), *_ = shared.items()
            which = "" if other == first else f", which is training image {printable(other)}"
            are = "is a training image too" if len(shared) == 1 else "are training images too"
            example = f"test image {printable(first)}{which}"
            sentences.append(_warn_of_shared(name, len(shared), len(test), are, example))
    return sentences


def _warn_of_shared(name: str, number: int, total: int, are: str, example: str) -> str:
    them = "it" if number == 1 else "them"
    return (
        f"{name}: {number} of {total} test images {are}, such as {example}; AP on {them} says "
        "little about new images"
    )


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
        lambda path: seen.get(os.path.abspath(path), "block", partial(_digest_block, path)),
        lambda path: seen.get(os.path.abspath(path), "digest", partial(sha256_of, path)),
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
        file.seek(max(0, os.path.getsize(path) - _BYTES) // 2)
        return hashlib.sha256(file.read(_BYTES)).hexdigest()


def find_near_duplicates(
    train: Sequence[str], tests: Mapping[str, Sequence[str]], reader: ImageReader
) -> list[dict[str, Any]]:
    """Return images that look like another one, the test images among training images first.

    A difference hash of 256 bits says at which cells of a 16 x 16 grid an image becomes brighter to
    the right. The distance of two images is 1 minus the cosine of their hashes: 0 for equal ones,
    about 0.5 for unrelated ones, 1 for an image of a single brightness.

    Args:
        train, tests: as for :func:`describe_shared_files`.
        reader: reads the images as training does.

    Returns:
        for each such image its ``image`` and ``data_set`` ("train" or the test set), the ``other``
        image that is nearest to it, which is a training image or an earlier image of the same set,
        with the ``other_data_set``, their ``distance``, and whether the files are ``equal``.
    """
    sets = {"train": train, **tests}
    hashes = {name: hash_images(paths, reader) for name, paths in sets.items()}
    pairs = [(name, "train") for name in tests] + [(name, name) for name in sets]
    found = []
    for name, other in pairs:
        nearest, distances = _find_nearest(hashes[name], hashes[other], earlier=name == other)
        found += [
            {
                "image": image,
                "data_set": name,
                "other": sets[other][neighbour],
                "other_data_set": other,
                "distance": round(max(float(distance), 0.0), 4),
                "equal": filecmp.cmp(image, sets[other][neighbour], shallow=False),
            }
            for image, neighbour, distance in zip(sets[name], nearest, distances, strict=True)
            if distance <= MAX_DISTANCE
        ]
    return found


def describe_near_duplicates(
    found: Sequence[Mapping[str, Any]], num_images: Mapping[str, int]
) -> list[str]:
    """Return a sentence for each data set that has images which look alike.

    Test images that equal a training image are left to :func:`describe_shared_files`.

    Args:
        found: of :func:`find_near_duplicates`.
        num_images: "train" or the name of a test set -> number of its images.
    """
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for pair in found:
        if not pair["equal"] or pair["data_set"] == pair["other_data_set"]:
            groups[pair["data_set"], pair["other_data_set"]].append(pair)
    sentences = []
    for (name, other), pairs in groups.items():
        number, total = len(pairs), num_images[name]
        image, lookalike = (printable(pairs[0][key]) for key in ("image", "other"))
        if name == other:
            data = "training" if name == "train" else name
            look = "looks" if number == 1 else "look"
            sentences.append(
                f"{number} of {total} {data} images {look} like another of them, such as {image} "
                f"and {lookalike}"
            )
        else:
            look = "looks like a training image" if number == 1 else "look like training images"
            example = f"test image {image} and training image {lookalike}"
            sentences.append(_warn_of_shared(name, number, total, look, example))
    return sentences


def hash_images(paths: Sequence[str], reader: ImageReader) -> _Bits:
    """Return the difference hash of each image: (N, 256), 0 or 1; zeros if it cannot be read."""
    paths = list(map(os.path.abspath, paths))
    seen = FileCache("gradients", reader, *sorted(set(map(os.path.dirname, paths))))

    def hash_one(path: str) -> bytes:
        try:
            return bytes.fromhex(seen.get(path, "gradients", partial(_hash, path, reader)))
        except Exception:  # the check of the images says why
            return bytes(_SIDE * _SIDE // 8)

    with ThreadPoolExecutor() as pool:
        packed = b"".join(pool.map(hash_one, paths))
    seen.save()
    bits = np.unpackbits(np.frombuffer(packed, np.uint8)).reshape(-1, _SIDE * _SIDE)
    return bits.astype(np.float32)


def _hash(path: str, reader: ImageReader) -> str:
    with reader.open(path) as image:
        image.draft("L", (8 * _SIDE, 8 * _SIDE))  # of a JPEG, only what is needed is decoded
        grey = reader.to_8_bits(image).convert("L")
    cells = np.asarray(grey.resize((_SIDE + 1, _SIDE), Image.Resampling.BOX))
    return np.packbits(cells[:, 1:] > cells[:, :-1]).tobytes().hex()


def _find_nearest(
    hashes: _Bits, others: _Bits, *, earlier: bool
) -> tuple[npt.NDArray[np.int64], _Bits]:
    """Return the index of the nearest other hash and the distance, both (N,); 1 if there is none.

    If ``earlier``, the two are the same, and each one is compared only with those before it.
    """
    nearest = np.zeros(len(hashes), np.int64)
    distances = np.ones(len(hashes), np.float32)
    hashes, others = (
        h / np.maximum(np.linalg.norm(h, axis=1), 1)[:, None] for h in (hashes, others)
    )
    for start in range(0, len(hashes) if len(others) else 0, _BLOCK):
        block = slice(start, start + _BLOCK)
        if earlier:
            cosines = np.tril(hashes[block] @ others[: block.stop].T, start - 1)
        else:
            cosines = hashes[block] @ others.T
        nearest[block] = cosines.argmax(1)
        distances[block] = 1 - cosines.max(1)
    return nearest, distances
