"""Formats of boxes: telling which one a json has, and converting to COCO's.

A json does not say its format. Boxes of another one than COCO's are four finite numbers all the
same, and a detector learns them without a word; what tells them is that as they stand many leave
their images, and read otherwise none does.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

BOX_FORMATS = {
    "xywh": "[x, y, width, height]",
    "xyxy": "[x0, y0, x1, y1]",
    "cxcywh": "[center x, center y, width, height]",
    "relative_xywh": "[x, y, width, height] as fractions of the image",
    "relative_xyxy": "[x0, y0, x1, y1] as fractions of the image",
    "relative_cxcywh": "[center x, center y, width, height] as fractions of the image",
}
"""Value of ``DATASETS.CUSTOM.BOX_FORMAT`` to what its four numbers are."""

_MIN_BOXES = 2
"""Boxes that contradict a format at least: one may be a slip."""

_Array = npt.NDArray[np.float64]
_Mask = npt.NDArray[np.bool_]


def is_number(value: Any) -> bool:
    """Tell whether it is a finite number, and no bool."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def is_box(value: Any) -> bool:
    """Tell whether it is a list of four finite numbers."""
    if not isinstance(value, list) or len(value) != 4:
        return False
    # The first is the fast way: a sum of floats is finite only if they are.
    all_floats = set(map(type, value)) == {float} and math.isfinite(sum(value))
    return all_floats or all(map(is_number, value))


@dataclass(frozen=True)
class BoxTable:
    """Boxes of a json as they stand.

    Attributes:
        indices: (M,) place among the annotations
        numbers: (M, 4)
        sizes: (M, 2) width and height of the image in pixels
        areas: (M,) ``area`` of the annotation, NaN where there is none
    """

    indices: list[int]
    numbers: _Array
    sizes: _Array
    areas: _Array

    def to_corners(self, box_format: str) -> _Array:
        """Return (M, 4) XYXY in pixels, the boxes read as of a format."""
        first, second = self.numbers[:, :2], self.numbers[:, 2:]
        if box_format.endswith("cxcywh"):
            corners = np.hstack([first - second / 2, first + second / 2])
        elif box_format.endswith("xywh"):
            corners = np.hstack([first, first + second])
        else:
            corners = self.numbers
        return corners * np.tile(self.sizes, 2) if is_relative(box_format) else corners


def is_relative(box_format: str) -> bool:
    """Tell whether the numbers of a format are fractions of the image."""
    return box_format.startswith("relative_")


def from_corners(corners: list[float], box_format: str) -> list[float]:
    """Return [x0, y0, x1, y1] as a box of a format, in the unit that the corners have."""
    x0, y0, x1, y1 = corners
    if box_format.endswith("cxcywh"):
        return [(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0]
    return [x0, y0, x1 - x0, y1 - y0] if box_format.endswith("xywh") else corners


def find_format_fault(boxes: BoxTable, box_format: str, name: Callable[[int], str]) -> str | None:
    """Return why boxes cannot be of a format, and what mends it, where the boxes show it.

    Args:
        boxes: of one json
        box_format: the key's
        name: from a place among the annotations to how the annotation is called
    """
    if not boxes.indices:
        return None

    def example(mask: _Mask) -> str:
        row = int(mask.argmax())
        numbers = ", ".join(f"{number:.6g}" for number in boxes.numbers[row])
        return f"{name(boxes.indices[row])} has [{numbers}]"

    with np.errstate(over="ignore", invalid="ignore"):  # numbers near the largest float
        fractions = _are_fractions(boxes)
        fits = {other: _fits(boxes, other, fractions) for other in BOX_FORMATS}
        if found := _find_other_formats(boxes, box_format, fits, fractions):
            others, reason, rows = found
            return (
                f"{reason} ({example(rows)}); set DATASETS.CUSTOM.BOX_FORMAT "
                f"{' or '.join(others)}, or DATASETS.CHECK.OTHER_BOX_FORMAT keep if they are "
                f"{box_format}"
            )
        if two := _find_two_formats(boxes, box_format, fits, fractions):
            (one, one_rows), (other, other_rows) = two
            return (
                f"boxes are of two formats: {example(one_rows)} ({one}), {example(other_rows)} "
                f"({other}); convert one of them, or set DATASETS.CHECK.OTHER_BOX_FORMAT keep if "
                f"all are {box_format}"
            )
    return None


def _are_fractions(boxes: BoxTable) -> _Mask:
    """Tell which boxes are fractions of the image, as their numbers show without its size."""
    if (np.abs(boxes.numbers) <= 2).all():  # with some that reach far outside
        return np.ones(len(boxes.indices), bool)
    small = ((boxes.numbers >= -0.01) & (boxes.numbers <= 1.01)).all(1)
    fractions: _Mask = small & (boxes.numbers % 1 != 0).any(1)
    return fractions


def _fits(boxes: BoxTable, box_format: str, fractions: _Mask) -> _Mask:
    """Tell which boxes have a size and lie inside their images, read as of a format.

    Boxes drawn by hand reach outside by a little: a pixel, or a twentieth of their side.
    """
    corners = boxes.to_corners(box_format)
    sides = corners[:, 2:] - corners[:, :2]
    slack = np.maximum(1, sides / 20)
    inside = (corners[:, :2] >= -slack) & (corners[:, 2:] <= boxes.sizes + slack) & (sides > 0)
    fits: _Mask = inside.all(1)
    return fits if is_relative(box_format) else fits & ~fractions


def _find_other_formats(
    boxes: BoxTable, box_format: str, fits: dict[str, _Mask], fractions: _Mask
) -> tuple[list[str], str, _Mask] | None:
    """Return the formats that boxes have in truth, how that shows, and the boxes that show it."""
    total = len(boxes.indices)
    misfits = {other: total - int(mask.sum()) for other, mask in fits.items()}
    wrong = misfits[box_format]
    all_fractions = bool(fractions.all()) and not is_relative(box_format)
    if all_fractions or (wrong >= _MIN_BOXES and (10 * wrong >= total or wrong >= 20)):
        others = [
            other
            for other in BOX_FORMATS
            if (is_relative(other) if all_fractions else 10 * misfits[other] <= wrong)
        ]
        others = [other for other in others if misfits[other] == min(map(misfits.get, others))]
        if others and misfits[others[0]] < total:
            by_area = [other for other in others if _agree_with_area(boxes, other).mean() > 0.9]
            others = by_area or others
            rest = f"all but {misfits[others[0]]}" if misfits[others[0]] else "all"
            reason = (
                f"no number of {total} boxes is above {boxes.numbers.max():.3g}; they look like "
                "fractions of the image"
                if all_fractions
                else f"as {box_format} {wrong} of {total} boxes do not lie inside their images; "
                f"as {' or '.join(others)} {rest} do"
            )
            return others, reason, ~fits[box_format]

    with_area = ~np.isnan(boxes.areas)
    if with_area.sum() >= _MIN_BOXES:
        share = {
            other: _agree_with_area(boxes, other)[with_area].mean()
            for other in BOX_FORMATS
            if is_relative(other) == is_relative(box_format)
        }
        others = [o for o in share if share[o] >= 0.95 and 50 * misfits[o] <= total]
        if share[box_format] <= 0.05 and others:
            kind = " or ".join(others)
            return others, f"area is not that of {box_format}, but that of {kind}", with_area
    return None


def _agree_with_area(boxes: BoxTable, box_format: str) -> _Mask:
    """Tell which boxes, read as of a format, have the area that the json says."""
    corners = boxes.to_corners(box_format)
    sides = corners[:, 2:] - corners[:, :2]
    areas = [sides.prod(1), (sides + 1).prod(1)]  # some tools count both border pixels
    if is_relative(box_format):
        areas.append(sides.prod(1) / boxes.sizes.prod(1))
    near = [np.abs(boxes.areas - area) <= 0.01 * area for area in areas]
    agree: _Mask = np.any(near, axis=0) & (sides > 0).all(1)
    return agree


def _find_two_formats(
    boxes: BoxTable, box_format: str, fits: dict[str, _Mask], fractions: _Mask
) -> tuple[tuple[str, _Mask], tuple[str, _Mask]] | None:
    """Return two formats and which boxes have each, where one file has both."""
    pixels = (boxes.numbers > 2).any(1)
    fractions = fractions & np.any([fits[o] for o in BOX_FORMATS if is_relative(o)], axis=0)
    if pixels.any() and fractions.any():
        return ("pixels", pixels), ("fractions of the image", fractions)

    prefix = "relative_" if is_relative(box_format) else ""
    pair = f"{prefix}xywh", f"{prefix}xyxy"
    if box_format not in pair:
        return None
    one, other = box_format, pair[pair[0] == box_format]
    alone = {one: fits[one] & ~fits[other], other: fits[other] & ~fits[one]}
    enough = max(_MIN_BOXES, len(boxes.indices) / 10)
    clear = (fits[one] | fits[other]).mean() >= 0.9
    if alone[one].any() and alone[other].sum() >= enough and clear:
        return (one, alone[one]), (other, alone[other])
    with_area = ~np.isnan(boxes.areas)
    agree = {name: _agree_with_area(boxes, name) & fits[name] for name in (one, other)}
    if (agree[one] | agree[other])[with_area].all():
        alone = {one: agree[one] & ~agree[other], other: agree[other] & ~agree[one]}
        if alone[one].any() and alone[other].any():
            return (one, alone[one]), (other, alone[other])
    return None
