from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.structures import Boxes, BoxMode, pairwise_iou
from PIL import Image

from retinanet_ext.data import SampleSet, make_sample_set, sample_set
from retinanet_ext.data.coco_json import read_coco_json
from retinanet_ext.errors import InputError

TINY = SampleSet(num_train=3, num_val=2)


def digest(folder: Path) -> str:
    """Of the json files and of the decoded pixels."""
    sha = hashlib.sha256()
    for part in ("train", "val"):
        content = (folder / f"{part}.json").read_bytes()
        sha.update(content)
        for image in json.loads(content)["images"]:
            sha.update(read_pixels(folder, part, image).tobytes())
    return sha.hexdigest()


def read_pixels(folder: Path, part: str, image: dict[str, Any]) -> np.ndarray:
    with Image.open(folder / part / image["file_name"]) as opened:
        return np.asarray(opened)


def boxes_of(content: dict[str, Any], image: dict[str, Any]) -> list[list[int]]:
    return [a["bbox"] for a in content["annotations"] if a["image_id"] == image["id"]]


@pytest.fixture(scope="session")
def default_set(datasets_root: Path) -> Path:
    return make_sample_set(SampleSet(), datasets_root / "retinanet_ext_sample")


def test_the_same_everywhere(tmp_path: Path) -> None:
    """If this fails after a change of what is drawn, raise GENERATOR_VERSION with the digest."""
    assert sample_set.GENERATOR_VERSION == 1
    expected = "392bf4b2cdb90ffd65c717e820b71e2bd9c977ef8b4cace92a7ff27b0f025218"
    assert digest(make_sample_set(TINY, tmp_path)) == expected


def test_parameters_and_version_have_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make_sample_set(TINY, tmp_path)
    other_seed = make_sample_set(replace(TINY, seed=1), tmp_path)
    monkeypatch.setattr(sample_set, "GENERATOR_VERSION", 99)
    other_version = make_sample_set(TINY, tmp_path)
    assert {first, other_seed, other_version} == set(tmp_path.iterdir())
    assert len({digest(folder) for folder in (first, other_seed, other_version)}) == 3


def test_made_once(tmp_path: Path) -> None:
    folder = make_sample_set(TINY, tmp_path)
    before = os.stat(folder / "train.json").st_mtime_ns
    assert make_sample_set(TINY, tmp_path) == folder
    assert os.stat(folder / "train.json").st_mtime_ns == before


def test_several_at_the_same_time(tmp_path: Path) -> None:
    barrier = Barrier(4)

    def make(_: int) -> Path:
        barrier.wait()
        return make_sample_set(TINY, tmp_path / "new")

    with ThreadPoolExecutor(4) as pool:
        (folder,) = set(pool.map(make, range(4)))
    assert list((tmp_path / "new").iterdir()) == [folder]
    assert digest(folder) == digest(make_sample_set(TINY, tmp_path / "alone"))


def test_nothing_half_made_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(InputError, match=r"No space left on device.*DETECTRON2_DATASETS"):
        make_sample_set(TINY, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file/.*cannot be written: Not a directory"):
        make_sample_set(TINY, tmp_path / "file")


def test_boxes_are_where_the_objects_were_drawn(tmp_path: Path) -> None:
    """The pixels that differ from the same picture without its object."""
    one = SampleSet(num_train=40, num_val=0, num_objects=(1, 1), empty_fraction=0.0)
    without = make_sample_set(replace(one, num_objects=(0, 0)), tmp_path)
    folder = make_sample_set(one, tmp_path)
    content = json.loads((folder / "train.json").read_text())
    for image, annotation in zip(content["images"], content["annotations"], strict=True):
        changed = read_pixels(folder, "train", image) != read_pixels(without, "train", image)
        rows, columns = np.nonzero(changed.any(2))
        found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        x, y, width, height = annotation["bbox"]
        # Pixels covered by less than half are painted, but not counted to the object.
        assert np.abs(np.subtract(found, [x, y, x + width, y + height])).max() <= 2
        assert annotation["area"] == pytest.approx(len(rows), rel=0.35)
        assert annotation["area"] <= width * height


def test_default_set_is_a_small_hard_one(default_set: Path) -> None:
    for part, num_images in (("train", 160), ("val", 40)):
        content = read_coco_json(str(default_set / f"{part}.json"))
        assert len(content["images"]) == num_images
        used = Counter(annotation["image_id"] for annotation in content["annotations"])
        assert 1 <= num_images - len(used) <= num_images / 10
        assert max(used.values()) <= 5
        per_class = Counter(annotation["category_id"] for annotation in content["annotations"])
        assert len(per_class) == 5
        assert min(per_class.values()) > 0.5 * max(per_class.values())
        for image in content["images"]:
            boxes = boxes_of(content, image)
            for index, (x, y, width, height) in enumerate(boxes):
                assert x >= 0
                assert y >= 0
                assert max(x + width, y + height) <= 256
                assert 8 <= max(width, height) <= 46
                for other in boxes[:index]:
                    w = min(x + width, other[0] + other[2]) - max(x, other[0])
                    h = min(y + height, other[1] + other[3]) - max(y, other[1])
                    smaller = min(width * height, other[2] * other[3])
                    assert max(w, 0) * max(h, 0) <= 0.2 * smaller


def test_hundreds_of_background_anchors_to_each_foreground_one(default_set: Path) -> None:
    assert 300 < measure_imbalance(default_set) < 1000


@pytest.mark.parametrize(
    ("easier", "harder"),
    [
        ({"num_objects": (6, 12)}, {"num_objects": (1, 2)}),
        ({"object_size": (40, 60)}, {"object_size": (16, 24)}),
        ({"image_size": 128}, {"image_size": 384}),
    ],
)
def test_parameters_move_the_imbalance(
    easier: dict[str, Any], harder: dict[str, Any], tmp_path: Path
) -> None:
    few = SampleSet(num_train=12, num_val=0, empty_fraction=0.0)
    ratios = [
        measure_imbalance(make_sample_set(replace(few, **change), tmp_path))
        for change in (easier, harder)
    ]
    assert ratios[1] > 2 * ratios[0]


def measure_imbalance(folder: Path) -> float:
    """Background anchors (IoU < .4) to each foreground one (IoU >= .5), with RetinaNet's anchors.

    Sides 4 x stride x 2^(k/3), aspect ratios 1:2, 1:1, 2:1, strides 8 to 128, at the images' own
    size (paper, section 4).
    """
    strides = [8, 16, 32, 64, 128]
    sizes = [[4 * stride * 2 ** (k / 3) for k in range(3)] for stride in strides]
    generator = DefaultAnchorGenerator(
        sizes=sizes, aspect_ratios=[[0.5, 1.0, 2.0]], strides=strides
    )
    contents = [json.loads((folder / f"{part}.json").read_text()) for part in ("train", "val")]
    cells = [-(-contents[0]["images"][0]["width"] // stride) for stride in strides]
    anchors = Boxes.cat(generator([torch.zeros(1, 1, n, n) for n in cells]))
    foreground = background = 0
    for content in contents:
        for image in content["images"]:
            boxes = torch.tensor(boxes_of(content, image), dtype=torch.float).reshape(-1, 4)
            boxes = BoxMode.convert(boxes, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
            boxes = torch.cat([boxes, torch.zeros(1, 4)])  # none overlaps this one
            iou = pairwise_iou(anchors, Boxes(boxes)).amax(1)
            foreground += int((iou >= 0.5).sum())
            background += int((iou < 0.4).sum())
    return background / foreground
