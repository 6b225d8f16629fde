from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, get_detection_dataset_dicts
from detectron2.modeling import build_model
from PIL import Image

from retinanet_ext.data import CheckedDatasetMapper, SampleSet, make_sample_set, prepare_datasets
from retinanet_ext.data.imbalance import measure_imbalance
from retinanet_ext.data.sample_set import IMBALANCE_DIAL
from retinanet_ext.engine import load_config

from .conftest import Bccd

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
SMALLER = {  # with some 100 boxes each
    "1:30": {"num_train": 10, "num_val": 1},
    "1:100": {"num_train": 20, "num_val": 1},
    "1:300": {"num_train": 60, "num_val": 1},
    "1:1000": {"num_train": 150, "num_val": 1},
    "1:3000": {"num_train": 300, "num_val": 1},
}


def quickstart(*opts: Any) -> CfgNode:
    cfg, _ = load_config(str(QUICKSTART), [str(opt) for opt in opts])
    return cfg


def dial(name: str) -> CfgNode:
    sample = {f"DATASETS.SAMPLE.{key}": value for key, value in IMBALANCE_DIAL[name].items()}
    return quickstart(
        *("INPUT.MIN_SIZE_TRAIN", [192], "INPUT.MIN_SIZE_TEST", 192),
        *("DATALOADER.FILTER_EMPTY_ANNOTATIONS", False),
        *(item for pair in sample.items() for item in pair),
    )


@pytest.mark.parametrize(
    ("low_quality_matches", "short_side"), [("all", 100), ("none", 100), ("all", 300)]
)
def test_equals_what_the_detector_trains_on(
    low_quality_matches: str, short_side: int, bccd: Bccd
) -> None:
    """Real images; one without objects, a crowd region, a box outside and one reaching out."""
    cfg = bccd.use(
        quickstart(
            *("MODEL.DEVICE", "cpu", "INPUT.RANDOM_FLIP", "none"),
            *("INPUT.MIN_SIZE_TRAIN", [short_side], "INPUT.MAX_SIZE_TRAIN", 390),
            *("MODEL.RETINANET.LOW_QUALITY_MATCHES", low_quality_matches),
            *("MODEL.FPN.OUT_CHANNELS", 32, "MODEL.ANCHOR_GENERATOR.BASE_SCALE", 3.0),
        )
    )
    bccd.train["annotations"] = [a for a in bccd.train["annotations"] if a["image_id"] != 80]
    bccd.train["annotations"][0]["iscrowd"] = 1
    bccd.train["annotations"][1]["bbox"] = [540, 380, 200, 160]
    bccd.write()
    prepare_datasets(cfg, num_classes_is_set=False, eval_only=False)
    seen = []

    model, mapper = build_model(cfg), CheckedDatasetMapper(cfg, is_train=True)
    model.criterion.register_forward_pre_hook(lambda module, args: seen.append(args[3]))
    records = get_detection_dataset_dicts(["custom_train"])
    num_boxes = 0
    for record in records:
        mapped = mapper(record)
        num_boxes += len(mapped["instances"])
        model([mapped])
    labels = torch.cat([labels.flatten() for labels in seen])

    found = measure_imbalance(cfg, str(bccd.train_json))
    assert (found.num_images, found.num_boxes) == (2, num_boxes)
    assert found.background == int((labels == 3).sum())
    assert found.foreground == int(((labels >= 0) & (labels < 3)).sum())
    assert len(labels) > found.background + found.foreground  # some are ignored


def test_regions_are_ignored_by_the_detector_that_does_so(bccd: Bccd) -> None:
    for annotation in bccd.train["annotations"][::2]:
        annotation["iscrowd"] = 1
    bccd.write()

    def background(*opts: Any) -> int:
        return measure_imbalance(quickstart(*opts), str(bccd.train_json)).background

    counted = background("MODEL.RETINANET.IGNORE_IOA_THRESH", 0.0)
    assert background() < counted == background("MODEL.META_ARCHITECTURE", "RetinaNet")


def test_images_and_sizes_are_those_of_training_or_testing(bccd: Bccd) -> None:
    bccd.train["annotations"] = [a for a in bccd.train["annotations"] if a["image_id"] != 80]
    bccd.write()
    path = str(bccd.train_json)
    keys = ("DATALOADER.FILTER_EMPTY_ANNOTATIONS", "INPUT.MIN_SIZE_TRAIN", "INPUT.MIN_SIZE_TEST")

    def count(filter_empty: bool, sides: list[int], test_side: int, **kwargs: Any) -> Any:
        values = (filter_empty, sides, test_side)
        opts = [item for pair in zip(keys, values, strict=True) for item in pair]
        return measure_imbalance(quickstart(*opts), path, **kwargs)

    without, with_empty = count(True, [128], 192), count(False, [128], 192)
    assert with_empty.num_images == without.num_images + 1 == 3
    assert with_empty.foreground == without.foreground
    # Strides 8 to 128 on 128 x 171 pixels, padded to 128 x 192: 9 anchors a cell.
    cells = 16 * 24 + 8 * 12 + 4 * 6 + 2 * 3 + 1 * 2
    assert with_empty.background - without.background == 9 * cells

    tested = count(True, [128], 192, is_train=False)
    assert tested == count(False, [192], 128)
    both = count(False, [128, 192], 128)
    assert both.num_images == 6
    assert both.background == with_empty.background + tested.background
    assert both.foreground == with_empty.foreground + tested.foreground
    assert count(False, [480], 0, is_train=False) == count(False, [0], 480)


def test_no_foreground_is_infinitely_imbalanced(bccd: Bccd) -> None:
    bccd.train["annotations"] = []
    bccd.write()
    found = measure_imbalance(quickstart(), str(bccd.train_json), is_train=False)
    assert (found.num_boxes, found.foreground) == (0, 0)
    assert found.ratio == math.inf


def test_hundreds_of_background_anchors_to_each_foreground_one(datasets_root: Path) -> None:
    folder = datasets_root / "retinanet_ext_sample" / SampleSet().folder_name
    assert 300 < measure_imbalance(quickstart(), str(folder / "train.json")).ratio < 1000


@pytest.mark.parametrize(
    ("easier", "harder"),
    [
        ({"num_objects": (6, 12)}, {"num_objects": (1, 2)}),
        ({"object_size": (20, 30)}, {"object_size": (10, 14)}),
        ({"image_size": 128}, {"image_size": 384}),
        ({"empty_fraction": 0.0}, {"empty_fraction": 0.8}),
    ],
)
def test_parameters_move_the_imbalance(
    easier: dict[str, Any], harder: dict[str, Any], tmp_path: Path
) -> None:
    cfg = quickstart("INPUT.MIN_SIZE_TEST", 0)  # images as they are
    few = SampleSet(num_train=20, num_val=1, empty_fraction=0.0)
    folders = [make_sample_set(replace(few, **change), tmp_path) for change in (easier, harder)]
    ratios = [
        measure_imbalance(cfg, str(folder / "train.json"), is_train=False).ratio
        for folder in folders
    ]
    assert ratios[1] > 2 * ratios[0]


@pytest.fixture(scope="module")
def small_dial(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each point of the dial with a few of its images."""
    root = tmp_path_factory.mktemp("dial")
    return {
        name: make_sample_set(
            replace(SampleSet.from_config(dial(name).DATASETS.SAMPLE), **SMALLER[name]), root
        )
        for name in IMBALANCE_DIAL
    }


@pytest.mark.parametrize("name", IMBALANCE_DIAL)
def test_points_of_the_dial_are_as_imbalanced_as_they_are_called(
    name: str, small_dial: dict[str, Path]
) -> None:
    nominal = int(name.removeprefix("1:"))
    found = measure_imbalance(dial(name), str(small_dial[name] / "train.json"))
    assert nominal / 1.25 < found.ratio < nominal * 1.25
    # Objects are alike on all points: so many anchors each.
    assert found.foreground / found.num_boxes == pytest.approx(8.6, rel=0.1)


def test_points_of_the_dial_differ_in_their_objects_alone(small_dial: dict[str, Path]) -> None:
    free = {"NUM_OBJECTS", "EMPTY_FRACTION", "NUM_VAL"}
    contents = {}
    for name, folder in small_dial.items():
        contents[name] = json.loads((folder / "train.json").read_text())
    first, *others = (
        {key: value for key, value in point.items() if key not in free}
        for point in IMBALANCE_DIAL.values()
    )
    assert all(other == first for other in others)

    for image_id in range(1, 9):
        pictures, outside = [], np.ones((192, 192), bool)
        for name, folder in small_dial.items():
            with Image.open(folder / "train" / f"{image_id:06d}.png") as opened:
                pictures.append(np.asarray(opened))
            for annotation in contents[name]["annotations"]:
                if annotation["image_id"] == image_id:
                    x, y, width, height = annotation["bbox"]
                    # Pixels covered by less than half are painted, but outside the box.
                    outside[max(y - 2, 0) : y + height + 2, max(x - 2, 0) : x + width + 2] = False
        assert outside.mean() > 0.2
        assert all((picture == pictures[0])[outside].all() for picture in pictures)


def test_the_dial_is_made_of_config_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the data that a config with these keys registers."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    cfg = dial("1:300")
    cfg.merge_from_list(["DATASETS.SAMPLE.NUM_TRAIN", 6, "DATASETS.SAMPLE.NUM_VAL", 3])
    prepare_datasets(cfg, num_classes_is_set=False, eval_only=False)
    records = DatasetCatalog.get("retinanet_ext_sample_train")
    assert [record["width"] for record in records] == [192] * 6
    assert {len(record["annotations"]) for record in records} <= {1, 2, 3, 4}
