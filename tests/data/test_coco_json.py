from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
from detectron2.config import CfgNode
from detectron2.data.datasets.coco import load_coco_json

from retinanet_ext.data import CheckedDatasetMapper, coco_json, prepare_datasets
from retinanet_ext.errors import InputError

from .conftest import Bccd
from .eight_images import Eight, check


def empty(*keys: str) -> Callable[[Bccd], None]:
    return lambda bccd: bccd.train.update({key: [] for key in keys})


def make_all_crowd(bccd: Bccd) -> None:
    for annotation in bccd.train["annotations"]:
        annotation["iscrowd"] = 1


UNUSABLE = {
    "no images key": (lambda bccd: bccd.train.pop("images"), "no list of images"),
    "annotations no list": (
        lambda bccd: bccd.train.update(annotations={}, categories=None),
        "no list of categories, annotations",
    ),
    "no images": (empty("images", "annotations"), "list of images is empty"),
    "no annotations": (empty("annotations"), "so there is nothing to learn"),
    "only crowd": (make_all_crowd, "so there is nothing to learn"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_json_without_what_is_needed_is_refused(case: str, bccd: Bccd, cfg: CfgNode) -> None:
    spoil, expected = UNUSABLE[case]
    spoil(bccd)
    with pytest.raises(InputError, match=expected) as error:
        prepare_datasets(bccd.use(cfg), eval_only=False)
    assert str(error.value).startswith(str(bccd.train_json))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"{'images': []}", "is not JSON: Expecting property name"),
        (b"\xff\xd8\xff\xe0", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "is not a COCO instances file: no list of images, categories, annotations"),
    ],
)
def test_file_that_is_no_coco_json(content: bytes, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        coco_json.read_coco_json(str(path))
    assert str(error.value).startswith(f"{path}: {expected}")


def test_dicts_equal_detectron2s_but_for_the_box_without_area(bccd: Bccd) -> None:
    bccd.train["images"].reverse()
    bccd.train["annotations"][0]["iscrowd"] = 1
    bccd.write()
    checked = check(bccd.train, bccd.images)
    ours = coco_json.to_dataset_dicts(checked.content, str(bccd.images))
    theirs = load_coco_json(str(bccd.train_json), str(bccd.images), "bccd_mini_by_detectron2")
    assert sum(len(record["annotations"]) for record in theirs) == 36
    for record in theirs:
        record["annotations"] = [a for a in record["annotations"] if a["bbox"][2] > 0]
    assert sum(len(record["annotations"]) for record in ours) == 35
    assert ours == theirs


def test_boxes_of_integers_are_not_cut_to_integers_by_the_resize(bccd: Bccd, cfg: CfgNode) -> None:
    for annotation in bccd.train["annotations"]:
        annotation["bbox"] = [int(number) for number in annotation["bbox"]]
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.RANDOM_FLIP = (100,), "none"
    record = coco_json.to_dataset_dicts(bccd.train, str(bccd.images))[0]
    boxes = CheckedDatasetMapper(cfg, is_train=True)(record)["instances"].gt_boxes.tensor
    x, y, w, h = bccd.train["annotations"][0]["bbox"]
    expected = [x * 133 / 640, y * 100 / 480, (x + w) * 133 / 640, (y + h) * 100 / 480]
    assert boxes[0].tolist() == pytest.approx(expected)


def test_malformed_segmentation_costs_no_box(eight: Eight) -> None:
    for annotation, segmentation in zip(
        eight.content["annotations"], ([[1, 2]], [1.0, 2.0], {"counts": 3}, "none"), strict=False
    ):
        annotation["segmentation"] = segmentation
    assert len(eight.check().content["annotations"]) == 8


def test_completed_json_differs_in_what_was_missing_only(bccd: Bccd) -> None:
    assert coco_json.complete_for_evaluation(bccd.val) == bccd.val
    given = copy.deepcopy(bccd.val)
    # pycocotools 2.0.9 and 2.0.10 need "info", 2.0.11 does not.
    del given["annotations"][0]["iscrowd"], given["annotations"][1]["area"], given["info"]
    before = copy.deepcopy(given)
    # The data's own area is width x height.
    assert coco_json.complete_for_evaluation(given) == {**bccd.val, "info": {}}
    assert given == before


@pytest.mark.parametrize("mark", ["iscrowd", "ignore"])
def test_regions_to_ignore_are_marked_as_both_readers_know_them(mark: str, eight: Eight) -> None:
    eight.content["annotations"][0][mark] = 1
    records = coco_json.to_dataset_dicts(eight.content, "")
    assert [a["iscrowd"] for record in records for a in record["annotations"]].count(1) == 1
    completed = coco_json.complete_for_evaluation(eight.content)["annotations"]
    assert [a["iscrowd"] for a in completed] == [1] + [0] * 7


@pytest.mark.parametrize("new_id", [0, -3, 2])
def test_ids_that_the_evaluation_stumbles_over_are_numbered_anew(new_id: int, eight: Eight) -> None:
    eight.content["annotations"][0]["id"] = new_id
    completed = coco_json.complete_for_evaluation(eight.content)["annotations"]
    assert [a["id"] for a in completed] == list(range(1, 9))
    assert [a["bbox"] for a in completed] == [a["bbox"] for a in eight.content["annotations"]]
