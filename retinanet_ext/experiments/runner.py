"""Run rows of the tables one after another, each in its own process; resume what was cut off."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import IO, Any

import torch
from detectron2.config import CfgNode

import retinanet_ext
from retinanet_ext.data import prepare_datasets
from retinanet_ext.data.sample_set import GENERATOR_VERSION
from retinanet_ext.data.sources import read_texts
from retinanet_ext.engine.checkpoint import find_weights
from retinanet_ext.engine.config_check import check_config, load_config, use_cpu_without_cuda
from retinanet_ext.engine.distributed import end_with_parent
from retinanet_ext.engine.launch import check_model
from retinanet_ext.engine.run_info import commit, cpu_name, versions
from retinanet_ext.errors import DIVERGED as DIVERGED_EXIT
from retinanet_ext.errors import InputError
from retinanet_ext.experiments import record
from retinanet_ext.experiments.presets import (
    Preset,
    find_preset,
    find_rows,
    row_arguments,
    row_config,
)
from retinanet_ext.experiments.record import Record
from retinanet_ext.experiments.statistics import duration
from retinanet_ext.experiments.tables import Row, Table

CAMPAIGN = "campaign.json"
RUN = "run.json"  # the rows and the config of a run, and its starts


@dataclass(frozen=True)
class Run:
    """One config to be run with one seed.

    Attributes:
        rows: every ``table/row`` of the preset that has this config.
        key: digest of the config without its seed and folder.
        config_file, arguments: as ``train_net.py`` takes them, without OUTPUT_DIR.
    """

    rows: tuple[str, ...]
    key: str
    seed: int
    config_file: Path
    arguments: tuple[str, ...]

    @property
    def name(self) -> str:
        """Return the folder's name: that of the first row."""
        table, row = self.rows[0].split("/")
        return f"{table}_{row}_seed{self.seed}".replace(":", "-")

    @property
    def label(self) -> str:
        """Return what the log calls the run."""
        others = f" (= {', '.join(self.rows[1:])})" if len(self.rows) > 1 else ""
        return f"{self.rows[0]}{others} seed {self.seed}"


@dataclass(frozen=True)
class Campaign:
    """A folder of runs that may be compared: one preset, config, data and package version."""

    folder: Path
    content: dict[str, Any]


def plan(
    preset_name: str,
    *,
    tables: Sequence[str] = (),
    rows: Sequence[str] = (),
    seeds: int | None = None,
    num_gpus: int = 1,
    opts: Sequence[str] = (),
    root: Path,
    output: Path,
) -> tuple[Campaign, list[Run]]:
    """Return the campaign and its runs, seed after seed; nothing is written.

    Args:
        preset_name: a key of :data:`~retinanet_ext.experiments.presets.PRESETS`
        tables, rows: names; none means all
        seeds: number of seeds per row, numbered from 1; by default the preset's
        num_gpus: number of processes per run
        opts: alternating config keys and values for all rows
        root: folder of ``train_net.py`` and ``configs/``
        output: folder of all campaigns

    Raises:
        InputError: an unknown name, key or value; a data file that cannot be read
    """
    preset = find_preset(preset_name)
    chosen = find_rows(tables, rows, preset)
    if seeds is not None and seeds < 1:
        raise InputError(f"--seeds must be at least 1, got {seeds}")
    if num_gpus < 1:
        raise InputError(f"--num-gpus must be at least 1, got {num_gpus}")
    _check_opts(preset, chosen, opts)
    configs = root / "configs"
    file_digest = cache(_file_digest)

    def key(row: Row) -> str:
        return _digest(row_config(preset, row, 0, opts, configs)[0], file_digest)

    campaign = _campaign(preset, num_gpus, opts, configs, output, file_digest)
    names: dict[str, list[str]] = {}
    keys: dict[str, str] = {}  # by table/row
    for table, row in find_rows((), (), preset):
        name = f"{table.name}/{row.name}"
        keys[name] = key(row)
        names.setdefault(keys[name], []).append(name)
    distinct: dict[str, Row] = {}
    for table, row in chosen:
        distinct.setdefault(keys[f"{table.name}/{row.name}"], row)
    return campaign, [
        Run(
            rows=tuple(names[key]),
            key=key,
            seed=seed,
            config_file=configs / preset.configs[row.model],
            arguments=tuple(row_arguments(preset, row, seed, opts)),
        )
        for seed in range(1, (seeds or preset.seeds) + 1)
        for key, row in distinct.items()
    ]


def _check_opts(preset: Preset, chosen: Sequence[tuple[Table, Row]], opts: Sequence[str]) -> None:
    """Refuse options that would be defeated in silence."""
    if len(opts) % 2:
        raise InputError(
            f"config values come as pairs KEY VALUE, got {' '.join(opts)}; "
            "several tables are given as --table A --table B"
        )
    for key in opts[::2]:
        if key in ("OUTPUT_DIR", "SEED"):
            raise InputError(f"{key} is the runner's to set; see --output and --seeds")
        for table, row in chosen:
            if key in row.overrides or key in row.preset_overrides.get(preset.name, {}):
                raise InputError(
                    f"{key} is what table {table.name} itself sets (row {row.name}); leave it "
                    "out, or name other tables with --table"
                )


def _campaign(
    preset: Preset,
    num_gpus: int,
    opts: Sequence[str],
    configs: Path,
    output: Path,
    file_digest: Callable[[str], str],
) -> Campaign:
    cfg, _ = row_config(preset, Row("base", {}, {}), 0, opts, configs)
    if len(cfg.DATASETS.TEST) > 1:
        raise InputError(f"DATASETS.TEST must name one data set here, got {cfg.DATASETS.TEST}")
    files = {side: read_texts(cfg, f"DATASETS.CUSTOM.{side}_JSON") for side in ("TRAIN", "TEST")}
    data = {
        side.lower(): {
            "name": ", ".join(files[side] or cfg.DATASETS[side]),
            "sha256": ", ".join(map(file_digest, files[side])),
        }
        for side in files
    }
    content = {
        "format": record.FORMAT,
        "preset": preset.name,
        "version": retinanet_ext.__version__,
        "num_gpus": num_gpus,
        "opts": list(opts),
        "data": data,
    }
    parts = retinanet_ext.__version__, GENERATOR_VERSION, num_gpus, _digest(cfg, file_digest)
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()[:8]
    return Campaign(output / f"{preset.name}-{digest}", content)


def _digest(cfg: CfgNode, file_digest: Callable[[str], str]) -> str:
    """Return a digest of what a run's result depends on; data counts by content, not by place."""
    cfg = cfg.clone()
    cfg.OUTPUT_DIR, cfg.SEED = "", 0
    for side in ("TRAIN", "TEST"):
        files = read_texts(cfg, f"DATASETS.CUSTOM.{side}_JSON")
        cfg.DATASETS.CUSTOM[f"{side}_JSON"] = ", ".join(map(file_digest, files))
        cfg.DATASETS.CUSTOM[f"{side}_IMAGES"] = ""
    return hashlib.sha256(json.dumps(cfg, sort_keys=True).encode()).hexdigest()[:12]


def _file_digest(path: str) -> str:
    if not path:
        return ""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None


def run_campaign(
    campaign: Campaign,
    runs: Sequence[Run],
    *,
    root: Path,
    log: Callable[[str], None] = print,
) -> list[Record]:
    """Run what is not finished, one run after another, and return the records of ``runs``.

    A run that finished or diverged is skipped, one that was cut off is resumed, and one that
    failed is tried again. A run that could not even be started has no record. SIGINT and SIGTERM
    have the current run save a checkpoint, and raise KeyboardInterrupt.

    Raises:
        InputError: a config or data that no row could be run with, another runner in the same
            folder, a folder that cannot be written
    """
    num_gpus = campaign.content["num_gpus"]
    hardware = _hardware(_check(runs, num_gpus), num_gpus)
    with _open_campaign(campaign) as lock, _interrupt_on_sigterm():
        records = {(run.key, run.seed): run for run in record.read_records(campaign.folder)}
        waiting = []
        for run in runs:
            if (found := records.get((run.key, run.seed))) and found.status != record.FAILED:
                _credit(found, run)
            else:
                waiting.append(run)
        done = len(runs) - len(waiting)
        log(f"{done} of {len(runs)} runs are done; results in {campaign.folder}")
        for number, run in enumerate(waiting, start=done + 1):
            left = _time_left(records, len(runs) - number + 1)
            try:
                folder = _folder(campaign.folder, run)
                how = "resumed" if (folder / RUN).exists() else "started"
                log(f"[{number}/{len(runs)}] {run.label} {how}{left}")
                ended = _run(folder, run, root, hardware, lock)
            except (InputError, OSError) as error:
                log(f"{run.label} cannot be run: {error}")
            else:
                records[run.key, run.seed] = ended
                log(f"{run.label}: {_result(ended)} ({duration(ended.wall_seconds)})")
    return [records[run.key, run.seed] for run in runs if (run.key, run.seed) in records]


def _check(runs: Sequence[Run], num_gpus: int) -> str:
    """Refuse what every process would refuse, and return the device they will use.

    The config of every row is checked; data, weights and the model only of the first.
    """
    if torch.cuda.is_available() and num_gpus > torch.cuda.device_count():
        raise InputError(
            f"--num-gpus {num_gpus}: this machine has {torch.cuda.device_count()} CUDA devices"
        )
    first, is_set = load_config(str(runs[0].config_file), runs[0].arguments)
    use_cpu_without_cuda(first, num_threads=torch.get_num_threads())
    for run in {run.key: run for run in runs}.values():  # seeds aside
        _check_row(run, first.MODEL.DEVICE, num_gpus)
    weights, _ = find_weights(first, resume=False, eval_only=False)
    prepare_datasets(first, num_classes_is_set=is_set, eval_only=False)
    check_model(first, weights, resume=False, eval_only=False)
    return first.MODEL.DEVICE


def _check_row(run: Run, device: str, num_gpus: int) -> None:
    """Refuse a row's config before anything is run or written."""
    cfg, _ = load_config(str(run.config_file), run.arguments)
    cfg.MODEL.DEVICE = device
    check_config(cfg, num_processes=num_gpus, eval_only=False)


def _hardware(device: str, num_gpus: int) -> dict[str, Any]:
    gpus = range(num_gpus) if device.startswith("cuda") else ()
    return {
        "cpu": cpu_name(),
        "gpus": [torch.cuda.get_device_name(gpu) for gpu in gpus],
        "num_processes": num_gpus,
        "threads": max(1, torch.get_num_threads() // num_gpus),
    }


@contextmanager
def _open_campaign(campaign: Campaign) -> Iterator[IO[bytes]]:
    """Make the folder, and hold its lock; a second runner is refused."""
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
                f"another runner is at work in {campaign.folder}; the same command goes on "
                "from there once it has ended"
            ) from None
        if not (campaign.folder / CAMPAIGN).exists():
            record.write_json(campaign.folder / CAMPAIGN, campaign.content)
        yield lock


def _credit(found: Record, run: Run) -> None:
    """Add to a finished run's record the rows that were given its config since."""
    if missing := [row for row in run.rows if row not in found.rows]:
        found.rows += missing
        found.write()


def _run(folder: Path, run: Run, root: Path, hardware: dict[str, Any], lock: IO[bytes]) -> Record:
    """Run ``train_net.py``, resuming what is there, and write the record of how it ended."""
    folder.mkdir(exist_ok=True)
    (folder / record.RECORD).unlink(missing_ok=True)  # of a run that failed
    starts = _add_start(folder, run)
    command = [sys.executable, str(root / "train_net.py"), "--config-file", str(run.config_file)]
    command += ["--num-gpus", str(hardware["num_processes"])]
    command += ["--resume"] if len(starts) > 1 else []
    with (
        open(folder / "output.txt", "ab") as output,
        subprocess.Popen(
            [*command, *run.arguments, "OUTPUT_DIR", str(folder)],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # Ctrl-C reaches the runner alone
            pass_fds=(lock.fileno(),),  # the folder is locked until both have ended
            preexec_fn=end_with_parent,
        ) as process,
    ):
        try:
            process.wait()
        except KeyboardInterrupt:
            process.terminate()  # it saves a checkpoint
            process.wait()
            raise
    return _write_record(folder, run, starts, hardware, process.returncode)


def _folder(campaign: Path, run: Run) -> Path:
    """Return the run's folder: its own if it has one, else one that no other config has taken."""
    folder, number = campaign / "runs" / run.name, 1
    while (folder / RUN).exists() and record.read_json(folder / RUN).get("key") != run.key:
        number += 1
        folder = folder.with_name(f"{run.name}-{number}")
    return folder


def _add_start(folder: Path, run: Run) -> list[dict[str, Any]]:
    """Add a start to ``run.json``, and return all starts of the run.

    The time of a start that was cut off ends with the last line of output.
    """
    starts: list[dict[str, Any]] = []
    if (folder / RUN).exists():
        starts = record.read_json(folder / RUN).get("starts", [])
    if starts and (output := folder / "output.txt").exists():
        seconds = max(0.0, output.stat().st_mtime - starts[-1]["time"])
        starts[-1].setdefault("seconds", round(seconds, 1))
    starts.append({"time": time.time(), "commit": commit()})
    content = {"key": run.key, "rows": run.rows, "starts": starts}
    record.write_json(folder / RUN, content)
    return starts


def _write_record(
    folder: Path,
    run: Run,
    starts: list[dict[str, Any]],
    hardware: dict[str, Any],
    exit_code: int,
) -> Record:
    now = time.time()
    status, message = _outcome(exit_code, folder / "output.txt")
    metrics, milliseconds = record.final_metrics(folder)
    steps = [line for line in record.read_metrics(folder) if "total_loss" in line]
    seconds = sum(start.get("seconds", 0) for start in starts[:-1]) + now - starts[-1]["time"]
    ended = Record(
        rows=list(run.rows),
        seed=run.seed,
        key=run.key,
        status=status,
        message=message,
        metrics=metrics if status == record.FINISHED else {},
        inference_ms=milliseconds,
        iterations=steps[-1]["iteration"] + 1 if steps else 0,
        wall_seconds=round(seconds, 1),
        num_starts=len(starts),
        started=_local_time(starts[0]["time"]),
        ended=_local_time(now),
        commit=", ".join(dict.fromkeys(start["commit"] for start in starts)),
        versions=versions(),
        hardware=hardware,
        folder=folder,
    )
    ended.write()
    if status != record.FAILED:
        for checkpoint in folder.glob("model_[0-9]*.pth"):
            checkpoint.unlink()  # model_final.pth stays, if there is one
    return ended


def _outcome(code: int, output: Path) -> tuple[str, str]:
    if code == 0:
        return record.FINISHED, ""
    lines = output.read_text(errors="replace").strip().splitlines()
    said = [line.partition(" error: ")[2] for line in lines if "train_net.py: error: " in line]
    message = said[-1] if said else lines[-1] if lines else ""
    if code == DIVERGED_EXIT:
        return record.DIVERGED, message.partition(";")[0]
    if code < 0:
        message = f"ended by {signal.Signals(-code).name}"
    return record.FAILED, message


@contextmanager
def _interrupt_on_sigterm() -> Iterator[None]:
    """Treat SIGTERM as Ctrl-C."""
    earlier = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier)


def _local_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")


def _time_left(records: dict[tuple[str, int], Record], num_left: int) -> str:
    """Return how many runs are left, and for how long, judging by those that finished."""
    seconds = [run.wall_seconds for run in records.values() if run.status == record.FINISHED]
    about = f", about {duration(sum(seconds) / len(seconds) * num_left)}" if seconds else ""
    return f"; {num_left} left{about}"


def _result(ended: Record) -> str:
    if ended.status == record.FAILED:
        return f"failed: {ended.message} (see {ended.folder / 'output.txt'})"
    if ended.status == record.DIVERGED:
        return ended.message
    ap = ended.metrics.get("AP")
    return "finished, no AP" if ap is None else f"AP {ap:.1f}"
