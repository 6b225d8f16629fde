"""What the figures of a report share: size, colours, style, and their rendering as SVG."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import matplotlib as mpl
from matplotlib.figure import Figure

from retinanet_ext.analysis.plots import encode_figure

WIDTH = 8.6  # inches
INK, GREY, PALE, BLUE, RED = "#222222", "#8a8a8a", "#c8c8c8", "#0072b2", "#d55e00"
PALETTE = (BLUE, RED, "#009e73", "#a8578f", "#c98a00", INK)
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "text.parse_math": False,
}


@dataclass(frozen=True)
class Drawing:
    """A figure.

    Attributes:
        name: of its file, without the suffix.
        caption: what it shows.
        is_detail: whether it belongs below the table; a question has one figure above.
    """

    name: str
    caption: str
    svg: bytes
    is_detail: bool = False


def render_svg(draw: Callable[[], Figure]) -> bytes:
    """Return what ``draw`` returns as SVG, in the style of the reports."""
    with mpl.rc_context(STYLE):
        return encode_figure(draw(), ".svg")
