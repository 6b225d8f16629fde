"""A training step with OpenMP's default waiting and with ``OMP_WAIT_POLICY=passive``.

    python benchmarks/bench_wait_policy.py [--repeat 3] [--seconds 15] [--save]

An OpenMP thread that waits for the others spins by default, and takes a core from whoever has work;
with the passive policy it sleeps. Each row is one state of the machine: idle, or shared with two
processes that are always busy, and with the training's own loader workers or without. The policies
alternate, each in a process of its own that trains ``configs/quickstart.yaml`` for that many
seconds. Times are wall-clock seconds per step, medians and quartiles over the repetitions.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common import Timing, argument_parser, hardware, save
from tabulate import tabulate

ROOT = Path(__file__).parents[1]
# The first is libgomp's default, spelt out, because the package sets a policy where there is none.
POLICIES = {
    "default": {"GOMP_SPINCOUNT": "300000"},
    "passive": {"OMP_WAIT_POLICY": "passive"},
}
NUM_BUSY = 2
WARMUP = 3  # steps


def time_steps(seconds: float, num_workers: int) -> float:
    """Train the quick start for a number of seconds, and return the seconds per step."""
    from detectron2.utils.events import EventStorage

    from retinanet_ext import engine
    from retinanet_ext.data import prepare_datasets

    opts = ["MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", str(num_workers)]
    cfg = engine.load_config(str(ROOT / "configs/quickstart.yaml"), opts)
    prepare_datasets(cfg, eval_only=False)
    trainer = engine.Trainer(cfg)._trainer
    with EventStorage():
        for trainer.iter in range(WARMUP):
            trainer.run_step()
        start, num_steps = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            trainer.run_step()
            num_steps += 1
        return (time.perf_counter() - start) / num_steps


@contextmanager
def busy_processes(number: int) -> Iterator[None]:
    """Keep a number of cores busy."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def run(args: argparse.Namespace, policy: str, num_workers: int, data: str) -> float:
    """Return the seconds per step of a process with a policy."""
    left_out = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    env = {name: value for name, value in os.environ.items() if name not in left_out}
    env |= {"OMP_NUM_THREADS": str(args.threads), "DETECTRON2_DATASETS": data}
    env |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), **POLICIES[policy]}
    command = [sys.executable, __file__, "--steps", str(num_workers), "--seconds"]
    done = subprocess.run(
        [*command, str(args.seconds)], env=env, check=True, stdout=subprocess.PIPE, text=True
    )
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    """Time the steps and print a table."""
    parser = argument_parser(__doc__.splitlines()[0], repeat=3)
    parser.add_argument("--seconds", type=float, default=15, help="of every repetition")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--steps", type=int, metavar="WORKERS", help="time steps in this process")
    args = parser.parse_args()
    if args.steps is not None:
        print(time_steps(args.seconds, args.steps))
        return
    args.device = "cpu"
    rows = []
    with tempfile.TemporaryDirectory() as data:
        for num_workers in args.workers:
            for num_busy in (0, NUM_BUSY):
                seconds: dict[str, list[float]] = {policy: [] for policy in POLICIES}
                for _ in range(args.repeat):
                    for policy in POLICIES:
                        with busy_processes(num_busy):
                            seconds[policy].append(run(args, policy, num_workers, data))
                times = {policy: Timing(values) for policy, values in seconds.items()}
                ratio = times["passive"].median / times["default"].median
                machine = {"busy processes": num_busy, "loader workers": num_workers}
                rows.append({**machine, **times, "ratio": ratio})
                print(rows[-1], flush=True)
    print(hardware(), f"{args.threads} threads")
    print(tabulate(rows, headers="keys", floatfmt=".3g"))
    if args.save:
        print(f"Wrote {save('wait_policy', rows, args)}")


if __name__ == "__main__":
    main()
