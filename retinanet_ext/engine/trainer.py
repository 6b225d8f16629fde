"""Detectron2's trainer, with what it leaves to its users."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, build_detection_test_loader
from detectron2.data.detection_utils import build_augmentation
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase, create_ddp_model, hooks
from detectron2.evaluation import (
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
)
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter, EventWriter, TensorboardXWriter
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from retinanet_ext.data.loader import TrainLoader
from retinanet_ext.data.mapper import CheckedDatasetMapper
from retinanet_ext.data.register import registered_classes
from retinanet_ext.engine.checkpoint import Checkpointer
from retinanet_ext.engine.class_matching import match_optimizer_state, saved_class_names
from retinanet_ext.engine.config_check import config_errors
from retinanet_ext.engine.hooks import EvalHook, PreciseBN, SeedIterations, StopOnSignal
from retinanet_ext.engine.loss_film import LossFilm
from retinanet_ext.engine.metrics import StrictJSONWriter, archive_superseded_metrics
from retinanet_ext.engine.model_selection import EarlyStop, SelectionHook, check_metric
from retinanet_ext.engine.setup import report_results
from retinanet_ext.engine.solver import build_lr_scheduler, build_optimizer
from retinanet_ext.engine.train_step import AccumulatingTrainer, unwrap
from retinanet_ext.engine.weight_average import WeightAverage
from retinanet_ext.errors import InputError
from retinanet_ext.evaluation import BoxEvaluator, InferenceTime, ValidationLoss
from retinanet_ext.evaluation.outputs import draw_detections, inference_dir
from retinanet_ext.modeling import RetinaNetExt
from retinanet_ext.modeling.timm_backbone import load_timm_weights, timm_weights

EVALUATOR_TYPES = ("coco", "lvis", "pascal_voc")
"""The data sets' ``evaluator_type`` that have an evaluator of boxes."""

logger = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """Detectron2's ``DefaultTrainer`` with exact resume, strict weights and CPU processes.

    Every ``build_*`` method can be overridden, as in Detectron2::

        class MyTrainer(Trainer):
            def build_hooks(self):
                return [*super().build_hooks(), MyHook()]

    It differs from ``DefaultTrainer`` in the following.

    - Several processes train without CUDA, too.
    - Weights that do not fit are refused, see :class:`Checkpointer`.
    - A resumed run ends as the uninterrupted one does, bit for bit where the arithmetic is
      deterministic (the CPU). The checkpoint also holds the place in the stream of samples and its
      seed, and each iteration seeds the random numbers. The learning rate and the optimizer's other
      settings are the config's and not the checkpoint's; a warning tells where they differ.
    - A step that is not finite is explained, and gradients can be accumulated, see
      :class:`AccumulatingTrainer`.
    - With ``SOLVER.EMA.DECAY`` the averaged weights are evaluated and saved, see
      :class:`WeightAverage`.
    - SIGTERM and one Ctrl-C save a checkpoint before they stop the training.
    - Inference is timed, and a picture of detections is drawn after an evaluation.
    - The best model is kept, and a run may stop early, see :class:`SelectionHook`.
    - ``metrics.json`` is strict JSON, and holds no iteration twice.
    """

    def __init__(self, cfg: CfgNode) -> None:
        """
        Args:
            cfg: a config whose data sets are registered; nothing is written yet

        Raises:
            InputError: no model, optimizer or loader can be built from the config, a test set has
                an ``evaluator_type`` without an evaluator, or ``SOLVER.BEST.METRIC`` is unknown
        """
        TrainerBase.__init__(self)  # DefaultTrainer's would build all of what follows differently
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        for name in cfg.DATASETS.TEST:
            if _evaluator_type(name) not in EVALUATOR_TYPES:
                self.build_evaluator(cfg, name)  # a subclass may have one
        if cfg.SOLVER.BEST.METRIC:
            check_metric(cfg, self.build_evaluator)
        model = self.build_model(cfg)
        with config_errors():
            optimizer = self.build_optimizer(cfg, model)
            self.scheduler = self.build_lr_scheduler(cfg, optimizer)
            data_loader = self.build_train_loader(cfg)
        # Detectron2 would pass device_ids, which DDP refuses for a model on the CPU.
        devices = {} if torch.device(cfg.MODEL.DEVICE).type == "cuda" else {"device_ids": None}
        # Gradients are views of what is all-reduced: less memory by their size, and a copy less.
        ddp_model = create_ddp_model(
            model, broadcast_buffers=False, gradient_as_bucket_view=True, **devices
        )
        self.weight_average = None
        if cfg.SOLVER.EMA.DECAY:  # after DDP, which gives all processes the same initial weights
            self.weight_average = WeightAverage(model, cfg.SOLVER.EMA.DECAY)
        self._trainer = AccumulatingTrainer(ddp_model, data_loader, optimizer, cfg)
        self.checkpointer = Checkpointer(
            self.evaluated_model,
            cfg.OUTPUT_DIR,
            reinit_mismatched=cfg.MODEL.RETINANET.REINIT_MISMATCHED,
            class_names=registered_classes(cfg, "TRAIN"),
            trainer=weakref.proxy(self),
        )
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self._last_eval_results: Mapping[str, Any] = {}
        self._resumes = self._had_ended = False
        self.register_hooks(self.build_hooks())

    @property
    def evaluated_model(self) -> nn.Module:
        """The model that is evaluated and saved: the averaged one with ``SOLVER.EMA.DECAY``."""
        return self.weight_average.model if self.weight_average else self.model

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Return the model, on its device, with random weights.

        Raises:
            InputError: no model can be built from the config
        """
        with config_errors():
            return super().build_model(cfg)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer that ``SOLVER.OPTIMIZER`` names."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> LRScheduler:
        """Return the schedule that ``SOLVER.LR_SCHEDULER_NAME`` names."""
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> TrainLoader:
        """Return the training batches, in an order that can be resumed.

        Another iterable may take its place; a resumed run then begins its images anew.
        """
        return TrainLoader(cfg, CheckedDatasetMapper(cfg, is_train=True))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> DataLoader:
        """Return the batches of a test set, with ``instances`` for ``TEST.LOSS``."""
        mapper = CheckedDatasetMapper(cfg, is_train=False)
        if cfg.TEST.LOSS:
            augmentations = build_augmentation(cfg, is_train=False)
            mapper = CheckedDatasetMapper(cfg, is_train=True, augmentations=augmentations)
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """Return the evaluator that fits the data set's ``evaluator_type``; COCO's without one.

        Raises:
            InputError: there is none for this type
        """
        evaluator_type = _evaluator_type(dataset_name)
        if evaluator_type not in EVALUATOR_TYPES:
            raise InputError(
                f"DATASETS.TEST {dataset_name} has the evaluator_type {evaluator_type!r}, for "
                f"which there is no evaluator of boxes; there is one for "
                f"{', '.join(EVALUATOR_TYPES)}. Override Trainer.build_evaluator for another one"
            )
        folder = str(inference_dir(cfg, dataset_name))
        if evaluator_type == "lvis":
            return LVISEvaluator(dataset_name, output_dir=folder)
        if evaluator_type == "pascal_voc":
            return PascalVOCDetectionEvaluator(dataset_name)
        max_detections = cfg.TEST.DETECTIONS_PER_IMAGE
        return BoxEvaluator(dataset_name, max_detections=max_detections, output_dir=folder)

    def build_hooks(self) -> list[HookBase]:
        """Return the hooks in the order in which they are called.

        A run stops after its state is complete and before an evaluation, which may take longer than
        a scheduler waits.
        """
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.DATALOADER.NUM_WORKERS = 0  # of PreciseBN's own loader
        is_main = comm.is_main_process()
        all_hooks: list[HookBase] = [SeedIterations(), hooks.IterationTimer(), hooks.LRScheduler()]
        if self.weight_average:
            all_hooks.append(self.weight_average)
        training_model = unwrap(self.model)
        if cfg.SOLVER.LOSS_FILM_PERIOD and isinstance(training_model, RetinaNetExt):
            all_hooks.append(LossFilm(training_model, self.checkpointer.class_names))
        model = self.evaluated_model
        if cfg.TEST.PRECISE_BN.ENABLED and get_bn_modules(model):
            loader, num_iter = self.build_train_loader(cfg), cfg.TEST.PRECISE_BN.NUM_ITER
            all_hooks.append(PreciseBN(cfg.TEST.EVAL_PERIOD, model, loader, num_iter))
        if is_main:
            period = cfg.SOLVER.CHECKPOINT_PERIOD
            all_hooks.append(hooks.PeriodicCheckpointer(self.checkpointer, period))
        all_hooks += [StopOnSignal(), self._build_eval_hook()]
        if is_main:
            all_hooks.append(hooks.PeriodicWriter(self.build_writers(), period=20))
        return all_hooks

    def _build_eval_hook(self) -> HookBase:
        if not self.cfg.SOLVER.BEST.METRIC:
            return EvalHook(self.cfg.TEST.EVAL_PERIOD, self._evaluate)
        checkpointer = self.checkpointer  # its model is the one that is evaluated
        return SelectionHook(self.cfg, checkpointer.model, checkpointer.class_names)

    def build_writers(self) -> list[EventWriter]:
        """Return the writers to stdout, ``metrics.json`` and TensorBoard."""
        return [
            CommonMetricPrinter(self.max_iter),
            StrictJSONWriter(str(Path(self.cfg.OUTPUT_DIR, "metrics.json"))),
            TensorboardXWriter(self.cfg.OUTPUT_DIR),
        ]

    def resume_or_load(self, resume: bool = True) -> None:
        """Resume from the last checkpoint of the run, or load initial weights.

        These are ``MODEL.WEIGHTS``, or where that is empty ``MODEL.TIMM.WEIGHTS``.

        Raises:
            InputError: the weights cannot be used, or processes find different checkpoints
        """
        checkpoint = self.checkpointer.get_checkpoint_file() if resume else ""
        found = comm.all_gather(Path(checkpoint).name)
        if len(set(found)) > 1:
            raise InputError(
                f"OUTPUT_DIR {self.cfg.OUTPUT_DIR} must be the same folder for all processes to "
                f"resume: process 0 finds {found[0] or 'no checkpoint'} there, another "
                f"{next(name for name in found if name != found[0]) or 'none'}"
            )
        if checkpoint:
            content = self.checkpointer.load(checkpoint)
            saved, wanted = saved_class_names(content), self.checkpointer.class_names
            if saved and wanted and saved != wanted:
                match_optimizer_state(self.optimizer, saved, wanted, unwrap(self.model))
                if self.weight_average:
                    self.weight_average.match_classes(saved, wanted)
            self.start_iter = self.iter + 1
            self._had_ended = Path(self.checkpointer.loaded_path).name == "model_final.pth"
            self._keep_seed()
        elif timm_weights(self.cfg):
            load_timm_weights(self.checkpointer.model, self.cfg)
        else:
            self.checkpointer.load(self.cfg.MODEL.WEIGHTS, checkpointables=[])
        if self.weight_average:
            self.weight_average.after_loading()
        self._resumes = resume

    def _keep_seed(self) -> None:
        """Record the seed of the run, which goes on, in the config."""
        if not isinstance(self.data_loader, TrainLoader):
            return
        seed = self.data_loader.seed
        if self.cfg.SEED not in (-1, seed):
            logger.warning("SEED %d of the run goes on, and not %d", seed, self.cfg.SEED)
        self.cfg.defrost()
        self.cfg.SEED = seed
        self.cfg.freeze()

    def train(self) -> Mapping[str, Any]:
        """Train, and return the results of the last evaluation (empty but on the main process).

        The run ends at ``SOLVER.MAX_ITER``, or before by ``SOLVER.EARLY_STOP``.
        """
        Path(self.cfg.OUTPUT_DIR).mkdir(parents=True, exist_ok=True)
        if self._resumes and comm.is_main_process():
            metrics = Path(self.cfg.OUTPUT_DIR, "metrics.json")
            is_extended = self._had_ended and self.start_iter < self.max_iter
            archive_superseded_metrics(metrics, self.start_iter, is_extended=is_extended)
        try:
            TrainerBase.train(self, self.start_iter, self.max_iter)
        except EarlyStop as reason:
            logger.info("%s", reason)
        report_results(self.cfg, self._last_eval_results)
        return self._last_eval_results

    def _evaluate(self) -> Mapping[str, Any]:
        self._last_eval_results = self.test(self.cfg, self.evaluated_model)
        return self._last_eval_results

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None) -> Mapping[str, Any]:
        """Evaluate the model on each test set, time it and draw its detections.

        Returns:
            metrics by task and name, such as ``{"bbox": {"AP": 40.1}}``; by data set where there
            are several. Empty but on the main process.
        """
        if comm.get_world_size() > 1:
            # Each process has its own statistics of BatchNorm; the checkpoint holds the first's.
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)
        if evaluators is None:
            others = [InferenceTime(model)]
            if cfg.TEST.LOSS and cfg.MODEL.META_ARCHITECTURE == "RetinaNetExt":
                others.append(ValidationLoss(unwrap(model)))
            evaluators = [
                DatasetEvaluators([cls.build_evaluator(cfg, name), *others])
                for name in cfg.DATASETS.TEST
            ]
        results = super().test(cfg, model, evaluators)
        if comm.is_main_process() and cfg.TEST.DETECTION_GRID.NUM_IMAGES > 0:
            for name in cfg.DATASETS.TEST:
                draw_detections(cfg, name)
        return results

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs besides the weights."""
        state = super().state_dict()
        if isinstance(self.data_loader, TrainLoader):
            state["data"] = self.data_loader.state_dict(self.iter + 1)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load the state of a run, except for settings of the optimizer, which are the config's.

        Raises:
            InputError: the run has more iterations than ``SOLVER.MAX_ITER``, another optimizer, or
                averaged weights where the config has none
        """
        if "WeightAverage" in state_dict.get("hooks", {}) and not self.weight_average:
            raise InputError(
                "SOLVER.EMA.DECAY 0.0: the run averages its weights; resume it with its own value"
            )
        groups = self.optimizer.param_groups
        # Of the optimizers, AdamW alone has betas.
        saved = state_dict.get("_trainer", {}).get("optimizer", {}).get("param_groups", groups)
        if any("betas" in group for group in saved) != any("betas" in group for group in groups):
            raise InputError(
                f"SOLVER.OPTIMIZER {self.cfg.SOLVER.OPTIMIZER}: the run was trained with another "
                "optimizer; resume it with that one, or start a new run with MODEL.WEIGHTS"
            )
        configured = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        super().load_state_dict(state_dict)
        if self.iter >= self.max_iter:
            raise InputError(
                f"SOLVER.MAX_ITER {self.max_iter} is less than the {self.iter + 1} iterations that "
                "the checkpoint holds; raise it to go on, or evaluate with --eval-only --resume"
            )
        if isinstance(self.data_loader, TrainLoader):
            # A checkpoint of Detectron2's trainer says only how many batches there were.
            data = state_dict.get("data") or self.data_loader.state_dict(self.iter + 1)
            self.data_loader.load_state_dict(data)
        else:
            logger.warning(
                "%s does not save its place in the data: the run does not resume exactly, because "
                "its images begin anew",
                type(self.data_loader).__name__,
            )

        groups = self.optimizer.param_groups  # loading makes new ones
        self.scheduler.base_lrs = [group["initial_lr"] for group in configured]
        for settings, lr in zip(configured, self.scheduler.get_lr(), strict=True):
            settings["lr"] = lr
        changed = {
            f"{name} {group[name]:g} -> {settings[name]:g}": None
            for group, settings in zip(groups, configured, strict=True)
            for name in ("lr", "momentum", "weight_decay")
            if group.get(name) != settings.get(name)
        }
        if changed:
            logger.warning("Settings other than the checkpoint's: %s", ", ".join(changed))
        for group, settings in zip(groups, configured, strict=True):
            group.update(settings)
        if self.cfg.SOLVER.FUSED_OPTIMIZER:
            # Moves AdamW's step counts to the GPU, where the fused kernel expects them.
            self.optimizer.load_state_dict(self.optimizer.state_dict())


def _evaluator_type(dataset_name: str) -> str:
    return MetadataCatalog.get(dataset_name).get("evaluator_type", "coco")
