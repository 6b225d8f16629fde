"""A run's folder without a training: a detector of random weights that finds something."""

from pathlib import Path

import torch
from detectron2.modeling import build_model

from detectors import make_cfg
from retinanet_ext.engine.checkpoint import Checkpointer

CLASS_NAMES = ["RBC", "WBC", "Platelets"]
FIXTURE = Path("tests/fixtures/bccd_mini")


def make_run(folder, *opts, seed=0, iteration=9):
    """Write the ``config.yaml`` and the checkpoint of a run with BCCD's classes and images."""
    folder.mkdir(parents=True, exist_ok=True)
    data = ["DATASETS.CUSTOM.TEST_JSON", str(FIXTURE / "instances_val.json")]
    data += ["DATASETS.CUSTOM.TEST_IMAGES", str(FIXTURE / "images"), "DATALOADER.NUM_WORKERS", 0]
    sizes = ["INPUT.MIN_SIZE_TEST", 96, "INPUT.MAX_SIZE_TEST", 160]
    cfg = make_cfg(*data, *sizes, "OUTPUT_DIR", str(folder), *opts, num_classes=3)
    torch.manual_seed(seed)
    model = build_model(cfg)
    with torch.no_grad():
        model.head.cls_score.weight.mul_(20)
        model.head.cls_score.bias.fill_(-2)
    (folder / "config.yaml").write_text(cfg.dump())
    checkpointer = Checkpointer(model, str(folder), class_names=CLASS_NAMES)
    checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
    return folder
