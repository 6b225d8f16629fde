"""Train this detector and Detectron2's RetinaNet and compare losses, AP, time and memory.

    python benchmarks/compare_detectron2.py --config-file configs/small_R18_FPN.yaml \
        DATASETS.CUSTOM.TRAIN_JSON train.json DATASETS.CUSTOM.TRAIN_IMAGES images ...

Both use the same config, data, seed and machine. They run one after the other, each in its own
process so that peak memory is separate. Results go to ``OUTPUT_DIR/<architecture>``.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from detectron2.engine import HookBase, default_setup
from tabulate import tabulate

from retinanet_ext.data import prepare_datasets
from retinanet_ext.engine import Trainer, load_config

ARCHITECTURES = ("RetinaNet", "RetinaNetExt")


class Recorder(HookBase):
    """Keep the total loss and the seconds of every iteration."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def before_step(self) -> None:
        self.start = time.perf_counter()

    def after_step(self) -> None:
        self.seconds.append(time.perf_counter() - self.start)
        self.losses.append(self.trainer.storage.history("total_loss").latest())


def run(architecture: str, args: argparse.Namespace) -> tuple[list[float], list[float], Any, float]:
    """Train one architecture; return its losses, seconds, metrics and peak memory (MiB)."""
    torch.set_num_threads(args.threads)
    cfg = load_config(args.config_file, args.opts)
    cfg.MODEL.META_ARCHITECTURE = architecture
    cfg.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, architecture)
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    prepare_datasets(cfg, eval_only=False)
    os.makedirs(cfg.OUTPUT_DIR)  # an earlier comparison is not overwritten
    default_setup(cfg, args)
    trainer = Trainer(cfg)
    recorder = Recorder()
    trainer.register_hooks([recorder])
    trainer.resume_or_load(resume=False)
    metrics = trainer.train()["bbox"]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if torch.cuda.is_available():
        memory = torch.cuda.max_memory_allocated() / 2**20
    return recorder.losses, recorder.seconds, metrics, memory


def main() -> None:
    """Run both and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs")
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    rows, losses = [], {}
    for architecture in ARCHITECTURES:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            losses[architecture], seconds, metrics, memory = pool.submit(
                run, architecture, args
            ).result()
        median = torch.tensor(seconds).median().item()
        rows.append([architecture, metrics["AP"], metrics["AP50"], median, memory])
    print(tabulate(rows, ["", "AP", "AP50", "s/iteration (median)", "peak MiB"], floatfmt=".3f"))
    print("relative difference of the losses, iteration by iteration:")
    pairs = list(zip(*losses.values(), strict=True))[:20]
    print(", ".join(f"{abs(ours - stock) / stock:.0e}" for stock, ours in pairs))


if __name__ == "__main__":
    main()
