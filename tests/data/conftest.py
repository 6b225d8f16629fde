"""Five real images of blood cells to spoil, and the sample set made once."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from detectron2.config import CfgNode, get_cfg

from retinanet_ext import add_retinanet_ext_config
from retinanet_ext.data import SampleSet, make_sample_set

from .eight_images import Eight

BCCD_MINI = Path(__file__).parents[1] / "fixtures" / "bccd_mini"


@dataclass
class Bccd:
    """A copy of the real data; what a test does to ``train`` and ``val`` is written by `use`."""

    folder: Path
    train: Any
    val: Any

    @property
    def images(self) -> Path:
        return self.folder / "images"

    @property
    def train_json(self) -> Path:
        return self.folder / "instances_train_raw.json"

    @property
    def val_json(self) -> Path:
        return self.folder / "instances_val.json"

    def write(self) -> None:
        self.train_json.write_text(json.dumps(self.train))
        self.val_json.write_text(json.dumps(self.val))

    def use(self, cfg: CfgNode) -> CfgNode:
        """Write the json files and name them in the config."""
        self.write()
        cfg.DATASETS.CUSTOM.TRAIN_JSON = str(self.train_json)
        cfg.DATASETS.CUSTOM.TRAIN_IMAGES = str(self.images)
        cfg.DATASETS.CUSTOM.TEST_JSON = str(self.val_json)
        cfg.DATASETS.CUSTOM.TEST_IMAGES = str(self.images)
        return cfg


@pytest.fixture
def bccd(tmp_path: Path) -> Bccd:
    folder = tmp_path / "bccd"
    shutil.copytree(BCCD_MINI, folder)
    train, val = (
        json.loads((folder / f"instances_{name}.json").read_text()) for name in ("train_raw", "val")
    )
    return Bccd(folder, train, val)


@pytest.fixture
def eight(tmp_path: Path) -> Eight:
    return Eight(tmp_path / "mine")


@pytest.fixture
def cfg() -> CfgNode:
    cfg = get_cfg()
    add_retinanet_ext_config(cfg)
    return cfg


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What the package logs, also after some other test made its logger keep it to itself."""
    logger = logging.getLogger("retinanet_ext.data.register")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(caplog.handler)
    caplog.handler.setLevel(logging.INFO)
    yield caplog
    logger.removeHandler(caplog.handler)
    logger.setLevel(level)


@pytest.fixture(scope="session")
def datasets_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for DETECTRON2_DATASETS that holds the sample set."""
    root = tmp_path_factory.mktemp("datasets")
    make_sample_set(SampleSet(), root / "retinanet_ext_sample")
    return root
