"""Training of a very small detector in the test's own process, and by ``train_net.py``."""

import os
import random
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

import train_net
from retinanet_ext.data import prepare_datasets
from retinanet_ext.engine import Trainer, argument_parser, launch, load_config

ROOT = Path(__file__).parents[1]
CONFIG = "tests/engine/resume.yaml"
TRAIN_NET = (sys.executable, "train_net.py")


def make_trainer(folder, *opts, resume=False):
    """A trainer with its weights, in the state of a process that has just begun."""
    values = ["MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(folder), *map(str, opts)]
    cfg = load_config(CONFIG, values)
    prepare_datasets(cfg, eval_only=False)
    folder.mkdir(exist_ok=True)
    if cfg.SEED >= 0:
        random.seed(cfg.SEED)
        np.random.seed(cfg.SEED)
        torch.manual_seed(cfg.SEED)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    return trainer


@contextmanager
def no_cuda():
    """Hide the GPUs from this process and from those that it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setattr("torch.cuda.is_available", lambda: False)
        yield


class CutOffError(Exception):
    pass


def cut_off(trainer, iteration):
    """Train until the middle of an iteration, whose batch is then lost."""
    run_step = trainer.run_step

    def run_step_or_end():
        run_step()
        if trainer.iter == iteration:
            raise CutOffError

    trainer.run_step = run_step_or_end
    with pytest.raises(CutOffError):
        trainer.train()


def run_train_net(*argv):
    """Run train_net.py in this process, with its launcher, and return the exit code."""
    args = argument_parser().parse_args(list(map(str, argv)))
    return launch(
        train_net.main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )


def start_train_net(*argv, config=CONFIG, command=TRAIN_NET, env=(), interrupts=True, **kwargs):
    """Start ``train_net.py`` on the CPU, also where there is CUDA.

    Without ``interrupts`` it ignores SIGINT, as what a script starts in the background does.
    """
    handler = signal.default_int_handler if interrupts else signal.SIG_IGN
    return subprocess.Popen(
        [*command, "--config-file", config, *map(str, argv)],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **dict(env)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, handler),
        **kwargs,
    )


def train_in_double(folder, opts):
    """Train in float64, where no rounding decides on which side of a ReLU a value is.

    Returns the weights before.
    """
    torch.set_default_dtype(torch.float64)
    try:
        trainer = make_trainer(folder, *opts)
        before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
        trainer.train()
    finally:
        torch.set_default_dtype(torch.float32)
    return before
