"""What the documents promise is tried."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

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
