"""Run rows of the tables, each in a process of its own, and pick up what was cut off."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import torch
from detectron2.config import CfgNode
from tabulate import tabulate

import retinanet_ext
from retinanet_ext.data import prepare_datasets
from retinanet_ext.engine.config import check_config, load_config, use_cpu_without_cuda
from retinanet_ext.engine.failures import DIVERGED as DIVERGED_EXIT
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
from retinanet_ext.experiments.tables import TABLES, Row, Table

CAMPAIGN = "campaign.json"
STARTS = "starts.json"  # seconds of the parts of a run that has not ended
POLL_SECONDS = 0.5


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


@dataclass(frozen=True)
class Campaign:
    """A folder of runs that may be compared: one preset, config, data and package version."""

    folder: Path
    content: dict[str, Any]

    def records(self) -> list[Record]:
        """Return what has ended so far."""
        return record.read_records(self.folder)


def plan(
    preset_name: str,
    *,
    tables: Sequence[str] = (),
    rows: Sequence[str] = (),
    seeds: int = 0,
    opts: Sequence[str] = (),
    root: Path,
    output: Path,
) -> tuple[Campaign, list[Run]]:
    """Return the campaign and its runs, seed after seed; nothing is written.

    Args:
        preset_name: a key of :data:`~retinanet_ext.experiments.presets.PRESETS`
        tables, rows: names; none means all
        seeds: of each row, 1 to ``seeds``; 0: as many as the preset says
        opts: alternating config keys and values for all rows
        root: folder of ``train_net.py`` and ``configs/``
        output: folder of all campaigns

    Raises:
        InputError: a name that does not exist, a config that cannot be
    """
    preset = find_preset(preset_name)
    chosen = find_rows(tables, rows, preset)
    if seeds < 0:
        raise InputError(f"the number of seeds must be at least 1, got {seeds}")
    own = {"OUTPUT_DIR", "SEED"} & set(opts[::2])
    if own:
        raise InputError(f"{own.pop()} is the runner's to set; see --output and --seeds")
    configs = root / "configs"

    def key(row: Row) -> str:
        return _digest(row_config(preset, row, 0, opts, configs)[0])

    campaign = _campaign(preset, opts, configs, output)
    all_rows = find_rows((), (), preset)
    names: dict[str, list[str]] = {}
    for table, row in all_rows:
        names.setdefault(key(row), []).append(f"{table.name}/{row.name}")
    distinct = {key(row): row for _, row in reversed(chosen)}
    ordered = dict.fromkeys(key(row) for _, row in chosen)
    return campaign, [
        Run(
            rows=tuple(names[k]),
            key=k,
            seed=seed,
            config_file=configs / preset.configs[distinct[k].model],
            arguments=tuple(row_arguments(preset, distinct[k], seed, opts)),
        )
        for seed in range(1, (seeds or preset.seeds) + 1)
        for k in ordered
    ]


def _campaign(preset: Preset, opts: Sequence[str], configs: Path, output: Path) -> Campaign:
    base = Row("base", {}, {})
    cfg, _ = row_config(preset, base, 0, opts, configs)
    custom = cfg.DATASETS.CUSTOM
    data = {
        side: {
            "name": getattr(custom, f"{side}_JSON") or ", ".join(cfg.DATASETS[side]),
            "sha256": _file_digest(getattr(custom, f"{side}_JSON")),
        }
        for side in ("TRAIN", "TEST")
    }
    content = {
        "format": record.FORMAT,
        "preset": preset.name,
        "version": retinanet_ext.__version__,
        "opts": list(opts),
        "data": {side.lower(): value for side, value in data.items()},
    }
    digest = hashlib.sha256(f"{content['version']} {_digest(cfg)}".encode()).hexdigest()[:8]
    return Campaign(output / f"{preset.name}-{digest}", content)


def _digest(cfg: CfgNode) -> str:
    """Return a digest of what a run's result depends on; data counts by content, not by place."""
    cfg = cfg.clone()
    cfg.OUTPUT_DIR, cfg.SEED = "", 0
    for key, value in cfg.DATASETS.CUSTOM.items():
        cfg.DATASETS.CUSTOM[key] = _file_digest(value) if key.endswith("_JSON") else ""
    return hashlib.sha256(cfg.dump().encode()).hexdigest()[:12]


def _file_digest(path: str) -> str:
    if not path:
        return ""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None


def run(
    campaign: Campaign,
    runs: Sequence[Run],
    *,
    root: Path,
    num_gpus: int = 1,
    jobs: int = 1,
    log: Any = print,
) -> list[Record]:
    """Run what is not finished, ``jobs`` at a time, and return the records of all ``runs``.

    A finished or diverged run is left as it is; one that was cut off is resumed; one that failed
    is tried again. Each leaves its record as soon as it ends.

    Raises:
        InputError: a config or data that no row could be run with; a folder that cannot be
            written. Nothing has been lost.
    """
    if num_gpus < 1 or jobs < 1:
        raise InputError("the numbers of GPUs and of jobs must be at least 1")
    _check(runs, num_gpus)
    _start_campaign(campaign)
    records = {(one.key, one.seed): one for one in campaign.records()}
    waiting = [
        one
        for one in runs
        if (one.key, one.seed) not in records or records[one.key, one.seed].status == record.FAILED
    ]
    log(f"{len(runs) - len(waiting)} of {len(runs)} runs are done; results in {campaign.folder}")
    progress = _Progress(len(runs), len(runs) - len(waiting), jobs, log)
    active: dict[int, _Active] = {}  # by slot
    with _interrupt_on_sigterm():
        try:
            while waiting or active:
                for slot in range(jobs):
                    if slot not in active and waiting:
                        started = _start(campaign, waiting.pop(0), root, num_gpus, jobs, slot)
                        if isinstance(started, str):
                            progress.skip(started)
                        else:
                            active[slot] = started
                            progress.start(started)
                for slot, process in list(active.items()):
                    if process.popen.poll() is not None:
                        del active[slot]
                        one = process.end()
                        records[one.key, one.seed] = one
                        progress.end(one)
                time.sleep(POLL_SECONDS if active else 0)
        except BaseException:
            for process in active.values():
                process.stop()
            raise
    return [records[one.key, one.seed] for one in runs if (one.key, one.seed) in records]


def _check(runs: Sequence[Run], num_processes: int) -> None:
    """Refuse what every process would refuse: values of all rows, data of the first."""
    first, is_set = load_config(str(runs[0].config_file), runs[0].arguments)
    use_cpu_without_cuda(first, num_threads=torch.get_num_threads())
    prepare_datasets(first, num_classes_is_set=is_set, eval_only=False)
    for one in runs:
        cfg, _ = load_config(str(one.config_file), one.arguments)
        cfg.MODEL.DEVICE = first.MODEL.DEVICE
        check_config(cfg, num_processes=num_processes, eval_only=False)


def _start_campaign(campaign: Campaign) -> None:
    try:
        (campaign.folder / "runs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{error.filename} cannot be written: {error.strerror}") from None
    if not (campaign.folder / CAMPAIGN).exists():
        record.write_json(campaign.folder / CAMPAIGN, campaign.content)


@dataclass
class _Active:
    """A run in progress."""

    run: Run
    folder: Path
    popen: subprocess.Popen[bytes]
    lock: IO[bytes]
    hardware: dict[str, Any]
    started: datetime
    commit: str
    clock: float
    starts: list[float]  # seconds of the earlier parts

    def end(self) -> Record:
        """Write the record of a process that has ended, and return it."""
        seconds = time.monotonic() - self.clock
        status, message = _outcome(self.popen.returncode, self.folder / "output.txt")
        metrics, milliseconds = record.final_metrics(self.folder)
        steps = [line for line in record.read_metrics(self.folder) if "total_loss" in line]
        one = Record(
            rows=list(self.run.rows),
            seed=self.run.seed,
            key=self.run.key,
            status=status,
            message=message,
            metrics=metrics if status == record.FINISHED else {},
            inference_ms=milliseconds,
            iterations=steps[-1]["iteration"] + 1 if steps else 0,
            wall_seconds=round(sum(self.starts) + seconds, 1),
            num_starts=len(self.starts) + 1,
            started=self.started.isoformat(timespec="seconds"),
            ended=datetime.now().astimezone().isoformat(timespec="seconds"),
            commit=self.commit,
            versions=record.versions(),
            hardware=self.hardware,
            folder=self.folder,
        )
        one.write()
        if status == record.FINISHED:
            for checkpoint in self.folder.glob("model_[0-9]*.pth"):
                checkpoint.unlink()  # model_final.pth stays
        self.lock.close()
        return one

    def stop(self) -> None:
        """End the process; what it has is resumed by the next call."""
        self.popen.terminate()
        try:
            self.popen.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
        self.lock.close()


def _start(
    campaign: Campaign, one: Run, root: Path, num_gpus: int, jobs: int, slot: int
) -> _Active | str:
    """Start a run's process, or say why it is left alone."""
    folder = _folder(campaign, one)
    try:
        folder.mkdir(exist_ok=True)
        lock = open(folder / "lock", "wb")  # noqa: SIM115  held as long as the process lives
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        return f"{one.rows[0]} seed {one.seed} is being run by another process"
    (folder / record.RECORD).unlink(missing_ok=True)  # of an attempt that failed
    record.write_json(folder / "run.json", {"key": one.key, "rows": one.rows})
    starts = _earlier_parts(folder)
    command = [sys.executable, str(root / "train_net.py"), "--config-file", str(one.config_file)]
    command += ["--num-gpus", str(num_gpus)]
    command += ["--resume"] if starts else []
    command += [*one.arguments, "OUTPUT_DIR", str(folder)]
    environment, hardware = _hardware(num_gpus, jobs, slot)
    started = datetime.now().astimezone()
    record.write_json(folder / STARTS, {"seconds": starts, "started": started.timestamp()})
    with open(folder / "output.txt", "ab") as output:
        popen = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            pass_fds=(lock.fileno(),),  # locked until both have ended
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
    commit = record.commit()
    return _Active(one, folder, popen, lock, hardware, started, commit, time.monotonic(), starts)


def _folder(campaign: Campaign, one: Run) -> Path:
    """Return the run's folder: its own if it has one, else one that no other config has taken."""
    folder, number = campaign.folder / "runs" / one.name, 1
    while (folder / "run.json").exists():
        if record.read_json(folder / "run.json").get("key") == one.key:
            break
        number += 1
        folder = folder.with_name(f"{one.name}-{number}")
    return folder


def _earlier_parts(folder: Path) -> list[float]:
    """Return the seconds of each part of a run that was cut off, empty for a new one."""
    if not (folder / STARTS).exists():
        return []
    content = record.read_json(folder / STARTS)
    if not (folder / "last_checkpoint").exists():
        # Cut off before its first checkpoint was whole: nothing to resume.
        for path in [*folder.glob("model_*.pth"), folder / "metrics.json"]:
            path.unlink(missing_ok=True)
        shutil.rmtree(folder / "inference", ignore_errors=True)
        return []
    last_sign = max(path.stat().st_mtime for path in folder.iterdir() if path.is_file())
    return [*content["seconds"], round(max(0.0, last_sign - content["started"]), 1)]


def _hardware(num_gpus: int, jobs: int, slot: int) -> tuple[dict[str, str], dict[str, Any]]:
    """Return a job's environment, with its share of the machine, and what it runs on."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    hardware: dict[str, Any] = {"num_processes": num_gpus, "cpu": record.cpu_name(), "gpus": []}
    count = torch.cuda.device_count()
    if count:
        devices = [(slot * num_gpus + i) % count for i in range(num_gpus)]
        hardware["gpus"] = [torch.cuda.get_device_name(device) for device in devices]
        if jobs > 1:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
            names = visible.split(",")
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(names[device] for device in devices)
    elif "OMP_NUM_THREADS" not in environment:
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        environment["OMP_NUM_THREADS"] = str(max(1, cores // (jobs * num_gpus)))
    hardware["threads"] = int(environment.get("OMP_NUM_THREADS", torch.get_num_threads()))
    return environment, hardware


def _end_with_parent() -> None:
    """Have the kernel end this process when the runner is killed, so that no orphan goes on."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


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
    """Treat SIGTERM as Ctrl-C: runs in progress are ended, and resumed by the next call."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    earlier = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier)


class _Progress:
    """One line for each run that starts or ends, with what is left."""

    def __init__(self, total: int, done: int, jobs: int, log: Any) -> None:
        self.total, self.done, self.jobs, self.log = total, done, jobs, log
        self.seconds: list[float] = []

    def start(self, active: _Active) -> None:
        how = "resumed" if active.starts else "started"
        self.log(f"{_name(active.run)} {how}")

    def skip(self, why: str) -> None:
        self.done += 1
        self.log(why)

    def end(self, one: Record) -> None:
        self.done += 1
        self.seconds.append(one.wall_seconds)
        left = self.total - self.done
        result = one.message
        if one.status == record.FINISHED:
            ap = one.metrics.get("AP")
            result = "finished, no AP" if ap is None else f"AP {ap:.1f}"
        elif one.status == record.FAILED:
            result = f"failed: {one.message} (see {one.folder / 'output.txt'})"
        text = f"[{self.done}/{self.total}] {_name(one)}: {result} ({duration(one.wall_seconds)})"
        if left:
            mean = sum(self.seconds) / len(self.seconds)
            text += f"; {left} left, about {duration(mean * left / self.jobs)}"
        self.log(text)


def _name(one: Run | Record) -> str:
    others = f" (= {', '.join(one.rows[1:])})" if len(one.rows) > 1 else ""
    return f"{one.rows[0]}{others} seed {one.seed}"


def duration(seconds: float) -> str:
    """Return seconds as a person says them: 40 s, 3 min 20 s, 2 h 5 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


def describe(tables: Sequence[str] = ()) -> str:
    """Return the tables, or the rows of those named, as text.

    Raises:
        InputError: a table that does not exist
    """
    if not tables:
        return tabulate(
            [
                (t.name, len(t.rows), t.title, t.source, ", ".join(t.presets))
                for t in TABLES.values()
            ],
            ["table", "rows", "what", "where", "presets"],
            disable_numparse=True,
        )
    for name in tables:
        if name not in TABLES:
            raise InputError(f"there is no table {name!r}; there are {', '.join(TABLES)}")
    return "\n\n".join(_describe(TABLES[name]) for name in tables)


def _describe(table: Table) -> str:
    def paper(row: Row) -> str:
        return f"{row.paper['AP']:.1f}" if "AP" in row.paper else row.outcome

    text = tabulate(
        [(row.name, *row.settings.values(), paper(row)) for row in table.rows],
        ["row", *table.rows[0].settings, "the paper's AP"],
        disable_numparse=True,
    )
    return "\n".join(
        filter(None, [f"{table.name}: {table.title} ({table.source})", table.note, text])
    )
