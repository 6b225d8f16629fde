"""Made-up folders of campaigns, as the runner leaves them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from retinanet_ext.experiments.presets import PRESETS
from retinanet_ext.experiments.record import Record, write_json
from retinanet_ext.experiments.tables import TABLES

CONFIG = """\
INPUT:
  MIN_SIZE_TEST: 160
  MIN_SIZE_TRAIN: [160]
MODEL:
  RESNETS: {DEPTH: 18, NUM_GROUPS: 1, WIDTH_PER_GROUP: 64}
SOLVER: {BASE_LR: 0.02, IMS_PER_BATCH: 4, MAX_ITER: 350}
"""
HARDWARE = {"cpu": "Intel(R) Xeon(R)", "threads": 1, "gpus": [], "num_processes": 1}
SMALL = PRESETS["small"].configs
WHAT_A_ROW_IS = ("overrides", "preset_overrides", "factors")
VERSIONS = {"retinanet_ext": "0.3.0", "torch": "2.11.0"}


def make_campaign(folder: Path) -> Path:
    """Make a campaign without runs."""
    (folder / "runs").mkdir(parents=True)
    info = {
        "format": 1,
        "preset": "small",
        "version": "0.3.0",
        "opts": ["DATASETS.CUSTOM.TRAIN_JSON", "cells/train.json", "SOLVER.CLIP", "1.0"],
        "data": {
            "train": {"name": "cells/train.json", "sha256": "0" * 64},
            "test": {"name": "cells/val.json", "sha256": "1" * 64},
        },
    }
    write_json(folder / "campaign.json", info)
    return folder


def same_runs(table: str, row: str) -> list[str]:
    """Return every table/row that changes the same keys, the given one first."""
    first = TABLES[table][row]
    same = [
        f"{other.name}/{one.name}"
        for other in TABLES.values()
        for one in other.rows
        if all(getattr(one, what) == getattr(first, what) for what in WHAT_A_ROW_IS)
        and SMALL[one.model] == SMALL[first.model]
        and "small" in other.presets
    ]
    return sorted(same, key=lambda name: name != f"{table}/{row}")


def add_run(
    campaign: Path,
    table: str,
    row: str,
    seed: int = 1,
    ap: float | None = None,
    *,
    metrics: Mapping[str, float | None] | None = None,
    losses: Sequence[float] = (),
    picture: tuple[int, int] | None = None,
    **fields: Any,
) -> Record:
    """Add a run, finished with that AP unless ``fields`` say otherwise."""
    if metrics is None and ap is not None:
        metrics = {"AP": ap, "AP50": 2 * ap, "AP75": ap / 2, "AP-disc": ap + 1, "AP-ring": ap - 1}
    record = Record(
        **{
            "rows": same_runs(table, row),
            "seed": seed,
            "status": "finished",
            "key": min(same_runs(table, row)),
            "metrics": dict(metrics or {}),
            "inference_ms": 41.25,
            "iterations": 350,
            "wall_seconds": 100.0,
            "started": "2026-11-21T20:00:00",
            "ended": "2026-11-21T20:01:40",
            "commit": "0a1b2c3d4e",
            "versions": VERSIONS,
            "hardware": HARDWARE,
            "folder": campaign / "runs" / f"{table}_{row}_seed{seed}".replace(":", "-"),
            **fields,
        }
    )
    record.folder.mkdir()
    record.write()
    (record.folder / "config.yaml").write_text(CONFIG)
    lines = [
        json.dumps({"iteration": 20 * i + 19, "total_loss": loss, "loss_cls": loss / 2})
        for i, loss in enumerate(losses)
    ]
    (record.folder / "metrics.json").write_text("\n".join(lines))
    if picture is not None:
        width, height = picture
        pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(record.folder / "detections.png")
    return record
