"""The page in Chromium: it fits narrow and wide windows, and its pictures and links are there."""

import math

import pytest

from browser import measure_page, needs_browser
from experiments.campaigns import add_run, make_campaign
from retinanet_ext.experiments.report import write_report
from retinanet_ext.experiments.tables import TABLES

pytestmark = needs_browser


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    campaign = make_campaign(tmp_path_factory.mktemp("report") / "small-0123abcd")
    for name in ("1b", "1e", "fig7", "dial"):
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
    found = measure_page(page, width, tmp_path)
    assert len(found["images"]) >= 8 and len(found["links"]) > 5
    assert found["title"].startswith("Focal loss, measured")
