"""The last thing a run prints: its result, and where to find the rest."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from tabulate import tabulate

from retinanet_ext.evaluation import COCO_MAX_DETECTIONS
from retinanet_ext.evaluation.outputs import DETECTIONS, grid_path, inference_dir

CLASS_COLUMNS = 4


def summarize(cfg: CfgNode, results: Mapping[str, Any]) -> str:
    """Return AP, AP of each class and the files of a run as text.

    Args:
        cfg: the config of the run
        results: as ``Trainer.test`` returns them: of one data set, or by data set where there are
            several
    """
    names = cfg.DATASETS.TEST
    by_name = {names[0]: results} if len(names) == 1 else results
    parts = [_table(cfg, name, by_name.get(name, {}).get("bbox", {})) for name in names]
    return "\n\n".join(["Finished.", *parts, _files(cfg)])


def _table(cfg: CfgNode, name: str, metrics: Mapping[str, float]) -> str:
    if not metrics:
        return f"{name}: not evaluated, as it has no annotations"
    prefix = "AP-"
    overall = {key: value for key, value in metrics.items() if not key.startswith(prefix)}
    if all(map(math.isnan, overall.values())):
        return f"{name}: no objects in the test data: AP cannot be computed"
    detections = inference_dir(cfg, name) / DETECTIONS
    if detections.is_file() and detections.stat().st_size <= len("[]"):
        thresh = cfg.MODEL.RETINANET.SCORE_THRESH_TEST
        return f"{name}: no detections above MODEL.RETINANET.SCORE_THRESH_TEST {thresh:g}: AP is 0"
    limit = cfg.TEST.DETECTIONS_PER_IMAGE
    notes = []
    if limit > COCO_MAX_DETECTIONS:
        notes.append(
            f"AP of up to {limit} detections per image (TEST.DETECTIONS_PER_IMAGE): not COCO's, "
            f"which counts {COCO_MAX_DETECTIONS}"
        )
    if any(map(math.isnan, metrics.values())):
        notes.append("-: no such objects in the test data")
    text = f"Box AP on {name}, in percent\n" + tabulate(
        [[_number(value) for value in overall.values()]],
        list(overall),
        stralign="right",
        disable_numparse=True,
    )
    classes = [
        (key.removeprefix(prefix), _number(value))
        for key, value in metrics.items()
        if key.startswith(prefix)
    ]
    if not classes:  # Detectron2 gives none where there is one class
        return "\n\n".join([text, *notes])
    num_rows = math.ceil(len(classes) / CLASS_COLUMNS)
    rows = [
        [cell for label, ap in classes[row::num_rows] for cell in (label, ap)]
        for row in range(num_rows)
    ]
    num_columns = len(rows[0]) // 2
    by_class = tabulate(
        rows,
        ["class", "AP"] * num_columns,
        colalign=["left", "right"] * num_columns,
        disable_numparse=True,
    )
    return "\n\n".join([text, by_class, *notes])


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1f}"


def _files(cfg: CfgNode) -> str:
    folder = Path(cfg.OUTPUT_DIR)
    candidates: Sequence[tuple[Path, str]] = [
        *((grid_path(cfg, name), "picture of detections") for name in cfg.DATASETS.TEST),
        *((inference_dir(cfg, name), "all detections") for name in cfg.DATASETS.TEST),
        (folder / "metrics.json", "losses and AP by iteration"),
        (folder / "model_final.pth", "weights"),
        (folder / "log.txt", "log"),
    ]
    return tabulate([(what, path) for path, what in candidates if path.exists()], tablefmt="plain")
