"""Detectron2's trainer, with what it leaves to its user."""

from __future__ import annotations

import json
import logging
import math
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetCatalog,
    MetadataCatalog,
    build_detection_test_loader,
)
from detectron2.engine import DefaultTrainer, create_ddp_model, hooks
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, EventWriter, JSONWriter, get_event_storage
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from retinanet_ext.data.images import ImageReader
from retinanet_ext.data.loader import TrainLoader, build_train_loader
from retinanet_ext.data.mapper import CheckedDatasetMapper
from retinanet_ext.data.register import registered_classes
from retinanet_ext.engine.checkpoint import Checkpointer
from retinanet_ext.engine.resume import ResumableTrainer
from retinanet_ext.engine.train_step import AccumulatingTrainer
from retinanet_ext.evaluation import BoxEvaluator, InferenceTime, draw_detection_grid

DETECTIONS = "coco_instances_results.json"
"""The file of detections that Detectron2's ``COCOEvaluator`` writes, in COCO's format."""

logger = logging.getLogger(__name__)


class Trainer(ResumableTrainer):
    """Detectron2's ``DefaultTrainer``, except for the following.

    - Several processes work without CUDA too.
    - Weights that do not fit are refused, see :class:`Checkpointer`.
    - Resuming is exact, see :class:`ResumableTrainer`.
    - An image that cannot be read is named.
    - Evaluation is COCO's, with the time an image takes; then a picture of detections is drawn.
    - ``metrics.json`` is strict JSON.
    - A training that failed is not evaluated.
    """

    def __init__(self, cfg: CfgNode) -> None:
        super(DefaultTrainer, self).__init__()  # in place of DefaultTrainer's, in its order
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        # Detectron2 gives device_ids, which DDP refuses for a model on the CPU.
        devices = {} if torch.device(cfg.MODEL.DEVICE).type == "cuda" else {"device_ids": None}
        model = create_ddp_model(model, broadcast_buffers=False, **devices)
        self._trainer = AccumulatingTrainer(model, data_loader, optimizer, cfg)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = Checkpointer(
            model,
            cfg.OUTPUT_DIR,
            reinit_mismatched=cfg.MODEL.RETINANET.REINIT_MISMATCHED,
            class_names=registered_classes(cfg, "TRAIN"),
            trainer=weakref.proxy(self),
        )
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self._last_eval_results: Mapping[str, Any] = {}  # set by Detectron2's evaluation hook
        self.register_hooks(self.build_hooks())

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        optimizer = super().build_optimizer(cfg, model)
        if cfg.SOLVER.FUSED_OPTIMIZER:
            for group in optimizer.param_groups:
                group.update(fused=True, foreach=False)
        return optimizer

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> TrainLoader:
        return build_train_loader(cfg, CheckedDatasetMapper(cfg, is_train=True))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> DataLoader:
        return build_detection_test_loader(
            cfg, dataset_name, mapper=CheckedDatasetMapper(cfg, is_train=False)
        )

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        return BoxEvaluator(
            dataset_name,
            max_detections=cfg.TEST.DETECTIONS_PER_IMAGE,
            output_dir=str(inference_dir(cfg, dataset_name)),
        )

    def build_writers(self) -> list[EventWriter]:
        writers = super().build_writers()
        for index, writer in enumerate(writers):
            if isinstance(writer, JSONWriter):
                writer.close()
                writers[index] = StrictJSONWriter(str(Path(self.cfg.OUTPUT_DIR, "metrics.json")))
        return writers

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None) -> Mapping[str, Any]:
        if isinstance(model, DistributedDataParallel):
            # Statistics of BatchNorm are each process's own; the first's are in the checkpoint.
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)
        if evaluators is None:
            evaluators = [
                DatasetEvaluators([cls.build_evaluator(cfg, name), InferenceTime(model)])
                for name in cfg.DATASETS.TEST
            ]
        results = super().test(cfg, model, evaluators)
        if comm.is_main_process() and cfg.TEST.DETECTION_GRID.NUM_IMAGES > 0:
            for dataset_name in cfg.DATASETS.TEST:
                draw_detections(cfg, dataset_name)
        return results

    def train(self) -> Mapping[str, Any]:
        """Train, and return what the last evaluation gave, empty but on the main process."""
        super().train()
        return self._last_eval_results

    def after_train(self) -> None:
        if self.iter < self.max_iter:
            # Detectron2 evaluates a run that failed in its last iteration; other processes may be
            # gone by then.
            self._hooks = [hook for hook in self._hooks if not isinstance(hook, hooks.EvalHook)]
        super().after_train()


class StrictJSONWriter(JSONWriter):
    """Detectron2's, but with null for NaN and infinity, which strict readers refuse."""

    def write(self) -> None:
        with _NullForNonFinite(get_event_storage()):
            super().write()


class _NullForNonFinite(EventStorage):
    """The latest scalars of a storage, those that are not finite as None."""

    def __init__(self, storage: EventStorage) -> None:
        super().__init__(storage.iter)
        self._storage = storage

    def latest_with_smoothing_hint(self, window_size: int = 20) -> dict[str, tuple[Any, int]]:
        latest = self._storage.latest_with_smoothing_hint(window_size)
        return {
            name: (value if math.isfinite(value) else None, iteration)
            for name, (value, iteration) in latest.items()
        }


def inference_dir(cfg: CfgNode, dataset_name: str) -> Path:
    """Return the folder of a data set's detections: its own where there are several."""
    folder = Path(cfg.OUTPUT_DIR, "inference")
    return folder / dataset_name if len(cfg.DATASETS.TEST) > 1 else folder


def grid_path(cfg: CfgNode, dataset_name: str) -> Path:
    """Return the file of a data set's picture."""
    suffix = f"_{dataset_name}" if len(cfg.DATASETS.TEST) > 1 else ""
    return Path(cfg.OUTPUT_DIR, f"detections{suffix}.png")


def draw_detections(cfg: CfgNode, dataset_name: str) -> None:
    """Draw the picture of the detections that ``COCOEvaluator`` has written."""
    file = inference_dir(cfg, dataset_name) / DETECTIONS
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
