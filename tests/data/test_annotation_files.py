"""YOLO labels and Pascal VOC XML: the same data as in COCO's format, and their layouts."""

from __future__ import annotations

import html
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from retinanet_ext.cli import main
from retinanet_ext.data.findings import KINDS
from retinanet_ext.data.sources import find_custom
from retinanet_ext.data.validation_report import check_data
from retinanet_ext.data.voc_xml import read_voc
from retinanet_ext.engine import load_config
from training import run_train_net

from .conftest import Bccd
from .eight_images import (
    HEIGHT,
    WIDTH,
    Eight,
    config,
    evaluate,
    picture,
    prepare,
    refusal,
    trained_on,
)
from .other_formats import write_voc, write_yolo

TRAIN, TEST = "DATASETS.CUSTOM.TRAIN_JSON", "DATASETS.CUSTOM.TEST_JSON"
SIX_DECIMALS = 0.5e-6 * 640 * 1.5
"""Largest error of a coordinate in pixels: of a center and of half a side."""


def both(path: Path) -> list[str]:
    return [TRAIN, str(path), TEST, str(path)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def registered(name: str) -> dict[str, list[tuple[str, int, list[float]]]]:
    """Return file name -> class name, crowd flag and box of each object."""
    classes = MetadataCatalog.get(name).thing_classes
    return {
        Path(record["file_name"]).name: [
            (classes[a["category_id"]], a["iscrowd"], a["bbox"]) for a in record["annotations"]
        ]
        for record in DatasetCatalog.get(name)
    }


@pytest.mark.parametrize("kind", ["yolo", "voc"])
def test_converted_data_equal_those_in_coco_format(kind: str, bccd: Bccd, tmp_path: Path) -> None:
    """Real images; the box without area is found in each format."""
    cfg = prepare(*both(bccd.train_json)[:2], "DATASETS.CUSTOM.TRAIN_IMAGES", str(bccd.images))
    train = registered("custom_train")
    bccd.write()
    prepare(
        *(TEST, str(bccd.val_json), "DATASETS.CUSTOM.TEST_IMAGES", str(bccd.images)), eval_only=True
    )
    test, results = registered("custom_test"), evaluate(tmp_path / "coco", shift=9)
    if kind == "yolo":
        opts = both(write_yolo(tmp_path / "yolo", bccd.images, train=bccd.train, val=bccd.val))
    else:
        opts = [TRAIN, str(write_voc(tmp_path / "train", bccd.images, bccd.train))]
        opts += [TEST, str(write_voc(tmp_path / "VOCdevkit/VOC2007", bccd.images, bccd.val).parent)]
    before = contents(tmp_path)
    converted = prepare(*opts)
    assert contents(tmp_path) == before
    assert converted.MODEL.RETINANET.NUM_CLASSES == cfg.MODEL.RETINANET.NUM_CLASSES == 3
    for name, expected in (("custom_train", train), ("custom_test", test)):
        found = registered(name)
        assert found.keys() == expected.keys()
        for file, objects in expected.items():
            assert [o[:2] for o in found[file]] == [o[:2] for o in objects]
            np.testing.assert_allclose(
                [o[2] for o in found[file]],
                [o[2] for o in objects],
                rtol=0,
                atol=0 if kind == "voc" else SIX_DECIMALS,
            )
    again = evaluate(tmp_path / kind, shift=9)
    assert 10 < again["AP"] < 90
    assert again == pytest.approx(results, abs=1e-9, nan_ok=True)


def yolo_folder(folder: Path, *, labels: dict[str, str], **config: Any) -> Path:
    """Write eight pictures' worth of a YOLO layout: ``images/train`` and the given labels."""
    for number, name in enumerate(labels):
        image = folder / "images/train" / name
        image.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(image, format="JPEG")
        if labels[name] is not None:
            label = folder / "labels/train" / Path(name).with_suffix(".txt")
            label.parent.mkdir(parents=True, exist_ok=True)
            label.write_text(labels[name])
    config = {"train": "images/train", "val": "images/train", "names": ["zebra", "ant"], **config}
    (folder / "data.yaml").write_text(yaml.safe_dump(config))
    return folder / "data.yaml"


def test_what_a_yolo_layout_may_hold(tmp_path: Path) -> None:
    labels = {
        "a.jpg": "1 .5 .5 .25 .5\n\n0 .1 .1 .2 .1 .2 .25\n",  # a box and a polygon
        "empty.jpg": "",
        "ü猫.JPG": "1.0 0.5 0.5 0.5 0.5",
        "without.jpg": None,
        "below/b.jpg": "0 .5 .5 1 1",
    }
    path = yolo_folder(tmp_path / "mine", labels=labels, names={1: "ant", 0: "zebra"})
    (path.parent / "images/train/notes.txt").write_text("not an image")
    cfg = prepare(*both(path))
    assert MetadataCatalog.get("custom_train").thing_classes == ["zebra", "ant"]
    expected = {
        "a.jpg": [(1, [30, 15, 20, 30]), (0, [8, 6, 8, 9])],
        "b.jpg": [(0, [0, 0, 80, 60])],
        "empty.jpg": [],
        "without.jpg": [],
        "ü猫.JPG": [(1, [20, 15, 40, 30])],
    }
    for name, objects in trained_on():
        assert [label for label, _ in objects] == [label for label, _ in expected[name]]
        np.testing.assert_allclose(
            [box for _, box in objects], [box for _, box in expected[name]], atol=1e-9
        )
    assert [name for name, _ in trained_on()] == [
        *("a.jpg", "empty.jpg", "without.jpg", "ü猫.JPG", "b.jpg"),
    ]
    assert str(path) == cfg.DATASETS.CUSTOM.TRAIN_JSON


@pytest.mark.parametrize("layout", ["list file", "roboflow", "path", "images key", "several"])
def test_where_a_data_yaml_finds_its_images(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "mine"
    labels = {"a.jpg": "0 .5 .5 .5 .5", "b.jpg": "1 .5 .5 .5 .5"}
    keys, opts = {}, []
    if layout == "list file":
        keys = {"train": "train.txt", "val": "train.txt"}
        folder.mkdir()
        (folder / "train.txt").write_text("./images/train/b.jpg\nimages/train/a.jpg\n")
    elif layout == "roboflow":
        keys = {"train": "../images/train", "val": "../images/train", "test": ""}
    elif layout == "path":
        keys = {"path": "mine"}
        monkeypatch.chdir(tmp_path)
    elif layout == "images key":
        keys = {"path": "/content/elsewhere"}
        key = "DATASETS.CUSTOM.{}_IMAGES"
        opts = [key.format("TRAIN"), str(folder), key.format("TEST"), str(folder)]
    else:
        keys = {"train": ["images/train", str(tmp_path / "more")]}
        (tmp_path / "more").mkdir()
        picture(7).save(tmp_path / "more/c.jpg")
        (tmp_path / "more/c.txt").write_text("1 .5 .5 .5 .5")  # beside it: no folder is `images`
    path = yolo_folder(folder, labels=labels, nc=2, **keys)
    prepare(*both(path), *opts)
    names = [name for name, objects in trained_on() if objects]
    assert names == {"list file": ["b.jpg", "a.jpg"], "several": ["a.jpg", "b.jpg", "c.jpg"]}.get(
        layout, ["a.jpg", "b.jpg"]
    )


def test_a_data_yaml_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    yolo_folder(tmp_path, labels={"a.jpg": "0 0.5 0.5 0.2 0.2"})
    monkeypatch.chdir(tmp_path)
    prepare(TRAIN, "data.yaml")
    assert [len(objects) for objects in registered("custom_train").values()] == [1]


def test_labels_are_of_the_upright_image(tmp_path: Path) -> None:
    path = yolo_folder(tmp_path, labels={"a.jpg": "0 .25 .5 .5 .2"})
    image = Image.open(tmp_path / "images/train/a.jpg")
    exif = image.getexif()
    exif[0x0112] = 6  # a quarter turn
    image.save(tmp_path / "images/train/a.jpg", exif=exif)
    prepare(*both(path))
    (record,) = DatasetCatalog.get("custom_train")
    assert (record["width"], record["height"]) == (HEIGHT, WIDTH)
    np.testing.assert_allclose(record["annotations"][0]["bbox"], [0, 32, 30, 16], atol=1e-9)


def test_pose_labels_give_their_boxes(tmp_path: Path) -> None:
    line = "0 .5 .5 .5 .5 .1 .1 2 .9 .9 2"
    prepare(*both(yolo_folder(tmp_path, labels={"a.jpg": line}, kpt_shape=[2, 3])))
    assert trained_on() == [("a.jpg", [(0, [20, 15, 40, 30])])]


def test_test_images_without_any_label_are_not_labelled(tmp_path: Path) -> None:
    path = yolo_folder(tmp_path, labels={"a.jpg": "0 .5 .5 .5 .5"}, val="", test="images/test")
    shutil.copytree(tmp_path / "images/train", tmp_path / "images/test")
    prepare(*both(path))
    assert not MetadataCatalog.get("custom_test").is_labelled
    shutil.rmtree(tmp_path / "labels")
    assert f"{path}: none of the 1 training images has a label file" in refusal(*both(path))


LINE = "labels/train/a.txt, line 2: "


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        ("7 .5 .5 .5 .5", "annotation labels/train/a.txt:2 of image 1 (images/train/a.jpg): categ"),
        ("0 .5 x .5 .5", LINE + "'0 .5 x .5 .5': every field must be a number"),
        ("0 .5 .5", LINE + "'0 .5 .5': a line is 'class cx cy w h', or"),
        ("0 .5 .5 .5 .5 .9", LINE),
        ("0 .5 nan .5 .5", LINE + "'0 .5 nan .5 .5': the class must be a whole number, and all n"),
        ("0.5 .5 .5 .5 .5", LINE),
        ("0 40 30 20 20", LINE + "'0 40 30 20 20': numbers must be fractions of the image's"),
    ],
)
def test_a_faulty_label_is_named_by_file_and_line(
    second: str, expected: str, tmp_path: Path
) -> None:
    path = yolo_folder(tmp_path, labels={"a.jpg": f"0 .5 .5 .5 .5\n{second}\n"})
    assert expected in refusal(*both(path))


def test_all_faulty_labels_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = {f"{name}.jpg": "0 .5 .5 .5 .5\n" + "0 .5\n" * 4 for name in "abc"}
    path = yolo_folder(tmp_path, labels=labels)
    files = ["--output", str(tmp_path / "report.json"), "--report", str(tmp_path / "page.html")]
    argv = ["check-data", "--config-file", "configs/small_R18_FPN.yaml", *files]
    assert main([*argv, *both(path)]) == 1
    text = capsys.readouterr().out
    page = html.unescape((tmp_path / "page.html").read_text())
    assert all(line in page for line in text.splitlines() if not line.startswith("Wrote"))
    content = json.loads((tmp_path / "report.json").read_text())["data_sets"][0]
    assert f"{KINDS['unreadable_label'].what}: 12" in text and "and 2 more" in text
    (found,) = (each for each in content["findings"] if each["kind"] == "unreadable_label")
    named = [re.search(r"labels/train/(\w).txt, line (\d)", i["message"]) for i in found["items"]]
    lines = [match.groups() for match in named if match]
    assert lines == [(name, line) for name in "abc" for line in "2345"]
    assert content["facts"]["boxes"] == 3
    said = refusal(*both(path))
    assert "12 labels that cannot be read: " in said and "check-data lists all" in said


def test_all_faulty_xml_files_are_reported(eight: Eight) -> None:
    path = write_voc(eight.folder / "voc", eight.images, eight.content)
    for number, (old, new) in enumerate((("</annotation>", ""), ("<ymin>", "<ymin>x")), start=1):
        file = path / f"Annotations/a{number}.xml"
        file.write_text(file.read_text().replace(old, new))
    report = check_data(load_config("configs/small_R18_FPN.yaml", both(path)))
    text, content = report.text, report.content["data_sets"][0]
    assert "a1.xml: is not valid XML" in text and "a2.xml: object 1 has xmin, ymin" in text
    assert content["facts"]["images"] == 7 and content["facts"]["boxes"] == 6
    for file in path.glob("Annotations/*.xml"):
        file.write_text("<")
    assert "8 labels that cannot be read" in refusal(*both(path))


def test_a_class_that_is_not_listed_may_be_left_out(tmp_path: Path) -> None:
    path = yolo_folder(tmp_path, labels={"a.jpg": "0 .5 .5 .5 .5\n7 .5 .5 .1 .1\n"})
    prepare(*both(path), "DATASETS.CHECK.UNKNOWN_CLASS", "drop")
    assert trained_on() == [("a.jpg", [(0, [20, 15, 40, 30])])]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"names": None}, "names must be the list of class names, got None"),
        ({"names": ["a", True]}, "name is True; it must be a text"),
        ({"names": {"a": 0}}, "names has 'a', which is no class index"),
        ({"nc": 3}, "nc is 3, but there are 2 names"),
        ({"train": None}, "there is no train"),
        ({"train": "none"}, "is neither a folder nor a .txt file that lists images"),
        ({"train": "labels/train"}, "train: there is no image in labels/train"),
        ({"path": "/nowhere"}, "path is '/nowhere', which is no folder here; set TRAIN_IMAGES"),
    ],
)
def test_a_faulty_data_yaml_is_one_line(
    keys: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    path = yolo_folder(tmp_path, labels={"a.jpg": "0 .5 .5 .5 .5"}, **keys)
    assert expected in refusal(*both(path))
    path.write_text("names: [a, b\ntrain: images")
    assert f"{path}, line 2: not valid YAML" in refusal(*both(path))


def test_boxes_given_by_their_corner_are_noticed(eight: Eight) -> None:
    """As exports do that divide COCO's numbers by the size; the key that is named helps."""
    path = write_yolo(eight.folder / "yolo", eight.images, train=eight.content, val=eight.content)
    for image, annotation in zip(
        eight.content["images"], eight.content["annotations"], strict=True
    ):
        x, y, w, h = annotation["bbox"]
        numbers = f"{x / WIDTH} {y / HEIGHT} {w / WIDTH} {h / HEIGHT}"
        for split in ("train", "val"):
            label = path.parent / f"labels/{split}/{Path(image['file_name']).stem}.txt"
            label.write_text(f"{annotation['category_id'] - 1} {numbers}\n")
    message = refusal(*both(path))
    assert "as relative_cxcywh" in message
    assert "set DATASETS.CUSTOM.BOX_FORMAT relative_xywh" in message
    prepare(*both(path), "DATASETS.CUSTOM.BOX_FORMAT", "relative_xywh")
    assert trained_on()[0][1][0][1] == pytest.approx(eight.content["annotations"][0]["bbox"])


def test_label_files_without_image_are_noted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An image outside the list of a split is an image; a list of classes is no label."""
    labels = dict.fromkeys(["a.jpg", "b.jpg", "c.jpg"], "0 .5 .5 .5 .5")
    path = yolo_folder(tmp_path, labels=labels, train="train.txt")
    (tmp_path / "train.txt").write_text("images/train/a.jpg")
    (tmp_path / "labels/train/classes.txt").write_text("zebra")
    (tmp_path / "images/train/b.jpg").unlink()
    cfg = load_config("configs/quickstart.yaml", both(path))
    for data in check_data(cfg).content["data_sets"]:
        assert data["notes"][-1] == "1 label file has no image: labels/train/b.txt"
    with caplog.at_level("INFO"):
        prepare(*both(path))
    assert any("custom_train: 1 image, 1 box, 0 regions to ignore, 2" in m for m in caplog.messages)
    assert f"{path}: 1 label file has no image: labels/train/b.txt" in caplog.messages


def test_boxes_in_messages_have_three_decimals(tmp_path: Path) -> None:
    lines = "0 .5 .3333333 .3333333 .3333333\n" * 2 + "0 .1 .5 .3333333 .5\n"
    path = yolo_folder(tmp_path, labels={"a.jpg": lines})
    data = check_data(load_config("configs/quickstart.yaml", both(path))).content["data_sets"][0]
    messages = {f["kind"]: f["items"][0]["message"] for f in data["findings"]}
    assert "bbox [-5.333, 15.0, 26.667, 30.0], conv" in messages["clipped_box"]
    assert "bbox [26.667, 10.0, 26.667, 20.0] and [26.667, 10" in messages["duplicate_box"]


def test_difficult_objects_are_regions_to_ignore(eight: Eight) -> None:
    eight.content["annotations"][1]["ignore"] = 1
    path = write_voc(eight.folder / "voc", eight.images, eight.content)
    prepare(*both(path))
    flags = [a["iscrowd"] for r in DatasetCatalog.get("custom_train") for a in r["annotations"]]
    assert flags == [0, 1, 0, 0, 0, 0, 0, 0]


def test_image_sets_split_a_voc_folder_and_its_classes_are_shared(eight: Eight) -> None:
    path = write_voc(eight.folder / "voc", eight.images, eight.content)
    (path / "ImageSets/Main").mkdir(parents=True)
    (path / "ImageSets/Main/train.txt").write_text("a1\na2\na3\n")
    (path / "ImageSets/Main/val.txt").write_text("a4\na6\n")  # no dog
    for named in (path / "Annotations", path):
        prepare(*both(named))
        assert [name for name, _ in trained_on()] == ["a1.jpg", "a2.jpg", "a3.jpg"]
    assert [name for name, _ in trained_on("custom_test")] == ["a4.jpg", "a6.jpg"]
    assert MetadataCatalog.get("custom_test").thing_classes == ["cat", "dog"]
    (path / "ImageSets/Main/train.txt").write_text("a1\na9\n")
    assert "a9.xml, which" in refusal(*both(path))
    (path / "ImageSets/Main/train.txt").unlink()
    assert "ImageSets/Main has no train.txt or trainval.txt" in refusal(*both(path))


def test_what_a_voc_folder_may_lack(eight: Eight) -> None:
    """No size, a size of 0, another file name in the XML, and images beside the annotations."""
    path = write_voc(eight.folder / "voc", eight.images, eight.content)
    flat = eight.folder / "flat"
    flat.mkdir()
    for file in sorted(path.glob("*/*")):
        file.rename(flat / file.name)
    first, second, third = (flat / f"a{n}.xml" for n in (1, 2, 3))
    first.write_text(first.read_text().replace(f"<width>{WIDTH}</width>", ""))
    second.write_text(second.read_text().replace(f"<width>{WIDTH}<", "<width>0<"))
    third.write_text(third.read_text().replace("a3.jpg", "before_renaming.jpg"))
    prepare(*both(flat))
    assert [(name, box) for name, [(_, box)] in trained_on()] == [
        (image["file_name"], annotation["bbox"])
        for image, annotation in zip(
            eight.content["images"], eight.content["annotations"], strict=True
        )
    ]


def test_a_voc_folder_uses_its_own_annotations(eight: Eight) -> None:
    """And not those of a folder in it, such as an earlier state of them."""
    path = write_voc(eight.folder / "voc", eight.images, eight.content)
    shutil.copytree(path / "Annotations", path / "backup/Annotations")
    (path / "backup/Annotations/a1.xml").unlink()
    prepare(*both(path))
    assert len(registered("custom_train")) == len(eight.content["images"])


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("</annotation>", "", "a1.xml: is not valid XML: no element found"),
        ("<xmin>3</xmin>", "<xmin>x</xmin>", "a1.xml: object 1 has xmin, ymin, xmax and ymax x,"),
        ("<ymax>", "<ymax>1e999", "which must be finite numbers"),
        ("<name>dog</name>", "", "a1.xml: object 1 has no name"),
        ("<width>80</width>", "<width>81</width>", "80 x 60 pixels when upright, not 81 x 60"),
        ("a1.jpg", "a1.jpg", "a1.jpg (image id 1) is missing"),
    ],
)
def test_a_faulty_xml_is_named(old: str, new: str, expected: str, eight: Eight) -> None:
    path = write_voc(eight.folder / "voc", eight.images, eight.content)
    file = path / "Annotations/a1.xml"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    if old == new:
        (path / "JPEGImages/a1.jpg").unlink()
    assert expected in refusal(*both(path))


def test_a_faulty_xml_of_the_test_set_is_none_of_the_training_set(eight: Eight) -> None:
    train, test = (
        write_voc(eight.folder / name, eight.images, eight.content) for name in ("train", "test")
    )
    (test / "Annotations/a1.xml").write_text("<annotation>")
    faults = [
        read_voc(str(own), str(own / "JPEGImages"), split, related=[str(other)]).faults
        for own, other, split in ((train, test, "TRAIN"), (test, train, "TEST"))
    ]
    assert [len(each) for each in faults] == [0, 1]


def test_formats_may_be_mixed_in_a_list(eight: Eight, tmp_path: Path) -> None:
    other = Eight(tmp_path / "other", "b{}.jpg", seed=1)
    voc = write_voc(tmp_path / "voc", other.images, other.content)
    opts = eight.opts()
    cfg = load_config("configs/quickstart.yaml", [TRAIN, f"[{opts[1]}, {voc}]"])
    cfg.DATASETS.CUSTOM.TRAIN_IMAGES = [opts[3], str(voc / "JPEGImages")]
    report = check_data(cfg).content["data_sets"][0]
    assert report["facts"]["images"] == 16 and report["findings"] == []
    assert [row["boxes"] for row in report["facts"]["classes"].values()] == [8, 8]


def test_checksum_changes_with_a_label(tmp_path: Path) -> None:
    path = yolo_folder(tmp_path, labels={"a.jpg": "0 .5 .5 .5 .5"})

    def checksum() -> list[str]:
        return list(find_custom(config(*both(path)), "TRAIN").digests().values())

    before = checksum()
    assert before == checksum()
    (tmp_path / "labels/train/a.txt").write_text("0 .5 .5 .5 .4")
    assert checksum() != before


def test_a_run_on_yolo_labels_is_evaluated_again_from_its_folder(
    bccd: Bccd, tmp_path: Path
) -> None:
    path = write_yolo(tmp_path / "yolo", bccd.images, train=bccd.train, val=bccd.val)
    before, run = contents(path.parent), tmp_path / "run"
    keys = ["DATASETS.CUSTOM.TRAIN_IMAGES", "", "DATASETS.CUSTOM.TEST_IMAGES", ""]
    keys += [*both(path), "MODEL.DEVICE", "cpu", "SOLVER.MAX_ITER", 1, "OUTPUT_DIR", run]
    keys += ["TEST.DETECTION_GRID.NUM_IMAGES", 0]
    assert run_train_net("--config-file", "tests/engine/tiny.yaml", *keys) == 0
    assert contents(path.parent) == before
    assert str(path) == load_config(run / "config.yaml").DATASETS.CUSTOM.TRAIN_JSON
    for name, given in (("train", bccd.train), ("test", bccd.val)):
        written = json.loads((run / f"custom_{name}.json").read_text())
        assert len(written["images"]) == len(given["images"])
        boxes = [a["bbox"] for a in given["annotations"] if a["bbox"][2]]
        assert sorted(a["bbox"] for a in written["annotations"]) == [
            pytest.approx(box, abs=1e-3 + SIX_DECIMALS) for box in sorted(boxes)
        ]
    argv = ["--config-file", run / "config.yaml", "--eval-only", "--resume"]
    assert run_train_net(*argv, "OUTPUT_DIR", run) == 0
    files = [run / "run_info.json", *run.glob("eval-*/run_info.json")]
    (trained,), (evaluated,) = (json.loads(file.read_text()) for file in files)
    assert len(trained["data"]["custom_train"]["sha256"][0]) == 64
    # The same data at another time.
    assert trained["data"]["custom_test"] == evaluated["data"]["custom_test"]
