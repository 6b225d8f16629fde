"""Run rows of the tables, each in its own process; resume what was cut off."""

from __future__ import annotations

import fcntl
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import torch

from retinanet_ext.data import prepare_datasets
from retinanet_ext.engine.config_check import check_config, use_cpu_without_cuda
from retinanet_ext.engine.config_load import load_config
from retinanet_ext.engine.config_warnings import too_long
from retinanet_ext.engine.find_checkpoint import find_weights
from retinanet_ext.engine.launch import end_with_parent
from retinanet_ext.engine.run_info import commit, cpu_name, versions
from retinanet_ext.engine.trainer import Trainer
from retinanet_ext.errors import DIVERGED as DIVERGED_EXIT
from retinanet_ext.errors import InputError
from retinanet_ext.experiments import record
from retinanet_ext.experiments.plan import Campaign, Run
from retinanet_ext.experiments.record import Record
from retinanet_ext.experiments.statistics import duration
from retinanet_ext.modeling.timm_backbone import timm_weights

CAMPAIGN = "campaign.json"
OUTPUT = "output.txt"


def run_campaign(
    campaign: Campaign,
    runs: Sequence[Run],
    *,
    root: Path,
    jobs: int = 1,
    log: Callable[[str], None] = print,
) -> list[Record]:
    """Run what is not finished, ``jobs`` runs at a time, and return the records of ``runs``.

    A run that finished or diverged is skipped, one that was cut off is resumed, and one that
    failed is tried again. A run that could not be started has no record. On SIGINT or SIGTERM the
    runs that are going on save a checkpoint, and KeyboardInterrupt is raised.

    Raises:
        InputError: a config or data that no row could be run with, another runner in the same
            folder, a folder that cannot be written
    """
    if jobs < 1:
        raise InputError(f"--jobs must be at least 1, got {jobs}")
    hardware = _check(runs, campaign.content["num_gpus"], jobs, log)
    with _open_campaign(campaign) as lock, _interrupt_on_sigterm():
        records = {(run.key, run.seed): run for run in record.read_records(campaign.folder)}
        waiting = []
        for run in runs:
            found = records.get((run.key, run.seed))
            if not found or found.status in (record.FAILED, record.UNFINISHED):
                waiting.append(run)
            elif missing := [row for row in run.rows if row not in found.rows]:
                found.rows += missing  # rows that were given this config since
                found.write()
        done = len(runs) - len(waiting)
        log(f"{done} of {len(runs)} runs are done; results in {campaign.folder}")
        going: list[_Process] = []
        try:
            for number, run in enumerate(waiting, start=done + 1):
                while len(going) >= jobs:
                    _wait_for_one(going, records, log)
                found = records.get((run.key, run.seed))
                left = _time_left(records.values(), len(runs) - number + 1, jobs)
                log(f"[{number}/{len(runs)}] {run.label} {'resumed' if found else 'started'}{left}")
                try:
                    current = found or _new_record(campaign.folder, run)
                    going.append(_start(current, run, root, hardware, lock))
                except (InputError, OSError) as error:
                    log(f"{run.label} cannot be run: {error}")
            while going:
                _wait_for_one(going, records, log)
        finally:  # of Ctrl-C, for example
            for process in going:
                process.popen.terminate()  # it saves a checkpoint
            for process in going:
                process.popen.wait()
    found = [records[run.key, run.seed] for run in runs if (run.key, run.seed) in records]
    return [run for run in found if run.status != record.UNFINISHED]


def _check(
    runs: Sequence[Run], num_gpus: int, jobs: int, log: Callable[[str], None]
) -> dict[str, Any]:
    """Refuse what every process would refuse, warn, and return the hardware that they will use.

    The config of every row is checked, and that its file of a backbone's weights exists; the data
    and the model only of the first.
    """
    first = load_config(str(runs[0].config_file), runs[0].arguments)
    use_cpu_without_cuda(first, num_threads=torch.get_num_threads())
    for run in {run.key: run for run in runs}.values():  # one seed of each
        cfg = load_config(str(run.config_file), run.arguments)
        cfg.MODEL.DEVICE = first.MODEL.DEVICE
        check_config(cfg, num_processes=num_gpus, eval_only=False)
        timm_weights(cfg)
        for line in too_long(cfg, "SOLVER.WARMUP_ITERS"):
            log(f"{run.rows[0]}: {line}")
    find_weights(first, resume=False, eval_only=False)
    prepare_datasets(first, eval_only=False)
    Trainer.build_model(first)
    gpus = range(num_gpus) if first.MODEL.DEVICE.startswith("cuda") else ()
    return {
        "cpu": cpu_name(),
        "gpus": [torch.cuda.get_device_name(gpu) for gpu in gpus],
        "num_processes": num_gpus,
        "threads": max(1, torch.get_num_threads() // (num_gpus * jobs)),
    }


@contextmanager
def _open_campaign(campaign: Campaign) -> Iterator[IO[bytes]]:
    """Make the folder and hold its lock; refuse a second runner."""
    try:
        (campaign.folder / "runs").mkdir(parents=True, exist_ok=True)
        lock = open(campaign.folder / "lock", "ab")  # noqa: SIM115
    except OSError as error:
        raise InputError(f"{error.filename} cannot be written: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(
                f"another runner is using {campaign.folder}; once it has ended, the same command "
                "continues from there"
            ) from None
        if not (campaign.folder / CAMPAIGN).exists():
            record.write_json(campaign.folder / CAMPAIGN, campaign.content)
        yield lock


@contextmanager
def _interrupt_on_sigterm() -> Iterator[None]:
    """Treat SIGTERM as Ctrl-C."""
    earlier = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier)


def _new_record(campaign: Path, run: Run) -> Record:
    """Return the record of a run without a folder yet; it gets one that no other run has taken."""
    folder, number = campaign / "runs" / run.name, 1
    while (folder / record.RECORD).exists():
        number += 1
        folder = folder.with_name(f"{run.name}-{number}")
    return Record(list(run.rows), run.seed, record.UNFINISHED, run.key, num_starts=0, folder=folder)


@dataclass(frozen=True)
class _Process:
    """A run that is going on."""

    run: Run
    record: Record
    popen: subprocess.Popen[bytes]
    started: float


def _start(
    current: Record, run: Run, root: Path, hardware: dict[str, Any], lock: IO[bytes]
) -> _Process:
    """Start ``train_net.py``, which resumes what is there."""
    folder = current.folder
    folder.mkdir(exist_ok=True)
    command = [sys.executable, str(root / "train_net.py"), "--config-file", str(run.config_file)]
    command += ["--num-gpus", str(hardware["num_processes"])]
    command += ["--resume"] if current.num_starts else []
    begun = _begin(current, run, hardware)
    started = time.time()
    with open(folder / OUTPUT, "ab") as output:
        popen = subprocess.Popen(
            [*command, *run.arguments, "OUTPUT_DIR", str(folder)],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={
                **os.environ,
                "OMP_NUM_THREADS": str(hardware["threads"]),
                "PYTHONUNBUFFERED": "1",
            },
            start_new_session=True,  # Ctrl-C reaches the runner alone
            pass_fds=(lock.fileno(),),  # the folder is locked until both have ended
            preexec_fn=end_with_parent,
        )
    return _Process(run, begun, popen, started)


def _wait_for_one(
    going: list[_Process],
    records: dict[tuple[str, int], Record],
    log: Callable[[str], None],
) -> None:
    """Wait until one of the runs has ended, and move it from ``going`` to ``records``."""
    while all(process.popen.poll() is None for process in going):
        time.sleep(0.1)
    ended = next(process for process in going if process.popen.poll() is not None)
    going.remove(ended)
    found = _end(ended.record, ended.popen.returncode, time.time() - ended.started)
    records[ended.run.key, ended.run.seed] = found
    log(f"{ended.run.label}: {_result(found)} ({duration(found.wall_seconds)})")


def _begin(current: Record, run: Run, hardware: dict[str, Any]) -> Record:
    """Write the record of a run that is about to start or to be resumed.

    Such a record stays behind if the run is cut off. The time of a part that was cut off is that
    from writing the record to the last line of output.
    """
    output, seconds = current.folder / OUTPUT, current.wall_seconds
    if current.num_starts and current.status == record.UNFINISHED and output.exists():
        begun = (current.folder / record.RECORD).stat().st_mtime
        seconds += max(0.0, output.stat().st_mtime - begun)
    commits = [*current.commit.split(", "), commit()]
    begun = Record(
        rows=list(run.rows),
        seed=run.seed,
        status=record.UNFINISHED,
        key=run.key,
        wall_seconds=seconds,
        num_starts=current.num_starts + 1,
        started=current.started or _now(),
        commit=", ".join(dict.fromkeys(filter(None, commits))),
        versions=versions(),
        hardware=hardware,
        folder=current.folder,
    )
    begun.write()
    return begun


def _end(current: Record, exit_code: int, seconds: float) -> Record:
    """Write the record of a run that has ended, and delete the checkpoints it no longer needs."""
    folder = current.folder
    status, message = _outcome(exit_code, folder / OUTPUT)
    metrics, milliseconds = record.final_metrics(folder)
    steps = [line for line in record.read_metrics(folder) if "total_loss" in line]
    ended = replace(
        current,
        status=status,
        message=message,
        metrics=metrics if status == record.FINISHED else {},
        inference_ms=milliseconds,
        iterations=steps[-1]["iteration"] + 1 if steps else 0,
        wall_seconds=round(current.wall_seconds + seconds, 1),
        ended=_now(),
    )
    ended.write()
    if status != record.FAILED:
        for checkpoint in folder.glob("model_[0-9]*.pth"):
            checkpoint.unlink()  # model_final.pth stays, if there is one
    return ended


def _outcome(code: int, output: Path) -> tuple[str, str]:
    """Return status and message of a run from its exit code and the end of its output."""
    if code == 0:
        return record.FINISHED, ""
    lines = output.read_text(errors="replace").strip().splitlines()
    errors = [line.partition(" error: ")[2] for line in lines if "train_net.py: error: " in line]
    message = (errors or lines or [""])[-1]
    if code == DIVERGED_EXIT:
        return record.DIVERGED, message.partition(";")[0]
    if code < 0:
        message = f"ended by {signal.Signals(-code).name}"
    return record.FAILED, message


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _time_left(records: Iterable[Record], num_left: int, jobs: int) -> str:
    """Return how many runs are left, and for how long, judging by those that finished."""
    seconds = [run.wall_seconds for run in records if run.status == record.FINISHED]
    rounds = math.ceil(num_left / jobs)
    about = f", about {duration(sum(seconds) / len(seconds) * rounds)}" if seconds else ""
    return f"; {num_left} left{about}"


def _result(ended: Record) -> str:
    if ended.status == record.FAILED:
        return f"failed: {ended.message} (see {ended.folder / OUTPUT})"
    if ended.status == record.DIVERGED:
        return ended.message
    ap = ended.metrics.get("AP")
    return "finished, no AP" if ap is None else f"AP {ap:.1f}"
