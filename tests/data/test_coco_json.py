from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from detectron2.config import CfgNode
from detectron2.data.datasets.coco import load_coco_json
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from retinanet_ext.data import coco_json, prepare_datasets
from retinanet_ext.errors import InputError

from .conftest import BCCD_MINI, Bccd

TRAIN = "instances_train_raw.json"
FIRST = "BloodImage_00164.jpg"  # image id 80, 640 x 480


def put(key: str, index: int, **fields: Any) -> Callable[[Bccd], None]:
    return lambda bccd: bccd.train[key][index].update(fields)


def remove(key: str, index: int, field: str) -> Callable[[Bccd], None]:
    return lambda bccd: bccd.train[key][index].pop(field) and None


def empty(*keys: str) -> Callable[[Bccd], None]:
    return lambda bccd: bccd.train.update({key: [] for key in keys})


def spoil_image(content: bytes | None, keep: int | None = None) -> Callable[[Bccd], None]:
    def spoil(bccd: Bccd) -> None:
        path = bccd.images / FIRST
        path.write_bytes(path.read_bytes()[:keep] if content is None else content)

    return spoil


def delete_images(bccd: Bccd) -> None:
    for image in bccd.train["images"]:
        (bccd.images / image["file_name"]).unlink()


def make_all_crowd(bccd: Bccd) -> None:
    for annotation in bccd.train["annotations"]:
        annotation["iscrowd"] = 1


BAD_JSON = {
    "no images key": (lambda bccd: bccd.train.pop("images"), ["no list of images"]),
    "annotations no list": (
        lambda bccd: bccd.train.update(annotations={}, categories=None),
        ["no list of categories, annotations"],
    ),
    "entry no object": (lambda bccd: bccd.train["images"].append(7), ["images[3]", "no"]),
    "no images": (empty("images", "annotations"), ["list of images is empty"]),
    "no categories": (empty("categories", "annotations"), ["list of categories is empty"]),
    "no annotations": (empty("annotations"), ["no box", "nothing to learn"]),
    "only crowd": (make_all_crowd, ["no box", "nothing to learn"]),
    "no file_name": (remove("images", 1, "file_name"), ["file_name of images[1] (id 125)"]),
    "no width": (remove("images", 1, "width"), ["width of images[1] (id 125) is missing"]),
    "no bbox": (
        remove("annotations", 2, "bbox"),
        ["bbox of annotations[2] (id 1183, image_id 80) is missing"],
    ),
    "no name": (remove("categories", 2, "name"), ["name of categories[2] (id 3)"]),
    "width 0": (put("images", 0, width=0), ["width", "(id 80) is 0", "integer above 0"]),
    "id text": (put("images", 0, id="80"), ["id of images[0]", "'80'", "integer"]),
    "file_name null": (put("images", 0, file_name=None), ["(id 80) is None"]),
    "image id twice": (put("images", 1, id=80), ["images: id used more than once: 80"]),
    "annotation id twice": (
        put("annotations", 1, id=1181),
        ["annotations: id used more than once: 1181"],
    ),
    "category id twice": (put("categories", 1, id=1), ["categories: id", "more than once: 1"]),
    "category name twice": (
        put("categories", 1, name="RBC"),
        ["categories: name used more than once: RBC"],
    ),
    "unknown image_id": (
        put("annotations", 0, image_id=999),
        ["annotation 1181 has image_id 999"],
    ),
    "unknown category_id": (
        put("annotations", 0, category_id=0),
        ["annotation 1181 has category_id 0", "(1, 2, 3)"],
    ),
    "bbox NaN": (
        put("annotations", 0, bbox=[1, 2, float("nan"), 4]),
        ["bbox of annotations[0] (id 1181, image_id 80) is [1, 2, nan, 4]", "4 finite numbers"],
    ),
    "bbox infinite": (put("annotations", 0, bbox=[1, 2, 3, float("inf")]), ["id 1181", "inf"]),
    "bbox huge": (put("annotations", 0, bbox=[1, 2, 3, 10**400]), ["id 1181", "finite"]),
    "bbox text": (put("annotations", 0, bbox=["NaN", 2, 3, 4]), ["id 1181", "'NaN'"]),
    "bbox of 3": (put("annotations", 0, bbox=[1, 2, 3]), ["id 1181", "[1, 2, 3]"]),
    "bbox of 5": (put("annotations", 0, bbox=[1, 2, 3, 4, 5]), ["id 1181"]),
    "bbox empty": (put("annotations", 0, bbox=[]), ["id 1181", "[]"]),
    "bbox true": (put("annotations", 0, bbox=[True, 2, 3, 4]), ["id 1181", "True"]),
    "width negative": (put("annotations", 0, bbox=[9, 9, -3, 4]), ["id 1181", "height >= 0"]),
    "height negative": (put("annotations", 0, bbox=[9, 9, 3, -4]), ["id 1181", "height >= 0"]),
    "ignore": (put("annotations", 0, ignore=1), ["ignore", "id 1181", "iscrowd 1 instead"]),
    "iscrowd 2": (put("annotations", 0, iscrowd=2), ["iscrowd", "id 1181", "0 or 1"]),
    "area null": (put("annotations", 0, area=None), ["area", "id 1181", "None"]),
    "absolute path": (
        put("images", 0, file_name="/etc/passwd"),
        ["'/etc/passwd' of image 80 leaves the image folder"],
    ),
    "path upwards": (put("images", 0, file_name="a/../../b.jpg"), ["image 80", "leaves"]),
}
BAD_IMAGES = {
    "all missing": (delete_images, ["3 of 3 images are missing", FIRST, "00343.jpg"]),
    "one missing": (lambda bccd: (bccd.images / FIRST).unlink(), ["1 of 3 images", FIRST]),
    "truncated": (spoil_image(None, keep=9000), [FIRST, "image id 80", "truncated"]),
    "no image": (spoil_image(b"<html>not found</html>"), [FIRST, "image id 80", "not an image"]),
    "no bytes": (spoil_image(b""), ["1 of 3 images cannot be used", FIRST, "image id 80"]),
    "other size": (
        put("images", 0, width=641),
        [FIRST, "image id 80", "(640, 480)", "(641, 480)"],
    ),
}


@pytest.mark.parametrize("case", [*BAD_JSON, *BAD_IMAGES])
def test_fault_of_the_data_is_one_line_that_names_it(case: str, bccd: Bccd, cfg: CfgNode) -> None:
    spoil, expected = (BAD_JSON | BAD_IMAGES)[case]
    spoil(bccd)
    with pytest.raises(InputError) as error:
        prepare_datasets(bccd.use(cfg), num_classes_is_set=False, eval_only=False)
    message = str(error.value)
    assert message.startswith(str(bccd.train_json))
    assert len(message.splitlines()) == 1
    for part in expected:
        assert part in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"{'images': []}", "is not JSON: Expecting property name"),
        (b'{"images": [', "is not JSON"),
        (b"\xff\xd8\xff\xe0", "is not JSON"),
        (b"[]", "is not a COCO instances file: no list of images, categories, annotations"),
    ],
)
def test_file_that_is_no_coco_json(content: bytes, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        coco_json.read_coco_json(str(path))
    assert str(error.value).startswith(f"{path}: {expected}")


@pytest.mark.parametrize("name", ["gone.json", "."])
def test_file_that_cannot_be_read(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"(gone\.json|.*): cannot be read: (No such|Is a)"):
        coco_json.read_coco_json(os.path.join(tmp_path, name))


def test_missing_image_folder_is_named(bccd: Bccd, cfg: CfgNode) -> None:
    bccd.use(cfg).DATASETS.CUSTOM.TRAIN_IMAGES = str(bccd.folder / "pictures")
    with pytest.raises(InputError, match=r"image folder .*/pictures does not exist"):
        prepare_datasets(cfg, num_classes_is_set=False, eval_only=False)


@pytest.mark.parametrize("case", ["no image", "no bytes", "other size"])
def test_headers_show_faults_of_a_large_set(
    case: str, bccd: Bccd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coco_json, "MAX_DECODED_IMAGES", 2)
    check(bccd)
    spoil, expected = BAD_IMAGES[case]
    spoil(bccd)
    with pytest.raises(InputError) as error:
        check(bccd)
    assert all(part in str(error.value) for part in expected)


def test_large_set_is_not_decoded(bccd: Bccd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coco_json, "MAX_DECODED_IMAGES", 2)
    monkeypatch.setattr(coco_json, "read_image", None)  # would fail if called
    check(bccd)


@pytest.mark.parametrize("max_decoded", [2, 3], ids=["headers", "decoded"])
@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_size_is_that_of_the_upright_image(
    max_decoded: int, suffix: str, bccd: Bccd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coco_json, "MAX_DECODED_IMAGES", max_decoded)
    exif = Image.Exif()
    exif[274] = 6  # turned by a quarter
    image = bccd.train["images"][0]
    with Image.open(bccd.images / FIRST) as opened:
        opened.save(bccd.images / f"turned{suffix}", exif=exif)
    image["file_name"] = f"turned{suffix}"
    with pytest.raises(InputError, match=r"turned.*\(480, 640\).*\(640, 480\)"):
        check(bccd)
    image["width"], image["height"] = 480, 640
    check(bccd)


def check(bccd: Bccd) -> None:
    """Check the training images."""
    coco_json.check_images(
        str(bccd.train_json), bccd.train, str(bccd.images), image_format="BGR", decode=True
    )


def test_dicts_equal_detectron2s_but_for_the_box_without_area(bccd: Bccd) -> None:
    bccd.train["images"].reverse()
    bccd.train["annotations"][0]["iscrowd"] = 1
    bccd.write()
    ours = coco_json.load_dataset_dicts(str(bccd.train_json), str(bccd.images))
    theirs = load_coco_json(str(bccd.train_json), str(bccd.images), "bccd_mini_by_detectron2")
    assert sum(len(record["annotations"]) for record in theirs) == 36
    for record in theirs:
        record["annotations"] = [a for a in record["annotations"] if a["bbox"][2] > 0]
    assert sum(len(record["annotations"]) for record in ours) == 35
    assert ours == theirs


def test_malformed_segmentation_costs_no_box(bccd: Bccd) -> None:
    for annotation, segmentation in zip(
        bccd.train["annotations"], ([[1, 2]], [1.0, 2.0], {"counts": 3}, "none"), strict=False
    ):
        annotation["segmentation"] = segmentation
    bccd.write()
    records = coco_json.load_dataset_dicts(str(bccd.train_json), str(bccd.images))
    assert sum(len(record["annotations"]) for record in records) == 35


@pytest.mark.parametrize(
    ("bbox", "no_area", "outside"),
    [
        ([0, 0, 640, 480], False, False),
        ([-0.5, 0, 641, 480], False, False),
        ([-5, 0, 20, 20], False, True),
        ([600, 400, 90, 20], False, True),
        ([100, 100, 0, 20], True, False),
        ([100, 100, 20, 0], True, False),
        ([640, 100, 20, 20], True, True),
        ([100, -30, 20, 30], True, True),
        ([1e308, 0, 1e308, 20], True, True),
    ],
)
def test_what_is_left_of_a_box_inside_the_image(
    bbox: list[float], no_area: bool, outside: bool, bccd: Bccd
) -> None:
    bccd.train["annotations"] = [{**bccd.train["annotations"][0], "bbox": bbox}]
    assert bool(coco_json.boxes_without_area(bccd.train)) == no_area
    assert bool(coco_json.boxes_reaching_outside(bccd.train)) == outside


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: (
        st.lists(children, max_size=5)
        | st.dictionaries(st.sampled_from(["id", "bbox", "name"]), children, max_size=3)
    ),
    max_leaves=6,
)
NODES = st.sampled_from(
    [
        (key, index, field)
        for key, fields in {
            "images": ["id", "file_name", "width", "height"],
            "annotations": ["id", "image_id", "category_id", "bbox", "area", "iscrowd", "ignore"],
            "categories": ["id", "name"],
        }.items()
        for index in (0, 1)
        for field in [*fields, None]
    ]
)


@settings(max_examples=200)
@given(st.lists(st.tuples(NODES, JSON_VALUES), min_size=1, max_size=3))
def test_whatever_a_field_holds_it_is_used_or_refused(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[tuple[str, int, str], Any]]
) -> None:
    content = json.loads((BCCD_MINI / TRAIN).read_text())
    for (key, index, field), value in changes:
        if field is None:
            content[key][index] = value
        elif isinstance(content[key][index], dict):
            content[key][index][field] = value
    path = tmp_path_factory.getbasetemp() / "changed.json"
    path.write_text(json.dumps(content))
    try:
        records = coco_json.load_dataset_dicts(str(path), str(BCCD_MINI / "images"))
    except InputError as error:
        assert len(str(error).splitlines()) == 1
        return
    assert all(0 <= a["category_id"] < 3 for record in records for a in record["annotations"])
    coco_json.complete_for_evaluation(coco_json.read_coco_json(str(path)))


def test_complete_json_is_left_alone(bccd: Bccd) -> None:
    assert coco_json.complete_for_evaluation(bccd.train) is None


def test_completed_json_differs_in_what_was_missing_only(bccd: Bccd) -> None:
    given = copy.deepcopy(bccd.val)
    del given["annotations"][0]["iscrowd"], given["annotations"][1]["area"]
    before = copy.deepcopy(given)
    # The data's own area is width x height.
    assert coco_json.complete_for_evaluation(given) == bccd.val
    assert given == before


def test_folder_with_subfolders_is_read(bccd: Bccd) -> None:
    (bccd.images / "a b").mkdir()
    shutil.move(bccd.images / FIRST, bccd.images / "a b" / "ü.jpg")
    bccd.train["images"][0]["file_name"] = "./a b/ü.jpg"
    check(bccd)
