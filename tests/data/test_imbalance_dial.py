"""The points of the imbalance dial: background anchors per foreground anchor (section 3)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from retinanet_ext.data import SampleSet, make_sample_set
from retinanet_ext.data.anchor_coverage import build_grid, measure_coverage, training_boxes
from retinanet_ext.data.coco_json import read_coco_json, to_dataset_dicts
from retinanet_ext.data.sample_set import IMBALANCE_DIAL
from retinanet_ext.engine import load_config

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
NUM_TRAIN = {"1:30": 10, "1:100": 20, "1:300": 60, "1:1000": 150, "1:3000": 300}
"""Images with some 100 boxes."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each point of the dial, with a few of its images."""
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
def test_points_are_as_imbalanced_as_they_are_called(name: str, folders: dict[str, Path]) -> None:
    cfg = load_config(str(QUICKSTART), ["INPUT.MIN_SIZE_TRAIN", "[0]"])
    records = to_dataset_dicts(read_coco_json(str(folders[name] / "train.json")), "")
    backbone, grid = build_grid(cfg)
    data = training_boxes(cfg, records, backbone)
    coverage = measure_coverage(cfg, data, grid, [])
    nominal = int(name.removeprefix("1:"))
    ratio = coverage["anchors_an_image"] / coverage["foreground_an_image"] - 1
    assert nominal / 1.25 < ratio < nominal * 1.25
    # Objects are alike on all points, with as many anchors each.
    assert coverage["all"]["positives_mean"] == pytest.approx(8.6, rel=0.1)


def test_points_differ_in_their_objects_alone(folders: dict[str, Path]) -> None:
    free = {"NUM_OBJECTS", "EMPTY_FRACTION", "NUM_VAL"}
    first, *others = (
        {key: value for key, value in point.items() if key not in free}
        for point in IMBALANCE_DIAL.values()
    )
    assert all(other == first for other in others)
    contents = {
        name: json.loads((folder / "train.json").read_text()) for name, folder in folders.items()
    }
    for image_id in range(1, 9):
        pictures, outside = [], np.ones((192, 192), bool)
        for name, folder in folders.items():
            with Image.open(folder / "train" / f"{image_id:06d}.png") as opened:
                pictures.append(np.asarray(opened))
            for annotation in contents[name]["annotations"]:
                if annotation["image_id"] == image_id:
                    x, y, width, height = annotation["bbox"]
                    # Pixels covered by less than half are painted, but outside the box.
                    outside[max(y - 2, 0) : y + height + 2, max(x - 2, 0) : x + width + 2] = False
        assert outside.mean() > 0.2
        assert all((picture == pictures[0])[outside].all() for picture in pictures)
