"""Tables and numbers in Markdown, and Markdown as one HTML page without other files or scripts."""

from __future__ import annotations

import base64
import html
import io
import math
import re
from collections.abc import Container, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote

from markdown_it import MarkdownIt
from PIL import Image, UnidentifiedImageError

PICTURE_WIDTH = 1200  # pixels, at most
NOTHING = "–"
"""What stands for a number that there is not."""

HEAD = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: auto; padding: 1rem; }
h1, h2, h3 { line-height: 1.25; text-wrap: balance; }
h1 { font-size: 1.7rem; }
h2 { margin-top: 3rem; border-bottom: 1px solid #8886; }
p, li, blockquote { max-width: 46rem; overflow-wrap: anywhere; }
blockquote { margin: 1rem 0; padding: 0 1rem; border-left: 4px solid #c98a00; }
p:has(> img) { max-width: none; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: 0.875rem; font-variant-numeric: tabular-nums; }
table { width: max-content; }
th, td { padding: 0.3rem 0.6rem; border-bottom: 1px solid #8886; text-align: left; }
th { vertical-align: bottom; max-width: 9rem; }
td { vertical-align: top; max-width: min(28rem, 50vw); overflow-wrap: break-word; }
img { max-width: 100%; background: #fff; }
p:has(> img + img) { display: flex; flex-wrap: wrap; align-items: start; gap: 0.75rem; }
p:has(> img + img) { max-width: none; }
p:has(> img + img) > img { width: 34rem; }
p:has(> img + img) > img[src*="svg+xml"] { width: auto; }
pre { overflow-x: auto; font-size: 0.875rem; line-height: 1.3; }
p > em { color: light-dark(#555, #aaa); }
@media (max-width: 40rem) {
  th, td { padding: 0.3rem; }
  p:has(> img[src*="jpeg"]:only-child) { overflow-x: auto; }
  p > img[src*="jpeg"]:only-child { max-width: 185%; }
}
</style>
"""


def render_page(markdown: str, folder: Path, *, title: str) -> str:
    """Return a report as a page; pictures are read from ``folder`` and embedded."""
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(markdown)
    for token, following in pairwise(tokens):
        if token.type == "heading_open":
            token.attrSet("id", anchor(following.content))
        for child in token.children or ():
            if child.type == "image":
                child.attrSet("src", _data_uri(folder / unquote(str(child.attrs["src"]))))
    body = parser.renderer.render(tokens, parser.options, {})
    body = body.replace("<table>", '<div class="scroll" tabindex="0"><table>')
    head = HEAD.replace("{title}", html.escape(title))
    return head + body.replace("</table>", "</table></div>")


def anchor(heading: str) -> str:
    """Return the id that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def escape(text: str) -> str:
    """Return text in one line, with the markup of Markdown and HTML escaped."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", text)


def markdown_table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Container[int] = ()
) -> str:
    """Return a table whose columns in ``numbers`` are right-aligned; cells may hold markup."""
    rule = ["---:" if column in numbers else "---" for column in range(len(head))]
    lines = (map(escape, head), rule, *rows)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def number(value: float | None, digits: int = 1) -> str:
    """Return a number with a fixed number of decimals; a dash for None and NaN."""
    return NOTHING if value is None or math.isnan(value) else f"{value:.{digits}f}"


def signed(value: float | None) -> str:
    """Return a difference with its sign, the minus typographic; a dash for None and NaN.

    What rounds to zero keeps its sign, so that an interval shows whether it leaves out 0.
    """
    if value is None or math.isnan(value):
        return NOTHING
    return f"{value + 0.0:+.1f}".replace("-", "−")  # -0.0 + 0.0 is 0.0


def interval(bounds: tuple[float, float] | None) -> str:
    """Return an interval of differences as "low to high"; a dash for None and NaN."""
    if bounds is None or math.isnan(bounds[0]):
        return NOTHING
    return " to ".join(map(signed, bounds))


def with_interval(value: float | None, bounds: tuple[float, float] | None) -> str:
    """Return a difference, followed by its interval in brackets if there is one."""
    text, around = signed(value), interval(bounds)
    return text if NOTHING in (text, around) else f"{text} ({around})"


def _data_uri(path: Path) -> str:
    """Return a picture as a data URI; an empty one if it cannot be read, to show its caption."""
    try:
        if path.suffix == ".svg":
            kind, content = "svg+xml", path.read_bytes()
        else:
            with Image.open(path) as image:
                picture = image.convert("RGB")
            picture.thumbnail((PICTURE_WIDTH, picture.height))
            buffer = io.BytesIO()
            picture.save(buffer, "JPEG", quality=82)
            kind, content = "jpeg", buffer.getvalue()
    except (UnidentifiedImageError, OSError):
        return "data:,"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
