"""Run rows of the tables, each in a process of its own, and pick up what was cut off."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import IO, Any

import torch
from detectron2.config import CfgNode
from tabulate import tabulate

import retinanet_ext
from retinanet_ext import provenance
from retinanet_ext.data import prepare_datasets
from retinanet_ext.data.sample_set import GENERATOR_VERSION
from retinanet_ext.data.sources import read_texts
from retinanet_ext.engine.checkpoint import find_weights
from retinanet_ext.engine.config import check_config, load_config, use_cpu_without_cuda
from retinanet_ext.engine.distributed import end_with_parent
from retinanet_ext.engine.failures import DIVERGED as DIVERGED_EXIT
from retinanet_ext.engine.launch import check_model
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
from retinanet_ext.experiments.results import duration
from retinanet_ext.experiments.tables import TABLES, Row, Table
from retinanet_ext.files import write_file

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
        seeds: of each row, 1 to ``seeds``; as many as the preset says by default
        num_gpus: processes of each run
        opts: alternating config keys and values for all rows
        root: folder of ``train_net.py`` and ``configs/``
        output: folder of all campaigns

    Raises:
        InputError: a name that does not exist, a config that cannot be
    """
    preset = find_preset(preset_name)
    chosen = find_rows(tables, rows, preset)
    if seeds is not None and seeds < 1:
        raise InputError(f"the number of seeds must be at least 1, got {seeds}")
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


def run(
    campaign: Campaign,
    runs: Sequence[Run],
    *,
    root: Path,
    jobs: int = 1,
    log: Callable[[str], None] = print,
) -> list[Record]:
    """Run what is not finished, ``jobs`` at a time, and return the records of all ``runs``.

    A finished or diverged run is left as it is; one that was cut off is resumed; one that failed
    is tried again. Each leaves its record as soon as it ends.

    Raises:
        InputError: a config or data that no row could be run with; a folder that cannot be
            written. Nothing has been lost.
    """
    if jobs < 1:
        raise InputError(f"the number of jobs must be at least 1, got {jobs}")
    num_gpus = campaign.content["num_gpus"]
    device = _check(runs, num_gpus)
    _start_campaign(campaign)
    machine = _Machine(device, num_gpus, jobs)
    records = {(one.key, one.seed): one for one in campaign.records()}
    waiting = []
    for one in runs:
        if (found := records.get((one.key, one.seed))) and found.status != record.FAILED:
            _credit(found, one)
        else:
            waiting.append(one)
    log(f"{len(runs) - len(waiting)} of {len(runs)} runs are done; results in {campaign.folder}")
    progress = _Progress(len(runs), len(runs) - len(waiting), jobs, log)
    progress.seconds += [
        one.wall_seconds for one in records.values() if one.status == record.FINISHED
    ]
    active: dict[int, _Active] = {}  # by slot
    with _interrupt_on_sigterm():
        try:
            while waiting or active:
                for slot in range(jobs):
                    while slot not in active and waiting:
                        started = _start(campaign, waiting.pop(0), root, machine, slot)
                        if isinstance(started, _Active):
                            active[slot] = started
                            progress.start(started)
                        elif isinstance(started, Record):  # another runner was faster
                            records[started.key, started.seed] = started
                            progress.end(started)
                        else:
                            progress.skip(started)
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


def _check(runs: Sequence[Run], num_gpus: int) -> str:
    """Refuse what every process would refuse, and return the device they will use.

    Values of all rows; data, weights and the model of the first.
    """
    if torch.cuda.is_available() and num_gpus > torch.cuda.device_count():
        raise InputError(
            f"--num-gpus {num_gpus}: this machine has {torch.cuda.device_count()} CUDA devices"
        )
    first, is_set = load_config(str(runs[0].config_file), runs[0].arguments)
    use_cpu_without_cuda(first, num_threads=torch.get_num_threads())
    for one in {one.key: one for one in runs}.values():  # seeds aside
        cfg, _ = load_config(str(one.config_file), one.arguments)
        cfg.MODEL.DEVICE = first.MODEL.DEVICE
        check_config(cfg, num_processes=num_gpus, eval_only=False)
    weights, _ = find_weights(first, resume=False, eval_only=False)
    prepare_datasets(first, num_classes_is_set=is_set, eval_only=False)
    check_model(first, weights, resume=False, eval_only=False)
    return first.MODEL.DEVICE


def _credit(found: Record, one: Run) -> None:
    """Note the rows that a finished run stands for by now."""
    if missing := [row for row in one.rows if row not in found.rows]:
        found.rows += missing
        found.write()


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
    clock: float
    earlier: Earlier

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
            wall_seconds=round(sum(self.earlier.seconds) + seconds, 1),
            num_starts=len(self.earlier.seconds) + 1,
            started=self.started.isoformat(timespec="seconds"),
            ended=datetime.now().astimezone().isoformat(timespec="seconds"),
            commit=", ".join(dict.fromkeys(self.earlier.commits)),
            versions=provenance.versions(),
            hardware=self.hardware,
            folder=self.folder,
        )
        one.write()
        if status != record.FAILED:
            for checkpoint in self.folder.glob("model_[0-9]*.pth"):
                checkpoint.unlink()  # model_final.pth stays, where there is one
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
    campaign: Campaign, one: Run, root: Path, machine: _Machine, slot: int
) -> _Active | Record | str:
    """Start a run's process, or return what another runner made of it, or why it is left alone."""
    try:
        folder = _folder(campaign, one)
        folder.mkdir(exist_ok=True)
        lock = open(folder / "lock", "ab")  # noqa: SIM115  held as long as the process lives
    except (InputError, OSError) as error:
        return f"{_name(one)} cannot be run: {error}"
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        return f"{_name(one)} is being run by another process"
    try:
        if (folder / record.RECORD).exists():
            found = record.read_record(folder)
            if found.status != record.FAILED:
                lock.close()
                return found
            (folder / record.RECORD).unlink()
        earlier = _earlier_parts(folder)
        started = datetime.now().astimezone()
        earlier.commits.append(provenance.commit())
        content = {"started": started.timestamp(), **asdict(earlier)}
        record.write_json(folder / STARTS, content)
        record.write_json(folder / "run.json", {"key": one.key, "rows": one.rows})
        environment, hardware = machine.share(slot)
        command = [sys.executable, str(root / "train_net.py")]
        command += ["--config-file", str(one.config_file), "--num-gpus", str(machine.num_gpus)]
        command += ["--resume"] if earlier.seconds else []
        command += [*one.arguments, "OUTPUT_DIR", str(folder)]
        with open(folder / "output.txt", "ab") as output:
            popen = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
                pass_fds=(lock.fileno(),),  # locked until both have ended
                preexec_fn=end_with_parent,
            )
    except (InputError, OSError) as error:
        lock.close()
        return f"{_name(one)} cannot be run: {error}"
    return _Active(one, folder, popen, lock, hardware, started, time.monotonic(), earlier)


def _folder(campaign: Campaign, one: Run) -> Path:
    """Return the run's folder: its own if it has one, else one that no other config has taken."""
    folder, number = campaign.folder / "runs" / one.name, 1
    while (folder / "run.json").exists():
        if record.read_json(folder / "run.json").get("key") == one.key:
            break
        number += 1
        folder = folder.with_name(f"{one.name}-{number}")
    return folder


@dataclass
class Earlier:
    """The parts of a run that was cut off: the seconds of each, and the code of all so far."""

    seconds: list[float] = field(default_factory=list)
    commits: list[str] = field(default_factory=list)


def _earlier_parts(folder: Path) -> Earlier:
    """Return what is there to resume; clear away what a run left before its first checkpoint."""
    if not (folder / STARTS).exists():
        return Earlier()
    tag = folder / "last_checkpoint"
    if tag.exists() and not (folder / (tag.read_text().strip() or "-")).is_file():
        tag.unlink()  # cut off while it was written, which is after its checkpoint was
        if checkpoints := sorted(folder.glob("model_*.pth")):
            write_file(tag, checkpoints[-1].name)
    if not tag.exists():
        for path in [*folder.glob("model_*.pth"), folder / "metrics.json"]:
            path.unlink(missing_ok=True)
        shutil.rmtree(folder / "inference", ignore_errors=True)
        return Earlier()
    content = record.read_json(folder / STARTS)
    signs = [folder / name for name in ("log.txt", "output.txt", "metrics.json")]
    last = max((path.stat().st_mtime for path in signs if path.exists()), default=0)
    seconds = round(max(0.0, last - content["started"]), 1)
    return Earlier([*content["seconds"], seconds], content["commits"])


@dataclass(frozen=True)
class _Machine:
    """What the jobs share: GPUs in turn, or the CPU's cores."""

    device: str
    num_gpus: int
    jobs: int

    def share(self, slot: int) -> tuple[dict[str, str], dict[str, Any]]:
        """Return a job's environment, and what it runs on."""
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        hardware: dict[str, Any] = {
            "cpu": provenance.cpu_name(),
            "gpus": [],
            "num_processes": self.num_gpus,
            "jobs": self.jobs,
        }
        if self.device.startswith("cuda"):
            count = torch.cuda.device_count()
            devices = [(slot * self.num_gpus + i) % count for i in range(self.num_gpus)]
            hardware["gpus"] = [torch.cuda.get_device_name(device) for device in devices]
            if self.jobs > 1:
                visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
                names = visible.split(",")
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(names[i] for i in devices)
        elif "OMP_NUM_THREADS" not in environment:
            linux = sys.platform == "linux"
            cores = len(os.sched_getaffinity(0)) if linux else os.cpu_count() or 1
            environment["OMP_NUM_THREADS"] = str(max(1, cores // (self.jobs * self.num_gpus)))
        hardware["threads"] = int(environment.get("OMP_NUM_THREADS", torch.get_num_threads()))
        return environment, hardware


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
        how = "resumed" if active.earlier.seconds else "started"
        self.log(f"{_name(active.run)} {how}{self.left()}")

    def skip(self, why: str) -> None:
        self.done += 1
        self.log(why)

    def end(self, one: Record) -> None:
        self.done += 1
        result = one.message
        if one.status == record.FINISHED:
            self.seconds.append(one.wall_seconds)
            ap = one.metrics.get("AP")
            result = "finished, no AP" if ap is None else f"AP {ap:.1f}"
        elif one.status == record.FAILED:
            result = f"failed: {one.message} (see {one.folder / 'output.txt'})"
        text = f"[{self.done}/{self.total}] {_name(one)}: {result} ({duration(one.wall_seconds)})"
        self.log(f"{text}{self.left()}")

    def left(self) -> str:
        """Return how many runs are left, and how long they take judging by those that finished."""
        left = self.total - self.done
        if not left or not self.seconds:
            return f"; {left} left" if left else ""
        seconds = sum(self.seconds) / len(self.seconds) * left / self.jobs
        return f"; {left} left, about {duration(seconds)}"


def _name(one: Run | Record) -> str:
    others = f" (= {', '.join(one.rows[1:])})" if len(one.rows) > 1 else ""
    return f"{one.rows[0]}{others} seed {one.seed}"


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
