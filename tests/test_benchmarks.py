"""The benchmarks' page agrees with the saved results."""

import json
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "benchmarks"


def test_the_page_is_made_from_the_results():
    program = "import summarize; print(summarize.summarize(), end='')"
    made = subprocess.run(
        [sys.executable, "-c", program], cwd=FOLDER, capture_output=True, text=True
    )
    assert made.stdout == (FOLDER / "README.md").read_text(encoding="utf-8"), made.stderr
    for path in FOLDER.glob("results/*.json"):  # only the newest per setting is kept
        content = json.loads(path.read_text())
        assert (
            f"{content['date']}, torch {content['torch']}, commit {content['commit']}"
            in made.stdout
        )
