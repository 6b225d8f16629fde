"""Minutes of training to an AP: this project's default beside Detectron2's RetinaNet.

    python benchmarks/bench_time_to_ap.py --data FOLDER [--seeds 1] [--save]

FOLDER holds ``instances_{train,val}.json`` and ``images``. "detectron2" is its RetinaNet, trainer,
loader and step schedule, with the backbone, the image size and the number of images of
``configs/small_R18_FPN.yaml``, which "ours" trains as it is. Both are evaluated as they go; minutes
are those of training alone. The runs follow one another, each in its own process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import custom_data, save
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.evaluation import COCOEvaluator
from matplotlib.figure import Figure
from tabulate import tabulate

from retinanet_ext.data import prepare_datasets
from retinanet_ext.engine import Trainer, load_config

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs/small_R18_FPN.yaml"
TARGETS = (30, 40, 45, 50)
FIGURE = ROOT / "docs/results/figures/time_to_ap.svg"
COLORS = {"detectron2": "#d55e00", "ours": "#0072b2"}


class Detectron2Trainer(DefaultTrainer):
    """As in Detectron2's own training script."""

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> COCOEvaluator:
        """Return COCO's evaluator."""
        return COCOEvaluator(dataset_name, output_dir=cfg.OUTPUT_DIR)


class Curve(HookBase):
    """AP at each evaluation and the minutes of training before it."""

    def before_train(self) -> None:
        """Start the clock, which stands still during evaluations."""
        self.points: list[tuple[int, float, float]] = []
        self.evaluating = 0.0
        self.start = time.perf_counter()
        test = self.trainer.test

        def timed_test(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            results = test(*args, **kwargs)
            minutes = (begun - self.start - self.evaluating) / 60
            self.points.append((self.trainer.iter + 1, minutes, results["bbox"]["AP"]))
            self.evaluating += time.perf_counter() - begun
            return results

        self.trainer.test = timed_test


def make_configs(args: argparse.Namespace, output: str) -> dict[str, CfgNode]:
    """Return the config of each way, with the data registered."""
    opts = ["OUTPUT_DIR", output, "TEST.EVAL_PERIOD", str(args.period), "SEED", str(args.seed)]
    opts += ["TEST.DETECTION_GRID.NUM_IMAGES", "0"]
    if not torch.cuda.is_available():
        opts += ["MODEL.DEVICE", "cpu"]
    opts += [word for pair in custom_data(args.data).items() for word in pair]
    ours = load_config(CONFIG, [*opts, *args.opts])
    prepare_datasets(ours, eval_only=False)
    stock = get_cfg()
    stock.merge_from_file(str(ROOT / "benchmarks/detectron2_R18_FPN.yaml"))
    for group, key in (
        ("DATASETS", "TRAIN"),
        ("DATASETS", "TEST"),
        ("SOLVER", "MAX_ITER"),
        ("SOLVER", "IMS_PER_BATCH"),
        ("TEST", "EVAL_PERIOD"),
        ("MODEL", "DEVICE"),
    ):
        stock[group][key] = ours[group][key]
    stock.MODEL.RETINANET.NUM_CLASSES = ours.MODEL.RETINANET.NUM_CLASSES
    # The last ninth at a tenth of the rate, as in Detectron2's schedules.
    stock.SOLVER.STEPS = tuple(stock.SOLVER.MAX_ITER * n // 9 for n in (6, 8))
    stock.SEED, stock.OUTPUT_DIR = args.seed, output
    return {"detectron2": stock, "ours": ours}


def run(way: str, args: argparse.Namespace) -> None:
    """Train in this process and print the curve as the last line."""
    with tempfile.TemporaryDirectory() as output:
        cfg = make_configs(args, output)[way]
        torch.manual_seed(args.seed)
        trainer = (Trainer if way == "ours" else Detectron2Trainer)(cfg)
        trainer.resume_or_load(resume=False)
        curve = Curve()
        trainer.register_hooks([curve])
        trainer.train()
    print(json.dumps(curve.points))


def minutes_to(points: list[list[float]], target: float) -> str:
    """Return the minutes of the first evaluation at or above an AP."""
    return next((f"{minutes:.2f}" for _, minutes, ap in points if ap >= target), "never")


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Write AP against minutes of training, a line per run."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.add_subplot(xlabel="minutes of training", ylabel="AP")
    labelled: set[str] = set()
    for row in rows:
        _, minutes, aps = zip(*row["curve"], strict=True)
        label = None if row["way"] in labelled else row["way"]
        labelled.add(row["way"])
        axes.plot([0, *minutes], [0, *aps], "o-", ms=3, color=COLORS[row["way"]], label=label)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Run both ways and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--period", type=int, default=30, help="iterations between evaluations")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--save", action="store_true", help="write a file below results/")
    parser.add_argument("--way", choices=("detectron2", "ours"), help="train in this process")
    parser.add_argument("opts", nargs="*", help="KEY VALUE pairs for ours, and lengths for both")
    args = parser.parse_args()
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.way:
        run(args.way, args)
        return
    rows = []
    for seed in range(args.seed, args.seed + args.seeds):
        for way in ("detectron2", "ours"):
            options = ["--seed", str(seed), "--way", way, "--period", str(args.period)]
            command = [sys.executable, __file__, "--data", args.data, *options, *args.opts]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            points = json.loads(output.splitlines()[-1])
            reached = {f"min to {ap} AP": minutes_to(points, ap) for ap in TARGETS}
            last = {"min in all": f"{points[-1][1]:.2f}", "last AP": f"{points[-1][2]:.1f}"}
            rows.append({"way": way, "seed": seed, **reached, **last, "curve": points})
    print(tabulate([{k: v for k, v in row.items() if k != "curve"} for row in rows], "keys"))
    if args.save:
        save("time_to_ap", rows, args)
        draw(rows, FIGURE)


if __name__ == "__main__":
    main()
