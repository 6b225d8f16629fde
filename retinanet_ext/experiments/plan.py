"""Plan a campaign: which configs are run with which seeds, and in which folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

import retinanet_ext
from retinanet_ext.data.sample_set import GENERATOR_VERSION
from retinanet_ext.data.sources import find_custom, read_texts
from retinanet_ext.engine.launch import check_processes
from retinanet_ext.errors import InputError
from retinanet_ext.experiments import record
from retinanet_ext.experiments.presets import (
    Preset,
    find_preset,
    find_rows,
    merge_row,
    row_arguments,
    row_config,
    rows_with,
)
from retinanet_ext.experiments.tables import Row, Table

SIDES = ("TRAIN", "TEST")


@dataclass(frozen=True)
class Run:
    """One config to be run with one seed.

    Attributes:
        rows: every ``table/row`` of the preset that has this config.
        key: digest of the config without its seed and folder.
        config_file, arguments: for ``train_net.py``, without OUTPUT_DIR.
    """

    rows: tuple[str, ...]
    key: str
    seed: int
    config_file: Path
    arguments: tuple[str, ...]

    @property
    def name(self) -> str:
        """Return the name of the run's folder, after its first row."""
        table, row = self.rows[0].split("/")
        return f"{table}_{row}_seed{self.seed}".replace(":", "-")

    @property
    def label(self) -> str:
        """Return the name of the run in the log."""
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
    first_seed: int = 1,
    num_gpus: int = 1,
    opts: Sequence[str] = (),
    root: Path,
    output: Path,
) -> tuple[Campaign, list[Run]]:
    """Return the campaign and its runs, seed after seed; nothing is written.

    Args:
        preset_name: a key of :data:`~retinanet_ext.experiments.presets.PRESETS`
        tables, rows: names; none means all
        seeds, first_seed: number of seeds per row, by default the preset's, and the lowest of them
        num_gpus: number of processes per run
        opts: alternating config keys and values for all rows
        root: folder of ``train_net.py`` and ``configs/``
        output: folder of all campaigns

    Raises:
        InputError: an unknown name, key or value; a data file that cannot be read
    """
    preset = find_preset(preset_name)
    chosen = find_rows(tables, rows, preset)
    for option, value in (("--seeds", seeds), ("--first-seed", first_seed)):
        if value is not None and value < 1:
            raise InputError(f"{option} must be at least 1, got {value}")
    check_processes(num_gpus)
    _check_opts(preset, chosen, opts)
    configs = root / "configs"
    (needs,) = {table.needs for table, _ in chosen}
    model = chosen[0][1].model if needs else "R50"
    base = row_config(preset, Row("base", {}, {}, model=model), 0, opts, configs)
    digests = _file_digests(base)
    names = {f"{table.name}/{row.name}" for table, row in chosen}
    rows_of: dict[str, list[str]] = {}  # key -> table/row
    distinct: dict[str, Row] = {}
    for table, row in rows_with(needs, preset):
        name = f"{table.name}/{row.name}"
        config = row_config if name in names else merge_row  # only what is run is checked
        key = _digest(config(preset, row, 0, opts, configs), digests)
        rows_of.setdefault(key, []).append(name)
        if name in names:
            distinct.setdefault(key, row)
    campaign = _campaign(preset, num_gpus, opts, base, digests, output)
    return campaign, [
        Run(
            rows=tuple(rows_of[key]),
            key=key,
            seed=seed,
            config_file=configs / preset.configs[row.model],
            arguments=tuple(row_arguments(preset, row, seed, opts, configs)),
        )
        for seed in range(first_seed, first_seed + (seeds or preset.seeds))
        for key, row in distinct.items()
    ]


def _check_opts(preset: Preset, chosen: Sequence[tuple[Table, Row]], opts: Sequence[str]) -> None:
    """Refuse options that a row would silently override."""
    if len(opts) % 2:
        raise InputError(
            f"config values come as pairs KEY VALUE, got {' '.join(opts)}; "
            "several tables are given as --table A --table B"
        )
    for table, _ in chosen:
        if table.needs not in ("", *opts[::2]):
            raise InputError(
                f"table {table.name} needs {table.needs} FILE at the end of the command: weights "
                "for the rows that do not start from random ones"
            )
        if table.needs != chosen[0][0].needs:
            raise InputError(
                f"tables {chosen[0][0].name} and {table.name} cannot be run by one command: only "
                "one of them takes weights"
            )
    for key in opts[::2]:
        if key in ("OUTPUT_DIR", "SEED"):
            raise InputError(f"{key} is set by the runner; see --output, --seeds and --first-seed")
        for table, row in chosen:
            own = {**row.overrides, **row.preset_overrides.get(preset.name, {})}
            if key in own and key != table.needs:
                raise InputError(
                    f"{key} is what table {table.name} itself sets (row {row.name}); leave it "
                    "out, or name other tables with --table"
                )


def _campaign(
    preset: Preset,
    num_gpus: int,
    opts: Sequence[str],
    base: CfgNode,
    digests: Mapping[str, str],
    output: Path,
) -> Campaign:
    content = {
        "format": record.FORMAT,
        "preset": preset.name,
        "version": retinanet_ext.__version__,
        "num_gpus": num_gpus,
        "opts": list(opts),
        "data": _describe_data(base, digests),
    }
    parts = retinanet_ext.__version__, GENERATOR_VERSION, num_gpus, _digest(base, digests)
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()[:8]
    return Campaign(output / f"{preset.name}-{digest}", content)


def _annotation_files(cfg: CfgNode, side: str) -> tuple[str, ...]:
    return read_texts(cfg, f"DATASETS.CUSTOM.{side}_JSON")


def _file_digests(cfg: CfgNode) -> dict[str, str]:
    """Return the digests of each side's annotation files; empty: the side has none."""
    sources = {side: find_custom(cfg, side) for side in SIDES}
    return {
        side: ", ".join(source.digests().values()) if source else ""
        for side, source in sources.items()
    }


def _describe_data(cfg: CfgNode, digests: Mapping[str, str]) -> dict[str, dict[str, str]]:
    if len(cfg.DATASETS.TEST) > 1:
        raise InputError(f"DATASETS.TEST must name one data set here, got {cfg.DATASETS.TEST}")
    files = {side: _annotation_files(cfg, side) for side in SIDES}
    return {
        side.lower(): {
            "name": ", ".join(files[side] or cfg.DATASETS[side]),
            "sha256": digests[side],
        }
        for side in SIDES
    }


def _digest(cfg: CfgNode, digests: Mapping[str, str]) -> str:
    """Return a digest of what a run's result depends on: files by content, not by path."""
    content = {**cfg, "OUTPUT_DIR": "", "SEED": 0}
    custom = dict(cfg.DATASETS.CUSTOM)
    for side in SIDES:
        custom[f"{side}_JSON"] = digests[side] if _annotation_files(cfg, side) else ""
        custom[f"{side}_IMAGES"] = ""
    content["DATASETS"] = {**cfg.DATASETS, "CUSTOM": custom}
    if (weights := Path(cfg.MODEL.TIMM.WEIGHTS)).is_file():
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()
        content["MODEL"] = {**cfg.MODEL, "TIMM": {**cfg.MODEL.TIMM, "WEIGHTS": digest}}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
