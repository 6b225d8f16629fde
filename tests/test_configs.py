"""The project's configs load without running code, build, and say what the paper says."""

from pathlib import Path

import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model

from detectors import build_without_memory
from retinanet_ext.engine import load_config

CONFIGS = Path(__file__).parents[1] / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def load(name):
    cfg = load_config(str(CONFIGS / f"{name}.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    return cfg


def test_the_configs_that_others_rely_on_are_there():
    models = {f"retinanet_{depth}_FPN" for depth in ("R50", "R101", "X101")}
    small = {f"small_{backbone}_FPN" for backbone in ("R18", "mobilenetv2")}
    others = {"mmdet_retinanet_R50_FPN", "torchvision_retinanet_v1", "torchvision_retinanet_v2"}
    assert set(NAMES) == {*models, *small, *others, "finetune_R50_FPN", "base_coco", "quickstart"}


@pytest.mark.parametrize("name", NAMES)
def test_config_builds_this_detector(name):
    cfg = load(name)
    assert cfg.MODEL.META_ARCHITECTURE == "RetinaNetExt"
    anchors = "Torchvision" if name.startswith("torchvision") else "Octave"
    assert f"{anchors}AnchorGenerator" == cfg.MODEL.ANCHOR_GENERATOR.NAME
    build_without_memory(cfg)


@pytest.mark.parametrize("name", ["retinanet_R50_FPN", "retinanet_R101_FPN", "retinanet_X101_FPN"])
def test_recipe_of_the_paper(name):
    """Sections 4 and 4.1; the authors' code where the paper is silent (docs/deviations.md)."""
    cfg = load(name)
    solver, retinanet, jitter = cfg.SOLVER, cfg.MODEL.RETINANET, "X101" in name
    assert (solver.IMS_PER_BATCH, solver.BASE_LR) == (16, 0.01)
    assert (solver.MOMENTUM, solver.WEIGHT_DECAY, solver.GAMMA) == (0.9, 1e-4, 0.1)
    schedule = (135_000, (90_000, 120_000)) if jitter else (90_000, (60_000, 80_000))
    assert (solver.MAX_ITER, tuple(solver.STEPS)) == schedule
    assert (solver.BIAS_LR_FACTOR, solver.WEIGHT_DECAY_BIAS) == (2.0, 0.0)
    assert (solver.WARMUP_ITERS, round(solver.WARMUP_FACTOR, 4)) == (500, 0.3333)
    assert (retinanet.FOCAL_LOSS_ALPHA, retinanet.FOCAL_LOSS_GAMMA) == (0.25, 2.0)
    assert (retinanet.PRIOR_INIT, retinanet.PRIOR_PROB, retinanet.NUM_CONVS) == (True, 0.01, 4)
    assert (retinanet.IOU_THRESHOLDS, retinanet.IOU_LABELS) == ([0.4, 0.5], [0, -1, 1])
    assert (retinanet.LOSS_NORMALIZER, retinanet.LOW_QUALITY_MATCHES) == (
        "foreground",
        "ignored_band",
    )
    assert (retinanet.SMOOTH_L1_LOSS_BETA, retinanet.BBOX_REG_LOSS_TYPE) == (0.11, "smooth_l1")
    assert tuple(retinanet.BBOX_REG_WEIGHTS) == (1, 1, 1, 1)
    test = (retinanet.SCORE_THRESH_TEST, retinanet.TOPK_CANDIDATES_TEST, retinanet.NMS_THRESH_TEST)
    assert test == (0.05, 1000, 0.5) and cfg.TEST.DETECTIONS_PER_IMAGE == 100
    node = cfg.INPUT
    assert (node.MIN_SIZE_TEST, node.MAX_SIZE_TEST, max(node.MIN_SIZE_TRAIN)) == (
        (800, 1333, 800) if jitter else (600, 1000, 600)
    )
    assert (node.MAX_SIZE_TRAIN, len(node.MIN_SIZE_TRAIN)) == ((1333, 6) if jitter else (1000, 1))
    assert node.RANDOM_FLIP == "horizontal"
    assert cfg.MODEL.ANCHOR_GENERATOR.OFFSET == 0.5
    depth = cfg.MODEL.RESNETS.DEPTH
    assert depth == (50 if "R50" in name else 101)
    assert cfg.MODEL.RESNETS.STRIDE_IN_1X1 is not jitter  # the original ResNets, not ResNeXt
    assert (cfg.MODEL.BACKBONE.FREEZE_AT, cfg.MODEL.RESNETS.NORM) == (2, "FrozenBN")
    assert list(cfg.DATASETS.TRAIN) == ["coco_2017_train"]
    assert len(MetadataCatalog.get("coco_2017_train").thing_classes) == retinanet.NUM_CLASSES


@pytest.mark.parametrize("backbone", ["R18", "mobilenetv2"])
def test_small_config_trains_every_layer(backbone):
    cfg = load(f"small_{backbone}_FPN")
    model = build_model(cfg)
    assert all(parameter.requires_grad for parameter in model.parameters())
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d | torch.nn.GroupNorm)]
    assert len(norms) > 20
