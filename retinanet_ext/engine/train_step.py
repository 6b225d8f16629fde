"""One training step: precision, accumulated gradients, and what is done if it is not finite."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer
from detectron2.layers import FrozenBatchNorm2d
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from retinanet_ext.engine.non_finite import (
    Batch,
    Report,
    StepSnapshot,
    begin_step,
    compute_losses,
    explain_step,
    total_loss,
)
from retinanet_ext.engine.replay import save_step
from retinanet_ext.errors import InputError, NonFiniteError, first_line

logger = logging.getLogger(__name__)


class AccumulatingTrainer(SimpleTrainer):
    """Detectron2's ``SimpleTrainer`` and ``AMPTrainer`` in one, by ``SOLVER.AMP``.

    In addition:

    - ``SOLVER.GRAD_ACCUM_STEPS`` batches make one step, equal to that of one batch of all their
      images.
    - A loss or gradient that is not finite on any process is found before the weights change, by
      all processes together, and dealt with by ``SOLVER.NON_FINITE``. With float16 an infinite
      gradient alone is no such case unless the scale is below 1: it is how the scale is found.
    - ``stop_requested``, which a signal handler may set on one process, becomes ``stop_agreed`` on
      all of them with the end of the same step.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[Batch],
        optimizer: torch.optim.Optimizer,
        cfg: CfgNode,
    ) -> None:
        super().__init__(model, data_loader, optimizer)
        self.cfg = cfg
        self.device = next(model.parameters()).device
        self.precision = cfg.SOLVER.AMP.PRECISION if cfg.SOLVER.AMP.ENABLED else "float32"
        self.grad_scaler = torch.amp.GradScaler(
            self.device.type, enabled=self.precision == "float16"
        )
        self.stop_requested = False
        self.stop_agreed = False
        self.skipped_steps = 0
        self._has_updated = False  # the weights, since they were loaded

    def run_step(self) -> None:
        assert self.model.training, "the model was changed to eval mode"
        buffers = [(buffer, buffer.clone()) for buffer in _changing_buffers(self.model)]
        self.optimizer.zero_grad()
        batches, losses, data_time = self._forward_and_backward()
        not_finite, self.stop_agreed = self._agree(losses)
        if not_finite:
            self.optimizer.zero_grad()
            _restore(buffers)
            self._report(batches, losses, buffers)
            return
        self.after_backward()
        self._write_metrics(losses, data_time)
        self.grad_scaler.unscale_(self.optimizer)  # for the clipping in the optimizer's own step
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()
        self._has_updated = True

    def _forward_and_backward(self) -> tuple[list[Batch], dict[str, Tensor], float]:
        """Leave the step's gradient in the parameters, times the scale of float16.

        Returns:
            the batches, the step's losses and the seconds waited for data
        """
        count = self.cfg.SOLVER.GRAD_ACCUM_STEPS
        end_step = begin_step(_unwrap(self.model), count)
        totals: dict[str, Tensor] = {}
        batches, data_time = [], 0.0
        for number in range(count):
            start = time.perf_counter()
            batches.append(next(self._data_loader_iter))
            data_time += time.perf_counter() - start
            with self._synchronize(number == count - 1):
                losses = compute_losses(self.model, batches[-1], self.precision)
                self.grad_scaler.scale(total_loss(losses)).backward()
            for name, loss in losses.items():
                totals[name] = totals.get(name, 0) + loss.detach()
        scale = end_step()
        if count > 1:
            totals = {name: total * scale for name, total in totals.items()}
            for gradient in self._gradients():
                gradient.mul_(scale)
        return batches, totals, data_time

    def _synchronize(self, wanted: bool) -> AbstractContextManager:
        """Return the context in which backward averages gradients over processes, or does not."""
        if wanted or not isinstance(self.model, DistributedDataParallel):
            return nullcontext()
        return self.model.no_sync()

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.model.parameters() if p.grad is not None]

    def _agree(self, losses: dict[str, Tensor]) -> tuple[bool, bool]:
        """Return whether any process has a step that is not finite, and whether one is to stop."""
        finite = torch.nn.utils.get_total_norm(self._gradients()).isfinite()
        if self.grad_scaler.is_enabled():
            finite |= self.grad_scaler.scale(torch.ones((), device=self.device)) >= 1
        finite &= total_loss(losses).isfinite()
        flags = torch.full((2,), float(self.stop_requested), device=self.device)
        flags[0] = ~finite
        if comm.get_world_size() > 1:
            dist.all_reduce(flags)
        not_finite, stop = flags.tolist()
        return not_finite > 0, stop > 0

    def _report(
        self,
        batches: list[Batch],
        losses: dict[str, Tensor],
        buffers: list[tuple[Tensor, Tensor]],
    ) -> None:
        """Explain the step on the processes that saw it; raise on all of them, or skip it.

        Raises:
            NonFiniteError: as ``SOLVER.NON_FINITE`` says
        """
        policy = self.cfg.SOLVER.NON_FINITE
        most = policy.MAX_SKIPPED or float("inf")
        skip = policy.POLICY == "skip" and self.skipped_steps < most
        step = StepSnapshot(
            cfg=self.cfg,
            batches=batches,
            iteration=self.iter,
            rank=comm.get_rank(),
            num_processes=comm.get_world_size(),
            precision=self.precision,
            learning_rate=max(group["lr"] for group in self.optimizer.param_groups),
            has_updated=self._has_updated,
            losses={name: loss.item() for name, loss in losses.items()},
            seed=torch.initial_seed(),  # set anew before each step
        )
        report = explain_step(_unwrap(self.model), step)
        _restore(buffers)
        saw = report["reproduced"] or not all(map(math.isfinite, step.losses.values()))
        # Where no process sees it alone, the sum over processes was it: the first reports.
        if not any(comm.all_gather(saw)):
            saw = comm.is_main_process()
        # Of steps that are skipped the first is saved whole, as there may be many.
        whole = not skip or not self.skipped_steps
        line = self._save(step, report, whole=whole) if saw else ""
        lines = {rank: line for rank, line in enumerate(comm.all_gather(line)) if line}
        (_, text), *others = lines.items()
        if others:
            text += f"; also on rank {', '.join(str(rank) for rank, _ in others)}"
        if not skip:
            skipped = f"; {self.skipped_steps} steps were skipped" if self.skipped_steps else ""
            raise NonFiniteError(f"diverged {text}{skipped}")
        self.skipped_steps += 1
        get_event_storage().put_scalar("skipped_steps", self.skipped_steps, smoothing_hint=False)
        logger.warning("Skipped the step %s (%d so far)", text, self.skipped_steps)

    def _save(self, step: StepSnapshot, report: Report, *, whole: bool) -> str:
        """Write the report, with a ``whole`` step to replay, and return all in one line."""
        losses = ", ".join(f"{name} {loss:.4g}" for name, loss in step.losses.items())
        line = f"at iteration {step.iteration}: {losses} on rank {step.rank}; {report['cause']}"
        states = {
            "model": _unwrap(self.model).state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "grad_scaler": self.grad_scaler.state_dict(),
        }
        try:
            return f"{line}; see {save_step(step, report, states if whole else None)}"
        except InputError as error:  # the diagnosis is worth more than its file
            return f"{line}; {error}"
        except Exception as error:
            return f"{line}; it cannot be saved: {type(error).__name__}: {first_line(error)}"

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict() | {"skipped_steps": self.skipped_steps}
        if self.grad_scaler.is_enabled():
            state["grad_scaler"] = self.grad_scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.skipped_steps = state_dict.get("skipped_steps", 0)  # Detectron2's has none
        if self.grad_scaler.is_enabled():
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])


def _unwrap(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


def _changing_buffers(model: nn.Module) -> list[Tensor]:
    """Return what a forward pass changes: statistics of BatchNorm, the loss's normaliser."""
    modules = (m for m in model.modules() if not isinstance(m, FrozenBatchNorm2d))
    return [buffer for module in modules for buffer in module.buffers(recurse=False)]


def _restore(buffers: list[tuple[Tensor, Tensor]]) -> None:
    for buffer, before in buffers:
        buffer.copy_(before)
