"""From a row of a table to a whole config: as the paper ran it, or small enough for one machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from tabulate import tabulate

from retinanet_ext.config_keys import read_key
from retinanet_ext.engine import load_config
from retinanet_ext.engine.config_check import resolve_precision
from retinanet_ext.engine.config_load import AUTO_KEYS
from retinanet_ext.engine.config_warnings import ineffective_keys
from retinanet_ext.errors import InputError
from retinanet_ext.experiments.tables import TABLES, Row, Table


@dataclass(frozen=True)
class Preset:
    """How rows are run.

    Attributes:
        name, what: as on the command line, and in a few words.
        configs: the paper's model -> file in ``configs/``.
        overrides: config key -> value; the command line and the row take precedence.
        seeds: number of seeds of each row, unless the command line says otherwise.
    """

    name: str
    what: str
    configs: Mapping[str, str]
    overrides: Mapping[str, Any] = field(default_factory=dict)
    seeds: int = 1


_SMALL = {
    **dict.fromkeys(("R50", "R101", "X101"), "small_R18_FPN.yaml"),
    "MobileNetV2": "small_mobilenetv2_FPN.yaml",
}
_SMALL_OVERRIDES = {
    "DATASETS.TRAIN": ("retinanet_ext_sample_train",),
    "DATASETS.TEST": ("retinanet_ext_sample_val",),
    "INPUT.MIN_SIZE_TRAIN": (160,),
    "INPUT.MIN_SIZE_TEST": 160,
    "MODEL.ANCHOR_GENERATOR.BASE_SCALE": 2.0,  # small images hold small objects
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 4,
    # The paper's optimizer with its momentum and weight decay, in place of the config's.
    "SOLVER.OPTIMIZER": "SGD",
    "SOLVER.BASE_LR": 0.02,
    "SOLVER.WEIGHT_DECAY": 0.0001,
    "SOLVER.LR_SCHEDULER_NAME": "WarmupCosineLR",
    # Not in the paper. From pretrained weights seeds lie up to 22 AP apart without it.
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": 10.0,
    "SOLVER.EMA.DECAY": 0.0,
    "SOLVER.MAX_ITER": 350,
    "SOLVER.CHECKPOINT_PERIOD": 100,
}
_GPU_OVERRIDES = {
    **_SMALL_OVERRIDES,
    "INPUT.MIN_SIZE_TRAIN": (320,),
    "INPUT.MIN_SIZE_TEST": 320,
    "MODEL.ANCHOR_GENERATOR.BASE_SCALE": 4.0,
    "DATALOADER.NUM_WORKERS": 1,
    "SOLVER.IMS_PER_BATCH": 8,
    "SOLVER.MAX_ITER": 450,
    "SOLVER.CHECKPOINT_PERIOD": 150,
    "TEST.DETECTION_GRID.NUM_IMAGES": 0,
}
_QUICK_OVERRIDES = {
    **_SMALL_OVERRIDES,
    "INPUT.MIN_SIZE_TRAIN": (128,),
    "INPUT.MIN_SIZE_TEST": 128,
    "SOLVER.WARMUP_ITERS": 10,
    "SOLVER.MAX_ITER": 30,
    "SOLVER.CHECKPOINT_PERIOD": 30,
    "TEST.DETECTION_GRID.NUM_IMAGES": 4,
}
_RECIPE_OVERRIDES = {"TEST.DETECTION_GRID.NUM_IMAGES": 0}

PRESETS = {
    "paper": Preset(
        "paper",
        "COCO as published: 8 GPUs, 16 images per iteration, 90k iterations",
        {name: f"retinanet_{name}_FPN.yaml" for name in ("R50", "R101", "X101")},
    ),
    "small": Preset(
        "small",
        "ResNet-18 from random weights on your data: minutes per row on one GPU or CPU core",
        _SMALL,
        _SMALL_OVERRIDES,
        seeds=2,
    ),
    "gpu": Preset(
        "gpu",
        "the small preset at 320 pixels and 450 x 8 images: with --jobs several rows at a time",
        _SMALL,
        _GPU_OVERRIDES,
        seeds=3,
    ),
    "quick": Preset(
        "quick",
        "a first look: the small preset cut to seconds per row; its AP means little",
        _SMALL,
        _QUICK_OVERRIDES,
    ),
    "recipe": Preset(
        "recipe",
        "the small configs as they are, on your data: for the tables of the recipe",
        _SMALL,
        _RECIPE_OVERRIDES,
        seeds=3,
    ),
    "quickstart": Preset(
        "quickstart",
        "the quick start as it is, on the sample set: for table recipe",
        {"R50": "quickstart.yaml"},
        _RECIPE_OVERRIDES,
        seeds=3,
    ),
}


def find_preset(name: str) -> Preset:
    """Return a preset, or raise :class:`InputError` with the names of all presets."""
    return _find("preset", name, PRESETS)


def _find(kind: str, name: str, known: Mapping[str, Any]) -> Any:
    if name not in known:
        raise InputError(f"there is no {kind} {name!r}; there are {', '.join(known)}")
    return known[name]


def find_rows(
    tables: Sequence[str], rows: Sequence[str], preset: Preset
) -> list[tuple[Table, Row]]:
    """Return rows with their tables, in the order of :data:`TABLES`.

    Args:
        tables: names of tables; none means all tables of the preset that need no key
        rows: names of rows; none means all. Each must be in one of the tables.
        preset: how they will be run

    Raises:
        InputError: a name that does not exist, with those that do
    """
    for table in (_find("table", name, TABLES) for name in tables):
        if preset.name not in table.presets:
            raise InputError(
                f"table {table.name} has no preset {preset.name!r}; "
                f"it has {', '.join(table.presets)}"
            )
    found = rows_with("", preset)
    if tables:
        found = [(t, row) for t in TABLES.values() if t.name in tables for row in t.rows]
    known = list(dict.fromkeys(row.name for _, row in found))
    for name in rows:
        if name not in known:
            where = f"table {', '.join(tables)}" if tables else "any table"
            raise InputError(f"there is no row {name!r} in {where}; there are {', '.join(known)}")
    return [(table, row) for table, row in found if not rows or row.name in rows]


def rows_with(needs: str, preset: Preset) -> list[tuple[Table, Row]]:
    """Return the rows of a preset with their tables, of the tables that need this key or none."""
    return [
        (table, row)
        for table in TABLES.values()
        if preset.name in table.presets and table.needs == needs
        for row in table.rows
    ]


def row_arguments(
    preset: Preset, row: Row, seed: int, opts: Sequence[str], configs: Path
) -> list[str]:
    """Return a row's config as KEY VALUE pairs: the preset's, then ``opts``, then the row's own.

    What a row varies cannot be overridden; otherwise its name would be wrong. What it multiplies
    can.
    """
    own = _own(preset, row, seed, _shared_config(preset, row, opts, configs))
    return [*_pairs(preset.overrides), *opts, *_pairs(own)]


def _own(preset: Preset, row: Row, seed: int, shared: CfgNode) -> dict[str, Any]:
    own = {**row.overrides, **row.preset_overrides.get(preset.name, {}), "SEED": seed}
    for key, factor in row.factors.items():
        value = read_key(shared, key)
        own[key] = max(1, round(factor * value)) if isinstance(value, int) else factor * value
    return own


def _pairs(overrides: Mapping[str, Any]) -> list[str]:
    texts = {key: v if isinstance(v, str) else repr(v) for key, v in overrides.items()}
    return [text for pair in texts.items() for text in pair]


def row_config(preset: Preset, row: Row, seed: int, opts: Sequence[str], configs: Path) -> CfgNode:
    """Return the config that :func:`row_arguments` gives, after a check of its keys.

    Args:
        preset, row: what to run
        seed: of weights, order of the data and augmentation
        opts: alternating keys and values of the command line
        configs: the folder ``configs/``

    Raises:
        InputError: a key that is unknown, or has no effect beside the row's other settings
    """
    cfg = merge_row(preset, row, seed, opts, configs)
    # Otherwise all rows of a sweep would give the same result.
    if ineffective := ineffective_keys(cfg):
        raise InputError(f"row {row.name}: {ineffective[0]}")
    return cfg


def merge_row(preset: Preset, row: Row, seed: int, opts: Sequence[str], configs: Path) -> CfgNode:
    """Return the config that :func:`row_arguments` gives, without checking it."""
    cfg = _shared_config(preset, row, opts, configs).clone()
    own = _own(preset, row, seed, cfg)
    for key in own.keys() & AUTO_KEYS:  # yacs would refuse "auto" in the place of a number
        group, _, name = key.rpartition(".")
        read_key(cfg, group)[name] = own.pop(key)
    cfg.merge_from_list([part for pair in own.items() for part in pair])
    return cfg


def _shared_config(preset: Preset, row: Row, opts: Sequence[str], configs: Path) -> CfgNode:
    """Return the config of a row without what the row itself changes; not to be modified."""
    file = str(configs / preset.configs[row.model])
    return _load_once(file, (*_pairs(preset.overrides), *opts))


@cache
def _load_once(file: str, opts: tuple[str, ...]) -> CfgNode:
    """Return a config, which rows share, because reading it takes longer than merging their keys.

    The precision "auto" is resolved, because results of different ones cannot be compared.
    """
    cfg = load_config(file, opts)
    resolve_precision(cfg)
    return cfg


def list_tables(names: Sequence[str] = ()) -> str:
    """Return all tables as text, or the rows of the named tables."""
    if not names:
        rows = [
            (t.name, len(t.rows), t.title, t.source, ", ".join(t.presets)) for t in TABLES.values()
        ]
        return tabulate(rows, ["table", "rows", "what", "where", "presets"], disable_numparse=True)
    texts = []
    for table in (_find("table", name, TABLES) for name in names):
        rows = [
            (row.name, *row.settings.values(), row.paper.get("AP", row.outcome))
            for row in table.rows
        ]
        head = ["row", *table.rows[0].settings, "the paper's AP"]
        lines = [f"{table.name}: {table.title} ({table.source})", table.note]
        lines.append(tabulate(rows, head, disable_numparse=True))
        texts.append("\n".join(filter(None, lines)))
    return "\n\n".join(texts)
