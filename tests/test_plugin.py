"""The plugin in other people's scripts: a changed trainer, and Detectron2's own trainer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import COCOEvaluator, inference_on_dataset

from retinanet_ext import add_retinanet_ext_config
from retinanet_ext.data.sample_set import SampleSet, make_sample_set

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "docs/my_train_net.py"


def test_a_script_with_one_more_hook_and_another_evaluator(tmp_path):
    opts = ["DATASETS.SAMPLE.NUM_TRAIN", "8", "DATASETS.SAMPLE.NUM_VAL", "4"]
    opts += ["SOLVER.MAX_ITER", "2", "MODEL.RETINANET.SCORE_THRESH_TEST", "0.0"]
    command = [sys.executable, SCRIPT, "--config-file", "configs/quickstart.yaml", *opts]
    env = {**os.environ, "DETECTRON2_DATASETS": str(tmp_path), "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [*command, "OUTPUT_DIR", tmp_path / "run"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    printed = [line for line in run.stdout.splitlines() if line.startswith("iteration ")]
    assert [line.split(":")[0] for line in printed] == ["iteration 0", "iteration 1"]
    assert "maxDets= 50" in run.stdout  # of the other evaluator
    lines = (tmp_path / "run/metrics.json").read_text().splitlines()
    assert "bbox/AP" in json.loads(lines[-1])


@pytest.mark.usefixtures("restore_logging")
def test_the_model_trains_under_detectron2s_own_trainer(tmp_path):
    """Its data, its loaders and its trainer; the model's keys are the plugin's."""
    folder = Path(make_sample_set(SampleSet(num_train=4, num_val=2, image_size=64), tmp_path))
    for split in ("train", "val"):
        name = f"own_trainer_{split}"
        file = next(folder.rglob(f"*{split}*.json"))
        images = next(path for path in folder.rglob("*") if path.is_dir() and split in path.name)
        register_coco_instances(name, {}, str(file), str(images))
    cfg = get_cfg()
    add_retinanet_ext_config(cfg)
    cfg.merge_from_file("configs/small_R18_FPN.yaml", allow_unsafe=False)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("own_trainer_train",), ("own_trainer_val",)
    cfg.MODEL.RETINANET.NUM_CLASSES = 5
    cfg.MODEL.DEVICE, cfg.OUTPUT_DIR = "cpu", str(tmp_path / "run")
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (64,), 64
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER = 2, 2
    # Two values that Detectron2's own trainer does not know.
    cfg.SOLVER.LR_SCHEDULER_NAME = "WarmupCosineLR"
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "norm"
    cfg.DATALOADER.NUM_WORKERS = 0
    Path(cfg.OUTPUT_DIR).mkdir()
    trainer = DefaultTrainer(cfg)
    assert type(trainer.model).__name__ == "RetinaNetExt"
    before = trainer.model.head.cls_score.weight.detach().clone()
    trainer._hooks = [hook for hook in trainer._hooks if type(hook).__name__ != "EvalHook"]
    trainer.train()
    assert not torch.equal(trainer.model.head.cls_score.weight, before)
    name = cfg.DATASETS.TEST[0]
    loader = DefaultTrainer.build_test_loader(cfg, name)
    evaluator = COCOEvaluator(name, tasks=("bbox",), output_dir=cfg.OUTPUT_DIR)
    inference_on_dataset(trainer.model, loader, evaluator)
    assert (Path(cfg.OUTPUT_DIR) / "model_final.pth").is_file()
