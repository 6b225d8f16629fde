"""Every input of the table ends in one line, with nothing lost; its page says what was seen."""

import re
from collections import Counter

import pytest

from bad_inputs import PAGE, ROWS, VERSIONS, attempt, table_line

pytestmark = pytest.mark.usefixtures("restore_logging")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.area}: {row.given}")
def test_bad_input(row, tmp_path):
    line = attempt(row, tmp_path)
    said = table_line(row, line)
    # What libraries say may differ with their versions.
    columns = None if VERSIONS in PAGE.read_text() else 3
    expected = written[row.given].split(" | ")[:columns]
    assert said.split(" | ")[:columns] == expected, f"{PAGE}: run python tests/bad_inputs.py"


LINES = re.findall(r"^\| (?:data|config|checkpoint|environment) .*$", PAGE.read_text(), re.M)
written = {line.split(" | ")[1]: line for line in LINES}


def test_the_page_has_the_rows_of_the_table():
    assert list(written) == [row.given for row in ROWS], f"{PAGE}: run python tests/bad_inputs.py"
    assert f"\n{len(ROWS)} inputs" in PAGE.read_text()
    assert len(ROWS) >= 60
    assert min(Counter(row.area for row in ROWS).values()) >= 13
