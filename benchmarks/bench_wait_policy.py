"""A training step by how OpenMP's threads wait for each other.

    python benchmarks/bench_wait_policy.py [--repeat 9] [--seconds 5] [--save]

A thread that waits spins by default, and takes a core from whoever has work. With
``OMP_WAIT_POLICY=passive`` it sleeps at once, and with ``GOMP_SPINCOUNT=n`` after n turns. Each row
is a state of the machine: idle or shared with two processes that are always busy, and with the
training's own loader workers or without. The processes, one for each way, train
``configs/quickstart.yaml`` and take turns of some seconds. Times are wall-clock time per step,
medians and quartiles over the turns; a ratio is the median of those to the default in the same
round. "others" is the mean number of cores that all other processes used meanwhile, the busy ones
and the loader workers included.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from common import Timing, argument_parser, hardware, save
from tabulate import tabulate

ROOT = Path(__file__).parents[1]
POLICIES: dict[str, dict[str, str]] = {
    "default": {},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "spin 1000": {"GOMP_SPINCOUNT": "1000"},
    "spin 10000": {"GOMP_SPINCOUNT": "10000"},
}
NUM_BUSY = 2
WARMUP = 3  # steps


def train_in_turns(num_workers: int) -> None:
    """Train for as many seconds as each line of stdin says, and print the seconds per step."""
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
        print("ready", flush=True)
        for line in sys.stdin:
            start, num_steps, cpu = time.perf_counter(), 0, time.process_time()
            while time.perf_counter() - start < float(line):
                trainer.run_step()
                num_steps += 1
            seconds = time.perf_counter() - start
            print(seconds / num_steps, time.process_time() - cpu, flush=True)


@contextmanager
def started(policy: str, num_workers: int, threads: int, data: str) -> Iterator[subprocess.Popen]:
    """Start a training that waits for its turns."""
    unset = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    env = {name: value for name, value in os.environ.items() if name not in unset}
    env |= {"OMP_NUM_THREADS": str(threads), "DETECTRON2_DATASETS": data, **POLICIES[policy]}
    env |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, "--train", str(num_workers)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=env, text=True, **pipes) as process:
        while process.stdout.readline() != "ready\n":
            assert process.poll() is None, "the training failed"
        yield process
        process.stdin.close()


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


def machine_seconds() -> float:
    """Return the CPU time that all programs have used since the machine started."""
    user, nice, system, _, _, irq, softirq, *_ = map(
        int, Path("/proc/stat").read_text().split("\n")[0].split()[1:]
    )
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def take_turns(processes: dict[str, subprocess.Popen], args: argparse.Namespace) -> dict:
    """Return the times of all policies, their ratios, and the cores that others used."""
    times: dict[str, list[float]] = {policy: [] for policy in processes}
    others = []
    for _ in range(args.repeat):
        for policy, process in processes.items():
            start, used = time.perf_counter(), machine_seconds()
            print(args.seconds, file=process.stdin, flush=True)
            seconds, own = map(float, process.stdout.readline().split())
            times[policy].append(seconds)
            others.append((machine_seconds() - used - own) / (time.perf_counter() - start))
    columns: dict[str, object] = {}
    for policy, values in times.items():
        columns[policy] = Timing(values)
        if policy != "default":
            ratios = [a / b for a, b in zip(values, times["default"], strict=True)]
            columns[f"ratio of {policy}"] = statistics.median(ratios)
    return {**columns, "others": statistics.mean(others)}


def main() -> None:
    """Time the steps and print a table."""
    parser = argument_parser(__doc__.splitlines()[0], repeat=9)
    parser.add_argument("--seconds", type=float, default=5, help="of every turn")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--train", type=int, metavar="WORKERS", help="train in this process")
    args = parser.parse_args()
    if args.train is not None:
        train_in_turns(args.train)
        return
    args.device = "cpu"
    rows = []
    with tempfile.TemporaryDirectory() as data:
        for num_workers in args.workers:
            with ExitStack() as stack:
                processes = {
                    policy: stack.enter_context(started(policy, num_workers, args.threads, data))
                    for policy in POLICIES
                }
                for num_busy in (0, NUM_BUSY):
                    with busy_processes(num_busy):
                        found = take_turns(processes, args)
                    rows.append({"busy": num_busy, "workers": num_workers, **found})
                    print(*(f"{name} {value}" for name, value in rows[-1].items()), sep=", ")
    print(hardware(), f"{args.threads} threads, milliseconds per step")
    print(tabulate(rows, headers="keys", floatfmt=".3g"))
    if args.save:
        print(f"Wrote {save('wait_policy', rows, args)}")


if __name__ == "__main__":
    main()
