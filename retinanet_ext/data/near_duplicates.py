"""Images that look alike, within a data set and between training and test data."""

from __future__ import annotations

import filecmp
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from retinanet_ext.data.coco_json import printable
from retinanet_ext.data.file_cache import FileCache
from retinanet_ext.data.images import ImageReader

MAX_DISTANCE = 1 / 8
"""Largest distance of images that look alike. On BCCD it lies between copies that were compressed,
scaled or shifted by 8 pixels (at most 0.11) and different images of one microscope (least 0.27)."""

_SIDE = 16  # brightness is compared on a grid of this many cells by as many
_BLOCK = 512  # images compared at a time

_Bits = npt.NDArray[np.float32]


def find_near_duplicates(
    train: Sequence[str], tests: Mapping[str, Sequence[str]], reader: ImageReader
) -> list[dict[str, Any]]:
    """Return images that look like another one, the test images among training images first.

    A difference hash of 256 bits says at which cells of a 16 x 16 grid an image becomes brighter to
    the right. The distance of two images is 1 minus the cosine of their hashes: 0 for equal ones,
    about 0.5 for unrelated ones, 1 for an image of a single brightness.

    Args:
        train: paths of the training images.
        tests: name of each test set -> paths of its images.
        reader: reads the images as training does.

    Returns:
        for each such image its ``image`` and ``data_set`` ("train" or the test set), the ``other``
        image that is nearest to it, which is a training image or an earlier image of the same set,
        with the ``other_data_set``, their ``distance``, and whether the files are ``equal``.
    """
    sets = {"train": train, **tests}
    hashes = dict(zip(sets, map(partial(hash_images, reader=reader), sets.values()), strict=True))
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

    Test images that equal a training image are left to
    :func:`~retinanet_ext.data.shared_files.describe_shared_files`.

    Args:
        found: of :func:`find_near_duplicates`.
        num_images: "train" or the name of a test set -> number of its images.
    """
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for pair in found:
        if pair["equal"] and pair["data_set"] != pair["other_data_set"]:
            continue
        groups.setdefault((pair["data_set"], pair["other_data_set"]), []).append(pair)
    sentences = []
    for (name, other), pairs in groups.items():
        image, lookalike = (printable(pairs[0][key]) for key in ("image", "other"))
        count = f"{len(pairs)} of {num_images[name]}"
        is_one = len(pairs) == 1
        if name == other:
            data = "training" if name == "train" else name
            look = "looks" if is_one else "look"
            sentences.append(
                f"{count} {data} images {look} like another of them, such as {image} and "
                f"{lookalike}"
            )
        else:
            look = "looks like a training image" if is_one else "look like training images"
            sentences.append(
                f"{name}: {count} test images {look}, such as test image {image} and training "
                f"image {lookalike}; AP on {'it' if is_one else 'them'} says little about new "
                "images"
            )
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
    """Return the index of the nearest other hash and the distance; 1 if there is none.

    Args:
        hashes, others: (N, 256) and (M, 256).
        earlier: the two are the same, and only those before each one are compared.
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
