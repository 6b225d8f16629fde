"""Hooks that Detectron2 lacks."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm

from retinanet_ext.data.loader import TrainLoader, seed_rngs
from retinanet_ext.errors import StoppedError


class SeedIterations(HookBase):
    """Make the random numbers of an iteration a function of seed, iteration and process."""

    def before_step(self) -> None:
        seed = getattr(self.trainer.data_loader, "seed", self.trainer.cfg.SEED)
        if seed < 0:  # neither a loader nor the config has one
            return
        seed_rngs(seed, self.trainer.iter, comm.get_rank())
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(torch.initial_seed())


class StopOnSignal(HookBase):
    """Save a checkpoint and stop, after the current iteration, on SIGTERM or one Ctrl-C.

    All processes stop after the same iteration.

    Raises:
        StoppedError: once the checkpoint is written
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Any] = {}

    def before_train(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # only the main thread receives signals
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) != signal.SIG_IGN:  # as in a script's background jobs
                self._handlers[number] = signal.signal(number, self._request)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.trainer._trainer.stop_requested = True
        if number == signal.SIGINT:  # a second one interrupts
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def after_step(self) -> None:
        trainer = self.trainer
        if not trainer._trainer.stop_agreed:
            return
        name = f"model_{trainer.iter:07d}"
        trainer.checkpointer.save(name, iteration=trainer.iter)
        comm.synchronize()  # otherwise a process that ends early takes the others with it
        raise StoppedError(
            f"stopped by SIGTERM after iteration {trainer.iter}, saved as "
            f"{Path(trainer.cfg.OUTPUT_DIR, name)}.pth; the same command with --resume goes on"
        )

    def after_train(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)


class EvalHook(hooks.EvalHook):
    """Detectron2's hook, except that a training that failed is not evaluated.

    Detectron2 evaluates a run that fails in its last iteration, when other processes may be gone.
    """

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:
            super().after_train()


class PreciseBN(hooks.PreciseBN):
    """Detectron2's hook, except that it takes the batches that training takes next.

    Otherwise a resumed run, which has a new loader, would take others than an uninterrupted one.
    """

    def update_stats(self) -> None:
        if isinstance(self._data_loader, TrainLoader):
            state = self.trainer.data_loader.state_dict(self.trainer.iter + 1)
            self._data_loader.load_state_dict(state)
            self._data_iter = None  # so that it starts there
        super().update_stats()
