"""Stopping and going on as if nothing had been."""

from __future__ import annotations

import json
import logging
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from detectron2.engine import DefaultTrainer, HookBase, hooks
from detectron2.utils import comm

from retinanet_ext.data.loader import seed_rngs
from retinanet_ext.engine.class_matching import match_optimizer_state, saved_class_names
from retinanet_ext.errors import InputError, StoppedError
from retinanet_ext.files import atomic_write

logger = logging.getLogger(__name__)


class ResumableTrainer(DefaultTrainer):
    """Detectron2's ``DefaultTrainer``, whose ``--resume`` is exact, for :class:`TrainLoader`.

    A resumed run ends as the uninterrupted one does, bit for bit where the arithmetic is (the CPU).
    Beside what Detectron2 saves, the place in the stream of samples and its seed are saved; the
    generators of random numbers are set anew in each iteration.

    The learning rate and the optimizer's other settings are the config's and not the checkpoint's,
    from the first iteration on, with a warning where they differ.
    """

    def build_hooks(self) -> list[HookBase]:
        """Return Detectron2's hooks and those of this module.

        A run is stopped after its state is complete and before an evaluation, which may take
        longer than a scheduler waits.
        """
        usual = [
            _PreciseBN.of(hook) if isinstance(hook, hooks.PreciseBN) else hook
            for hook in super().build_hooks()
        ]
        evaluation = next(i for i, hook in enumerate(usual) if isinstance(hook, hooks.EvalHook))
        return [SeedIterations(), *usual[:evaluation], StopOnSigterm(), *usual[evaluation:]]

    def resume_or_load(self, resume: bool = True) -> None:
        """Go on from the last checkpoint with ``resume``, else load ``MODEL.WEIGHTS``.

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
                model = self.checkpointer.model
                match_optimizer_state(self.optimizer, saved, wanted, model)
            self.start_iter = self.iter + 1
        else:
            self.checkpointer.load(self.cfg.MODEL.WEIGHTS, checkpointables=[])
        if resume and comm.is_main_process():
            metrics = Path(self.cfg.OUTPUT_DIR, "metrics.json")
            has_ended = Path(checkpoint).name == "model_final.pth"
            is_extended = has_ended and self.start_iter < self.max_iter
            archive_superseded_metrics(metrics, self.start_iter, is_extended=is_extended)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"data": self.data_loader.state_dict(self.iter + 1)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        groups = self.optimizer.param_groups
        configured = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        super().load_state_dict(state_dict)
        if self.iter >= self.max_iter:
            raise InputError(
                f"SOLVER.MAX_ITER {self.max_iter} is less than the {self.iter + 1} iterations that "
                "the checkpoint holds; raise it to go on, or evaluate with --eval-only --resume"
            )
        # A checkpoint of Detectron2's trainer says only how many batches there were.
        data = state_dict.get("data") or self.data_loader.state_dict(self.iter + 1)
        self.data_loader.load_state_dict(data)

        groups = self.optimizer.param_groups  # loading makes new ones
        self.scheduler.base_lrs = [group["initial_lr"] for group in configured]
        for settings, lr in zip(configured, self.scheduler.get_lr(), strict=True):
            settings["lr"] = lr
        changed = {
            f"{name} {group[name]:g} -> {settings[name]:g}": None
            for group, settings in zip(groups, configured, strict=True)
            for name in ("lr", "momentum", "weight_decay")
            if group[name] != settings[name]
        }
        if changed:
            logger.warning("Settings other than the checkpoint's: %s", ", ".join(changed))
        for group, settings in zip(groups, configured, strict=True):
            group.update(settings)


def saved_seed(checkpoint: str | Path) -> int:
    """Return the seed that a checkpoint's run goes on with, -1 where none is written as here is."""
    trainer = torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True)["trainer"]
    try:
        seed = trainer["data"]["seed"]
    except (KeyError, TypeError):
        return -1
    return seed if isinstance(seed, int) else -1


class SeedIterations(HookBase):
    """Makes the random numbers of an iteration a function of seed, iteration and process."""

    def before_step(self) -> None:
        seed_rngs(self.trainer.data_loader.seed, self.trainer.iter, comm.get_rank())
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(torch.initial_seed())


class StopOnSigterm(HookBase):
    """Saves and ends the training, on all processes after the same iteration, at a SIGTERM."""

    def __init__(self) -> None:
        self._handler: Any = None

    def before_train(self) -> None:
        if threading.current_thread() is threading.main_thread():  # no other gets signals
            self._handler = signal.signal(signal.SIGTERM, self._request)

    def _request(self, signum: int, frame: FrameType | None) -> None:
        self.trainer._trainer.stop_requested = True

    def after_step(self) -> None:
        trainer = self.trainer
        if not trainer._trainer.stop_agreed:
            return
        name = f"model_{trainer.iter:07d}"
        trainer.checkpointer.save(name, iteration=trainer.iter)
        comm.synchronize()  # the launcher ends the other processes with the first
        raise StoppedError(
            f"stopped by SIGTERM after iteration {trainer.iter}, saved as "
            f"{Path(trainer.cfg.OUTPUT_DIR, name)}.pth; the same command with --resume goes on"
        )

    def after_train(self) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGTERM, self._handler)


class _PreciseBN(hooks.PreciseBN):
    """Detectron2's, from the batches that come next instead of those it has not seen before."""

    @classmethod
    def of(cls, hook: hooks.PreciseBN) -> _PreciseBN:
        return cls(hook._period, hook._model, hook._data_loader, hook._num_iter)

    def update_stats(self) -> None:
        state = self.trainer.data_loader.state_dict(self.trainer.iter + 1)
        self._data_loader.load_state_dict(state)
        self._data_iter = None  # so that it starts there
        super().update_stats()


def archive_superseded_metrics(
    metrics: Path, start_iter: int, *, is_extended: bool = False
) -> None:
    """Move the lines of iterations that will be run again to ``metrics_superseded.json``.

    Args:
        metrics: a file of Detectron2's ``JSONWriter``, which may have it open already
        start_iter: the first iteration that will be run
        is_extended: the run had ended; its last line is the evaluation then, which Detectron2
            writes under the iteration after the last
    """
    lines = metrics.read_bytes().splitlines(keepends=True) if metrics.exists() else []
    kept, superseded = [], []
    for number, line in enumerate(lines, 1):
        is_last = is_extended and number == len(lines)
        (kept if _is_before(line, start_iter + is_last) else superseded).append(line)
    if not superseded:
        return
    aside = metrics.with_name("metrics_superseded.json")
    earlier = aside.read_bytes() if aside.exists() else b""
    with atomic_write(aside) as file:
        file.writelines([earlier, *superseded])
    with open(metrics, "r+b") as file:
        file.writelines(kept)
        file.truncate()


def _is_before(line: bytes, start_iter: int) -> bool:
    try:
        return json.loads(line)["iteration"] < start_iter
    except ValueError:
        return False  # cut off by a kill
