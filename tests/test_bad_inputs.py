"""Every input of the table ends in one line, with nothing lost; its page says what was seen."""

import re
from collections import Counter

import pytest

from bad_inputs import PAGE, ROWS, attempt, table_line

pytestmark = pytest.mark.usefixtures("restore_logging")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.area}: {row.given}")
def test_bad_input(row, tmp_path):
    line = attempt(row, tmp_path)
    said = table_line(row, line)
    # The rest may differ with the versions of libraries.
    assert said.split(" | ")[:3] == written[row.given].split(" | ")[:3], f"{PAGE} is out of date"
    assert row.expected[:100] in line


LINES = re.findall(r"^\| (?:data|config|checkpoint|environment) .*$", PAGE.read_text(), re.M)
written = {line.split(" | ")[1]: line for line in LINES}


def test_the_page_has_the_rows_of_the_table():
    assert list(written) == [row.given for row in ROWS], f"{PAGE}: run python tests/bad_inputs.py"
    assert f"\n{len(ROWS)} inputs" in PAGE.read_text()
    assert len(ROWS) >= 60
    assert min(Counter(row.area for row in ROWS).values()) >= 15
