"""Kill a training at random moments, resume it and compare its end with the uninterrupted run's.

    python tests/stress_kills.py --kills 20 --iterations 200

Each kill is SIGKILL to all processes of a run of its own, every second one while a checkpoint is
being written. Prints a table, and ends with 1 if any tensor or number of ``model_final.pth``
differs.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from training import start_train_net

PERIOD = 5


def arguments(folder: Path, iterations: int) -> list[Any]:
    """Return the arguments of ``train_net.py``, but for the config file."""
    opts = ["SOLVER.MAX_ITER", iterations, "SOLVER.CHECKPOINT_PERIOD", PERIOD]
    flags = ["--num-gpus", 2, "--resume"]
    return [*flags, "OUTPUT_DIR", folder, *opts, "DATALOADER.NUM_WORKERS", 1]


def start(folder: Path, *, iterations: int) -> subprocess.Popen[bytes]:
    """Start, or resume, a training of two processes."""
    folder.mkdir(exist_ok=True)
    with open(folder / "output.txt", "ab") as output:
        return start_train_net(
            *arguments(folder, iterations),
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def finish(folder: Path, *, iterations: int) -> None:
    """Train, or resume, to the end."""
    if start(folder, iterations=iterations).wait(600):
        raise RuntimeError((folder / "output.txt").read_text()[-2000:])


@dataclass
class Kill:
    """What a kill met: the newest checkpoint, and whether one was being written."""

    checkpoint: str
    writing: bool


def kill(folder: Path, after: int, delay: float, *, in_writing: bool, iterations: int) -> Kill:
    """Start, or resume, and kill all processes.

    Args:
        folder: of the run
        after: the iteration whose checkpoint, or a later one, is waited for
        delay: seconds from then on
        in_writing: then wait until a checkpoint is being written
        iterations: length of the run
    """
    unfinished, tag = folder / ".unfinished_checkpoint", folder / "last_checkpoint"
    launcher = start(folder, iterations=iterations)

    def wait_for(condition: Callable[[], bool]) -> None:
        while not condition():
            if launcher.poll() is not None:
                raise RuntimeError(f"{folder}: the run ended before it was killed")
            time.sleep(0.0005)  # a checkpoint is being written for some milliseconds

    wait_for(lambda: tag.exists() and int(re.sub(r"\D", "", tag.read_text())) >= after)
    time.sleep(delay)
    if in_writing:
        wait_for(unfinished.exists)
    os.killpg(launcher.pid, signal.SIGKILL)
    launcher.wait()
    time.sleep(0.2)  # until the last write of a process that was in it
    return Kill(tag.read_text(), unfinished.exists())


def differences(first: Path, second: Path) -> list[str]:
    """Return the names of what is not equal, bit for bit, in two checkpoints."""
    a, b = (dict(leaves(torch.load(path))) for path in (first, second))
    return [
        name
        for name in sorted(a.keys() | b.keys())
        if name not in a or name not in b or not _equal(a[name], b[name])
    ]


def leaves(content: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the tensors, numbers and texts of a checkpoint by name."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from leaves(value, f"{name}/{key}")
    elif isinstance(content, list | tuple):
        for index, value in enumerate(content):
            yield from leaves(value, f"{name}/{index}")
    else:
        yield name, content


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return (
            a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
        )
    return type(a) is type(b) and a == b


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table of the kills."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    rng = random.Random(args.seed)
    rows = []
    with tempfile.TemporaryDirectory() as work:
        reference = Path(work, "uninterrupted")
        finish(reference, iterations=args.iterations)
        for number in range(args.kills):
            folder = Path(work, str(number))
            met = kill(
                folder,
                rng.randrange(args.iterations - 4 * PERIOD),
                rng.uniform(0, 1),  # about a period
                in_writing=number % 2 == 1,
                iterations=args.iterations,
            )
            finish(folder, iterations=args.iterations)
            different = differences(reference / "model_final.pth", folder / "model_final.pth")
            rows.append(
                (
                    number + 1,
                    met.checkpoint,
                    "yes" if met.writing else "no",
                    "equal" if not different else f"{len(different)} differ: {different[0]}",
                )
            )
            print(rows[-1], file=sys.stderr, flush=True)
        count = len(list(leaves(torch.load(reference / "model_final.pth"))))
    header = ("kill", "last_checkpoint", "in writing", "model_final.pth")
    print(tabulate(rows, header))
    equal = sum(row[-1] == "equal" for row in rows)
    print(
        f"{equal} of {len(rows)} runs of {args.iterations} iterations on two processes end equal "
        f"to the uninterrupted one in all {count} tensors and numbers"
    )
    return int(equal < len(rows))


if __name__ == "__main__":
    sys.exit(main())
