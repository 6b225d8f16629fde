from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from PIL import Image
from pycocotools.coco import COCO

from retinanet_ext.cli import main
from retinanet_ext.data import SampleSet, make_sample_set, prepare_datasets, sample_set
from retinanet_ext.data.anchor_coverage import build_grid, measure_coverage, training_boxes
from retinanet_ext.data.coco_json import read_coco_json, to_dataset_dicts
from retinanet_ext.data.dial import IMBALANCE_DIAL
from retinanet_ext.engine import load_config
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


def test_boxes_are_where_the_objects_were_drawn(tmp_path: Path) -> None:
    """The pixels that differ from the same picture without its object."""
    one = SampleSet(num_train=20, num_val=0, num_objects=(1, 1), empty_fraction=0.0)
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


def test_config_without_keys_is_the_default_set(cfg: CfgNode) -> None:
    """Whose folder has this name since the first release."""
    parameters = SampleSet.from_config(cfg.DATASETS.SAMPLE)
    assert parameters == SampleSet()
    assert parameters.folder_name == "487e165177b3"


def test_config_keys_are_what_is_drawn(
    cfg: CfgNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    use_sample_set(cfg)
    changes = [
        *("NUM_TRAIN", 5, "NUM_VAL", 2, "IMAGE_SIZE", 64, "NUM_OBJECTS", [3, 3]),
        *("OBJECT_SIZE", (9, 12), "NUM_CLUTTER", [0, 0], "EMPTY_FRACTION", 0.0, "SEED", 7),
    ]
    assert set(changes[::2]) == set(cfg.DATASETS.SAMPLE)
    cfg.merge_from_list(
        [f"DATASETS.SAMPLE.{c}" if i % 2 == 0 else c for i, c in enumerate(changes)]
    )
    prepare_datasets(cfg, eval_only=False)
    assert len(DatasetCatalog.get("retinanet_ext_sample_val")) == 2
    records = DatasetCatalog.get("retinanet_ext_sample_train")
    assert [len(record["annotations"]) for record in records] == [3] * 5
    for record in records:
        with Image.open(record["file_name"]) as opened:
            assert opened.size == (64, 64)
        assert all(4 <= max(a["bbox"][2:]) <= 14 for a in record["annotations"])
    (folder,) = (tmp_path / "retinanet_ext_sample").iterdir()
    same = SampleSet(5, 2, 64, (3, 3), (9, 12), (0, 0), 0.0, 7)
    assert folder.name == same.folder_name


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("NUM_TRAIN", 0, "a number in [1, 100000]"),
        ("IMAGE_SIZE", 7, "a number in [8, 4096]"),
        ("SEED", -1, "a number in [0, 4294967295]"),
        ("NUM_OBJECTS", [5, 1], "two whole numbers [least, most]"),
        ("NUM_OBJECTS", [0, 0], "nothing to learn"),
        ("NUM_OBJECTS", [3], "two whole numbers"),
        ("NUM_OBJECTS", [1, 2.5], "two whole numbers"),
        ("OBJECT_SIZE", [16, 257], "a number in [8, 256]"),
        ("EMPTY_FRACTION", 1.0, "a number in [0, 1)"),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    key: str, value: Any, allowed: str, cfg: CfgNode, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    use_sample_set(cfg)
    cfg.merge_from_list([f"DATASETS.SAMPLE.{key}", value])
    with pytest.raises(InputError) as raised:
        prepare_datasets(cfg, eval_only=False)
    message = str(raised.value)
    assert message.startswith(f"DATASETS.SAMPLE.{key} ") and allowed in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("object_size", "image_size"), [((8, 8), 8), ((8, 8), 64), ((64, 64), 64)])
def test_sizes_at_the_limits_can_be_drawn(
    object_size: tuple[int, int], image_size: int, tmp_path: Path
) -> None:
    drawn = SampleSet(40, 1, image_size, (1, 3), object_size, empty_fraction=0.0)
    folder = make_sample_set(drawn, tmp_path)
    content = read_coco_json(str(folder / "train.json"))
    assert {a["image_id"] for a in content["annotations"]} == set(range(1, 41))
    assert min(min(a["bbox"][2:]) for a in content["annotations"]) >= 4


def use_sample_set(cfg: CfgNode) -> None:
    cfg.DATASETS.TRAIN = ("retinanet_ext_sample_train",)
    cfg.DATASETS.TEST = ("retinanet_ext_sample_val",)


NUM_TRAIN = {"1:30": 8, "1:100": 12, "1:300": 30, "1:1000": 80, "1:3000": 160}
"""Images with 40 boxes or more."""


@pytest.fixture(scope="module")
def dial(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each point of the imbalance dial (section 3), with a few of its images."""
    root = tmp_path_factory.mktemp("dial")
    points = {
        name: SampleSet.from_config(SampleSet.config_defaults() | point)
        for name, point in IMBALANCE_DIAL.items()
    }
    return {
        name: make_sample_set(replace(point, num_train=NUM_TRAIN[name], num_val=1), root)
        for name, point in points.items()
    }


@pytest.mark.parametrize("name", IMBALANCE_DIAL)
def test_points_are_as_imbalanced_as_they_are_called(name: str, dial: dict[str, Path]) -> None:
    cfg = load_config("configs/quickstart.yaml", ["INPUT.MIN_SIZE_TRAIN", "[0]"])
    records = to_dataset_dicts(read_coco_json(str(dial[name] / "train.json")), "")
    backbone, grid = build_grid(cfg)
    coverage = measure_coverage(cfg, training_boxes(cfg, records, backbone), grid, [])
    nominal = int(name.removeprefix("1:"))
    ratio = coverage["anchors_an_image"] / coverage["foreground_an_image"] - 1
    assert nominal / 1.25 < ratio < nominal * 1.25
    # Objects are alike on all points, with as many anchors each.
    assert coverage["all"]["positives_mean"] == pytest.approx(8.6, rel=0.1)


def test_points_differ_in_their_objects_alone(dial: dict[str, Path]) -> None:
    contents = [json.loads((folder / "train.json").read_text()) for folder in dial.values()]
    for index in range(8):
        pictures, outside = [], np.ones((192, 192), bool)
        for folder, content in zip(dial.values(), contents, strict=True):
            image = content["images"][index]
            pictures.append(read_pixels(folder, "train", image))
            for x, y, width, height in boxes_of(content, image):
                # Pixels covered by less than half are painted, but outside the box.
                outside[max(y - 2, 0) : y + height + 2, max(x - 2, 0) : x + width + 2] = False
        assert outside.mean() > 0.2
        assert all((picture == pictures[0])[outside].all() for picture in pictures)


def test_point_of_the_dial_as_coco_files(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The exported files are what the dial trains on, and any COCO reader takes them."""
    folder = tmp_path / "dial"
    numbers = ["--num-train", "6", "--num-val", "2", "--seed", "7"]
    assert main(["sample-set", str(folder), "--ratio", "1:300", *numbers]) == 0
    assert capsys.readouterr().out == f"Wrote {folder}: 6 + 2 images\n"
    node = {**SampleSet.config_defaults(), **IMBALANCE_DIAL["1:300"]}
    node |= {"NUM_TRAIN": 6, "NUM_VAL": 2, "SEED": 7}
    own = make_sample_set(SampleSet.from_config(node), tmp_path / "own")
    assert digest(folder) == digest(own)
    coco = COCO(str(folder / "train.json"))
    assert len(coco.getImgIds()) == len(list((folder / "train").iterdir())) == 6
    assert len(coco.getCatIds()) == 5 and coco.getAnnIds()


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (
            ["--ratio", "1:3000", "--num-train", "2", "--num-val", "2"],
            "none of the 2 train images",
        ),
        (["--num-train", "0"], "NUM_TRAIN must be a number in"),
        ([], "is not empty; name a new folder"),
    ],
)
def test_what_cannot_be_exported(
    arguments: list[str], answer: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "new"
    if not arguments:
        folder = tmp_path
        (folder / "mine").touch()
    assert main(["sample-set", str(folder), "--seed", "2", *arguments]) == 2
    line = capsys.readouterr().err
    assert re.search(answer, line) and line.count("\n") == 1
    assert not [*tmp_path.rglob("train*")]
