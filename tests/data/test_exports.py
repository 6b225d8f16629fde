"""Annotations as tools export them: eight images of one box each, in all the ways they come."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from pycocotools import mask as mask_util

from retinanet_ext.data.box_format import BOX_FORMATS
from retinanet_ext.data.coco_json import class_names
from retinanet_ext.data.validation_report import check_data

from .conftest import BCCD_MINI
from .eight_images import (
    ALL,
    BOXES,
    HEIGHT,
    WIDTH,
    Eight,
    check,
    perfect_ap,
    prepare,
    refusal,
    small,
    trained_on,
)


def boxes_in(box_format: str) -> list[list[float]]:
    """Return the boxes in another format."""
    boxes = [
        {
            "xywh": [x, y, w, h],
            "xyxy": [x, y, x + w, y + h],
            "cxcywh": [x + w / 2, y + h / 2, w, h],
        }[box_format.removeprefix("relative_")]
        for x, y, w, h in BOXES
    ]
    unit = [WIDTH, HEIGHT] * 2 if box_format.startswith("relative_") else [1] * 4
    return [[float(n / side) for n, side in zip(box, unit, strict=True)] for box in boxes]


def write_boxes(eight: Eight, box_format: str, count: int = 8) -> Eight:
    """Write the first boxes of a json in another format."""
    pairs = zip(eight.content["annotations"], boxes_in(box_format), strict=False)
    for annotation, box in list(pairs)[:count]:
        annotation["bbox"] = box
    return eight


def drop_area(eight: Eight) -> None:
    for annotation in eight.content["annotations"]:
        del annotation["area"]


def both(eight: Eight) -> list[str]:
    return [*eight.opts(), *eight.opts("TEST")]


@pytest.mark.parametrize("box_format", list(BOX_FORMATS)[1:])
def test_boxes_of_another_format_are_refused_and_the_key_converts_them(
    box_format: str, eight: Eight, tmp_path: Path
) -> None:
    opts = both(write_boxes(eight, box_format))
    message = refusal(*opts)
    assert f"set DATASETS.CUSTOM.BOX_FORMAT {box_format}, or DATASETS.CHECK" in message
    assert any(
        f"annotation {k} of image {k} (a{k}.jpg) has [{box[0]:.6g}, " in message
        for k, box in enumerate(boxes_in(box_format), start=1)
    )
    assert check_data(small(*opts)).exit_code == 1

    prepare(*opts, "DATASETS.CUSTOM.BOX_FORMAT", box_format)
    for name in ("custom_train", "custom_test"):
        assert np.allclose([boxes[0][1] for _, boxes in trained_on(name)], BOXES)
    assert perfect_ap(tmp_path) == pytest.approx(100)
    assert eight.messages(box_format) == {}


@pytest.mark.parametrize("claimed", list(BOX_FORMATS)[1:])
@pytest.mark.parametrize("with_area", [True, False])
def test_a_wrong_key_is_refused_too(claimed: str, with_area: bool, eight: Eight) -> None:
    if not with_area:
        drop_area(eight)
    (message,) = eight.messages(claimed)["other_box_format"]
    assert "set DATASETS.CUSTOM.BOX_FORMAT xywh, or" in message
    assert eight.messages() == {}


@pytest.mark.parametrize("box_format", ["xywh", "xyxy", "cxcywh"])
def test_fractions_are_told_from_one_box(box_format: str, eight: Eight) -> None:
    write_boxes(eight, f"relative_{box_format}")
    eight.content["annotations"] = eight.content["annotations"][:1]
    (message,) = eight.messages()["other_box_format"]
    assert "no number of 1 boxes is above " in message
    assert f"relative_{box_format}" in message


def test_corners_inside_as_they_stand_are_told_by_their_area(eight: Eight) -> None:
    for annotation in eight.content["annotations"]:
        annotation["bbox"] = [10, 8, 30, 29]
        annotation["area"] = 30 * 29
    assert eight.messages() == {}  # it may be of either format
    for annotation in eight.content["annotations"]:
        annotation["area"] = 20 * 21
    (message,) = eight.messages()["other_box_format"]
    assert "area is not that of xywh, but that of xyxy" in message


def test_real_boxes_and_those_that_reach_outside_stay_accepted(eight: Eight) -> None:
    for path in (BCCD_MINI, BCCD_MINI.parent / "bccd_faults"):
        for file in path.glob("*.json"):
            checked = check(
                json.loads(file.read_text()), BCCD_MINI / "images", missing_image="keep"
            )
            assert "other_box_format" not in checked.by_kind()
    eight.content["annotations"][3]["bbox"] = [55, 38, 40, 40]
    eight.content["annotations"][5]["bbox"] = [-8, -4, 25, 34]
    assert set(eight.messages()) == {"clipped_box"}


@pytest.mark.parametrize("box_format", ["relative_xywh", "relative_cxcywh", "xyxy"])
@pytest.mark.parametrize(("count", "with_area"), [(1, True), (3, False), (5, True)])
def test_two_formats_in_one_file_are_one_line_with_a_box_of_each(
    box_format: str, count: int, with_area: bool, eight: Eight
) -> None:
    if not with_area:
        drop_area(eight)
    message = refusal(*write_boxes(eight, box_format, count).opts())
    assert "boxes are of two formats: annotation " in message
    ours = [k for k in range(1, 9) if f"annotation {k} of image {k} (a{k}.jpg)" in message]
    assert len(ours) == 2 and min(ours) <= count < max(ours)


def test_one_box_of_another_format_may_be_a_slip(eight: Eight) -> None:
    drop_area(eight)
    assert "other_box_format" not in write_boxes(eight, "xyxy", 1).messages()


def test_size_table_is_of_the_boxes(eight: Eight) -> None:
    for annotation in eight.content["annotations"]:
        annotation["area"] = 10000.0
    facts = check_data(small(*eight.opts())).content["data_sets"][0]["facts"]
    assert sum(row["small"] for row in facts["classes"].values()) == 8


@pytest.mark.parametrize(
    ("bbox", "expected"),
    [
        ({"x": 1, "y": 2, "width": 3, "height": 4}, "bbox is {"),
        (["2.5", "3.5", "24.0", "20.0"], "bbox is ['2.5'"),
        (None, "or a polygon or mask must be there"),
    ],
)
@pytest.mark.parametrize("box_format", ["xywh", "xyxy"])
def test_boxes_that_are_none_say_what_the_format_wants(
    bbox: Any, expected: str, box_format: str, eight: Eight
) -> None:
    eight.content["annotations"][0]["bbox"] = bbox
    (message,) = eight.messages(box_format, other_box_format="keep")["malformed_box"]
    assert message.startswith("annotation 1 of image 1 (a1.jpg): bbox is ") and expected in message
    assert f"4 finite numbers {BOX_FORMATS[box_format]}" in message


def test_wrong_corners_are_named_with_their_format(eight: Eight) -> None:
    write_boxes(eight, "xyxy").content["annotations"][1]["bbox"] = [78, 5, 50, 23]
    (message,) = eight.messages("xyxy")["inverted_box"]
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


SEGMENTATIONS = {
    "polygon": polygon,
    "flat polygon": lambda box: polygon(box)[0],
    "mask": rle,
    "list of runs": lambda box: rle(box, compressed=False),
}


@pytest.mark.parametrize("kind", SEGMENTATIONS)
@pytest.mark.parametrize("bbox", ["gone", [], [0, 0, 0, 0]])
def test_missing_boxes_come_from_polygon_or_mask(
    kind: str, bbox: Any, eight: Eight, log: pytest.LogCaptureFixture
) -> None:
    for annotation in eight.content["annotations"]:
        annotation["segmentation"] = SEGMENTATIONS[kind](annotation.pop("bbox"))
        if bbox != "gone":
            annotation["bbox"] = bbox
    prepare(*both(eight))
    assert trained_on() == trained_on("custom_test") == ALL
    (said,) = {m for m in log.messages if "boxes missing, taken from the polygon or mask: 8: " in m}
    assert "annotation 1 of image 1 (a1.jpg): bbox is missing and" in said
    assert eight.check(derived_box="drop").content["annotations"] == []


@pytest.mark.parametrize("box_format", list(BOX_FORMATS))
def test_polygons_are_in_the_unit_of_the_boxes(box_format: str, eight: Eight) -> None:
    scale = [WIDTH, HEIGHT] * 4 if box_format.startswith("relative_") else [1] * 8
    for annotation, box in list(
        zip(write_boxes(eight, box_format).content["annotations"], BOXES, strict=True)
    )[::2]:
        del annotation["bbox"]
        points = polygon(box)[0]
        annotation["segmentation"] = [[n / s for n, s in zip(points, scale, strict=True)]]
    eight.content["annotations"][0]["segmentation"] = rle(BOXES[0])
    done = eight.check(box_format).content["annotations"]
    assert np.allclose([a["bbox"] for a in done], BOXES)


@pytest.mark.parametrize(
    "segmentation",
    [
        *([], [[]], [[1, 2, 3, 4]], [[1, 2, 3, 4, 5, "6"]], "none"),
        {"size": [HEIGHT, WIDTH], "counts": [5]},
        {"size": [9, 9], "counts": rle(BOXES[0])["counts"]},
        {"size": [HEIGHT, WIDTH], "counts": "\x00~é"},
    ],
)
def test_box_without_usable_segmentation_is_refused_by_name(
    segmentation: Any, eight: Eight
) -> None:
    del eight.content["annotations"][4]["bbox"]
    eight.content["annotations"][4]["segmentation"] = segmentation
    found = eight.messages()
    assert [*found] == ["malformed_box", "empty_image"]
    expected = "annotation 5 of image 5 (a5.jpg): bbox is missing"
    assert found["malformed_box"][0].startswith(expected)


@pytest.mark.parametrize("kind", ["mask", "polygon", "box alone"])
@pytest.mark.parametrize("every", [1, 2])
def test_crowd_that_looks_like_objects_is_told_first_and_can_be_taken(
    kind: str, every: int, eight: Eight, log: pytest.LogCaptureFixture
) -> None:
    for annotation in eight.content["annotations"][::every]:
        segmentation = SEGMENTATIONS.get(kind, lambda _: None)(annotation["bbox"])
        annotation.update(iscrowd=1, segmentation=segmentation)
    opts = both(eight)
    report = check_data(small(*opts)).content
    assert report["data_sets"][0]["findings"][0]["kind"] == "crowd_object"
    if every == 1:
        message = refusal(*opts)
        assert "nothing to learn" in message and "DATASETS.CHECK.CROWD object takes" in message
        assert "DATASETS.CHECK.CROWD object takes" in report["conclusion"]
    else:
        prepare(*opts)
        warned = [r.getMessage() for r in log.records if r.levelname == "WARNING"]
        assert warned[0].startswith(f"{eight.json}: crowd regions that look like objects: 1: ")
        assert "4 of 8 annotations have iscrowd 1 (dog 4 of 4), and are neither" in warned[0]

    opts += ["DATASETS.CHECK.CROWD", "object"]
    prepare(*opts)
    assert trained_on() == ALL
    records = DatasetCatalog.get("custom_train")
    assert not any(a["iscrowd"] for record in records for a in record["annotations"])
    ground_truth = json.loads(Path(MetadataCatalog.get("custom_test").json_file).read_text())
    assert [a["iscrowd"] for a in ground_truth["annotations"]] == [0] * 8
    text = check_data(small(*opts)).text
    assert f"   taken  crowd regions, ignored unless taken as objects: {8 // every}" in text


def test_crowds_that_are_few_or_of_several_pieces_are_crowds(eight: Eight) -> None:
    eight.content["annotations"][0]["iscrowd"] = 1
    assert set(eight.messages()) == {"crowd", "empty_image"}
    for annotation in eight.content["annotations"]:
        annotation.update(iscrowd=1, segmentation=rle(annotation["bbox"], pieces=2))
    assert "crowd_object" not in eight.messages()


def test_nulls_and_missing_fields_are_filled_in(
    eight: Eight, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    for annotation in eight.content["annotations"]:
        del annotation["id"]
        annotation.update(iscrowd=None, area=None, ignore=None, segmentation=None)
    del eight.content["annotations"][0]["area"]
    prepare(*both(eight))
    notes = eight.check().notes
    assert sorted(notes) == [
        "annotations whose area is missing: 1 (width x height of the box is taken)",
        "annotations whose area is null: 7 (width x height of the box is taken)",
        "annotations whose id is missing: 8 (numbered for the evaluation)",
        "annotations whose ignore is null: 8 (read as 0)",
        "annotations whose iscrowd is null: 8 (read as 0)",
    ]
    assert {f"{eight.json}: {note}" for note in notes} <= set(log.messages)
    assert trained_on() == ALL
    assert perfect_ap(tmp_path) == pytest.approx(100)


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
def test_ids_that_are_text(case: str, eight: Eight, tmp_path: Path) -> None:
    own, named, how = IDS[case]
    content = eight.content
    for entry in [*content["images"], *content["categories"]]:
        entry["id"] = own(entry["id"])
    for annotation in content["annotations"]:
        annotation.update(
            id=f"uuid-{annotation['id']}",
            image_id=named(annotation["image_id"]),
            category_id=named(annotation["category_id"]),
        )
    prepare(*both(eight))
    ids_note, *_ = notes = eight.check().notes
    assert ids_note.startswith("ids of images are text") and how in ids_note
    assert "annotations whose id is text: 8 (numbered for the evaluation)" in notes
    assert sorted(trained_on()) == ALL
    assert MetadataCatalog.get("custom_train").thing_classes == ["cat", "dog"]
    assert perfect_ap(tmp_path) == pytest.approx(100)
    predictions = json.loads((tmp_path / "coco_instances_results.json").read_text())
    if how == "used as they are":
        assert [p["image_id"] for p in predictions] == [i["id"] for i in content["images"]]
    missing = content["images"].pop()["id"]
    (message, *_) = eight.messages()["unknown_image"]
    assert f"image_id {missing} is not among the images" in message


def test_text_ids_of_digits_are_in_the_order_of_numbers(eight: Eight) -> None:
    """Else classes 2 and 10 would change places with the same data whose ids are numbers."""
    eight.content["categories"] = [{"id": str(k), "name": f"class {k}"} for k in (1, 2, 10)]
    for annotation in eight.content["annotations"]:
        annotation["category_id"] = str(annotation["category_id"])
    assert class_names(eight.check().content) == ["class 1", "class 2", "class 10"]


@pytest.mark.parametrize("value", [1.5, None, True, [1], ""])
@pytest.mark.parametrize("field", ["image_id", "category_id"])
def test_ids_that_are_neither_are_refused(value: Any, field: str, eight: Eight) -> None:
    eight.content["annotations"][0][field] = value
    (message,) = eight.messages()["malformed_annotation"]
    assert f"{field} is {value!r}; it must be an integer or a text" in message


@pytest.mark.parametrize("name", ["things", "background"])
def test_class_of_no_objects_is_said_as_what_it_is(name: str, eight: Eight) -> None:
    classes = copy.deepcopy(eight.content["categories"])
    parent = {"id": 0, "name": name, "supercategory": "none"}
    eight.content["categories"] = [parent, *({**c, "supercategory": "things"} for c in classes)]
    what = "the background" if name != "things" else "the supercategory of cat, dog"
    (message,) = eight.messages()["parent_class"]
    assert f"class {name} (category 0) has no box and is {what}" in message
    assert """DATASETS.CUSTOM.CLASSES '["cat", "dog"]' leaves it out""" in message
    eight.content["annotations"][0]["category_id"] = 0
    assert eight.messages() == {}


def test_unused_class_is_no_parent_of_itself(eight: Eight) -> None:
    eight.content["categories"].append({"id": 3, "name": "person", "supercategory": "person"})
    assert set(eight.messages()) == {"unused_class"}
