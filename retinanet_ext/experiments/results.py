"""The runs of a campaign, read from its folder and sorted into the paper's tables."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from retinanet_ext.data.coco_json import count
from retinanet_ext.errors import InputError
from retinanet_ext.experiments.grids import GRIDS
from retinanet_ext.experiments.record import UNFINISHED, Record, read_json, read_records
from retinanet_ext.experiments.statistics import (
    WORDS,
    RowResult,
    TableResult,
    duration,
)
from retinanet_ext.experiments.tables import TABLES


@dataclass(frozen=True)
class Results:
    """The runs of a campaign and the tables that they fill.

    Attributes:
        info: the content of ``campaign.json``.
        tables: the tables in which at least two rows were run; if there are none, those with one.
        sparse: names of the tables left out. A run counts in every table that has its config, so
            running one table leaves single rows in others, and one level of a grid.
        configs: run's folder -> its config, flat: key -> value.
        superseded: runs left out, because their rows' config has changed since.
    """

    folder: Path
    info: Mapping[str, Any]
    runs: tuple[Record, ...]
    tables: tuple[TableResult, ...]
    sparse: tuple[str, ...] = ()
    configs: Mapping[Path, Mapping[str, Any]] = field(default_factory=dict)
    superseded: tuple[Record, ...] = ()

    @property
    def headline(self) -> str:
        """Return the number of claims per verdict, as a sentence."""
        words = [verdict.word for table in self.tables for verdict in table.verdicts]
        counts = {word: words.count(word) for word in WORDS if word in words}
        parts = ", ".join(f"{word} {number}" for word, number in counts.items())
        return f"The claims ({len(words)}): {parts}." if words else "No claim was tested."

    @property
    def warnings(self) -> list[str]:
        """Return the reasons, if any, why rows may not be comparable."""
        warnings = []
        if len(commits := _distinct(run.commit for run in self.runs)) > 1:
            warnings.append(
                f"The runs come from more than one commit: {', '.join(commits)}. Differences "
                "between rows may come from the code."
            )
        if self.superseded:
            names = ", ".join(run.folder.name for run in self.superseded)
            warnings.append(f"Left out, because their rows have changed since: {names}.")
        return warnings

    @property
    def facts(self) -> dict[str, str]:
        """Return what was run, with which settings and on which hardware: name -> text."""
        info, runs = self.info, self.runs
        data = (f"{side}: {data['name']}" for side, data in info.get("data", {}).items())
        opts = (" ".join(pair) for pair in zip(*[iter(info.get("opts", []))] * 2, strict=True))
        statuses = Counter(run.status for run in runs)
        dates = sorted(date[:10] for run in runs for date in (run.started, run.ended) if date)
        versions = {package: None for run in runs for package in run.versions}
        facts = {
            "Preset": str(info.get("preset", "")),
            "Data": "; ".join(data),
            "Model and budget": "; ".join(_distinct(map(_budget, self.configs.values()))),
            "Options": ", ".join(o for o in opts if not o.startswith(_DATA_KEYS)),
            "Runs": ", ".join(f"{num} {status}" for status, num in statuses.items()),
            "Seeds": ", ".join(_distinct(run.seed for run in runs)),
            "Wall time": duration(sum(run.wall_seconds or 0 for run in runs)) + " in all",
            "Dates": " to ".join(dict.fromkeys([*dates[:1], *dates[-1:]])),
            "Hardware": "; ".join(_distinct(_hardware(run.hardware) for run in runs)),
            "Versions": ", ".join(
                f"{package} {' / '.join(_distinct(run.versions.get(package) for run in runs))}"
                for package in versions
            ),
            "Commit": ", ".join(_distinct(run.commit for run in runs)),
        }
        return {name: value for name, value in facts.items() if value}


_DATA_KEYS = ("DATASETS.CUSTOM.TRAIN_", "DATASETS.CUSTOM.TEST_")


def read_results(campaign: Path) -> Results:
    """Read the records and configs in a campaign's folder.

    Raises:
        InputError: the folder does not exist, a record cannot be read, no run has ended, or the
            seeds of a row have different configs
    """
    if not campaign.is_dir():
        raise InputError(f"{campaign}: there is no such folder; name one that the runner wrote")
    ended = [run for run in read_records(campaign) if run.status != UNFINISHED]
    runs = sorted(ended, key=lambda run: (run.seed, run.folder.name))
    if not runs:
        raise InputError(f"{campaign}: no run has ended here yet, so there is nothing to report")
    newest: dict[str, str] = {}  # row -> key of its last run
    for run in sorted(runs, key=lambda run: run.ended):
        newest.update(dict.fromkeys(run.rows, run.key))
    shown = [run for run in runs if any(newest[row] == run.key for row in run.rows)]
    tables = []
    for table in TABLES.values():
        rows = [
            RowResult(
                table, row, tuple(run for run in shown if f"{table.name}/{row.name}" in run.rows)
            )
            for row in table.rows
        ]
        if any(row.runs for row in rows):
            tables.append(TableResult(table, tuple(rows)))
    configs = {run.folder: _read_config(run.folder / "config.yaml") for run in shown}
    _check_seeds_agree(shown, configs)
    full = [table for table in tables if len(table.measured) > 1 and _has_own_runs(table)]
    full = full or tables
    return Results(
        campaign,
        read_json(campaign / "campaign.json"),
        tuple(shown),
        tuple(full),
        tuple(table.table.name for table in tables if table not in full),
        configs,
        tuple(run for run in runs if run not in shown),
    )


def _has_own_runs(table: TableResult) -> bool:
    """Return whether more was run of a grid than the rows that other tables have as well."""
    runs = [run for row in table.rows for run in row.runs]
    name = table.table.name
    return name not in GRIDS or any(run.rows[0].startswith(f"{name}/") for run in runs)


_PER_RUN = ("SEED", "OUTPUT_DIR", "MODEL.DEVICE", "MODEL.TIMM.WEIGHTS", "DATASETS.CUSTOM.")
"""What seeds of one row may differ in. Data and weights are compared by their content."""


def _check_seeds_agree(runs: Iterable[Record], configs: Mapping[Path, Mapping[str, Any]]) -> None:
    """Refuse seeds of one row whose saved configs differ, because their mean is of no one row."""
    first: dict[str, Path] = {}  # key -> folder
    for run in runs:
        mine = configs[run.folder]
        other = first.setdefault(run.key, run.folder) if mine else run.folder
        theirs = configs[other]
        for key in sorted(mine.keys() | theirs.keys()):
            if not key.startswith(_PER_RUN) and mine.get(key) != theirs.get(key):
                raise InputError(
                    f"the seeds of {run.rows[0]} disagree about the configuration: {key} is "
                    f"{theirs.get(key)} in {other} and {mine.get(key)} in {run.folder}; move one "
                    "of the two folders away"
                )


def _distinct(values: Iterable[Any]) -> list[str]:
    """Return the distinct values that are not empty, as text; numbers are sorted."""
    values = list(dict.fromkeys(value for value in values if value not in ("", None)))
    if all(isinstance(value, (int, float)) for value in values):
        values.sort()
    return [str(value) for value in values]


def _read_config(path: Path) -> dict[str, Any]:
    if not path.exists():  # a run that failed may have left none
        return {}
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's is ten times as fast
    return flatten(yaml.load(path.read_text(encoding="utf-8"), Loader=loader))


def flatten(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested config as full key -> value, with lists instead of tuples."""
    flat: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = json.loads(json.dumps(value))
    return flat


def _budget(config: Mapping[str, Any]) -> str:
    """Return model, image size and training budget; an empty text if the model is no ResNet."""
    if "MODEL.RESNETS.DEPTH" not in config:
        return ""
    name = "ResNet" if config["MODEL.RESNETS.NUM_GROUPS"] == 1 else "ResNeXt"
    name = config.get("MODEL.TIMM.NAME") or f"{name}-{config['MODEL.RESNETS.DEPTH']}"
    sizes = {*config["INPUT.MIN_SIZE_TRAIN"], config["INPUT.MIN_SIZE_TEST"]}
    pixels = " to ".join(dict.fromkeys(map(str, (min(sizes), max(sizes)))))
    return (
        f"{name}-FPN, {pixels} px, "
        f"{config['SOLVER.MAX_ITER']} iterations of {config['SOLVER.IMS_PER_BATCH']} images, "
        f"learning rate {config['SOLVER.BASE_LR']:g}"
    )


def _hardware(hardware: Mapping[str, Any]) -> str:
    gpus = Counter(map(str, hardware.get("gpus") or []))
    parts = [f"{num} × {name}" if num > 1 else name for name, num in gpus.items()]
    if not gpus:
        threads = count(hardware.get("threads", 0), "thread")
        parts = [f"{hardware.get('cpu', 'CPU')}, {threads}, no GPU"]
    if hardware.get("num_processes", 1) > 1:
        parts.append(f"{hardware['num_processes']} processes")
    return ", ".join(parts)
