"""Write benchmarks/README.md from the newest saved result of each benchmark and setting.

python benchmarks/summarize.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common import RESULTS
from tabulate import tabulate

README = Path(__file__).with_name("README.md")
HEAD = """# Benchmarks

Made by `python benchmarks/summarize.py` from the files in [results](results/), which `--save`
writes; every ratio is of one run, beside the baseline in the same process. Times in milliseconds,
median (quartiles). What each measures is said at its top: {files}.
"""
CUDA = """## On a CUDA device

All of it in one go, with the tests and trainings that need one, for at most eight minutes:

```bash
python benchmarks/device.py --data FOLDER
```

FOLDER holds `instances_train.json`, `instances_val.json` and `images`.
"""


def main() -> None:
    """Write the page."""
    README.write_text(summarize(), encoding="utf-8")
    print(f"Wrote {README}")


def summarize() -> str:
    """Return the page."""
    newest: dict[tuple[str, ...], dict[str, Any]] = {}
    for path in sorted(RESULTS.glob("*.json"), key=_age):
        content = json.loads(path.read_text(encoding="utf-8"))
        settings = content["settings"]
        kind = [str(settings.get(name, "")) for name in ("precision", "dtype", "threads", "height")]
        newest[(content["what"], content["hardware"], *kind)] = content
    scripts = sorted(path.name for path in README.parent.glob("bench_*.py"))
    head = HEAD.format(files=", ".join(f"[{name}]({name})" for name in scripts))
    sections = [_section(content) for _, content in sorted(newest.items())]
    return "\n".join([head, *sections, CUDA])


def _age(path: Path) -> tuple[str, int]:
    """Return date and number of a file; ``x_2026-01-31_2.json`` is newer than the one without 2."""
    date, _, number = path.stem.partition("_20")[2].partition("_")
    return date, int(number or 1)


def _section(content: dict[str, Any]) -> str:
    settings = content["settings"]
    said = ", ".join(f"{name} {value}" for name, value in settings.items() if name != "device")
    names = [name for name in content["rows"][0] if name != "curve"]
    table = tabulate(
        [[_cell(name, row[name]) for name in names] for row in content["rows"]],
        [_column(name) for name in names],
        tablefmt="github",
        disable_numparse=True,
    )
    return (
        f"## {content['what'].replace('_', ' ')}\n\n{content['hardware']}, {content['date']}, "
        f"torch {content['torch']}, commit {content['commit']}; {said}\n\n{table}\n"
    )


def _column(name: str) -> str:
    return {"peak_bytes": "peak MiB", "time": "ms", "name": "", "way": ""}.get(name, name)


def _cell(name: str, value: Any) -> str:
    if isinstance(value, dict):
        low, high = value["quartiles_s"]
        return f"{1e3 * value['median_s']:.4g} ({1e3 * low:.4g} to {1e3 * high:.4g})"
    if name == "peak_bytes":
        return f"{value / 2**20:.1f}"
    if isinstance(value, float):
        return f"{value:.3g}"
    return "–" if value is None else str(value)


if __name__ == "__main__":
    main()
