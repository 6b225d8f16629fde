from __future__ import annotations

import numpy as np
import pytest
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from PIL import Image
from torch.utils.data import DataLoader

from retinanet_ext.data import CheckedDatasetMapper, coco_json
from retinanet_ext.errors import InputError, explain

from .conftest import Bccd

FIRST = "BloodImage_00164.jpg"


class Mapped:
    """The training images through the mapper, as a data set of a data loader."""

    def __init__(self, bccd: Bccd, cfg: CfgNode) -> None:
        bccd.write()
        self.records = coco_json.to_dataset_dicts(bccd.train, str(bccd.images))
        self.mapper = CheckedDatasetMapper(cfg, is_train=True)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        return self.mapper(self.records[index])


def test_good_image_is_mapped_as_by_detectron2(bccd: Bccd, cfg: CfgNode) -> None:
    cfg.INPUT.RANDOM_FLIP = "none"
    data = Mapped(bccd, cfg)
    expected = DatasetMapper(cfg, is_train=True)
    for index, record in enumerate(data.records):
        np.random.seed(0)
        ours = data[index]
        np.random.seed(0)
        theirs = expected(record)
        assert (ours["image"] == theirs["image"]).all()
        assert (ours["instances"].gt_boxes.tensor == theirs["instances"].gt_boxes.tensor).all()


@pytest.mark.parametrize("is_train", [True, False])
def test_truncated_image_is_named(is_train: bool, bccd: Bccd, cfg: CfgNode) -> None:
    data = Mapped(bccd, cfg)
    data.mapper = CheckedDatasetMapper(cfg, is_train=is_train)
    path = bccd.images / FIRST
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(InputError, match=rf"image .*{FIRST} \(image id 80\) cannot be .* trunc"):
        data[0]


def test_image_is_named_from_a_worker_process(bccd: Bccd, cfg: CfgNode) -> None:
    data = Mapped(bccd, cfg)
    data.records = data.records[:1]
    (bccd.images / FIRST).unlink()
    with pytest.raises(InputError) as error:
        list(DataLoader(data, batch_size=None, num_workers=1))
    code, line = explain(error.value)
    assert code == 2
    assert line.startswith(f"image {bccd.images / FIRST} (image id 80) cannot be used: ")
    assert "No such file" in line


def test_an_image_that_is_resized_to_nothing_is_named(bccd: Bccd, cfg: CfgNode) -> None:
    data = Mapped(bccd, cfg)
    Image.new("RGB", (4000, 1)).save(bccd.images / FIRST)
    data.records[0].update(width=4000, height=1)
    with pytest.raises(InputError, match=rf"{FIRST} .* of 4000 x 1 pixels cannot be used: .*> 0"):
        data[0]


@pytest.mark.parametrize("error", [KeyError("key"), MemoryError("no room"), TypeError()])
def test_other_errors_name_the_image_and_keep_their_cause(
    error: Exception, bccd: Bccd, cfg: CfgNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which are not blamed on it: what runs out of memory, and an error of code."""

    def fail(*args: object) -> None:
        raise error

    data = Mapped(bccd, cfg)
    monkeypatch.setattr(data.mapper, "_transform_annotations", fail)
    expected = rf"image .*{FIRST} \(image id 80\): .*{error}"
    with pytest.raises((RuntimeError, MemoryError), match=expected) as raised:
        data[0]
    assert raised.value.__cause__ is error
    end = explain(raised.value)
    assert end is None or (isinstance(error, MemoryError) and FIRST in end[1])


def test_crowd_regions_become_boxes_to_ignore(bccd: Bccd, cfg: CfgNode) -> None:
    """Resized and flipped with the image; they are no objects."""
    cfg.INPUT.MIN_SIZE_TRAIN = (240,)
    data = Mapped(bccd, cfg)
    data.records = data.records[:1]
    (record,) = data.records
    plain = data[0]["instances"]
    index = record["annotations"].index(record["annotations"][2])
    x, y, w, h = record["annotations"][index]["bbox"]
    record["annotations"][index]["iscrowd"] = 1
    np.random.seed(1)
    mapped = data[0]
    assert len(mapped["instances"]) == len(plain) - 1
    scale = 240 / record["height"]
    left, top, right, bottom = (mapped["ignore_regions"][0] / scale).tolist()
    assert [top, bottom] == pytest.approx([y, y + h], abs=1e-3)
    assert [left, right] in (
        pytest.approx([x, x + w], abs=1e-3),
        pytest.approx([record["width"] - x - w, record["width"] - x], abs=1e-3),
    )
    record["annotations"].clear()
    assert data[0]["ignore_regions"].shape == (0, 4)
