"""The paper's tables: the config keys that each row changes, and the numbers the paper printed.

Rows, numbers and claims are data in ``tables.yaml``; the recipes below expand what a row names
there (``focal: [2.0, 0.25]``) to config keys. Numbers are those of arXiv 1708.02002v2: AP in
percent on COCO, milliseconds per image on an Nvidia M40. docs/deviations.md lists what is assumed
where the paper leaves a choice open.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from retinanet_ext.experiments.grids import GRIDS
from retinanet_ext.experiments.rows import (
    Claim,
    Row,
    Table,
    cross_entropy,
    focal,
    image_sides,
    loss,
    ohem,
)

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
ABOVE = "AP above 33.5"  # the outcome of figure 7's blue curves


# Recipes: what a row of tables.yaml names, as config keys.


def _anchors(scales: int, aspects: int) -> dict[str, Any]:
    return {
        "MODEL.ANCHOR_GENERATOR.SCALES_PER_OCTAVE": scales,
        "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [[0.5, 1.0, 2.0]] if aspects == 3 else [[1.0]],
    }


RECIPES: dict[str, Callable[..., dict[str, Any]]] = {
    "cross_entropy": cross_entropy,
    "focal": focal,
    "focal_star": lambda gamma, beta: loss("focal_star", ALPHA=0.25, GAMMA=gamma, BETA=beta),
    "hinge": lambda margin: loss("hinge", MARGIN=margin),
    "ohem": ohem,
    "anchors": _anchors,
}

SHORT_SIDES = {400: 112, 500: 136, 600: 160, 700: 184, 800: 216}
"""Image sides of table 1e, and those of the small preset in proportion (600 pixels: 160)."""

SMALL_BACKBONES: dict[str, dict[str, Any]] = {
    "R50": {},
    "R101": {"MODEL.RESNETS.DEPTH": 34},
    "X101": {
        "MODEL.RESNETS.DEPTH": 50,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 256,
        "MODEL.RESNETS.NUM_GROUPS": 32,
        "MODEL.RESNETS.WIDTH_PER_GROUP": 4,
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
    },
}
"""What the small presets train in place of the paper's models, where a table compares models."""


def _image_side(depth: int, side: int) -> dict[str, dict[str, Any]]:
    backbone = SMALL_BACKBONES[f"R{depth}"]
    small = {**image_sides([SHORT_SIDES[side]]), **backbone}
    return {
        "paper": image_sides([side], round(side * 5 / 3)),
        "small": small,
        "gpu": {**image_sides([2 * SHORT_SIDES[side]]), **backbone},
        "quick": small,
    }


def _longer(model: str) -> dict[str, dict[str, Any]]:
    """Return a schedule 1.5 times as long, with scale jitter."""
    steps = {"SOLVER.MAX_ITER": 135_000, "SOLVER.STEPS": (90_000, 120_000)}
    small = SMALL_BACKBONES[model]
    return {
        "paper": {**steps, **image_sides([640, 672, 704, 736, 768, 800], 1333)},
        "small": {"SOLVER.MAX_ITER": 525, **image_sides([128, 144, 160]), **small},
        "gpu": {"SOLVER.MAX_ITER": 675, **image_sides([256, 288, 320]), **small},
        "quick": {"SOLVER.MAX_ITER": 45, **image_sides([96, 112, 128]), **small},
    }


PRESET_RECIPES = {"image_side": _image_side, "longer": _longer}
"""Recipes whose keys depend on the preset."""


def _read_row(name: str, columns: Sequence[str], row: Mapping[str, Any]) -> Row:
    overrides = dict(row.get("keys", {}))
    preset_overrides: dict[str, dict[str, Any]] = dict(row.get("preset_keys", {}))
    for recipe in row.keys() & RECIPES.keys():
        overrides |= RECIPES[recipe](*row[recipe])
    for recipe in row.keys() & PRESET_RECIPES.keys():
        preset_overrides = PRESET_RECIPES[recipe](*row[recipe])
    return Row(
        name,
        dict(zip(columns, row["columns"], strict=True)),
        overrides,
        dict(zip((*METRICS, "ms"), row.get("paper", ()), strict=False)),
        row.get("outcome", ""),
        row.get("model", "R50"),
        preset_overrides,
        baseline=row.get("baseline"),
    )


def _read_claim(text: str, names: Sequence[str]) -> Claim:
    """Read ``better > worse: text``, each a name or a pattern such as ``ohem*``."""
    pair, _, words = text.partition(": ")
    sides = pair.split(" > ")
    better, worse = (tuple(name for name in names if fnmatchcase(name, side)) for side in sides)
    return Claim(words, better, worse)


def _read_tables() -> dict[str, Table]:
    text = Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")
    tables = {}
    for name, content in yaml.safe_load(text).items():
        rows, columns = content.pop("rows"), content.pop("columns")
        claims = [_read_claim(claim, list(rows)) for claim in content.pop("claims", [])]
        tables[name] = Table(
            name=name,
            rows=tuple(_read_row(row, columns, rows[row]) for row in rows),
            claims=tuple(claims),
            **content,
        )
    return tables


TABLES: dict[str, Table] = {**_read_tables(), **GRIDS}
