"""One training step: mixed precision, gradient accumulation and non-finite losses."""

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

from retinanet_ext.engine.config_check import training_precision
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
    """Detectron2's ``SimpleTrainer`` and, with ``SOLVER.AMP.ENABLED``, its ``AMPTrainer``.

    It differs from them in the following.

    - A step accumulates the gradients of ``SOLVER.GRAD_ACCUM_STEPS`` micro-batches, and equals the
      step of one batch of all their images.
    - After each backward pass, and before the optimizer step, all processes agree on whether the
      loss and the gradient norm are finite. ``SOLVER.NON_FINITE`` says what happens if they are
      not. In float16 an infinite gradient alone is not a fault unless the loss scale is below 1,
      because it is how the scale is found.
    - A signal handler sets ``stop_requested`` on one process. At the end of the step,
      ``stop_agreed`` is set on all of them.
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
        self.precision = training_precision(cfg)
        self.grad_scaler = torch.amp.GradScaler(
            self.device.type, enabled=self.precision == "float16"
        )
        self.stop_requested = False
        self.stop_agreed = False
        self.skipped_steps = 0
        self._has_updated = False  # whether a step has changed the loaded weights

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
        """Compute the gradient of the step, scaled for float16, into the parameters' ``grad``.

        Returns:
            the micro-batches, the losses of the step and the seconds spent waiting for data
        """
        count = self.cfg.SOLVER.GRAD_ACCUM_STEPS
        end_step = begin_step(unwrap(self.model), count)
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
        """Return a context in which backward all-reduces gradients only if ``wanted``."""
        if wanted or not isinstance(self.model, DistributedDataParallel):
            return nullcontext()
        return self.model.no_sync()

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.model.parameters() if p.grad is not None]

    def _agree(self, losses: dict[str, Tensor]) -> tuple[bool, bool]:
        """All-reduce two flags: is any process's step not finite, and was any asked to stop?"""
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
        """Explain the step on the processes where it was not finite; then raise on all, or skip it.

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
        report = explain_step(unwrap(self.model), step)
        _restore(buffers)
        saw = report["reproduced"] or not all(map(math.isfinite, step.losses.values()))
        # If no process sees it alone, the sum over processes is not finite: rank 0 reports.
        if not any(comm.all_gather(saw)):
            saw = comm.is_main_process()
        # Of the skipped steps only the first is saved in full, because there may be many.
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
        """Write the report, and the step itself if ``whole``, and return a one-line summary."""
        losses = ", ".join(f"{name} {loss:.4g}" for name, loss in step.losses.items())
        line = f"at iteration {step.iteration}: {losses} on rank {step.rank}; {report['cause']}"
        states = {
            "model": unwrap(self.model).state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "grad_scaler": self.grad_scaler.state_dict(),
        }
        try:
            return f"{line}; see {save_step(step, report, states if whole else None)}"
        except InputError as error:  # the explanation matters more than its file
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
        if self.grad_scaler.is_enabled() and "grad_scaler" in state_dict:
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside ``DistributedDataParallel``, or the model itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def _changing_buffers(model: nn.Module) -> list[Tensor]:
    """Return the buffers that a forward pass changes: BatchNorm statistics, the loss normaliser."""
    modules = (m for m in model.modules() if not isinstance(m, FrozenBatchNorm2d))
    return [buffer for module in modules for buffer in module.buffers(recurse=False)]


def _restore(buffers: list[tuple[Tensor, Tensor]]) -> None:
    for buffer, before in buffers:
        buffer.copy_(before)
