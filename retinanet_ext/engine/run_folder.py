"""A run's folder as training leaves it: its config and weights, and detections of its test data."""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import inference_on_dataset
from detectron2.modeling import build_model

from retinanet_ext.data import prepare_datasets
from retinanet_ext.engine.config_check import check_config, use_cpu_without_cuda
from retinanet_ext.engine.config_load import load_config
from retinanet_ext.engine.find_checkpoint import last_checkpoint
from retinanet_ext.engine.model_selection import BEST
from retinanet_ext.engine.setup import load_trained_weights
from retinanet_ext.engine.trainer import Trainer
from retinanet_ext.errors import InputError
from retinanet_ext.evaluation import BoxEvaluator
from retinanet_ext.evaluation.outputs import DETECTIONS
from retinanet_ext.files import sha256_of, write_file

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


def detect_test_data(cfg: CfgNode, dataset_name: str) -> Path:
    """Return the file of a run's detections of a test set, in COCO's format.

    They are computed at the first call. Later calls with the same config, weights and annotations
    return the same file, ``evaluation/detections_<name>_<checksum>.json`` in the run's folder.

    Args:
        cfg: from :func:`load_run`, completed by :func:`register_test_data`
        dataset_name: one of ``DATASETS.TEST``
    """
    folder = Path(cfg.OUTPUT_DIR, EVALUATION)
    path = folder / f"detections_{dataset_name}_{_checksum(cfg, dataset_name)}.json"
    if path.is_file():
        logger.info("The detections are those of %s", path)
        return path
    model = build_model(cfg)
    load_trained_weights(model, cfg, resume=False)
    with tempfile.TemporaryDirectory() as scratch:
        evaluator = BoxEvaluator(
            dataset_name, max_detections=cfg.TEST.DETECTIONS_PER_IMAGE, output_dir=scratch
        )
        inference_on_dataset(model, Trainer.build_test_loader(cfg, dataset_name), evaluator)
        detections = Path(scratch, DETECTIONS)
        content = detections.read_bytes() if detections.exists() else b"[]"
    folder.mkdir(exist_ok=True)
    write_file(path, content)
    return path


def _checksum(cfg: CfgNode, dataset_name: str) -> str:
    """Return what detections depend on as twelve hexadecimal digits."""
    cfg = cfg.clone()
    cfg.defrost()
    weights, cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR = cfg.MODEL.WEIGHTS, "", ""
    annotations = MetadataCatalog.get(dataset_name).json_file
    parts = [cfg.dump(), sha256_of(weights), sha256_of(annotations)]
    return hashlib.sha256("\n".join(parts).encode(errors="backslashreplace")).hexdigest()[:12]
