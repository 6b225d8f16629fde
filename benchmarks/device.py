"""Run everything that needs a CUDA device: tests, benchmarks, and trainings with their AP.

    python benchmarks/device.py --data FOLDER [--minutes 8] [--parts tests loss ...] [--out output]
        [--tables 1b 1d] [--jobs 12]

Parts run one after another, each in its own process and with its own time limit. ``device.md`` and
``device.json`` are rewritten after each part, so that nothing measured is lost if the machine goes
away. Benchmarks save their results in ``benchmarks/results``. The trainings, on FOLDER's
``instances_{train,val}.json`` and ``images``, run side by side. At the end as many rows of the
paper's tables are trained as the minutes left allow; the same ``--out`` later goes on with them.
``--dry-run`` shrinks everything to test this script on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from common import custom_data, hardware

ROOT = Path(__file__).parents[1]
SIZE = "--height 800 --width 1344"
SMALL = "--height 128 --width 160 --repeat 1"
TRAININGS = {
    "float32": "",
    "float16": "SOLVER.AMP.ENABLED True",
    "bfloat16": "SOLVER.AMP.ENABLED True SOLVER.AMP.PRECISION bfloat16",
    "float16 skip": "SOLVER.AMP.ENABLED True SOLVER.NON_FINITE.POLICY skip",
}
"""Name of a training of the small config -> its config values."""
ROWS = "experiments"


@dataclass(frozen=True)
class Part:
    """One command, or several side by side, with a time limit.

    Attributes:
        commands: name -> arguments of Python
        seconds: time limit for all of them together
    """

    commands: dict[str, list[str]]
    seconds: int


def bench(name: str, options: str, seconds: int, dry_run: bool) -> Part:
    """Return the part that runs ``bench_<name>.py``."""
    options = f"{options} {SMALL}" if dry_run else f"{SIZE} {options} --save"
    return Part({name: [f"benchmarks/bench_{name}.py", *options.split()]}, seconds)


def make_parts(args: argparse.Namespace) -> dict[str, Part]:
    """Return the parts by name, in order."""
    images = 1 if args.dry_run else 16
    step = f"--images {images} --ways ours"
    several = "" if args.dry_run else "16"
    parts = {
        "tests": Part(
            {
                "tests": [
                    *("-m", "pytest", "-q", "-m", "cuda"),
                    *("tests/test_cuda.py", "tests/engine/test_train_step.py"),
                ],
                "kernels": ["-m", "pytest", "-q", "tests/kernel_cases.py"],
            },
            150,
        ),
        "loss": bench("loss", f"--images {images} --dtype bfloat16", 60, args.dry_run),
        "matching": bench("matching", f"--images {images}", 45, args.dry_run),
        "inference": bench("inference", f"--images 1 {several}", 45, args.dry_run),
        "trainings": Part({n: training(n, args) for n in TRAININGS}, 150),
    }
    for precision in ("float32", "bfloat16", *([] if args.dry_run else ["float16"])):
        options = f"{step} --precision {precision}"
        parts[f"step {precision}"] = bench("train_step", options, 60, args.dry_run)
    if not args.dry_run:
        part = bench("train_step", f"{step} --precision bfloat16", 180, False)
        part.commands["train_step"] += ["--ways", "ours, channels last", "ours, all", "--no-memory"]
        parts["step compiled"] = part
    for precision in ("float32", "bfloat16"):
        options = f"--images 1 {several} --network --precision {precision}"
        parts[f"network {precision}"] = bench("inference", options, 60, args.dry_run)
    parts["experiments"] = Part({"experiments": experiments(args)}, 3600)
    report = ["-m", "retinanet_ext", "experiments", "report", "--output", str(args.out / ROWS)]
    parts["report"] = Part({"report": report}, 60)
    return parts


def experiments(args: argparse.Namespace) -> list[str]:
    """Return the command of as many rows of the paper's tables as the time left allows."""
    command = ["-m", "retinanet_ext", "experiments", "run", "--output", str(args.out / ROWS)]
    if args.dry_run:
        command += ["--preset", "quick", "--table", "1a", "--row", "alpha.75"]
    else:
        command += ["--preset", "gpu", "--jobs", str(args.jobs)]
        for table in args.tables:
            command += ["--table", table]
    values = custom_data(args.data)
    if args.dry_run:
        values |= {"SOLVER.MAX_ITER": "2", "SOLVER.CHECKPOINT_PERIOD": "2"}
    return [*command, *(word for pair in values.items() for word in pair)]


def training(name: str, args: argparse.Namespace) -> list[str]:
    """Return the command of one of :data:`TRAININGS`."""
    config = "tests/engine/tiny.yaml" if args.dry_run else "configs/small_R18_FPN.yaml"
    pairs = [word for pair in custom_data(args.data).items() for word in pair]
    values = TRAININGS[name].split()
    if args.dry_run and "True" in values and "bfloat16" not in values:
        values += ["SOLVER.AMP.PRECISION", "bfloat16"]
    output = args.out / f"training_{name.replace(' ', '_')}"
    return ["train_net.py", "--config-file", config, "OUTPUT_DIR", str(output), *pairs, *values]


def run(part: Part, seconds: float, args: argparse.Namespace) -> dict[str, dict]:
    """Run the commands of a part side by side; return exit code, seconds and last lines of each."""
    start = time.monotonic()
    running = {}
    for name, arguments in part.commands.items():
        log = args.out / f"{name.replace(' ', '_')}.log"
        with open(log, "a") as file:
            command = [sys.executable, *arguments]
            process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        running[name] = process, log
    results = {}
    for name, (process, log) in running.items():
        left = max(start + seconds - time.monotonic(), 0)
        try:
            code: int | str = process.wait(left)
        except subprocess.TimeoutExpired:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
            code = "cut off"
        results[name] = {
            "command": " ".join(part.commands[name]),
            "exit_code": code,
            "seconds": round(time.monotonic() - start, 1),
            "output": log.read_text(errors="replace").splitlines()[-60:],
        }
    return results


def write_page(results: dict[str, dict], args: argparse.Namespace) -> None:
    """Write the results so far as JSON and as Markdown."""
    device = hardware("cuda") if torch.cuda.is_available() else hardware()
    content = {"hardware": device, "torch": torch.__version__, "parts": results}
    (args.out / "device.json").write_text(json.dumps(content, indent=1) + "\n")
    lines = [f"# {device}, torch {torch.__version__}", ""]
    for part, commands in results.items():
        for name, result in commands.items():
            code, seconds = result["exit_code"], result["seconds"]
            lines += [f"## {part}: {name}", "", f"`{result['command']}`", ""]
            lines += [f"exit code {code}, {seconds} s", "", "```", *result["output"], "```", ""]
    (args.out / "device.md").write_text("\n".join(lines))


def argument_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data to train on")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--out", type=Path, default=Path("output/device"))
    parser.add_argument("--parts", nargs="+", help="only these, in this order")
    parser.add_argument("--tables", nargs="+", default=["1b", "1d"], help="of the experiments")
    parser.add_argument("--jobs", type=int, default=12, help="rows of the experiments at a time")
    parser.add_argument("--dry-run", action="store_true")
    return parser


def main() -> None:
    """Run the parts that fit into ``--minutes``."""
    args = argument_parser().parse_args()
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    parts = make_parts(args)
    end = time.monotonic() + 60 * args.minutes
    results: dict[str, dict] = {}
    for name in args.parts or parts:
        left = end - time.monotonic()
        if left < 10:
            print(f"{name}: skipped, out of time", flush=True)
            continue
        results[name] = run(parts[name], min(parts[name].seconds, left), args)
        codes = {n: (r["exit_code"], r["seconds"]) for n, r in results[name].items()}
        print(f"{name}: {codes}", flush=True)
        write_page(results, args)
    print((args.out / "device.md").read_text())


if __name__ == "__main__":
    main()
