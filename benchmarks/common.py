"""Shared by the benchmarks: interleaved timing, peak memory, hardware name, saved results."""

from __future__ import annotations

import argparse
import datetime
import re
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from retinanet_ext.engine.run_info import commit, cpu_name
from retinanet_ext.files import to_json

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Timing:
    """Seconds of every repetition of one call."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and third quartile, in seconds."""
        if len(self.seconds) == 1:
            return self.median, self.median
        low, _, high = statistics.quantiles(self.seconds, method="inclusive")
        return low, high

    def __str__(self) -> str:
        low, high = self.quartiles
        return f"{1e3 * self.median:.4g} ({1e3 * low:.4g} to {1e3 * high:.4g})"


def custom_data(folder: str | Path) -> dict[str, str]:
    """Return the keys for a folder with ``instances_{train,val}.json`` and ``images``."""
    return {
        f"DATASETS.CUSTOM.{split}_{what}": f"{folder}/{name}"
        for split, file in (("TRAIN", "train"), ("TEST", "val"))
        for what, name in (("JSON", f"instances_{file}.json"), ("IMAGES", "images"))
    }


def argument_parser(description: str, repeat: int) -> argparse.ArgumentParser:
    """Return a parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--repeat", type=int, default=repeat, help="repetitions of every call")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--save", action="store_true", help=f"write a file below {RESULTS.name}/")
    return parser


def measure(
    calls: Mapping[str, Callable[[], object]], repeat: int, *, warmup: int = 1
) -> dict[str, Timing]:
    """Time calls in turn, round after round, so that a slow phase of the machine affects all alike.

    Args:
        calls: name -> call to time, including its work on a CUDA device
        repeat: number of rounds that count
        warmup: number of rounds before them that do not count
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repetition in range(warmup + repeat):
        for name, call in calls.items():
            _synchronize()
            start = time.perf_counter()
            call()
            _synchronize()
            if repetition >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: Timing(values) for name, values in seconds.items()}


def autocast(precision: str, device: str) -> AbstractContextManager:
    """Return the autocast context for a precision; no context for float32."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(torch.device(device).type, getattr(torch, precision))


def peak_memory(call: Callable[[], object], device: str = "cpu") -> int:
    """Return the peak number of bytes that one call allocates beyond what was allocated before.

    On CUDA the allocator counts them. On the CPU the profiler records the allocations of PyTorch's
    allocator. Unlike the resident set size this is exact and repeatable, but it misses memory that
    a library allocates itself (oneDNN's workspaces).
    """
    if device.startswith("cuda"):
        _synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        _synchronize()
        return torch.cuda.max_memory_allocated() - before
    cpu = [ProfilerActivity.CPU]
    with profile(activities=cpu, profile_memory=True, acc_events=True) as recorded:
        result = call()
    del result  # freed only after recording, because the returned value is part of the peak
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def hardware(device: str = "cpu") -> str:
    """Return the name of the CPU or GPU behind ``device``."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return re.sub(r"\((R|TM)\)", "", cpu_name())


def save(what: str, rows: list[dict[str, Any]], args: argparse.Namespace) -> Path:
    """Write ``results/<what>_<hardware>_<date>.json``; earlier files are kept.

    Args:
        what: the benchmark's name
        rows: one dict per line of its table; a :class:`Timing` is written as its median and
            quartiles in seconds
        args: the settings, from :func:`argument_parser`
    """
    name = hardware(args.device)
    date = datetime.date.today().isoformat()
    content = {
        "what": what,
        "hardware": name,
        "date": date,
        "torch": torch.__version__,
        "commit": commit(),
        "settings": {key: value for key, value in vars(args).items() if key != "save"},
        "rows": rows,
    }
    stem = f"{what}_{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}_{date}"
    path, number = RESULTS / f"{stem}.json", 1
    while path.exists():
        number += 1
        path = RESULTS / f"{stem}_{number}.json"
    RESULTS.mkdir(exist_ok=True)
    path.write_text(to_json(content, indent=2, default=_as_json) + "\n")
    return path


def _as_json(value: object) -> object:
    if isinstance(value, Timing):
        return {
            "median_s": value.median,
            "quartiles_s": value.quartiles,
            "repetitions": len(value.seconds),
        }
    return str(value)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
