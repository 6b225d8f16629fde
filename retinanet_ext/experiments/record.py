"""What a run leaves behind, so that a report needs nothing but the folder."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from retinanet_ext.errors import InputError
from retinanet_ext.files import to_json, write_file

FORMAT = 1
RECORD = "record.json"
FINISHED, DIVERGED, FAILED = "finished", "diverged", "failed"


@dataclass
class Record:
    """The result of one run: one config, one seed.

    Attributes:
        rows: every ``table/row`` that this very run stands for.
        status: ``finished``, ``diverged`` (a result too) or ``failed``.
        message: how it diverged or failed; a remark otherwise.
        metrics: AP in percent, as COCO's evaluation names it; None where it is not defined.
        inference_ms: median milliseconds an image.
        wall_seconds: all parts of a run that was cut off together.
        commit: of the project's code, of each part of a run that was cut off; empty outside of git.
        hardware: cpu, threads, gpus and num_processes of the run, and jobs: how many such runs
            went on at a time.
    """

    rows: list[str]
    seed: int
    status: str
    key: str
    message: str = ""
    metrics: dict[str, float | None] = field(default_factory=dict)
    inference_ms: float | None = None
    iterations: int = 0
    wall_seconds: float = 0.0
    num_starts: int = 1
    started: str = ""
    ended: str = ""
    commit: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    hardware: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT
    folder: Path = Path()

    def write(self) -> None:
        """Write ``record.json`` into the run's folder."""
        content = asdict(self)
        del content["folder"]
        write_json(self.folder / RECORD, content)


def read_records(campaign: Path) -> list[Record]:
    """Return the records below a campaign's ``runs/``, in the order of their folders' names.

    Raises:
        InputError: a record that cannot be read, or that another version wrote
    """
    return [read_record(path.parent) for path in sorted(campaign.glob(f"runs/*/{RECORD}"))]


def read_record(folder: Path) -> Record:
    """Return the record in a run's folder; errors as in :func:`read_records`."""
    content = read_json(folder / RECORD)
    if content.get("format") != FORMAT:
        raise InputError(
            f"{folder / RECORD}: format {content.get('format')}; this version reads {FORMAT}"
        )
    try:
        return Record(**content, folder=folder)
    except TypeError as error:
        raise InputError(f"{folder / RECORD} is not a run's record: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """Return a json file's object, or raise :class:`InputError` naming the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} does not hold a json object")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a json file whole or not at all."""
    write_file(path, to_json(content, indent=1, ensure_ascii=False) + "\n")


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return the lines of Detectron2's ``metrics.json``, each iteration's last one, in order.

    A run that was cut off repeats the iterations since its last checkpoint, and may end in half
    a line.
    """
    return sorted(_last_lines(run / "metrics.json").values(), key=lambda line: line["iteration"])


def _last_lines(path: Path) -> dict[tuple[int, bool], dict[str, Any]]:
    def lines() -> Iterator[dict[str, Any]]:
        for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict) and "iteration" in line:
                yield line

    return {(line["iteration"], "bbox/AP" in line): line for line in lines()}


def final_metrics(run: Path) -> tuple[dict[str, float | None], float | None]:
    """Return AP by name, and milliseconds an image, of the last evaluation in ``metrics.json``."""
    evaluations = [line for line in read_metrics(run) if "bbox/AP" in line]
    if not evaluations:
        return {}, None
    last = evaluations[-1]
    metrics = {
        name.removeprefix("bbox/"): None if value is None or math.isnan(value) else value
        for name, value in last.items()
        if name.startswith("bbox/")
    }
    return metrics, last.get("inference/ms_per_image")
