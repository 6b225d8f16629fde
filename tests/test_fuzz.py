"""Random configs, annotations and checkpoints, a few of each; ``tests/fuzz.py`` tries thousands."""

import pytest

from fuzz import KINDS_OF_CASES, bench

pytestmark = pytest.mark.usefixtures("restore_logging")


@pytest.mark.parametrize("kind", KINDS_OF_CASES)
def test_used_or_refused_in_one_line(kind):
    fuzz, share = KINDS_OF_CASES[kind]
    cases = round(300 * share)
    with bench() as here:
        fuzz(here, cases)
    assert here.ends.total() >= cases
    assert here.ends["refused"] > cases / 10
    assert here.ends["used"] > 0
