"""Exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.engine import HookBase
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from retinanet_ext.engine.class_matching import match_weights


class WeightAverage(HookBase):
    """Average the weights and buffers over the steps (``SOLVER.EMA.DECAY``).

    The average is what is evaluated, and what checkpoints hold as ``model``, so that evaluation,
    export and fine-tuning need not know of it. The weights that the optimizer changes are part of
    the trainer's state in the checkpoint; only a resumed run reads them.

    The average starts as the weights of the first step. After n steps the decay is at most
    (1 + n) / (10 + n), because the first weights would otherwise dominate that of a short run.

    Attributes:
        model: the averaged model
    """

    def __init__(self, training_model: nn.Module, decay: float) -> None:
        """
        Args:
            training_model: the model that is trained, without ``DistributedDataParallel``
            decay: weight of the previous average, in (0, 1)
        """
        self._training_model = training_model
        self._decay = decay
        self._averaged = AveragedModel(training_model, use_buffers=True)
        self._loaded: dict[str, Any] | None = None

    @property
    def model(self) -> nn.Module:
        return self._averaged.module

    @property
    def num_steps(self) -> int:
        """Number of steps in the average."""
        return int(self._averaged.n_averaged)

    def after_step(self) -> None:
        decay = min(self._decay, (1 + self.num_steps) / (10 + self.num_steps))
        self._averaged.multi_avg_fn = get_ema_multi_avg_fn(decay)
        self._averaged.update_parameters(self._training_model)

    def match_classes(self, saved: Sequence[str], wanted: Sequence[str]) -> None:
        """Reorder the outputs of the loaded training weights' classifier by class name."""
        if self._loaded:
            match_weights(self._loaded, saved, wanted, self._training_model)

    def after_loading(self) -> None:
        """Set the training weights, once the checkpointer has loaded the averaged model.

        They are those of the run that is resumed, or else equal to the averaged model's.
        """
        weights, self._loaded = self._loaded or self.model.state_dict(), None
        self._training_model.load_state_dict(weights)

    def state_dict(self) -> dict[str, Any]:
        return {"num_steps": self.num_steps, "weights": self._training_model.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._averaged.n_averaged.fill_(state_dict["num_steps"])
        self._loaded = dict(state_dict["weights"])
