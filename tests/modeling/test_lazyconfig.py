"""The detector of docs/lazyconfig.py, built and trained as Detectron2's lazyconfig_train_net.py."""

import re
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyCall, LazyConfig, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import SimpleTrainer
from detectron2.utils.events import EventStorage
from torch.testing import assert_close

from detectors import make_batch, make_cfg
from retinanet_ext.modeling import OctaveAnchorGenerator, RetinaNetExt
from retinanet_ext.sampling import OHEM

DOCS = Path(__file__).parents[2] / "docs"
DATA = Path(__file__).parents[1] / "fixtures/bccd_mini"


@pytest.fixture
def cfg():
    """The config on five images of 64 pixels."""
    register_coco_instances(
        "lazy_bccd", {}, str(DATA / "instances_train_raw.json"), str(DATA / "images")
    )
    cfg = LazyConfig.load(str(DOCS / "lazyconfig.py"))
    cfg.model.num_classes = 3
    loader = cfg.dataloader.train
    loader.dataset.names = "lazy_bccd"
    loader.mapper.augmentations[0].update(short_edge_length=64, max_size=96)
    loader.update(total_batch_size=2, num_workers=0)
    yield cfg
    DatasetCatalog.pop("lazy_bccd")
    MetadataCatalog.pop("lazy_bccd")


def test_a_step_of_training(cfg, tmp_path):
    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
    cfg = LazyConfig.load(str(tmp_path / "config.yaml"))  # as it is kept with the run
    model = instantiate(cfg.model)
    assert type(model) is RetinaNetExt
    cfg.optimizer.params.model = model
    trainer = SimpleTrainer(
        model.train(), instantiate(cfg.dataloader.train), instantiate(cfg.optimizer)
    )
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    with EventStorage() as storage:
        trainer.run_step()
    latest = {name: value for name, (value, _) in storage.latest().items()}
    # Random weights behind frozen statistics: large, and finite.
    assert 0 < latest["total_loss"] < float("inf") and latest["num_pos_anchors"] > 0
    changed = {name.split(".")[0] for name, weight in model.named_parameters()
               if not torch.equal(weight, before[name])}  # fmt: skip
    assert changed == {"backbone", "head"}
    detections = model.eval()(make_batch([1], num_classes=3, size=(64, 64)))
    assert len(detections) == 1


def test_the_detector_is_that_of_the_yaml_config(cfg):
    """Equal losses with equal weights."""
    lazy = instantiate(cfg.model)
    keys = ["LOSS_NORMALIZER", "foreground", "LOW_QUALITY_MATCHES", "ignored_band"]
    keys += ["SMOOTH_L1_LOSS_BETA", 0.11]
    recipe = [f"MODEL.RETINANET.{key}" if i % 2 == 0 else key for i, key in enumerate(keys)]
    recipe += ["MODEL.ANCHOR_GENERATOR.OFFSET", 0.5]
    model = RetinaNetExt(make_cfg(*recipe, depth=50, num_classes=3))
    model.load_state_dict(lazy.state_dict())
    batch = make_batch([3, 1], num_classes=3, size=(96, 96))
    with EventStorage():
        assert_close(lazy.train()(batch), model.train()(batch), rtol=0, atol=0)


def test_the_changes_that_the_page_shows(cfg, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "lazyconfig.md").read_text(), re.S)
    monkeypatch.chdir(DOCS.parent)
    names: dict = {}
    exec(code, names)
    model = instantiate(names["cfg"].model)
    assert model.criterion.alpha_weights[0].tolist() == [0.25, 0.25, 0.75]
    assert model.criterion.cls_loss.loss.name == "focal_star"
    assert isinstance(model.criterion.selection, OHEM)
    losses = model.train()(make_batch([2], num_classes=3, size=(64, 64)))
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize(
    "ratios", [[0.5, 1.0, 2.0], [[0.5, 1.0, 2.0]], [[1.0], [1.0, 2.0], [1.0], [1.0], [0.5]]]
)
def test_aspect_ratios_for_all_levels_or_for_each(ratios):
    """Omegaconf's lists are sequences, but no lists."""
    arguments = {"aspect_ratios": ratios, "strides": [8, 16, 32, 64, 128]}
    lazy = instantiate(LazyCall(OctaveAnchorGenerator)(**arguments))
    plain = OctaveAnchorGenerator(**arguments)
    assert lazy.num_anchors == plain.num_anchors
    assert all(map(torch.equal, lazy.cell_anchors, plain.cell_anchors))
