"""The report as one HTML page that needs no other file and no script."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image, UnidentifiedImageError

from retinanet_ext.experiments import results as words
from retinanet_ext.experiments.figures import Drawing
from retinanet_ext.experiments.results import (
    Results,
    TableResult,
    Verdict,
    duration,
    mean,
    number,
    signed,
    spread,
)

PICTURE_WIDTH = 1200  # pixels, at most
STRIP_WIDTH, STRIP_HEIGHT = 150, 18
MAX_DIFFERENCE = 10.0  # points of AP; a claim's mark beyond it is an arrow at the edge

CLASSES = {
    words.HOLDS: "holds",
    words.FAILS: "fails",
    words.NOISE: "noise",
    words.ONE_SEED: "one-seed",
    words.UNMEASURED: "unmeasured",
}
SIGNS = {
    words.HOLDS: "✓",
    words.FAILS: "✗",
    words.NOISE: "≈",
    words.ONE_SEED: "○",
    words.UNMEASURED: "·",
}


def render_page(results: Results, figures: Mapping[str, Sequence[Drawing]]) -> str:
    """Return the page; every text from outside is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    limit = difference_limit(verdict for _, verdict in results.verdicts)
    pictures = [(caption, _jpeg(path)) for caption, path in results.pictures]
    return environment.get_template("page.html").render(
        results=results,
        drawings={
            name: [(drawing, Markup(drawing.inline)) for drawing in drawings]
            for name, drawings in figures.items()
        },
        pictures=[(caption, data) for caption, data in pictures if data],
        loss_cdfs=[(cdf, _data_uri("svg+xml", cdf.svg)) for cdf in results.loss_cdfs],
        rule=words.RULE,
        classes=CLASSES,
        signs=SIGNS,
        limit=limit,
        forest=lambda verdict: forest(verdict, limit),
        strip=strip,
        strip_range=strip_range,
        class_names=class_names,
        mean=mean,
        number=number,
        signed=signed,
        duration=duration,
    )


def strip_range(table: TableResult) -> tuple[float, float]:
    """Return round numbers around the APs of a table's runs, the ends of its strips."""
    values = [value for row in table.rows for value in row.values("AP")] or [0.0]
    low, high = min(values), max(values)
    step = 10 ** math.floor(math.log10(max(high - low, 1)))
    low, high = step * math.floor(low / step), step * math.ceil(high / step)
    return low, high if high > low else low + step


def strip(values: Sequence[float], low: float, high: float) -> Markup:
    """Return a drawing of APs between two ends: a dot for each seed, a tick for the mean."""

    def x(value: float) -> float:
        return 4 + (STRIP_WIDTH - 8) * (value - low) / (high - low)

    middle = STRIP_HEIGHT / 2
    parts = [_line("track", 0, middle, STRIP_WIDTH, middle)]
    average = mean(values)
    if average is not None:
        if (sd := spread(values)) is not None:
            ends = (max(x(average - sd), 0), min(x(average + sd), STRIP_WIDTH))
            parts.append(_line("spread", ends[0], middle, ends[1], middle))
        parts.append(_line("mean", x(average), 2, x(average), STRIP_HEIGHT - 2))
        parts += [
            Markup('<circle cx="{:.1f}" cy="{:.1f}" r="2.6"/>').format(x(value), middle)
            for value in values
        ]
    label = f"AP of each seed: {', '.join(map(number, values)) or 'none'}"
    return _small_svg("strip", label, parts)


def difference_limit(verdicts: Sequence[Verdict]) -> float:
    """Return where the axis of the claims' differences ends, in points of AP."""
    reach = [
        abs(verdict.difference) + 2 * (verdict.error or 0)
        for verdict in verdicts
        if verdict.difference is not None
    ]
    return min(float(math.ceil(max(reach, default=1)) or 1), MAX_DIFFERENCE)


def forest(verdict: Verdict, limit: float) -> Markup:
    """Return a drawing of a claim's difference with twice its standard error, 0 in the middle."""
    if verdict.difference is None:
        return Markup()

    def x(value: float) -> float:
        return STRIP_WIDTH / 2 * (1 + max(-1.0, min(1.0, value / limit)) * 0.94)

    middle = STRIP_HEIGHT / 2
    parts = [
        _line("track", 0, middle, STRIP_WIDTH, middle),
        _line("zero", STRIP_WIDTH / 2, 0, STRIP_WIDTH / 2, STRIP_HEIGHT),
    ]
    at = x(verdict.difference)
    if verdict.error is not None:
        low, high = (x(verdict.difference + sign * 2 * verdict.error) for sign in (-1, 1))
        parts.append(_line("spread", low, middle, high, middle))
    if abs(verdict.difference) > limit:
        tip = math.copysign(5, verdict.difference)
        arrow = '<path d="M{:.1f} {:.1f}l{:.1f} 4l{:.1f} 4z"/>'
        parts.append(Markup(arrow).format(at, middle - 4, tip, -tip))
    else:
        parts.append(Markup('<circle cx="{:.1f}" cy="{:.1f}" r="3"/>').format(at, middle))
    return _small_svg(f"strip {CLASSES[verdict.word]}", f"difference {verdict.measured} AP", parts)


def class_names(table: TableResult) -> list[str]:
    """Return the classes whose AP any run of the table gives, in alphabetical order."""
    return sorted(
        {
            name.removeprefix("AP-")
            for row in table.rows
            for run in row.finished
            for name in run.metrics
            if name.startswith("AP-")
        }
    )


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    text = '<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>'
    return Markup(text).format(kind, x1, y1, x2, y2)


def _small_svg(kind: str, label: str, parts: Sequence[Markup]) -> Markup:
    head = '<svg class="{}" viewBox="0 0 {} {}" width="{}" height="{}" role="img" aria-label="{}">'
    size = (STRIP_WIDTH, STRIP_HEIGHT)
    return Markup(head).format(kind, *size, *size, label) + Markup().join(parts) + Markup("</svg>")


def _jpeg(path: Path) -> str:
    """Return a picture as a data URI, no wider than a page needs; empty if it cannot be read."""
    try:
        with Image.open(path) as image:
            picture = image.convert("RGB")
    except (UnidentifiedImageError, OSError):
        return ""
    if picture.width > PICTURE_WIDTH:
        height = max(1, round(picture.height * PICTURE_WIDTH / picture.width))
        picture = picture.resize((PICTURE_WIDTH, height), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=82, optimize=True)
    return _data_uri("jpeg", buffer.getvalue())


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
