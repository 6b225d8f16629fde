"""Box formats: the conversion to COCO's format, and the detection of a format that is not set.

A json does not name its box format. Boxes of another format than COCO's are four finite numbers
too, so a detector would be trained on them without an error. They are detected because many of them
leave their images, while none does if they are read in their true format.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torchvision.ops import box_convert

from retinanet_ext.errors import InputError

BOX_FORMATS = {
    "xywh": "[x, y, width, height]",
    "xyxy": "[x0, y0, x1, y1]",
    "cxcywh": "[center x, center y, width, height]",
    "relative_xywh": "[x, y, width, height] as fractions of the image",
    "relative_xyxy": "[x0, y0, x1, y1] as fractions of the image",
    "relative_cxcywh": "[center x, center y, width, height] as fractions of the image",
}
"""Value of ``DATASETS.CUSTOM.BOX_FORMAT`` -> what the four numbers are."""

_MIN_BOXES = 2
"""Fewest boxes that contradict a format; a single one may be a slip."""

_Array = npt.NDArray[np.float64]
_Mask = npt.NDArray[np.bool_]


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number; a bool is none."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def is_box(value: Any) -> bool:
    """Return whether a value is a list of four finite numbers."""
    if not isinstance(value, list) or len(value) != 4:
        return False
    # The usual case, decided fast: a sum of floats is only finite if all of them are.
    all_floats = set(map(type, value)) == {float} and math.isfinite(sum(value))
    return all_floats or all(map(is_number, value))


def format_box(box: Sequence[float]) -> str:
    """Return a box as text, to three decimals, because a converted number may have many."""
    return str([round(number, 3) for number in box])


@dataclass(frozen=True)
class BoxTable:
    """Boxes of a json, before they are converted.

    Attributes:
        indices: (M,) indices in the list of annotations.
        numbers: (M, 4) the numbers of ``bbox``.
        sizes: (M, 2) width and height of the image in pixels.
        areas: (M,) ``area`` of the annotation; NaN if it has none.
    """

    indices: list[int]
    numbers: _Array
    sizes: _Array
    areas: _Array

    def to_corners(self, box_format: str) -> _Array:
        """Return the boxes, read in a format, as XYXY in pixels: (M, 4)."""
        kind = box_format.removeprefix("relative_")
        corners: _Array = box_convert(torch.from_numpy(self.numbers), kind, "xyxy").numpy()
        return corners * np.tile(self.sizes, 2) if is_relative(box_format) else corners


def check_box_format_name(box_format: str) -> None:
    """Refuse a name that is not in :data:`BOX_FORMATS`, by an InputError."""
    if box_format not in BOX_FORMATS:
        known = ", ".join(map(repr, BOX_FORMATS))
        raise InputError(f"DATASETS.CUSTOM.BOX_FORMAT {box_format!r} is unknown; known: {known}")


def is_relative(box_format: str) -> bool:
    """Return whether the numbers of a format are fractions of the image's width and height."""
    return box_format.startswith("relative_")


def from_corners(corners: list[float], box_format: str) -> list[float]:
    """Return [x0, y0, x1, y1] in a format, in the unit of the corners."""
    x0, y0, x1, y1 = corners
    if box_format.endswith("cxcywh"):
        return [(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0]
    return [x0, y0, x1 - x0, y1 - y0] if box_format.endswith("xywh") else corners


def find_format_fault(boxes: BoxTable, box_format: str, name: Callable[[int], str]) -> str | None:
    """Return why the boxes of a json cannot have the configured format, and the remedy, or None.

    ``name`` returns the name of the annotation at an index.
    """
    if not boxes.indices:
        return None

    def example(mask: _Mask) -> str:
        row = int(mask.argmax())
        numbers = ", ".join(f"{number:.6g}" for number in boxes.numbers[row])
        return f"{name(boxes.indices[row])} has [{numbers}]"

    with np.errstate(over="ignore", invalid="ignore"):  # numbers near the largest float
        evidence = _Evidence(boxes, box_format)
        found = evidence.by_place() or evidence.by_area()
        two = None if found else evidence.two_formats()
    if found:
        others, reason, rows = found
        return (
            f"{reason} ({example(rows)}); set DATASETS.CUSTOM.BOX_FORMAT {' or '.join(others)}, or "
            f"DATASETS.CHECK.OTHER_BOX_FORMAT keep if they are {box_format}"
        )
    if two:
        examples = ", ".join(f"{example(rows)} ({one})" for one, rows in two.items())
        return (
            f"boxes are of two formats: {examples}; convert one of them, or set "
            f"DATASETS.CHECK.OTHER_BOX_FORMAT keep if all are {box_format}"
        )
    return None


def explain_other_format(boxes: BoxTable, box_format: str) -> str | None:
    """Return why boxes cannot have a format, by their place in the images; None if they can."""
    if not boxes.indices:
        return None
    with np.errstate(over="ignore", invalid="ignore"):  # numbers near the largest float
        found = _Evidence(boxes, box_format).by_place()
    return found and found[1]


_Found = tuple[list[str], str, _Mask] | None
"""The formats that boxes have in truth, the reason, and the boxes that show it: (M,)."""


class _Evidence:
    """What the boxes of a json say about their format.

    Attributes:
        fractions: which boxes look like fractions of the image, by their numbers alone: (M,).
        fits: format -> which boxes, read in it, have a size and lie inside their images: (M,).
    """

    def __init__(self, boxes: BoxTable, box_format: str) -> None:
        self.boxes, self.box_format = boxes, box_format
        small = ((boxes.numbers >= -0.01) & (boxes.numbers <= 1.01)).all(1)
        self.fractions = small & (boxes.numbers % 1 != 0).any(1)
        if (np.abs(boxes.numbers) <= 2).all():  # with some that reach far outside
            self.fractions = np.ones(len(boxes.indices), bool)
        self.fits = {other: self._fit(other) for other in BOX_FORMATS}

    def _fit(self, box_format: str) -> _Mask:
        """Boxes drawn by hand may reach outside by a pixel or a twentieth of their side."""
        low, high = np.hsplit(self.boxes.to_corners(box_format), 2)
        slack = np.maximum(1, (high - low) / 20)
        inside = (low >= -slack) & (high <= self.boxes.sizes + slack) & (high > low)
        fits: _Mask = inside.all(1)
        return fits if is_relative(box_format) else fits & ~self.fractions

    def _agree_with_area(self, box_format: str) -> _Mask:
        """Return which boxes, read in a format, have the area that the json gives: (M,)."""
        low, high = np.hsplit(self.boxes.to_corners(box_format), 2)
        sides = high - low
        areas = [sides.prod(1), (sides + 1).prod(1)]  # some tools count both border pixels
        if is_relative(box_format):
            areas.append(sides.prod(1) / self.boxes.sizes.prod(1))
        near = [np.abs(self.boxes.areas - area) <= 0.01 * area for area in areas]
        agree: _Mask = np.any(near, axis=0) & (sides > 0).all(1)
        return agree

    def by_place(self) -> _Found:
        """Return the formats in which more boxes lie inside their images."""
        total = len(self.boxes.indices)
        misfits = {other: total - int(mask.sum()) for other, mask in self.fits.items()}
        wrong = misfits[self.box_format]
        all_fractions = self.fractions.all() and not is_relative(self.box_format)
        if all_fractions:
            others = [other for other in BOX_FORMATS if is_relative(other)]
        elif wrong >= _MIN_BOXES and (10 * wrong >= total or wrong >= 20):
            others = [other for other in BOX_FORMATS if 10 * misfits[other] <= wrong]
        else:
            return None
        least = min((misfits[other] for other in others), default=total)
        if least == total:
            return None
        others = [other for other in others if misfits[other] == least]
        others = [o for o in others if self._agree_with_area(o).mean() > 0.9] or others
        if all_fractions:
            reason = (
                f"no number of {total} boxes is above {self.boxes.numbers.max():.3g}; they look "
                "like fractions of the image"
            )
        else:
            reason = (
                f"as {self.box_format} {wrong} of {total} boxes do not lie inside their images; as "
                f"{' or '.join(others)} {f'all but {least}' if least else 'all'} do"
            )
        return others, reason, ~self.fits[self.box_format]

    def by_area(self) -> _Found:
        """Return the formats whose areas are those that the json gives."""
        with_area = ~np.isnan(self.boxes.areas)
        if with_area.sum() < _MIN_BOXES:
            return None
        share = {
            other: self._agree_with_area(other)[with_area].mean()
            for other in BOX_FORMATS
            if is_relative(other) == is_relative(self.box_format)
        }
        others = [o for o in share if share[o] >= 0.95 and self.fits[o].mean() >= 0.98]
        if share[self.box_format] > 0.05 or not others:
            return None
        reason = f"area is not that of {self.box_format}, but that of {' or '.join(others)}"
        return others, reason, with_area

    def two_formats(self) -> dict[str, _Mask] | None:
        """Return two formats and the boxes of each, if one file has both."""
        fits = self.fits
        pixels = (self.boxes.numbers > 2).any(1)
        fractions = self.fractions & np.any([fits[o] for o in fits if is_relative(o)], axis=0)
        if pixels.any() and fractions.any():
            return {"pixels": pixels, "fractions of the image": fractions}

        prefix = "relative_" if is_relative(self.box_format) else ""
        pair = f"{prefix}xywh", f"{prefix}xyxy"
        if self.box_format not in pair:
            return None
        one, other = self.box_format, pair[pair[0] == self.box_format]
        alone = {one: fits[one] & ~fits[other], other: fits[other] & ~fits[one]}
        enough = max(_MIN_BOXES, len(self.boxes.indices) / 10)
        clear = (fits[one] | fits[other]).mean() >= 0.9
        if alone[one].any() and alone[other].sum() >= enough and clear:
            return alone
        agree = {name: self._agree_with_area(name) & fits[name] for name in (one, other)}
        if (agree[one] | agree[other])[~np.isnan(self.boxes.areas)].all():
            alone = {one: agree[one] & ~agree[other], other: agree[other] & ~agree[one]}
            return alone if alone[one].any() and alone[other].any() else None
        return None
