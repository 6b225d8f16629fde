"""Fonts for class names of any script, among those installed on this machine."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from matplotlib.font_manager import findSystemFonts, fontManager
from matplotlib.ft2font import FT2Font

from retinanet_ext.data.coco_json import join_some, printable

DEFAULT_FAMILY = "DejaVu Sans"
"""Comes with matplotlib and has Latin, Greek, Cyrillic and more."""

logger = logging.getLogger(__name__)


def choose_fonts(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return how to write class names, and the font families to draw them with.

    matplotlib takes each glyph from the first family that has it.

    Where no installed font has a character of a name, the name is replaced by the class's number
    ("class 2"), and a warning says which package to install.
    """
    names = [printable(name) for name in names]
    missing = {ord(character) for name in names for character in name}
    families = [DEFAULT_FAMILY]
    missing -= FT2Font(fontManager.findfont(DEFAULT_FAMILY)).get_charmap().keys()
    for file in sorted(findSystemFonts(), key=_rank) if missing else []:
        try:
            font = FT2Font(file)
            found = missing & font.get_charmap().keys()
            if found:
                # matplotlib's list of fonts may be older than this font.
                fontManager.addfont(file)
                families.append(font.family_name)
                missing -= found
        except (OSError, RuntimeError, ValueError):  # damaged, or bitmaps such as coloured emoji
            continue
    unwritable = [index for index, name in enumerate(names) if missing & set(map(ord, name))]
    if unwritable:
        logger.warning(
            "No installed font has all characters of %s, so the picture shows numbers instead; "
            "install one that does, for Chinese, Japanese and Korean the package fonts-noto-cjk "
            "(Debian, Ubuntu) or google-noto-sans-cjk-fonts (Fedora)",
            join_some((f"{names[index]} (class {index})" for index in unwritable), 3),
        )
    for index in unwritable:
        names[index] = f"class {index}"
    return names, families


def _rank(file: str) -> tuple[bool, bool, str]:
    """Sort regular fonts first, those without serifs before the others."""
    return "Regular" not in file, "Serif" in file, file
