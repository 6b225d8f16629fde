"""The best model of a run by a metric of its evaluations, and early stopping."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from torch import nn

from retinanet_ext.data.coco_json import join_some
from retinanet_ext.data.register import registered_classes
from retinanet_ext.engine.checkpoint import Checkpointer
from retinanet_ext.engine.hooks import EvalHook
from retinanet_ext.errors import InputError
from retinanet_ext.evaluation import BoxEvaluator

BEST = "model_best"
"""Name of the best model's file in OUTPUT_DIR, without ``.pth``."""

BOX_METRICS = tuple(f"bbox/{name}" for name in ("AP", "AP50", "AP75", "APs", "APm", "APl"))
LOSS_METRICS = tuple(f"validation/{name}" for name in ("total_loss", "loss_cls", "loss_box_reg"))

logger = logging.getLogger(__name__)


class EarlyStop(BaseException):
    """Ends the loop of ``TrainerBase.train``; the message says why.

    It is not an ``Exception``, because Detectron2 logs those as failures.
    """


class WeightsSaver(Checkpointer):
    """Saves files that no run resumes from, so that ``last_checkpoint`` does not name them."""

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        pass


class SelectionHook(EvalHook):
    """Evaluate, keep the weights of the best evaluation, and stop when the metric stagnates.

    Detectron2's ``BestCheckpointer`` forgets the best value when a run is resumed, and names its
    file as the checkpoint to resume from. The differences of this hook are:

    - ``model_best.pth`` holds ``metric``, ``value`` and ``iteration``, and the weights alone.
    - The best value and the number of evaluations since are part of a checkpoint. A checkpoint is
      written before the evaluation of its iteration, so a run that is resumed from it begins with
      this evaluation.
    - All processes agree, because all judge the main process's value.

    Raises:
        EarlyStop: after ``SOLVER.EARLY_STOP.PATIENCE`` evaluations in a row without a better value,
            once ``model_final.pth`` is written
        InputError: the evaluation does not give the metric
    """

    def __init__(self, cfg: CfgNode, model: nn.Module, class_names: Sequence[str]) -> None:
        """
        Args:
            cfg: config of the run
            model: the model that is evaluated
            class_names: as in :class:`Checkpointer`
        """
        super().__init__(cfg.TEST.EVAL_PERIOD, self._evaluate_and_select)
        self.period = cfg.TEST.EVAL_PERIOD
        self.metric = cfg.SOLVER.BEST.METRIC
        self.patience = cfg.SOLVER.EARLY_STOP.PATIENCE
        self.saver = WeightsSaver(model, cfg.OUTPUT_DIR, class_names=class_names)
        self.best: float | None = None
        self.best_iteration = -1
        self.evaluated = -1  # the iteration that was evaluated last
        self.num_not_better = 0
        self._iteration = -1  # the last one that is done

    def before_train(self) -> None:
        trainer, start = self.trainer, self.trainer.start_iter
        self._iteration = start - 1
        if not 0 < start < trainer.max_iter:
            return
        is_due = start % self.period == 0 or trainer._had_ended
        is_missing = is_due and self.evaluated < self._iteration
        if is_missing or self._is_exhausted():
            results = self._evaluate_and_select()
            if is_missing and not trainer._had_ended:  # otherwise metrics.json has them
                trainer.storage.put_scalars(**flatten_results_dict(results), smoothing_hint=False)
        if self._is_exhausted():
            trainer.iter = self._iteration  # nothing is trained
            self._stop()

    def after_step(self) -> None:
        self._iteration = self.trainer.iter
        super().after_step()
        if self._is_exhausted():
            self._stop()

    def _evaluate_and_select(self) -> Mapping[str, Any]:
        results = self.trainer._evaluate()
        metrics = comm.all_gather(flatten_results_dict(results))[0]
        if self._iteration > self.evaluated:
            self._judge(metrics)
        return results

    def _judge(self, metrics: Mapping[str, float]) -> None:
        if self.metric not in metrics:
            raise InputError(
                f"SOLVER.BEST.METRIC {self.metric!r} is none of the evaluation's metrics: "
                f"{join_some(metrics, 20) or 'it gives none'}"
            )
        value = float(metrics[self.metric])
        is_loss = self.metric.endswith(LOSS_METRICS)
        if math.isnan(value) and not is_loss:
            raise InputError(
                f"SOLVER.BEST.METRIC {self.metric} is undefined, because the test data have no "
                "such objects; choose another metric"
            )
        self.evaluated = self._iteration
        is_better = self.best is None or (value < self.best if is_loss else value > self.best)
        if not is_better or not math.isfinite(value):
            self.num_not_better += 1
            return
        self.best, self.best_iteration, self.num_not_better = value, self._iteration, 0
        logger.info("Best %s so far: %.4f, after iteration %d", self.metric, value, self._iteration)
        self.saver.save(BEST, iteration=self._iteration, metric=self.metric, value=value)

    def _is_exhausted(self) -> bool:
        return 0 < self.patience <= self.num_not_better

    def _stop(self) -> None:
        """
        Raises:
            EarlyStop: always
        """
        self.trainer.checkpointer.save("model_final", iteration=self._iteration)
        best = "never finite"
        if self.best is not None:
            best = f"{self.best:.4f} after iteration {self.best_iteration} and has not been better"
        raise EarlyStop(
            f"Early stop after iteration {self._iteration}: {self.metric} was {best} in the "
            f"{self.num_not_better} evaluations since (SOLVER.EARLY_STOP.PATIENCE {self.patience})"
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "metric": self.metric,
            "best": self.best,
            "best_iteration": self.best_iteration,
            "evaluated": self.evaluated,
            "num_not_better": self.num_not_better,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the best value of the run, unless it is another metric's."""
        if state["metric"] != self.metric:
            logger.warning(
                "SOLVER.BEST.METRIC is %s now and was %s: the best model is searched anew",
                self.metric,
                state["metric"],
            )
            return
        self.best, self.best_iteration = state["best"], state["best_iteration"]
        self.evaluated, self.num_not_better = state["evaluated"], state["num_not_better"]


def check_metric(cfg: CfgNode, build_evaluator: Callable[[CfgNode, str], DatasetEvaluator]) -> None:
    """Refuse a ``SOLVER.BEST.METRIC`` that the evaluation does not give.

    The metrics of other evaluators than :class:`BoxEvaluator` are known only after the first
    evaluation.

    Args:
        cfg: config of a training, whose data sets are registered
        build_evaluator: returns the evaluator of a test set

    Raises:
        InputError: names the metrics that there are
    """
    metric, tests = cfg.SOLVER.BEST.METRIC, cfg.DATASETS.TEST
    names = [name for name in tests if MetadataCatalog.get(name).get("is_labelled", True)]
    if not names:
        raise InputError(
            f"SOLVER.BEST.METRIC {metric} needs test data with annotations: set "
            "DATASETS.CUSTOM.TEST_JSON and TEST_IMAGES, or DATASETS.TEST"
        )
    # Without an annotation file, Detectron2's evaluator would write one.
    if not all(
        MetadataCatalog.get(name).get("json_file")
        and isinstance(build_evaluator(cfg, name), BoxEvaluator)
        for name in names
    ):
        return
    classes = registered_classes(cfg, "TEST", read=True)
    classes = classes if len(classes) > 1 else []  # Detectron2 gives no AP per class of one class
    has_loss = cfg.TEST.LOSS and cfg.MODEL.META_ARCHITECTURE == "RetinaNetExt"
    metrics = [*BOX_METRICS, *(LOSS_METRICS if has_loss else ())]
    prefixes = [f"{name}/" for name in names] if len(tests) > 1 else [""]
    per_class = [f"bbox/AP-{name}" for name in classes]
    known = [prefix + name for prefix in prefixes for name in (*metrics, *per_class)]
    if metric in known:
        return
    close = [name for name in known if name.lower().endswith(metric.lower())]
    close = close or get_close_matches(metric, known, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    if metric.endswith(LOSS_METRICS) and not cfg.TEST.LOSS:
        hint = " without TEST.LOSS True"
    several = ", after the name of a data set" if len(prefixes) > 1 else ""
    of_class = f" and bbox/AP-CLASS of {join_some(classes)}" if classes else ""
    where = f"{several}: {', '.join(prefixes)}" if several else ""
    raise InputError(
        f"SOLVER.BEST.METRIC {metric!r} is none of the evaluation's metrics{hint}; they are "
        f"{', '.join(metrics)}{of_class}{where}"
    )
