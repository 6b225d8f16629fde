"""Train the rows of recipe.yaml, several side by side, and print AP by row over seeds.

    python benchmarks/recipe.py --data bccd=FOLDER [--rows NAME ...] [--seeds 1 2 3] [--jobs 2]
        [--set KEY VALUE ...]

FOLDER holds ``instances_{train,val}.json`` and ``images``. Each row is a training by
``train_net.py`` in ``--out``; rows that are finished are not run again. ``recipe.json`` there is
rewritten after each run. ``--minutes`` ends all that runs at that time; ``--set`` is for all rows,
such as ``SOLVER.AMP.ENABLED True SOLVER.AMP.PRECISION bfloat16`` on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from common import custom_data

ROOT = Path(__file__).parents[1]
TABLES = Path(__file__).with_suffix(".yaml")


def command(
    table: dict[str, Any], row: str, seed: int, args: argparse.Namespace, data: str, output: Path
) -> list[str]:
    """Return the training of one row and seed."""
    values = {**table.get("base", {}), **table["rows"][row], "SEED": seed, "OUTPUT_DIR": output}
    config = values.pop("config", table.get("config"))
    if data:
        values.update(custom_data(data))
    pairs = [str(part) for pair in values.items() for part in pair]
    pairs = [args.weights if part == "{weights}" else part for part in pairs]
    return [sys.executable, "train_net.py", "--config-file", config, *pairs, *args.set]


def read_run(output: Path) -> dict[str, Any]:
    """Return the metrics of a finished run, its AP by iteration and its minutes; empty if none."""
    if not (output / "model_final.pth").is_file():
        return {}
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    evaluated = [line for line in lines if "bbox/AP" in line]
    if not evaluated:
        return {}
    seconds = [line["time"] for line in lines if "time" in line]
    last = evaluated[-1]
    return {
        "metrics": {k.removeprefix("bbox/"): v for k, v in last.items() if k.startswith("bbox/")},
        "curve": [[line["iteration"] + 1, round(line["bbox/AP"], 2)] for line in evaluated],
        "seconds_per_iteration": round(statistics.median(seconds), 4) if seconds else None,
    }


def run_all(jobs: list[tuple[str, str, int]], args: argparse.Namespace) -> dict[str, Any]:
    """Run the jobs, at most ``--jobs`` at a time, and return the results by name."""
    tables, data = yaml.safe_load(TABLES.read_text()), dict(pair.split("=") for pair in args.data)
    end = time.monotonic() + 60 * args.minutes
    waiting, running, results = list(jobs), {}, {}
    threads = str(max(1, (os.cpu_count() or 1) // args.jobs))
    environment = {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "passive", **os.environ}
    while waiting or running:
        for name, (process, output) in list(running.items()):
            if process.poll() is not None or time.monotonic() > end:
                process.terminate()
                results[name] = read_run(output)
                del running[name]
                save(results, args.out)
        while waiting and len(running) < args.jobs and time.monotonic() < end:
            table, row, seed = waiting.pop(0)
            name = f"{table}/{row}/{seed}"
            output = args.out / name
            if done := read_run(output):
                results[name] = done
                continue
            output.parent.mkdir(parents=True, exist_ok=True)
            with open(f"{output}.log", "w") as log:
                words = command(tables[table], row, seed, args, data.get(table, ""), output)
                process = subprocess.Popen(
                    words, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
                )
            running[name] = process, output
        if time.monotonic() > end and not running:
            break
        time.sleep(0.5)
    save(results, args.out)
    return results


def save(results: dict[str, Any], out: Path) -> None:
    """Rewrite ``recipe.json``."""
    (out / "recipe.json").write_text(json.dumps(results, indent=1) + "\n")


def table_of(results: dict[str, Any]) -> str:
    """Return a line per row: mean AP, the seeds' range, AP50 and the number of seeds."""
    rows: dict[str, list[dict[str, float]]] = {}
    for name, result in results.items():
        rows.setdefault(name.rpartition("/")[0], []).append(result.get("metrics", {}))
    lines = []
    for name, runs in rows.items():
        aps = [run["AP"] for run in runs if "AP" in run]
        if not aps:
            lines.append(f"{name:40} no result")
            continue
        ap50 = statistics.mean(run["AP50"] for run in runs if "AP50" in run)
        each = " ".join(f"{ap:.1f}" for ap in aps)
        lines.append(f"{name:40} AP {statistics.mean(aps):5.1f}  AP50 {ap50:5.1f}  seeds {each}")
    return "\n".join(lines)


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="*", default=[], metavar="TABLE=FOLDER")
    parser.add_argument("--weights", default="", help="timm's of the rows from ImageNet weights")
    parser.add_argument("--rows", nargs="*", default=[], metavar="TABLE/ROW", help="default: all")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY VALUE", help="of all rows")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=1, help="trainings side by side")
    parser.add_argument("--minutes", type=float, default=1e6)
    parser.add_argument("--out", type=Path, default=Path("output/recipe"))
    args = parser.parse_args()
    tables = yaml.safe_load(TABLES.read_text())
    rows = [(table, row) for table in tables for row in tables[table]["rows"]]
    if args.rows:
        rows = [pair for pair in rows if "/".join(pair) in args.rows or pair[0] in args.rows]
    jobs = [(table, row, seed) for seed in args.seeds for table, row in rows]
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    print(table_of(run_all(jobs, args)))


if __name__ == "__main__":
    main()
