"""Annotations as tools export them: eight images of one box each, in all the ways they come."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from pycocotools import mask as mask_util

from retinanet_ext.data import prepare_datasets
from retinanet_ext.data.box_format import BOX_FORMATS
from retinanet_ext.data.coco_json import class_names
from retinanet_ext.data.findings import DEFAULT_POLICY, ValidationResult
from retinanet_ext.data.validation import check_coco
from retinanet_ext.data.validation_report import check_data
from retinanet_ext.engine import load_config
from retinanet_ext.errors import InputError

from .conftest import BCCD_MINI
from .eight_images import perfect_ap

SMALL = Path(__file__).parents[2] / "configs" / "small_R18_FPN.yaml"
WIDTH, HEIGHT = 80, 60
# Of the size and at the places that objects have: at the borders too.
BOXES = [
    *([2, 3, 24, 20], [50, 5, 28, 18], [10, 35, 22, 24], [55, 38, 24, 20]),
    *([30, 20, 26, 22], [1, 18, 16, 30], [60, 2, 19, 33], [25, 40, 30, 19]),
]
Content = dict[str, Any]


@pytest.fixture
def content() -> Content:
    images = [
        {"id": k, "file_name": f"{k}.png", "width": WIDTH, "height": HEIGHT} for k in range(1, 9)
    ]
    annotations = [
        {"id": k, "image_id": k, "category_id": 1 + k % 2, "bbox": list(map(float, box))}
        | {"area": float(box[2] * box[3]), "iscrowd": 0}
        for k, box in enumerate(BOXES, start=1)
    ]
    categories = [{"id": 1, "name": "cell"}, {"id": 2, "name": "worm"}]
    return {"images": images, "annotations": annotations, "categories": categories}


@pytest.fixture
def use(tmp_path: Path) -> Any:
    """Write a json as training and test data, with its images, and name it in the config."""

    def use(content: Content, **keys: str) -> CfgNode:
        (tmp_path / "images").mkdir(exist_ok=True)
        for image in content["images"]:
            Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "images" / image["file_name"])
        (tmp_path / "mine.json").write_text(json.dumps(content))
        cfg = load_config(str(SMALL), [item for pair in keys.items() for item in pair])
        custom = cfg.DATASETS.CUSTOM
        custom.TRAIN_JSON = custom.TEST_JSON = str(tmp_path / "mine.json")
        custom.TRAIN_IMAGES = custom.TEST_IMAGES = str(tmp_path / "images")
        return cfg

    return use


def prepare(cfg: CfgNode) -> None:
    prepare_datasets(cfg, eval_only=False)


def refusal(cfg: CfgNode) -> str:
    with pytest.raises(InputError) as error:
        prepare(cfg)
    message = str(error.value)
    assert message.startswith(cfg.DATASETS.CUSTOM.TRAIN_JSON) and len(message.splitlines()) == 1
    report = check_data(cfg)
    assert report.exit_code == 1
    return message


def check(content: Content, box_format: str = "xywh", **policy: str) -> ValidationResult:
    before = copy.deepcopy(content)
    checked = check_coco("mine.json", content, {**DEFAULT_POLICY, **policy}, box_format=box_format)
    assert content == before
    return checked


def messages(checked: ValidationResult) -> dict[str, list[str]]:
    return {kind: [f.message for f in found] for kind, found in checked.by_kind().items()}


def trained_boxes(name: str = "custom_train") -> list[list[float]]:
    return [a["bbox"] for record in DatasetCatalog.get(name) for a in record["annotations"]]


def write_boxes(content: Content, box_format: str) -> Content:
    """Write the boxes of a json in another format."""
    content = copy.deepcopy(content)
    for annotation in content["annotations"]:
        x, y, w, h = annotation["bbox"]
        box = {
            "xywh": [x, y, w, h],
            "xyxy": [x, y, x + w, y + h],
            "cxcywh": [x + w / 2, y + h / 2, w, h],
        }[box_format.removeprefix("relative_")]
        if box_format.startswith("relative_"):
            box = [n / side for n, side in zip(box, [WIDTH, HEIGHT] * 2, strict=True)]
        annotation["bbox"] = box
    return content


@pytest.mark.parametrize("box_format", list(BOX_FORMATS)[1:])
def test_boxes_of_another_format_are_refused_and_the_key_converts_them(
    box_format: str, content: Content, use: Any, tmp_path: Path
) -> None:
    written = write_boxes(content, box_format)
    cfg = use(written)
    message = refusal(cfg)
    assert f"set DATASETS.CUSTOM.BOX_FORMAT {box_format}, or DATASETS.CHECK" in message
    assert any(
        f"annotation {k} of image {k} ({k}.png) has [{a['bbox'][0]:.6g}, " in message
        for k, a in enumerate(written["annotations"], start=1)
    )

    prepare(use(written, **{"DATASETS.CUSTOM.BOX_FORMAT": box_format}))
    for name in ("custom_train", "custom_test"):
        assert np.allclose(trained_boxes(name), BOXES)
    assert perfect_ap(tmp_path) == pytest.approx(100)
    assert messages(check(written, box_format)).keys() <= {"filled_field"}


@pytest.mark.parametrize("claimed", list(BOX_FORMATS)[1:])
@pytest.mark.parametrize("with_area", [True, False])
def test_a_wrong_key_is_refused_too(claimed: str, with_area: bool, content: Content) -> None:
    if not with_area:
        for annotation in content["annotations"]:
            del annotation["area"]
    (message,) = messages(check(content, claimed))["other_box_format"]
    assert "set DATASETS.CUSTOM.BOX_FORMAT xywh, or" in message
    assert "other_box_format" not in messages(check(content))


@pytest.mark.parametrize("box_format", ["xywh", "xyxy", "cxcywh"])
@pytest.mark.parametrize("count", [1, 8])
def test_fractions_are_told_from_one_box(box_format: str, count: int, content: Content) -> None:
    content["annotations"] = content["annotations"][:count]
    written = write_boxes(content, f"relative_{box_format}")
    (message,) = messages(check(written))["other_box_format"]
    assert f"no number of {count} boxes is above " in message
    assert f"relative_{box_format}" in message


def test_corners_inside_as_they_stand_are_told_by_their_area(content: Content) -> None:
    for annotation in content["annotations"]:
        annotation["bbox"] = [10, 8, 20, 21]
    boxes = write_boxes(content, "xyxy")
    assert "other_box_format" not in messages(check(boxes))  # [10, 8, 30, 29] may be of either
    for annotation in boxes["annotations"]:
        annotation["area"] = 20 * 21
    (message,) = messages(check(boxes))["other_box_format"]
    assert "area is not that of xywh, but that of xyxy" in message


def test_real_boxes_and_those_that_reach_outside_stay_accepted(content: Content) -> None:
    for path in (BCCD_MINI, BCCD_MINI.parent / "bccd_faults"):
        for file in path.glob("*.json"):
            real = json.loads(file.read_text())
            assert "other_box_format" not in messages(check(real))
    content["annotations"][3]["bbox"] = [55, 38, 40, 40]
    content["annotations"][5]["bbox"] = [-8, -4, 25, 34]
    assert set(messages(check(content))) == {"clipped_box"}


@pytest.mark.parametrize("box_format", ["relative_xywh", "relative_cxcywh", "xyxy"])
@pytest.mark.parametrize("count", [1, 3, 5])
@pytest.mark.parametrize("with_area", [True, False])
def test_two_formats_in_one_file_are_one_line_with_a_box_of_each(
    box_format: str, count: int, with_area: bool, content: Content, use: Any
) -> None:
    if not with_area:
        for annotation in content["annotations"]:
            del annotation["area"]
    other = write_boxes(content, box_format)["annotations"]
    content["annotations"] = other[:count] + content["annotations"][count:]
    if box_format == "xyxy" and count == 1 and not with_area:
        assert "other_box_format" not in messages(check(content))  # it may be a slip
        return
    message = refusal(use(content))
    assert "boxes are of two formats: annotation " in message
    ours = [k for k in range(1, 9) if f"annotation {k} of image {k} ({k}.png)" in message]
    assert len(ours) == 2 and min(ours) <= count < max(ours)


def test_size_table_is_of_the_boxes(content: Content, use: Any) -> None:
    for annotation in content["annotations"]:
        annotation["area"] = 10000.0
    facts = check_data(use(content)).content["data_sets"][0]["facts"]
    assert sum(row["small"] for row in facts["classes"].values()) == 8


@pytest.mark.parametrize(
    ("bbox", "expected"),
    [
        ({"x": 1, "y": 2, "width": 3, "height": 4}, "bbox is {"),
        (["2.5", "3.5", "24.0", "20.0"], "bbox is ['2.5'"),
        (None, "or a polygon or mask must be there"),
        ([], "or a polygon or mask must be there"),
        ([2, 3, 24], "bbox is [2, 3, 24]"),
    ],
)
@pytest.mark.parametrize("box_format", ["xywh", "xyxy"])
def test_boxes_that_are_none_say_what_the_format_wants(
    bbox: Any, expected: str, box_format: str, content: Content
) -> None:
    content["annotations"][0]["bbox"] = bbox
    (message,) = messages(check(content, box_format, other_box_format="keep"))["malformed_box"]
    assert message.startswith("annotation 1 of image 1 (1.png): bbox is ") and expected in message
    assert f"4 finite numbers {BOX_FORMATS[box_format]}" in message


def test_box_without_size_and_wrong_corners_are_named_with_their_format(content: Content) -> None:
    content["annotations"][0]["bbox"] = [2, 3, -0.0, 20]
    assert "has no area" in messages(check(content))["zero_area_box"][0]
    corners = write_boxes(content, "xyxy")
    corners["annotations"][1]["bbox"] = [78, 5, 50, 23]
    (message,) = messages(check(corners, "xyxy"))["inverted_box"]
    assert "bbox [78.0, 5.0, -28.0, 18.0], converted from xyxy, must have" in message


def rle(box: list[float], *, pieces: int = 1, compressed: bool = True) -> dict[str, Any]:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    x, y, w, h = map(int, box)
    mask[y : y + h, x : x + w] = 1
    if pieces == 2:
        mask[y : y + h, x + w // 3 : x + w // 2] = 0
    if compressed:
        encoded = mask_util.encode(mask)
        return {"size": encoded["size"], "counts": encoded["counts"].decode()}
    flat = mask.flatten(order="F")
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [2]])))
    return {"size": [HEIGHT, WIDTH], "counts": np.diff([0, *edges]).tolist()}


def polygon(box: list[float]) -> list[list[float]]:
    x, y, w, h = box
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


@pytest.mark.parametrize("kind", ["polygon", "flat polygon", "mask", "list of runs"])
@pytest.mark.parametrize("bbox", ["gone", None, [], [0, 0, 0, 0]])
def test_missing_boxes_come_from_polygon_or_mask(
    kind: str, bbox: Any, content: Content, use: Any, log: pytest.LogCaptureFixture
) -> None:
    for annotation in content["annotations"]:
        box = annotation.pop("bbox")
        if bbox != "gone":
            annotation["bbox"] = bbox
        annotation["segmentation"] = {
            "polygon": polygon(box),
            "flat polygon": polygon(box)[0],
            "mask": rle(box),
            "list of runs": rle(box, compressed=False),
        }[kind]
    prepare(use(content))
    assert trained_boxes() == trained_boxes("custom_test") == BOXES
    (said,) = {m for m in log.messages if "boxes missing, taken from the polygon or mask: 8: " in m}
    assert "annotation 1 of image 1 (1.png): bbox is missing and" in said
    assert len(check(content, derived_box="drop").content["annotations"]) == 0
    if kind == "polygon":
        (message,) = {refusal(use(content, **{"DATASETS.CHECK.DERIVED_BOX": "refuse"}))}
        assert "DATASETS.CHECK.DERIVED_BOX drop" in message


@pytest.mark.parametrize("box_format", list(BOX_FORMATS))
def test_polygons_are_in_the_unit_of_the_boxes(box_format: str, content: Content) -> None:
    written = write_boxes(content, box_format)
    scale = [WIDTH, HEIGHT] * 4 if box_format.startswith("relative_") else [1] * 8
    for annotation, box in zip(written["annotations"][::2], BOXES[::2], strict=True):
        del annotation["bbox"]
        points = polygon(box)[0]
        annotation["segmentation"] = [[n / s for n, s in zip(points, scale, strict=True)]]
    written["annotations"][0]["segmentation"] = rle(BOXES[0])
    done = check(written, box_format).content["annotations"]
    assert np.allclose([a["bbox"] for a in done], BOXES)


@pytest.mark.parametrize(
    "segmentation",
    [
        *([], [[]], [[1, 2, 3, 4]], [[1, 2, 3, 4, 5, "6"]], {}, "none"),
        {"size": [HEIGHT, WIDTH], "counts": [5]},
        {"size": [HEIGHT, WIDTH], "counts": [WIDTH * HEIGHT + 3, -3]},
        {"size": [9, 9], "counts": rle(BOXES[0])["counts"]},
        {"size": [HEIGHT, WIDTH], "counts": "\x00~é"},
    ],
)
def test_box_without_usable_segmentation_is_refused_by_name(
    segmentation: Any, content: Content
) -> None:
    del content["annotations"][4]["bbox"]
    content["annotations"][4]["segmentation"] = segmentation
    found = messages(check(content))
    assert [*found] == ["malformed_box", "empty_image"]
    assert found["malformed_box"][0].startswith("annotation 5 of image 5 (5.png): bbox is missing")


@pytest.mark.parametrize("kind", ["mask", "polygon", "box alone"])
@pytest.mark.parametrize("every", [1, 2])
def test_crowd_that_looks_like_objects_is_told_first_and_can_be_taken(
    kind: str, every: int, content: Content, use: Any, log: pytest.LogCaptureFixture
) -> None:
    for annotation in content["annotations"][::every]:
        segmentation = {"mask": rle, "polygon": polygon}.get(kind, lambda _: None)
        annotation.update(iscrowd=1, segmentation=segmentation(annotation["bbox"]))
    cfg = use(content)
    if every == 1:
        message = refusal(cfg)
        assert "nothing to learn; 8 have iscrowd 1, and DATASETS.CHECK.CROWD object" in message
        assert "DATASETS.CHECK.CROWD object" in check_data(cfg).content["conclusion"]
    else:
        prepare(cfg)
        warned = [r.getMessage() for r in log.records if r.levelname == "WARNING"]
        assert warned[0].startswith(f"{cfg.DATASETS.CUSTOM.TRAIN_JSON}: crowd regions that look")
        assert "4 of 8 annotations have iscrowd 1 (worm 4 of 4), and are neither" in warned[0]
        assert "DATASETS.CHECK.CROWD object takes them as objects" in warned[0]
    findings = check_data(cfg).content["data_sets"][0]["findings"]
    assert findings[0]["kind"] == "crowd_object"

    cfg = use(content, **{"DATASETS.CHECK.CROWD": "object"})
    prepare(cfg)
    assert trained_boxes() == BOXES
    records = DatasetCatalog.get("custom_train")
    assert not any(a["iscrowd"] for record in records for a in record["annotations"])
    ground_truth = json.loads(Path(MetadataCatalog.get("custom_test").json_file).read_text())
    assert [a["iscrowd"] for a in ground_truth["annotations"]] == [0] * 8
    text = check_data(cfg).text
    assert f"   taken  crowd regions, taken as objects: {8 // every}" in text


def test_crowds_that_are_few_or_of_several_pieces_are_crowds(content: Content) -> None:
    content["annotations"][0]["iscrowd"] = 1
    assert set(messages(check(content))) == {"crowd", "empty_image"}
    for annotation in content["annotations"]:
        annotation.update(iscrowd=1, segmentation=rle(annotation["bbox"], pieces=2))
    assert "crowd_object" not in messages(check(content))
    content["annotations"][0]["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": "\x00abc"}
    assert "crowd_object" not in messages(check(content))


def test_nulls_and_missing_fields_are_filled_in(
    content: Content, use: Any, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    for annotation in content["annotations"]:
        del annotation["id"]
        annotation.update(iscrowd=None, area=None, ignore=None, segmentation=None)
    del content["annotations"][0]["area"]
    cfg = use(content)
    prepare(cfg)
    said = next(m for m in log.messages if "fields of annotations, filled in: 5: " in m)
    notes = messages(check(content))["filled_field"]
    assert sorted(notes) == [
        "area is missing in 1 annotation (width x height of the box is taken)",
        "area is null in 7 annotations (width x height of the box is taken)",
        "id is missing in 8 annotations (numbered for the evaluation)",
        "ignore is null in 8 annotations (read as 0)",
        "iscrowd is null in 8 annotations (read as 0)",
    ]
    assert all(note in said for note in notes[:3])
    assert trained_boxes() == BOXES
    assert perfect_ap(tmp_path) == pytest.approx(100)
    content["annotations"][2]["bbox"] = [1, 2]
    (message,) = messages(check(content))["malformed_box"]
    assert message.startswith("annotations[2] of image 3 (3.png): bbox is [1, 2]")


IDS = {
    "digits throughout": (str, str, "used as they are"),
    "file stems": (lambda k: f"photo {k:03}", lambda k: f"photo {k:03}", "used as they are"),
    "text named as numbers": (str, int, "all are read as text"),
    "numbers named as text": (int, str, "all are read as numbers"),
    "both, of digits": (
        lambda k: str(k) if k > 1 else k,
        lambda k: k if k > 1 else str(k),
        "all are read as numbers",
    ),
    "both": (lambda k: f"p{k}" if k > 1 else k, lambda k: f"p{k}" if k > 1 else k, "read as text"),
}


@pytest.mark.parametrize("case", IDS)
def test_ids_that_are_text(
    case: str, content: Content, use: Any, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    own, named, how = IDS[case]
    for image in content["images"]:
        image["id"] = own(image["id"])
    for category in content["categories"]:
        category["id"] = own(category["id"])
    for annotation in content["annotations"]:
        annotation.update(
            id=f"uuid-{annotation['id']}",
            image_id=named(annotation["image_id"]),
            category_id=named(annotation["category_id"]),
        )
    prepare(use(content))
    (said,) = {m for m in log.messages if "mine.json: ids that are text: 2: ids of images are" in m}
    assert said.count(how) == 2
    assert sorted(trained_boxes()) == sorted(BOXES)
    assert MetadataCatalog.get("custom_train").thing_classes == ["cell", "worm"]
    assert perfect_ap(tmp_path) == pytest.approx(100)
    predictions = json.loads((tmp_path / "coco_instances_results.json").read_text())
    if how == "used as they are":
        assert [p["image_id"] for p in predictions] == [i["id"] for i in content["images"]]
    missing = content["images"].pop()["id"]
    (message, *_) = messages(check(content))["unknown_image"]
    assert f"image_id {missing} is not among the images" in message


def test_text_ids_of_digits_are_in_the_order_of_numbers(content: Content) -> None:
    """Else classes 2 and 10 would change places with the same data whose ids are numbers."""
    content["categories"] = [{"id": str(k), "name": f"class {k}"} for k in (1, 2, 10)]
    for annotation in content["annotations"]:
        annotation["category_id"] = str(annotation["category_id"])
    assert class_names(check(content).content) == ["class 1", "class 2", "class 10"]


@pytest.mark.parametrize("value", [1.5, None, True, [1], {}, ""])
@pytest.mark.parametrize("field", ["image_id", "category_id"])
def test_ids_that_are_neither_are_refused(value: Any, field: str, content: Content) -> None:
    content["annotations"][0][field] = value
    (message,) = messages(check(content))["malformed_annotation"]
    assert f"{field} is {value!r}; it must be an integer or a text" in message


@pytest.mark.parametrize("name", ["things", "background", "__background__"])
def test_class_of_no_objects_is_said_as_what_it_is(
    name: str, content: Content, use: Any, log: pytest.LogCaptureFixture
) -> None:
    parent = {"id": 0, "name": name, "supercategory": "none"}
    content["categories"].insert(0, parent)
    for category in content["categories"][1:]:
        category["supercategory"] = "things"
    prepare(use(content))
    what = "the background" if name != "things" else "the supercategory of cell, worm"
    said = next(m for m in log.messages if "classes that are a parent or the background: 1" in m)
    assert f"class {name} (category 0) has no box and is {what}" in said
    assert """DATASETS.CUSTOM.CLASSES '["cell", "worm"]' leaves it out""" in said
    assert "unused_class" not in messages(check(content))
    content["annotations"][0]["category_id"] = 0
    assert "parent_class" not in messages(check(content))


def test_unused_class_is_no_parent_of_itself(content: Content) -> None:
    content["categories"].append({"id": 3, "name": "person", "supercategory": "person"})
    assert set(messages(check(content))) == {"unused_class"}
