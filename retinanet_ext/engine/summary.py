"""The last lines of a run's log: its result, and where its files are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from tabulate import tabulate

from retinanet_ext.evaluation import COCO_MAX_DETECTIONS
from retinanet_ext.evaluation.outputs import DETECTIONS, grid_path, inference_dir

CLASS_COLUMNS = 4


def summarize(cfg: CfgNode, results: Mapping[str, Any]) -> str:
    """Return AP, AP per class, the validation loss and the files of a run as text.

    Args:
        cfg: config of the run
        results: as ``Trainer.test`` returns them: of one data set, or by name of several
    """
    names = cfg.DATASETS.TEST
    by_name = {names[0]: results} if len(names) == 1 else results
    parts = [
        text
        for name in names
        for text in (
            _tables(cfg, name, by_name.get(name, {}).get("bbox", {})),
            *_validation_loss(name, by_name.get(name, {}).get("validation", {})),
        )
    ]
    folder = Path(cfg.OUTPUT_DIR)
    files = {
        **{grid_path(cfg, name): "picture of detections" for name in names},
        **{inference_dir(cfg, name): "all detections" for name in names},
        folder / "metrics.json": "losses and AP by iteration",
        folder / "model_final.pth": "weights",
        folder / "model_best.pth": f"weights of the best {cfg.SOLVER.BEST.METRIC}",
        folder / "log.txt": "log",
    }
    table = tabulate(
        [(what, path) for path, what in files.items() if path.exists()], tablefmt="plain"
    )
    return "\n\n".join(["Finished.", *parts, table])


def _validation_loss(name: str, losses: Mapping[str, float]) -> list[str]:
    if not losses:
        return []
    parts = ", ".join(f"{key} {value:.4g}" for key, value in losses.items())
    return [f"Validation loss on {name}: {parts}"]


def _tables(cfg: CfgNode, name: str, metrics: Mapping[str, float]) -> str:
    if not metrics:
        return f"{name}: not evaluated, as it has no annotations"
    overall = {key: value for key, value in metrics.items() if not key.startswith("AP-")}
    detections = inference_dir(cfg, name) / DETECTIONS
    size = detections.stat().st_size if detections.is_file() else 0
    if all(map(math.isnan, overall.values())):
        # Detectron2's evaluator gives NaN for a detector that finds nothing, BoxEvaluator gives 0.
        what = "no objects" if size > len("[]") else "no detections, or no objects"
        return f"{name}: {what} in the test data: AP cannot be computed"
    if size == len("[]"):
        thresh = cfg.MODEL.RETINANET.SCORE_THRESH_TEST
        return f"{name}: no detections above MODEL.RETINANET.SCORE_THRESH_TEST {thresh:g}: AP is 0"
    number = {key: "-" if math.isnan(value) else f"{value:.1f}" for key, value in metrics.items()}
    style = {"headers": "keys", "stralign": "right", "disable_numparse": True}
    parts = [
        f"Box AP on {name}, in percent\n" + tabulate({k: [number[k]] for k in overall}, **style)
    ]
    cells = [text for key in metrics if key not in overall for text in (key[3:], number[key])]
    if cells:  # Detectron2 gives none if there is one class
        width = min(len(cells), 2 * CLASS_COLUMNS)
        rows = [cells[start : start + width] for start in range(0, len(cells), width)]
        columns = {"colalign": ["left", "right"] * (width // 2), "disable_numparse": True}
        parts.append(tabulate(rows, ["class", "AP"] * (width // 2), **columns))
    limit = cfg.TEST.DETECTIONS_PER_IMAGE
    if limit > COCO_MAX_DETECTIONS:
        parts.append(
            f"AP of up to {limit} detections per image (TEST.DETECTIONS_PER_IMAGE): not COCO's, "
            f"which counts {COCO_MAX_DETECTIONS}"
        )
    if "-" in number.values():
        parts.append("-: no such objects in the test data")
    return "\n\n".join(parts)
