"""The record of a run, one JSON file, and the metrics in its folder."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from retinanet_ext.errors import InputError
from retinanet_ext.files import to_json, write_file

FORMAT = 1
RECORD = "record.json"
FINISHED, DIVERGED, FAILED, UNFINISHED = "finished", "diverged", "failed", "unfinished"


@dataclass
class Record:
    """The result of one run: one config, one seed.

    Attributes:
        rows: every ``table/row`` whose config this is.
        status: ``finished``, ``diverged`` (a result too), ``failed``, or ``unfinished`` while it
            runs and after it was cut off.
        key: digest of the config without its seed and folder.
        message: how it diverged or failed.
        metrics: AP in percent, under the names of COCO's evaluation; None where undefined.
        inference_ms: median milliseconds per image.
        wall_seconds: total over all parts of a run that was cut off.
        commit: of the project's code, for each part of the run; empty outside of git.
        hardware: ``cpu``, ``threads``, ``gpus`` and ``num_processes``.
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
    """Return the object in a JSON file, or raise :class:`InputError` naming the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} does not hold a JSON object")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically."""
    write_file(path, to_json(content, indent=1, ensure_ascii=False) + "\n")


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return the lines of Detectron2's ``metrics.json``, the last one of each iteration, in order.

    A run that was cut off repeats the iterations since its last checkpoint, and may end in half
    a line.
    """
    path = run / "metrics.json"
    last = {}
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        last[line["iteration"], "bbox/AP" in line] = line
    return sorted(last.values(), key=lambda line: line["iteration"])


def final_metrics(run: Path) -> tuple[dict[str, float | None], float | None]:
    """Return AP by name, and milliseconds per image, of the last evaluation in ``metrics.json``."""
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
