"""The contract of a loss that needs more than x_t.

Such a loss depends on the sign of the target, on the quality of the predicted box, or on the whole
batch. It is a module: what it has learnt of the batches is a buffer, so that it is saved, resumed
and restored with the model.

Shapes: N images, R anchors over all levels, K classes.
Labels: -1 ignore, 0..K-1 class, K background.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from retinanet_ext.errors import InputError


class Entries(NamedTuple):
    """What a loss sees of a batch, one entry per anchor and class.

    Attributes:
        logits: float32 or wider, (N, R, K); 0 at ignored anchors
        positive: whether the anchor is of the class, (N, R, K)
        counted: whether the anchor is not ignored, (N, R, 1)
        quality: IoU of each anchor's decoded box with its ground truth, (N, R, 1); empty if the
            loss does not use it
    """

    logits: Tensor
    positive: Tensor
    counted: Tensor
    quality: Tensor


class LossModule(nn.Module):
    """Base of a loss of more than x_t.

    A subclass defines :meth:`value_and_grad`. Its ``__init__`` takes the number of classes and
    keyword-only parameters, each with a default and a range; its config keys follow from them.

    Attributes:
        needs_quality: whether the target of a positive is the quality of its box
    """

    needs_quality = False

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes

    def forward(self, logits: Tensor, labels: Tensor, quality: Tensor | None = None) -> Tensor:
        """Return the loss of each anchor, summed over the classes, (N, R), float32 or wider.

        It is differentiable once, with respect to the logits. The loss of ignored anchors is 0.

        Args:
            logits: (N, R, K)
            labels: (N, R)
            quality: IoU of each anchor's decoded box with its ground truth, in [0, 1], (N, R); only
                that of the foreground is used

        Raises:
            InputError: the loss needs the quality, and there is none
        """
        if self.needs_quality and quality is None:
            raise InputError(
                f"{type(self).__name__} needs the quality of each anchor (N, R): the IoU of its "
                "decoded box with its ground-truth box"
            )
        return _AnchorLosses.apply(self, logits, labels, quality)

    def value_and_grad(self, entries: Entries) -> tuple[Tensor, Tensor]:
        """Return the loss of each entry and its derivative by the logit, each (N, R, K).

        Those of ignored anchors may be anything finite.
        """
        raise NotImplementedError

    def begin_batch(self, num_micro_batches: int) -> None:
        """Treat the forward passes until :meth:`end_batch` as micro-batches of one batch."""

    def end_batch(self) -> None:
        """End the batch that :meth:`begin_batch` began."""


class _AnchorLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, loss: LossModule, logits: Tensor, labels: Tensor, quality: Tensor | None
    ) -> Tensor:
        labels = labels.unsqueeze(2)
        counted = labels >= 0
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        classes = torch.arange(logits.shape[2], device=logits.device)
        if quality is None:
            quality = wide.new_zeros(len(logits), 0)
        entries = Entries(
            # Ignored logits are replaced because 0 times an infinite loss would be NaN.
            torch.where(counted, wide, 0),
            labels == classes,
            counted,
            quality.to(wide).unsqueeze(2),
        )
        value, gradient = loss.value_and_grad(entries)
        ctx.dtype = logits.dtype
        # In float32 also for half-precision logits: unscaled, a float16 gradient underflows.
        ctx.save_for_backward(torch.where(counted, gradient, 0))
        return torch.where(counted, value, 0).sum(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return None, (gradient * grad_output.unsqueeze(2)).to(ctx.dtype), None, None


class StatefulLoss(LossModule):
    """Base of a loss with a statistic of the batches, kept in one buffer.

    A step updates the statistic once, with the sums of the whole batch: over all processes, and
    over all micro-batches, at the end of the step. Evaluation leaves it as it is. Loading weights
    without it (of another loss) keeps its value.

    Attributes:
        state: name of the buffer
    """

    state: str

    def __init__(self, num_classes: int, initial: Tensor) -> None:
        super().__init__(num_classes)
        self.register_buffer(self.state, initial)
        self._num_micro_batches = 1
        self._sums: list[Tensor] = []

    def next_state(self, sums: Tensor) -> Tensor:
        """Return the statistic after a batch whose sums over its entries are ``sums``."""
        raise NotImplementedError

    def observe(self, sums: Tensor) -> Tensor:
        """Take the sums of a batch, or of a micro-batch, into the statistic; return the statistic.

        In evaluation it is returned as it is. A micro-batch gets what the statistic would be if all
        micro-batches were like it, because the others are not known yet.
        """
        state = self.get_buffer(self.state)
        if not self.training:
            return state
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
        if self._num_micro_batches > 1:
            self._sums.append(sums)
            return self.next_state(self._num_micro_batches * sums)
        state.copy_(self.next_state(sums))
        return state

    def begin_batch(self, num_micro_batches: int) -> None:
        self._num_micro_batches = num_micro_batches
        self._sums = []

    @torch.no_grad()
    def end_batch(self) -> None:
        if self._sums:
            self.get_buffer(self.state).copy_(self.next_state(torch.stack(self._sums).sum(0)))
        self._num_micro_batches, self._sums = 1, []

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        state_dict.setdefault(prefix + self.state, self.get_buffer(self.state))
        super()._load_from_state_dict(state_dict, prefix, *args)
