"""The page in Chromium: it fits narrow and wide windows, and asks for nothing outside itself."""

import math

import pytest

from experiments.browser import find_chromium, open_browser
from experiments.campaigns import add_run, make_campaign
from retinanet_ext.experiments.report import write_report
from retinanet_ext.experiments.tables import TABLES

pytestmark = pytest.mark.browser

WINDOWS = [(360, 800), (1600, 1000)]


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
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
    return write_report(campaign)[2]


@pytest.fixture(scope="module")
def browser():
    program = find_chromium()
    if program is None:
        pytest.skip("needs Chromium (Debian's package chromium)")
    with open_browser(program) as page:
        yield page


@pytest.mark.parametrize(("width", "height"), WINDOWS)
@pytest.mark.parametrize("dark", [False, True])
def test_page_fits_the_window(browser, page_file, width, height, dark):
    browser.open(page_file, width, height, dark=dark)
    scroll, client = browser.evaluate(
        "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert client > width - 20  # but for a scroll bar
    assert scroll <= client
    sizes = browser.evaluate(
        "[...document.querySelectorAll('img')].filter(e => e.checkVisibility())"
        ".map(e => e.getBoundingClientRect()).map(box => [box.width, box.height])"
    )
    assert len(sizes) >= 8
    assert all(w > 0 and h > 0 for w, h in sizes)
    assert browser.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")


@pytest.mark.parametrize(("width", "height"), WINDOWS)
def test_page_is_quiet_and_needs_nothing(browser, page_file, width, height):
    browser.open(page_file, width, height)
    assert browser.evaluate("document.title").startswith("Focal loss, measured")
    assert browser.evaluate("document.scripts.length") == 0
    assert browser.happened("Runtime.exceptionThrown") == []
    assert browser.happened("Runtime.consoleAPICalled") == []
    assert browser.happened("Log.entryAdded") == []
    urls = [event["request"]["url"] for event in browser.happened("Network.requestWillBeSent")]
    assert urls[0] == page_file.as_uri()
    assert all(url.startswith("data:") for url in urls[1:])


def test_every_entry_of_the_contents_leads_somewhere(browser, page_file):
    browser.open(page_file, 1600, 1000)
    found = browser.evaluate(
        "[...document.links].map(a => decodeURIComponent(a.hash.slice(1)))"
        ".map(id => !!document.getElementById(id))"
    )
    assert len(found) > 5 and all(found)
