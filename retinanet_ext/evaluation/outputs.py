"""Where an evaluation writes its results, and the picture of them."""

from __future__ import annotations

import json
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from retinanet_ext.data.images import ImageReader

DETECTIONS = "coco_instances_results.json"
"""The file of detections that Detectron2's ``COCOEvaluator`` writes, in COCO's format."""


def inference_dir(cfg: CfgNode, dataset_name: str) -> Path:
    """Return the folder of a data set's detections: one per data set where there are several."""
    folder = Path(cfg.OUTPUT_DIR, "inference")
    return folder / dataset_name if len(cfg.DATASETS.TEST) > 1 else folder


def grid_path(cfg: CfgNode, dataset_name: str) -> Path:
    """Return the file of a data set's picture."""
    suffix = f"_{dataset_name}" if len(cfg.DATASETS.TEST) > 1 else ""
    return Path(cfg.OUTPUT_DIR, f"detections{suffix}.png")


def draw_detections(cfg: CfgNode, dataset_name: str) -> None:
    """Draw the detections that an evaluation has written, beside the ground truth.

    Nothing is drawn where the evaluator has written none.
    """
    file = inference_dir(cfg, dataset_name) / DETECTIONS
    if not file.exists():
        return
    from retinanet_ext.evaluation.pictures import draw_detection_grid  # matplotlib loads slowly

    predictions = json.loads(file.read_text())
    metadata = MetadataCatalog.get(dataset_name)
    class_ids = metadata.get("thing_dataset_id_to_contiguous_id")
    if class_ids is not None:
        for prediction in predictions:
            prediction["category_id"] = class_ids[prediction["category_id"]]
    draw_detection_grid(
        DatasetCatalog.get(dataset_name),
        predictions,
        metadata.thing_classes,
        grid_path(cfg, dataset_name),
        num_images=cfg.TEST.DETECTION_GRID.NUM_IMAGES,
        score_thresh=cfg.TEST.DETECTION_GRID.SCORE_THRESH,
        reader=ImageReader.from_config(cfg),
    )
