"""Inference time per image, measured during an evaluation."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from detectron2.evaluation import DatasetEvaluator
from torch import nn

NUM_WARMUP = 3
"""First calls, which allocate memory and choose kernels; they are left out if there are more."""


class InferenceTime(DatasetEvaluator):
    """Median time per image (ms), from the image tensor to its detections.

    Reading and resizing images and the evaluation itself do not count. A CUDA device is
    synchronised before each reading of the clock.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> timer = InferenceTime(model)
        >>> timer.reset()
        >>> _ = model(torch.zeros(4, 2))
        >>> timer.evaluate()["inference"]["ms_per_image"] > 0
        True
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._hooks: list[Any] = []

    def reset(self) -> None:
        self._seconds: list[float] = []
        self._hooks = [
            self._model.register_forward_pre_hook(self._start),
            self._model.register_forward_hook(self._stop),
        ]

    def process(self, inputs: Any, outputs: Any) -> None:
        """Do nothing: hooks of the model measure each call."""

    def evaluate(self) -> dict[str, dict[str, float]]:
        for hook in self._hooks:
            hook.remove()
        kept = self._seconds[NUM_WARMUP:] or self._seconds
        if not kept:
            return {}
        return {"inference": {"ms_per_image": 1000 * statistics.median(kept)}}

    def _start(self, module: nn.Module, args: Any) -> None:
        self._started = self._now()

    def _stop(self, module: nn.Module, args: Any, output: Any) -> None:
        self._seconds.append((self._now() - self._started) / len(args[0]))

    def _now(self) -> float:
        if next(self._model.parameters()).is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()
