"""Fonts for class names in any script, found on this machine."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from matplotlib import get_data_path
from matplotlib.font_manager import findSystemFonts
from matplotlib.ft2font import FT2Font
from PIL import ImageFont

from retinanet_ext.data.coco_json import join_some, printable

DEFAULT_FONT = str(Path(get_data_path(), "fonts/ttf/DejaVuSans.ttf"))
"""Comes with matplotlib; Latin, Greek, Cyrillic and more."""

SCORE = "0123456789. "
"""Characters that are written beside a name."""

logger = logging.getLogger(__name__)


class Label(NamedTuple):
    """How a class is named in a picture.

    Attributes:
        text: beside a box.
        legend: in the legend.
        font: file of a font that has all characters of both.
    """

    text: str
    legend: str
    font: str


def label_classes(names: Sequence[str]) -> list[Label]:
    """Return how to write each name: as it is where an installed font has all its characters.

    Other names are numbered ("class 2") and written with escapes (``\\u4e2d``) in the legend, and a
    warning says which font to install.
    """
    names = [printable(name) for name in names]
    fonts = _find_fonts(names)
    labels = []
    for index, name in enumerate(names):
        if name in fonts:
            labels.append(Label(name, name, fonts[name]))
        else:
            number = f"class {index}"
            labels.append(Label(number, f"{number}: {escape(name)}", DEFAULT_FONT))
    if missing := [name for name in names if name not in fonts]:
        logger.warning(
            "No installed font has the characters of %s, so the picture numbers such classes; "
            "install one that has, for Chinese, Japanese and Korean the package fonts-noto-cjk "
            "(Debian, Ubuntu) or google-noto-sans-cjk-fonts (Fedora)",
            join_some(missing, 3),
        )
    return labels


def escape(text: str) -> str:
    """Return a text with escapes in place of the characters that the default font lacks."""
    known = _characters(DEFAULT_FONT)
    return "".join(
        c if ord(c) in known else c.encode("ascii", "backslashreplace").decode()
        for c in printable(text)
    )


@cache
def load_font(file: str, size: int) -> ImageFont.FreeTypeFont:
    """Return a font of that height in pixels."""
    return ImageFont.truetype(file, size)


def _find_fonts(texts: Sequence[str]) -> dict[str, str]:
    """Return text -> file of the first font that has all its characters, where there is one."""
    found: dict[str, str] = {}
    missing = set(texts)
    for file in [DEFAULT_FONT, *_system_fonts()]:
        if not missing:
            break
        characters = _characters(file)
        covered = {text for text in missing if characters.issuperset(map(ord, text + SCORE))}
        found.update(dict.fromkeys(covered, file))
        missing -= covered
    return found


def _system_fonts() -> list[str]:
    """Return the files of installed fonts, regular ones without serifs first."""

    def rank(file: str) -> tuple[bool, bool, str]:
        return "Regular" not in file, "Serif" in file, file

    return sorted(findSystemFonts(), key=rank)


def _characters(file: str) -> frozenset[int]:
    """Return the code points that a font has; none if it cannot be used at any size."""
    try:
        load_font(file, 12)  # refuses fonts of bitmaps, such as those of coloured emoji
        return frozenset(FT2Font(file).get_charmap())
    except (OSError, RuntimeError, ValueError):
        return frozenset()
