"""A run's folder as training leaves it: its config and weights, and detections of its test data."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.modeling import build_model

import retinanet_ext
from retinanet_ext.data import prepare_datasets
from retinanet_ext.data.coco_json import read_coco_json
from retinanet_ext.engine.config_check import check_config, use_cpu_without_cuda
from retinanet_ext.engine.config_load import load_config
from retinanet_ext.engine.find_checkpoint import last_checkpoint
from retinanet_ext.engine.model_selection import BEST
from retinanet_ext.engine.setup import load_trained_weights
from retinanet_ext.engine.trainer import Trainer
from retinanet_ext.errors import InputError
from retinanet_ext.evaluation.box_data import BoxData
from retinanet_ext.files import make_folder, sha256_of, write_file

EVALUATION = "evaluation"
"""Folder within a run's folder for what is computed after the training."""

logger = logging.getLogger(__name__)


def load_run(folder: str | Path, opts: Sequence[str] = ()) -> CfgNode:
    """Return the config of a run, with the run's weights as MODEL.WEIGHTS.

    The weights are ``model_best.pth`` if the run has it, and the last checkpoint otherwise.
    OUTPUT_DIR is the folder itself, because a run may have been moved since it was trained.

    Args:
        folder: OUTPUT_DIR of a training
        opts: alternating keys and values that replace the run's, such as MODEL.WEIGHTS

    Returns:
        the config, not frozen; without CUDA its device is the CPU

    Raises:
        InputError: the folder is not a run's, or holds no checkpoint

    Example::

        predictor = Predictor(load_run("output/mine"))
    """
    folder = Path(folder)
    config = folder / "config.yaml"
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give the OUTPUT_DIR of a training")
    if not config.is_file():
        raise InputError(
            f"{folder} is not the folder of a run, because it holds no config.yaml; give the "
            "OUTPUT_DIR of a training"
        )
    cfg = load_config(config, opts)
    cfg.OUTPUT_DIR = str(folder)
    if "MODEL.WEIGHTS" not in opts[::2]:
        best = folder / f"{BEST}.pth"
        cfg.MODEL.WEIGHTS = str(best) if best.is_file() else last_checkpoint(folder)
        if not cfg.MODEL.WEIGHTS:
            raise InputError(f"{folder} holds no checkpoint yet (no model_*.pth)")
    elif not Path(cfg.MODEL.WEIGHTS).is_file():
        raise InputError(f"MODEL.WEIGHTS is {cfg.MODEL.WEIGHTS}, which is not a file")
    use_cpu_without_cuda(cfg, num_threads=torch.get_num_threads())
    return cfg


def register_test_data(cfg: CfgNode) -> None:
    """Check the config of a run and register its test data, and complete the config from them.

    Raises:
        InputError: the test data are missing, or cannot be used
    """
    check_config(cfg, num_processes=1, eval_only=True)
    prepare_datasets(cfg, eval_only=True)


def read_ground_truth(cfg: CfgNode) -> dict[str, dict[str, Any]]:
    """Register the test data of a run as :func:`register_test_data` does, and read their objects.

    Returns:
        name of each data set -> its ground truth in COCO's format

    Raises:
        InputError: as there, or a data set has no annotations in COCO's format, or no objects
    """
    register_test_data(cfg)
    contents = {}
    for name in cfg.DATASETS.TEST:
        metadata = MetadataCatalog.get(name)
        if "json_file" not in metadata.as_dict() or not metadata.get("is_labelled", True):
            raise InputError(
                f"{cfg.OUTPUT_DIR}: its test data {name} have no annotations in COCO's format, so "
                "there is no AP"
            )
        contents[name] = read_coco_json(metadata.json_file)
        BoxData.from_coco(contents[name], [], gt_file=metadata.json_file).require_objects()
    return contents


def detect_test_data(cfg: CfgNode, dataset_name: str) -> Path:
    """Return the file of a run's detections of a test set, in COCO's format.

    They are computed at the first call. Later calls with the same config, weights, annotations,
    images (by size and modification time) and version of the plugin return the same file,
    ``evaluation/detections_<name>_<checksum>.json`` in the run's folder.

    Args:
        cfg: from :func:`load_run`, completed by :func:`register_test_data`
        dataset_name: one of ``DATASETS.TEST``

    Raises:
        InputError: the weights cannot be loaded, or the run's folder is not writable
    """
    folder = Path(cfg.OUTPUT_DIR, EVALUATION)
    path = folder / f"detections_{dataset_name}_{_checksum(cfg, dataset_name)}.json"
    if path.is_file():
        logger.info("The detections are those of %s", path)
        return path
    make_folder(folder)  # now, because the inference may take hours
    model = build_model(cfg)
    load_trained_weights(model, cfg, resume=False)
    labels = MetadataCatalog.get(dataset_name).get("thing_dataset_id_to_contiguous_id") or {}
    category_ids = {label: category_id for category_id, label in labels.items()}
    loader = Trainer.build_test_loader(cfg, dataset_name)
    detections = inference_on_dataset(model, loader, _Detections(category_ids))
    write_file(path, json.dumps(detections))
    return path


class _Detections(DatasetEvaluator):
    """Collects detections as records in COCO's results format.

    Args:
        category_ids: class -> its category id, where the two differ
    """

    def __init__(self, category_ids: Mapping[int, int | str]) -> None:
        self._category_ids = category_ids
        self._records: list[dict[str, Any]] = []

    def process(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        for image, output in zip(inputs, outputs, strict=True):
            found = instances_to_coco_json(output["instances"].to("cpu"), image["image_id"])
            for record in found:
                label = record["category_id"]
                record["category_id"] = self._category_ids.get(label, label)
            self._records += found

    def evaluate(self) -> list[dict[str, Any]]:
        return self._records


def _checksum(cfg: CfgNode, dataset_name: str) -> str:
    """Return what detections depend on as twelve hexadecimal digits."""
    cfg = cfg.clone()
    cfg.defrost()
    weights, cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR = cfg.MODEL.WEIGHTS, "", ""
    annotations = MetadataCatalog.get(dataset_name).json_file
    files = (record["file_name"] for record in DatasetCatalog.get(dataset_name))
    images = map(os.stat, filter(os.path.isfile, files))
    parts = [
        retinanet_ext.__version__,
        cfg.dump(),
        sha256_of(weights),
        sha256_of(annotations),
        *(f"{image.st_size} {image.st_mtime_ns}" for image in images),
    ]
    return hashlib.sha256("\n".join(parts).encode(errors="backslashreplace")).hexdigest()[:12]
