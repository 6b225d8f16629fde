"""What the documents promise is tried."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from detectors import make_batch, make_cfg

ROOT = Path(__file__).parents[1]


def test_add_a_loss_as_its_document_says(tmp_path):
    text = (ROOT / "docs/add_a_loss.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.S).group(1)
    config = re.search(r"```yaml\n(.*?)```", text, re.S).group(1)
    shutil.copytree(ROOT / "retinanet_ext", tmp_path / "retinanet_ext")
    (tmp_path / re.search(r"`(retinanet_ext/losses/\w+\.py)`", text).group(1)).write_text(code)
    base = ROOT / "configs/retinanet_R50_FPN.yaml"
    (tmp_path / "power.yaml").write_text(yaml.safe_dump({"_BASE_": str(base)}) + config)
    program = """
import torch
from detectron2.config import get_cfg
from retinanet_ext import add_retinanet_ext_config
from retinanet_ext.modeling.criterion import build_cls_loss
cfg = get_cfg()
add_retinanet_ext_config(cfg)
assert cfg.MODEL.RETINANET.CLS_LOSS.POWER == {"EXPONENT": 2.0, "ALPHA": 0.25}
cfg.merge_from_file("power.yaml", allow_unsafe=False)
loss, alpha = build_cls_loss(cfg)
x = torch.linspace(-20, 20, 9, dtype=torch.float64)
assert torch.allclose(loss(x), (1 - x.sigmoid()) ** 1.5) and alpha == 0.25
print("trained with", cfg.MODEL.RETINANET.CLS_LOSS.NAME)
"""
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.stdout.strip() == "trained with power", run.stderr

    for name in ("tests/losses/test_losses.py", "tests/conftest.py", "pyproject.toml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    contract = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", "power"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert "2 passed" in contract.stdout, contract.stdout


@pytest.mark.parametrize("per_level", [False, True])
def test_the_lazy_config_trains_a_step_after_a_round_trip(per_level, tmp_path):
    """As it stands and as a YAML file that Detectron2 saves, with aspect ratios a level too."""
    cfg = LazyConfig.load(str(ROOT / "docs/lazyconfig.py"))
    stages = cfg.model.backbone.bottom_up.stages
    stages.depth = 18
    del stages.stride_in_1x1
    cfg.model.backbone.top_block.in_channels = 512
    cfg.model.num_classes = 4
    if per_level:
        cfg.model.anchor_generator.aspect_ratios = [[0.5, 1.0, 2.0]] * 5
    LazyConfig.save(cfg, str(tmp_path / "saved.yaml"))
    model = instantiate(LazyConfig.load(str(tmp_path / "saved.yaml")).model).train()
    with EventStorage():
        losses = model(make_batch([3, 0]))
    sum(losses.values()).backward()
    assert all(loss.isfinite() and loss > 0 for loss in losses.values())
    assert model.head.cls_score.weight.grad.abs().sum() > 0
    expected = build_model(make_cfg("MODEL.ANCHOR_GENERATOR.OFFSET", 0.5))
    assert model.state_dict().keys() == expected.state_dict().keys()
    for found, anchors in zip(
        model.anchor_generator.cell_anchors, expected.anchor_generator.cell_anchors, strict=True
    ):
        assert torch.equal(found, anchors)
