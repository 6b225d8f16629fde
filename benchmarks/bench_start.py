"""The start of a training, from the command to the first batch, beside Detectron2's.

    python benchmarks/bench_start.py --json train.json --images images [--weights FILE] [--repeat 5]

Both train ResNet-18 on the same data. Detectron2's is its ``DefaultTrainer``
behind ``default_setup``, as in its ``tools/train_net.py``; ours is ``train_net.py``. Each start
is a process of its own, and they alternate. "ours, first" has an empty cache of image checks.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tabulate import tabulate

ROOT = Path(__file__).parents[1]
WAYS = ("detectron2", "ours", "ours, first")


def start_detectron2(args: argparse.Namespace, output: str) -> None:
    """Do what Detectron2's training script does until it has the first batch."""
    from detectron2.config import get_cfg
    from detectron2.data.datasets import register_coco_instances
    from detectron2.engine import DefaultTrainer, default_argument_parser, default_setup

    from retinanet_ext import add_retinanet_ext_config

    register_coco_instances("start", {}, args.json, args.images)
    cfg = get_cfg()
    add_retinanet_ext_config(cfg)
    cfg.merge_from_file(str(ROOT / "benchmarks/detectron2_R18_FPN.yaml"), allow_unsafe=False)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("start",), ()
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR = "cpu", args.weights, output
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    cfg.MODEL.ANCHOR_GENERATOR.NAME = "DefaultAnchorGenerator"
    cfg.freeze()
    default_setup(cfg, default_argument_parser().parse_args([]))
    trainer = DefaultTrainer(cfg)
    trainer.resume_or_load(resume=False)
    next(trainer._trainer._data_loader_iter)


def start_ours(args: argparse.Namespace, output: str) -> None:
    """Do what ``train_net.py`` does until it has the first batch."""
    from retinanet_ext import engine

    opts = ["DATASETS.CUSTOM.TRAIN_JSON", args.json, "DATASETS.CUSTOM.TRAIN_IMAGES", args.images]
    opts += ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", args.weights, "OUTPUT_DIR", output]
    config = str(ROOT / "configs/small_R18_FPN.yaml")
    run_args = engine.argument_parser().parse_args(["--config-file", config, *opts])
    cfg = engine.load_config(run_args.config_file, run_args.opts)
    engine.prepare_run(cfg, run_args)
    trainer = engine.Trainer(cfg)
    trainer.resume_or_load(resume=False)
    engine.start_run(cfg, run_args)
    next(trainer._trainer._data_loader_iter)


def main() -> None:
    """Time the starts and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", required=True)
    parser.add_argument("--images", required=True)
    parser.add_argument("--weights", default="")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--way", choices=WAYS, help="start once in this process")
    args = parser.parse_args()
    if args.way:
        start = start_detectron2 if args.way == "detectron2" else start_ours
        start(args, tempfile.mkdtemp())
        return
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as cache:
        for _ in range(args.repeat):
            for way in reversed(WAYS):
                folder = tempfile.mkdtemp(dir=cache) if way.endswith("first") else cache
                env = {**os.environ, "RETINANET_EXT_CACHE": folder, "PYTHONPATH": str(ROOT)}
                begun = time.perf_counter()
                command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
                subprocess.run(command, env=env, check=True, capture_output=True)
                seconds[way].append(time.perf_counter() - begun)
    base = statistics.median(seconds["detectron2"])
    rows = [
        (way, statistics.median(times), min(times), statistics.median(times) / base)
        for way, times in seconds.items()
    ]
    print(tabulate(rows, ["", "median s", "least s", "ratio"], floatfmt=".3g"))


if __name__ == "__main__":
    main()
