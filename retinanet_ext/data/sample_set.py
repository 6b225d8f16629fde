"""A small detection data set that the project draws itself, so that a first run needs no download.

Images show a few objects of five classes on textured backgrounds, among clutter of similar shapes,
sizes and colours. There are hundreds of background anchors per foreground anchor, the imbalance
that the focal loss addresses (section 3). The classes differ in shape and hue, so that a short
training can learn them.
"""

from __future__ import annotations

import colorsys
import hashlib
import json
import logging
import math
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from retinanet_ext.errors import InputError
from retinanet_ext.losses.registry import Interval

logger = logging.getLogger(__name__)

GENERATOR_VERSION = 1
"""To be raised with every change of the pictures, so that old and new ones never mix."""

MAX_OVERLAP = 0.2
"""Largest overlap of two objects, as a share of the smaller box."""

MIN_OBJECT_SIZE = 8
"""Pixels; smaller objects of different classes look the same."""

_Array = np.ndarray
_Outline = Callable[[_Array, _Array], _Array]


@dataclass(frozen=True)
class SampleSet:
    """Parameters of a sample set. Ranges are inclusive; lengths are in pixels.

    The keys of ``DATASETS.SAMPLE`` are these fields in capitals, with ranges ``[least, most]``.

    Attributes:
        num_train: number of training images, 1 to 100000.
        num_val: number of test images, 1 to 100000.
        image_size: side of the square images, 8 to 4096.
        num_objects: number of objects per image, 0 to 1000. Objects that find no free place are
            left out.
        object_size: diameter of an object, or of the circumscribed circle of a polygon, 8 to
            ``image_size``.
        num_clutter: number of distractors per image, 0 to 1000.
        empty_fraction: probability, in [0, 1), that an image has no object. Training leaves such
            images out unless ``DATALOADER.FILTER_EMPTY_ANNOTATIONS`` is False.
        seed: seed of the pictures; another seed gives other pictures of the same kind.
    """

    num_train: int = 160
    num_val: int = 40
    image_size: int = 256
    num_objects: tuple[int, int] = (1, 5)
    object_size: tuple[int, int] = (16, 44)
    num_clutter: tuple[int, int] = (6, 20)
    empty_fraction: float = 0.05
    seed: int = 0

    @property
    def folder_name(self) -> str:
        """Folder name that is unique to these parameters and this version of the generator."""
        content = json.dumps({"version": GENERATOR_VERSION, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:12]

    @classmethod
    def config_defaults(cls) -> dict[str, Any]:
        """Return the keys of ``DATASETS.SAMPLE`` with their defaults."""
        defaults = {field.name.upper(): field.default for field in fields(cls)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in defaults.items()}

    @classmethod
    def from_config(cls, node: Mapping[str, Any]) -> SampleSet:
        """Return the parameters that ``DATASETS.SAMPLE`` describes.

        Raises:
            InputError: a value is not allowed, or no image could have an object.
        """
        for key, allowed in {
            "NUM_TRAIN": "[1, 100000]",  # a larger set would fill a disk and take days to draw
            "NUM_VAL": "[1, 100000]",
            "IMAGE_SIZE": f"[{MIN_OBJECT_SIZE}, 4096]",
            "NUM_OBJECTS": "[0, 1000]",
            "OBJECT_SIZE": f"[{MIN_OBJECT_SIZE}, {node['IMAGE_SIZE']}]",
            "NUM_CLUTTER": "[0, 1000]",
            "EMPTY_FRACTION": "[0, 1)",
            "SEED": f"[0, {2**32 - 1}]",
        }.items():
            name, value = f"DATASETS.SAMPLE.{key}", node[key]
            if isinstance(value, list):
                whole = all(type(number) is int for number in value)
                if not whole or len(value) != 2 or value[0] > value[1]:
                    raise InputError(
                        f"{name} must be two whole numbers [least, most], got {value!r}"
                    )
            for number in value if isinstance(value, list) else [value]:
                Interval(allowed).check(name, number)
        if node["NUM_OBJECTS"][1] == 0:
            raise InputError("DATASETS.SAMPLE.NUM_OBJECTS is [0, 0], so there is nothing to learn")
        values = {k.lower(): tuple(v) if isinstance(v, list) else v for k, v in node.items()}
        return cls(**values)


# Outlines in units of the object's radius: about the signed distance to the edge, negative inside.


def _disc(u: _Array, v: _Array) -> _Array:
    return np.sqrt(u * u + v * v) - 1


def _ring(u: _Array, v: _Array) -> _Array:
    return np.abs(_disc(u, v) + 0.28) - 0.28


def _bar(u: _Array, v: _Array, thickness: float = 0.28) -> _Array:
    return np.maximum(np.abs(u) - 1, np.abs(v) - thickness)


def _square(u: _Array, v: _Array) -> _Array:
    return np.maximum(np.abs(u), np.abs(v)) - 0.75


def _triangle(u: _Array, v: _Array) -> _Array:
    return np.maximum(v, math.sqrt(0.75) * np.abs(u) - v / 2) - 0.5


def _cross(u: _Array, v: _Array) -> _Array:
    return np.minimum(_bar(u, v), _bar(v, u))


CLASSES: dict[str, _Outline] = {
    "disc": _disc,
    "ring": _ring,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
}

# Each resembles a class except for one feature.
_CLUTTER: tuple[_Outline, ...] = (
    _bar,
    lambda u, v: _bar(u, v, 0.05),
    lambda u, v: np.maximum(_disc(u, v), v),  # half disc
    lambda u, v: np.maximum(_ring(u, v), v),  # half ring
    lambda u, v: np.minimum(_bar(u, v - 0.72), _bar(v, u - 0.72)),  # corner
    lambda u, v: np.minimum(_bar(u, v - 0.72), _bar(v, u)),  # T
    lambda u, v: np.abs(_triangle(u, v) + 0.1) - 0.1,  # hollow triangle
    lambda u, v: np.abs(_square(u, v) + 0.12) - 0.12,  # hollow square
    lambda u, v: np.maximum(_square(u, v), 0.2 - np.abs(v * 3 - np.round(v * 3))),  # stripes
)


def export_sample_set(parameters: SampleSet, folder: Path) -> None:
    """Draw a sample set into a new or empty folder, for other detectors.

    Raises:
        InputError: the folder holds something or cannot be written, or no object was drawn.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty; name a new folder")
    try:
        _write(parameters, folder, needs_objects=True)
    except OSError as error:
        raise InputError(
            f"{folder}: the sample set cannot be written: {error.strerror or error}"
        ) from error


def make_sample_set(parameters: SampleSet, root: str | os.PathLike[str]) -> Path:
    """Draw a sample set unless it exists.

    The folder appears once it is complete, so several processes may call this at the same time:
    the first to finish wins, and the others use its result.

    Args:
        parameters: what to draw.
        root: folder in which the sample set gets a folder of its own.

    Returns:
        the folder, with ``train.json`` and ``val.json`` in COCO's format and the folders ``train``
        and ``val`` of their images.

    Raises:
        InputError: the folder cannot be written.
    """
    folder = Path(root) / parameters.folder_name
    if folder.is_dir():
        return folder
    num_images = parameters.num_train + parameters.num_val
    logger.info("Drawing the sample set, %d images, into %s", num_images, folder)
    try:
        _write(parameters, folder)
    except OSError as error:
        if not folder.is_dir():  # otherwise another process was faster
            raise InputError(
                f"{folder}: the sample set cannot be written: {error.strerror or error}; set the "
                "environment variable DETECTRON2_DATASETS to a folder that can be"
            ) from error
    return folder


def _write(parameters: SampleSet, folder: Path, *, needs_objects: bool = False) -> None:
    """Draw a sample set into a folder that appears once it is complete."""
    unfinished = folder.with_name(f"{folder.name}.unfinished-{uuid.uuid4().hex}")
    try:
        for split, num_images in (("train", parameters.num_train), ("val", parameters.num_val)):
            num_objects = _write_split(parameters, unfinished, split, num_images)
            if needs_objects and not num_objects:
                raise InputError(
                    f"none of the {num_images} {split} images has an object, because "
                    f"{parameters.empty_fraction:.0%} of images are empty at this ratio; draw more"
                )
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_split(parameters: SampleSet, folder: Path, split: str, num_images: int) -> int:
    """Draw the images of "train" or "val" and write their annotations; return how many objects."""
    (folder / split).mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id in range(1, num_images + 1):
        # The legacy generator, whose numbers are promised to be the same in every NumPy.
        rng = np.random.RandomState([parameters.seed, int(split == "val"), image_id])
        picture, objects = _draw(parameters, rng)
        file_name = f"{image_id:06d}.png"
        Image.fromarray(picture).save(folder / split / file_name, compress_level=1)
        size = {"width": picture.shape[1], "height": picture.shape[0]}
        images.append({"id": image_id, "file_name": file_name, **size, "license": 1})
        for one in objects:
            ids = {"id": len(annotations) + 1, "image_id": image_id}
            annotations.append({**ids, **one, "iscrowd": 0})
    url = "https://creativecommons.org/publicdomain/zero/1.0/"
    content = {
        "info": {
            "description": f"retinanet_ext sample set, {split}, drawn by a program",
            "version": str(GENERATOR_VERSION),
            "parameters": asdict(parameters),
        },
        "licenses": [{"id": 1, "name": "CC0 1.0", "url": url}],
        "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)],
        "images": images,
        "annotations": annotations,
    }
    (folder / f"{split}.json").write_text(json.dumps(content))
    return len(annotations)


def _draw(parameters: SampleSet, rng: np.random.RandomState) -> tuple[_Array, list[dict[str, Any]]]:
    """Draw one picture (H, W, 3) uint8 and its objects as COCO annotations without ids."""
    size = parameters.image_size
    canvas = _background(size, rng)
    # Drawn before the objects, so that their number changes nothing else in the picture.
    light = 1 + rng.uniform(-0.25, 0.25) * np.linspace(-1, 1, size, dtype=np.float32)
    noise = rng.randint(-8, 9, size=(size, size, 1), dtype=np.int8)
    for _ in range(_between(rng, parameters.num_clutter)):
        outline = _CLUTTER[rng.randint(len(_CLUTTER))]
        radius = _between(rng, parameters.object_size) * rng.uniform(0.3, 0.8)
        angle = rng.uniform(0, 2 * math.pi)
        mark = _render(outline, size, radius, rng.uniform(0, size, 2), angle)
        _paint(canvas, *mark, rng.random_sample(), rng)

    objects: list[dict[str, Any]] = []
    is_empty = rng.random_sample() < parameters.empty_fraction
    for _ in range(0 if is_empty else _between(rng, parameters.num_objects)):
        label = int(rng.randint(len(CLASSES)))
        outline = list(CLASSES.values())[label]
        radius = _between(rng, parameters.object_size) / 2
        angle = rng.uniform(-0.5, 0.5)
        for _ in range(20):
            center = rng.uniform(0.7 * radius, size - 0.7 * radius, 2)
            window, coverage = _render(outline, size, radius, center, angle)
            is_covered = coverage >= 0.5
            x, y, *sides = cv2.boundingRect(is_covered.astype(np.uint8))
            box = [x + window[1].start, y + window[0].start, *sides]
            if all(_overlap(box, other["bbox"]) <= MAX_OVERLAP for other in objects):
                _paint(canvas, window, coverage, label / len(CLASSES), rng)
                area = int(is_covered.sum())
                objects.append({"category_id": label + 1, "bbox": box, "area": area})
                break

    canvas *= light[:, None, None]
    canvas += noise
    return canvas.round(out=canvas).clip(0, 255, out=canvas).astype(np.uint8), objects


def _between(rng: np.random.RandomState, bounds: tuple[int, int]) -> int:
    return rng.randint(bounds[0], bounds[1] + 1)


def _background(size: int, rng: np.random.RandomState) -> _Array:
    """Draw clouds between two colours, coarse to fine, (H, W, 3) float."""
    clouds = np.zeros((size, size), np.float32)
    for num_cells, weight in ((4, 0.5), (12, 0.3), (48, 0.2)):
        cells = rng.random_sample((num_cells, num_cells)).astype(np.float32)
        position = np.linspace(0, num_cells - 1, size, dtype=np.float32)
        low = np.minimum(position.astype(int), num_cells - 2)
        fraction = (position - low)[:, None]
        for _ in range(2):  # rows, then columns
            cells = (cells[low] * (1 - fraction) + cells[low + 1] * fraction).T
        clouds += weight * cells
    dark, bright = rng.uniform(30, 225, (2, 3)).astype(np.float32)
    return dark + (bright - dark) * clouds[:, :, None]


def _render(
    outline: _Outline, size: int, radius: float, center: _Array, angle: float
) -> tuple[tuple[slice, slice], _Array]:
    """Turn an outline; return its window of the canvas and how much of each pixel it covers."""
    left, top = np.maximum(center - 1.5 * radius, 0).astype(int).tolist()
    right, bottom = np.minimum(center + 1.5 * radius + 1, size).astype(int).tolist()
    x = (np.arange(left, right) + 0.5 - center[0]) / radius
    y = ((np.arange(top, bottom) + 0.5 - center[1]) / radius)[:, None]
    cos, sin = math.cos(angle), math.sin(angle)
    distance = outline(cos * x + sin * y, cos * y - sin * x) * radius
    return (slice(top, bottom), slice(left, right)), np.clip(0.5 - distance, 0, 1)


def _paint(
    canvas: _Array,
    window: tuple[slice, slice],
    coverage: _Array,
    hue: float,
    rng: np.random.RandomState,
) -> None:
    """Paint in the one of three random tones of a hue that stands out most from what is there."""
    under = canvas[window]
    tones = [
        colorsys.hsv_to_rgb((hue + rng.uniform(-0.08, 0.08)) % 1, rng.uniform(0.5, 1), value)
        for value in rng.uniform(0.4, 1, 3)
    ]
    colors = 235 * np.array(tones)
    color = colors[np.abs(colors - under.mean((0, 1))).sum(1).argmax()]
    shade = 1 + rng.uniform(-0.3, 0.3) * np.linspace(-1, 1, coverage.shape[1])[None, :, None]
    under += coverage[:, :, None] * (color * shade - under)


def _overlap(a: list[int], b: list[int]) -> float:
    """Return the intersection of two [x, y, width, height] boxes over the smaller one's area."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0) / min(a[2] * a[3], b[2] * b[3])
