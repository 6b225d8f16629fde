"""What the documents promise is tried."""

import doctest
import re
import runpy
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from detectron2.config import get_cfg

from retinanet_ext import add_retinanet_ext_config
from retinanet_ext.config_keys import COUNTS_ONLY_IF, all_keys, read_key

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")]
KEYS_PAGE = ROOT / "docs/keys.md"


def plugin_config():
    cfg = get_cfg()
    add_retinanet_ext_config(cfg)
    return cfg


@pytest.mark.parametrize("name", ["keys", "api"])
def test_generated_page_is_made_from_the_code(name):
    page = runpy.run_path(str(ROOT / f"docs/make_{name}.py"))["make_page"]()
    written = (ROOT / f"docs/{name}.md").read_text(encoding="utf-8")
    assert written == page, f"run python docs/make_{name}.py"


@pytest.mark.parametrize(
    "file", [f for f in sorted(ROOT.glob("retinanet_ext/**/*.py")) if ">>> " in f.read_text()],
    ids=lambda file: str(file.relative_to(ROOT)),
)  # fmt: skip
def test_examples_in_docstrings_run(file):
    name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    assert doctest.testmod(import_module(name)).failed == 0


def test_page_of_keys_has_a_row_per_key_with_default_description_and_conditions():
    cfg, stock = plugin_config(), set(all_keys(get_cfg()))
    text = KEYS_PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([A-Z0-9_.]+)` \| (?:`(.*?)`)? ?\| (.+) \| (.*) \|$", text, re.M)
    found = {key: (default, what, conditions) for key, default, what, conditions in rows}
    added = [key for key in all_keys(cfg) if key not in stock]
    assert len(rows) == len(found) and {*found} == {*added}
    for key, (default, what, conditions) in found.items():
        assert default == str(read_key(cfg, key)), key
        assert len(what.split()) > 3, key
        section = text[: text.index(f"| `{key}` |")].rpartition("\n## ")[2]
        shared = re.search(r"^These keys count only with .*$", section, re.M)
        said = conditions + (shared[0] if shared else "")
        for start, (other, values) in COUNTS_ONLY_IF.items():
            if key != other and (key == start or (start.endswith(".") and key.startswith(start))):
                wanted = [f"`{other} {value}`" for value in values] or [f"`{other}` set"]
                assert all(condition in said for condition in wanted), (key, other)


def test_a_key_without_a_comment_and_a_comment_without_a_key_are_named(monkeypatch):
    page = runpy.run_path(str(ROOT / "docs/make_keys.py"))
    comments = page["read_comments"]()
    del comments["SOLVER.FUSED_OPTIMIZER"]
    monkeypatch.setitem(page["make_page"].__globals__, "read_comments", lambda: comments)
    with pytest.raises(ValueError, match=r"no comment above SOLVER\.FUSED_OPTIMIZER in"):
        page["make_page"]()
    comments |= {
        "SOLVER.FUSED_OPTIMIZER": "on",
        "SOLVER.NON_FINITE": "said of a node without a section",
    }
    with pytest.raises(ValueError, match=r"above SOLVER\.NON_FINITE belongs above one of its keys"):
        page["make_page"]()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_keys_of_a_page_exist(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        name, _, anchor = link.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), link
        headings = re.findall(r"^#+ (.+)$", file.read_text(), re.M) if anchor else []
        anchors = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]
        assert not anchor or anchor in anchors, link
    if page.name == "bad_inputs.md":
        return  # its keys are wrong on purpose
    keys = set(all_keys(plugin_config()))
    group = "MODEL|SOLVER|INPUT|DATASETS|DATALOADER|TEST"
    for key in re.findall(rf"\b(?:{group})(?:\.[A-Z][A-Z0-9_]+)+\b(?!\w)", text):
        assert key in keys or any(other.startswith(f"{key}.") for other in keys), key


def test_add_a_loss_as_its_document_says(tmp_path):
    text = (ROOT / "docs/add_a_loss.md").read_text()
    codes = re.findall(r"```python\n(.*?)```", text, re.S)
    config = re.search(r"```yaml\n(.*?)```", text, re.S).group(1)
    shutil.copytree(ROOT / "retinanet_ext", tmp_path / "retinanet_ext")
    files = re.findall(r"^`(retinanet_ext/losses/\w+\.py)`:", text, re.M)
    for file, code in zip(files, codes, strict=True):
        (tmp_path / file).write_text(code)
    base = ROOT / "configs/retinanet_R50_FPN.yaml"
    (tmp_path / "power.yaml").write_text(yaml.safe_dump({"_BASE_": str(base)}) + config)
    program = """
import torch
from detectron2.config import get_cfg
from retinanet_ext import add_retinanet_ext_config
from retinanet_ext.modeling.loss_config import build_cls_loss
cfg = get_cfg()
add_retinanet_ext_config(cfg)
assert cfg.MODEL.RETINANET.CLS_LOSS.POWER == {"EXPONENT": 2.0, "ALPHA": 0.25}
cfg.merge_from_file("power.yaml", allow_unsafe=False)
loss, alpha = build_cls_loss(cfg)
x = torch.linspace(-20, 20, 9, dtype=torch.float64)
assert torch.allclose(loss(x), (1 - x.sigmoid()) ** 1.5) and alpha == 0.25
assert cfg.MODEL.RETINANET.CLS_LOSS.NAME == "power"
assert cfg.MODEL.RETINANET.CLS_LOSS.LENIENT == {"THRESHOLD": 0.01}
cfg.MODEL.RETINANET.CLS_LOSS.NAME = "lenient"
loss, alpha = build_cls_loss(cfg)
x = torch.tensor([[[-9.0, 0.0]]], dtype=torch.float64, requires_grad=True)
loss(x, torch.tensor([[1]])).backward()
assert alpha == -1 and x.grad.tolist() == [[[0.0, -0.5]]]
import pytest
raise SystemExit(pytest.main(["-q", "-k", "power"]))
"""
    for name in ("tests/losses/test_losses.py", "tests/conftest.py", "pyproject.toml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True
    )
    assert "2 passed" in run.stdout, run.stdout + run.stderr
