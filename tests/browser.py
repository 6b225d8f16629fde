"""Pages in Chromium."""

import html
import json
import re
import shutil
import subprocess

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
needs_browser = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian's package chromium)"),
]
MEASURE = """
const page = frame.contentDocument, root = page.documentElement, links = [...page.links];
document.title = JSON.stringify({
  width: root.clientWidth, needed: root.scrollWidth, title: page.title,
  images: [...page.images].map(i => i.naturalWidth > 0 && i.getBoundingClientRect().width > 0),
  links: links.map(a => !!page.getElementById(decodeURIComponent(a.hash.slice(1)))),
  scripts: page.scripts.length})
"""


def measure_page(page, width, folder):
    """Return what a window of that width shows of a page, after checking that the page fits it.

    In a frame of that width, as Chromium's own windows are at least 500 pixels wide.
    """
    frame = f'<iframe id="frame" style="border: 0" width="{width}" height="800"'
    file = folder / "frame.html"
    file.write_text(
        f"<!DOCTYPE html><script>addEventListener('load', () => {{{MEASURE}}})</script>"
        f'{frame} srcdoc="{html.escape(page)}"></iframe>',
        encoding="utf-8",
    )
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={folder / 'profile'}", file.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    found = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", dom, re.DOTALL)[1]))
    assert width - 20 < found["width"] <= width  # but for a scroll bar
    assert found["needed"] <= found["width"]
    assert all(found["images"]) and all(found["links"]) and found["scripts"] == 0
    return found
