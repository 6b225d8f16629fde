"""The page in Chromium: it fits narrow and wide windows, and its pictures and links are there."""

import html
import json
import math
import re
import shutil
import subprocess

import pytest

from experiments.campaigns import add_run, make_campaign
from retinanet_ext.experiments.report import write_report
from retinanet_ext.experiments.tables import TABLES

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
pytestmark = [
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


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    campaign = make_campaign(tmp_path_factory.mktemp("report") / "small-0123abcd")
    for name in ("1b", "1e", "fig7", "imbalance"):
        for index, row in enumerate(TABLES[name].rows[:7]):
            shared = {"losses": [2.0, 1.5, 1.2], "picture": (1500, 40)}
            if index == 1:
                message = f"<script>document.title = 'run'</script> {'x' * 300} loss_cls inf"
                add_run(campaign, name, row.name, 1, status="failed", message=message)
            elif index == 2:
                shared["losses"] = [2.0, 1e9, math.inf]
                add_run(campaign, name, row.name, 1, status="diverged", message="inf", **shared)
            elif index != 3:
                add_run(campaign, name, row.name, 1, 30 + index, **shared)
    return write_report(campaign)[2].read_text(encoding="utf-8")


@pytest.mark.parametrize("width", [360, 1600])
def test_page_in_a_window(page, width, tmp_path):
    """In a frame of that width, as Chromium's own windows are at least 500 pixels wide."""
    frame = f'<iframe id="frame" style="border: 0" width="{width}" height="800"'
    file = tmp_path / "frame.html"
    file.write_text(
        f"<!DOCTYPE html><script>addEventListener('load', () => {{{MEASURE}}})</script>"
        f'{frame} srcdoc="{html.escape(page)}"></iframe>',
        encoding="utf-8",
    )
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", file.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    found = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", dom, re.DOTALL)[1]))
    assert width - 20 < found["width"] <= width  # but for a scroll bar
    assert found["needed"] <= found["width"]
    assert len(found["images"]) >= 8 and all(found["images"])
    assert len(found["links"]) > 5 and all(found["links"])
    assert found["title"].startswith("Focal loss, measured") and found["scripts"] == 0
