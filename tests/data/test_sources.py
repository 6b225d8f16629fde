"""Several files, a choice of classes, and jsons without what others have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances

from retinanet_ext.data import prepare_datasets
from retinanet_ext.data.validation_report import check_data
from retinanet_ext.engine import load_config
from retinanet_ext.errors import InputError

from .eight_images import ALL, BOXES, SMALL, Eight, config, perfect_ap, prepare, small, trained_on

CUSTOM = "DATASETS.CUSTOM."


@pytest.fixture
def other(tmp_path: Path) -> Eight:
    """Its image and annotation ids are those of the first, its class ids have other names."""
    other = Eight(tmp_path / "other", "b{}.jpg", seed=1)
    other.content["categories"] = [{"id": 2, "name": "cow"}, {"id": 1, "name": "dog"}]
    return other


OF_OTHER = [(f"b{n}.jpg", [(1 + n % 2, box)]) for n, box in enumerate(BOXES, start=1)]
"""What is trained on of the other: dog is class 1, cow class 2."""


def lists(*parts: Eight, split: str = "TRAIN") -> list[Any]:
    for part in parts:
        part.write()
    return [
        *(f"{CUSTOM}{split}_JSON", [str(part.json) for part in parts]),
        *(f"{CUSTOM}{split}_IMAGES", [str(part.images) for part in parts]),
    ]


def use(*opts: Any, eval_only: bool = False) -> CfgNode:
    """Prepare data whose keys are set by hand, lists among them."""
    cfg = config()
    for key, value in zip(opts[::2], opts[1::2], strict=True):
        group, _, name = key.removeprefix("DATASETS.").partition(".")
        cfg.DATASETS[group][name] = value
    prepare_datasets(cfg, eval_only=eval_only)
    return cfg


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_json_with_a_byte_order_mark(encoding: str, eight: Eight, tmp_path: Path) -> None:
    """As Windows' tools write it; the evaluation, whose reader refuses it, gets a copy."""
    eight.content["categories"][0]["name"] = "猫"
    opts = [*eight.opts(), *eight.opts("TEST")]
    eight.write(encoding)
    cfg = prepare(*opts)
    assert cfg.MODEL.RETINANET.NUM_CLASSES == 2
    assert MetadataCatalog.get("custom_train").thing_classes == ["猫", "dog"]
    assert trained_on() == ALL
    assert perfect_ap(tmp_path / "out") == pytest.approx(100)


def test_files_are_merged_by_class_name(
    eight: Eight, other: Eight, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    before = str(eight.content), str(other.content)
    cfg = use(*lists(eight, other), *lists(eight, other, split="TEST"))
    assert cfg.MODEL.RETINANET.NUM_CLASSES == 3
    assert MetadataCatalog.get("custom_train").thing_classes == ["cat", "dog", "cow"]
    assert trained_on() == trained_on("custom_test") == ALL + OF_OTHER
    ids = [record["image_id"] for record in DatasetCatalog.get("custom_train")]
    assert len(set(ids)) == 16
    assert (
        f"{eight.json}, {other.json}: the classes of 2 files are united (cat, dog, cow); what a "
        "file does not list is background in its images"
    ) in log.messages
    assert perfect_ap(tmp_path / "out") == pytest.approx(100)
    assert before == (str(eight.content), str(other.content))


def test_one_folder_for_all_files(eight: Eight, tmp_path: Path) -> None:
    second = Eight(tmp_path / "second")
    second.content["images"] = second.content["images"][4:]
    second.content["annotations"] = second.content["annotations"][4:]
    eight.content["images"] = eight.content["images"][:4]
    eight.content["annotations"] = eight.content["annotations"][:4]
    opts = lists(eight, second)
    opts[-1] = str(eight.images)
    use(*opts)
    assert trained_on() == ALL


def test_lists_that_cannot_be_used_are_refused(eight: Eight) -> None:
    expected = r"TRAIN_JSON has 1 entries and .*TRAIN_IMAGES 2; give a folder for"
    with pytest.raises(InputError, match=expected):
        use(f"{CUSTOM}TRAIN_JSON", str(eight.json), f"{CUSTOM}TRAIN_IMAGES", ["a", "b"])
    with pytest.raises(InputError, match=r"CUSTOM\.TRAIN_JSON takes texts that are not empty"):
        use(f"{CUSTOM}TRAIN_JSON", ["a.json", 7], f"{CUSTOM}TRAIN_IMAGES", "images")


def test_faults_name_their_file(eight: Eight, other: Eight) -> None:
    other.content["annotations"][2]["bbox"] = [1, 2, 3]
    other.content["images"][0]["file_name"] = "none.jpg"
    opts = lists(eight, other)
    with pytest.raises(InputError) as error:
        use(*opts)
    missing = f"{other.images}/none.jpg (image id 1) is missing"
    assert str(error.value).startswith(f"{eight.json}, {other.json}: {other.json}: {missing}")
    text = check_data(small(*opts)).text
    assert f"{other.json}: {missing}" in text
    assert f"{other.json}: annotation 3 of image 3 (b3.jpg): bbox is [1, 2, 3]" in text


@pytest.mark.parametrize("policy", ["refuse", "merge", "keep"])
def test_image_in_two_files(policy: str, eight: Eight, other: Eight) -> None:
    """Two rounds of annotation of one folder: a class in each."""
    other.images = eight.images
    other.rename(lambda name: name.replace("b", "a"))
    opts = [*lists(eight, other), "DATASETS.CHECK.DUPLICATE_FILE", policy]
    if policy == "refuse":
        where = f"{eight.json} \\(image id 1\\), {other.json} \\(image id 1\\)"
        with pytest.raises(InputError, match=f"a1.jpg is listed in {where}.*DUPLICATE_FILE merge"):
            use(*opts)
        return
    use(*opts)
    merged = [(name, a + b) for (name, a), (_, b) in zip(ALL, OF_OTHER, strict=True)]
    kept = ALL + [(name, boxes) for (name, _), (_, boxes) in zip(ALL, OF_OTHER, strict=True)]
    assert trained_on() == (merged if policy == "merge" else kept)


def test_class_that_has_boxes_in_one_file_is_used(
    eight: Eight, other: Eight, log: pytest.LogCaptureFixture
) -> None:
    other.content["categories"].append({"id": 3, "name": "cat"})
    use(*lists(eight, other))
    assert not any("classes without a box" in line for line in log.messages)
    for annotation in eight.content["annotations"]:
        annotation["category_id"] = 2
    use(*lists(eight, other))
    assert any("class cat (category 1) has no box" in line for line in log.messages)


def boxes_of(name: str, split: str = "custom_train") -> list[str]:
    label = MetadataCatalog.get(split).thing_classes.index(name)
    return [file for file, boxes in trained_on(split) if any(box[0] == label for box in boxes)]


@pytest.mark.parametrize("chosen", [["dog"], ["dog", "cat"], ["cat", "dog"]])
def test_chosen_classes_alone_are_trained_in_their_order(
    chosen: list[str], eight: Eight, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    eight.content["categories"][0]["id"] = 70
    eight.content["annotations"][0]["bbox"] = [1, 2, 3]  # of a dog
    for annotation in eight.content["annotations"]:
        annotation["category_id"] = {1: 70, 2: 2}[annotation["category_id"]]
    opts = [*eight.opts(), *eight.opts("TEST"), "DATASETS.CHECK.MALFORMED_BOX", "drop"]
    node = use(*opts, f"{CUSTOM}CLASSES", chosen).MODEL.RETINANET
    assert node["NUM_CLASSES"] == len(chosen)
    for split in ("custom_train", "custom_test"):
        assert MetadataCatalog.get(split).thing_classes == chosen
        assert boxes_of("dog", split) == ["a3.jpg", "a5.jpg", "a7.jpg"]
        if "cat" in chosen:
            assert boxes_of("cat", split) == ["a2.jpg", "a4.jpg", "a6.jpg", "a8.jpg"]
    left_out = (
        f"{eight.json}: DATASETS.CUSTOM.CLASSES leaves out the boxes of other classes, which "
        "become background: cat 4"
    )
    assert (left_out in log.messages) == (chosen == ["dog"])
    assert perfect_ap(tmp_path / "out") == pytest.approx(100)


def test_chosen_classes_of_several_files(eight: Eight, other: Eight) -> None:
    use(*lists(eight, other), f"{CUSTOM}CLASSES", ["cow", "dog"])
    assert MetadataCatalog.get("custom_train").thing_classes == ["cow", "dog"]
    assert len(trained_on()) == 16 and len(boxes_of("cow")) == 4 and len(boxes_of("dog")) == 8


def test_class_lists_in_another_order_agree_by_choice(eight: Eight, tmp_path: Path) -> None:
    test = Eight(tmp_path / "test", seed=1)
    test.content["categories"][0]["name"], test.content["categories"][1]["name"] = "dog", "cat"
    opts = [*eight.opts(), *test.opts("TEST")]
    with pytest.raises(InputError, match="must have the same classes in the same order"):
        use(*opts)
    use(*opts, f"{CUSTOM}CLASSES", ["cat", "dog"])
    assert MetadataCatalog.get("custom_test").thing_classes == ["cat", "dog"]
    assert boxes_of("cat") == [n.replace("b", "a") for n in boxes_of("dog", "custom_test")]


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (["dgo"], r"names 'dgo', which is no class of .*; did you mean 'dog'\? \(classes: cat, do"),
        (["zebra"], r"names 'zebra', which is no class of [^;]* \(classes: cat, dog\)"),
        (["dog", "dog"], "names 'dog' twice"),
    ],
)
def test_classes_that_cannot_be_chosen(chosen: list[Any], expected: str, eight: Eight) -> None:
    with pytest.raises(InputError, match=rf"DATASETS\.CUSTOM\.CLASSES {expected}"):
        use(*eight.opts(), f"{CUSTOM}CLASSES", chosen)


def test_test_images_without_annotations(
    eight: Eight, other: Eight, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    """As COCO's image_info_test-dev2017.json: detections are written, AP is not computed."""
    other.content["categories"] = eight.content["categories"]
    del other.content["annotations"]
    cfg = use(*eight.opts(), *other.opts("TEST"))
    assert cfg.MODEL.RETINANET.NUM_CLASSES == 2
    assert trained_on("custom_test") == [(name, []) for name, _ in OF_OTHER]
    said = {line for line in log.messages if str(other.json) in line}
    assert any(
        line.endswith("annotations: detections are written, AP is not computed") for line in said
    )
    assert len(said) == 2  # and the one that counts images
    evaluator = COCOEvaluator("custom_test", output_dir=str(tmp_path / "out"))
    evaluator.reset()
    for record in DatasetCatalog.get("custom_test"):
        found = Instances(
            (record["height"], record["width"]),
            pred_boxes=Boxes(torch.tensor([[1.0, 2, 3, 4]])),
            scores=torch.ones(1),
            pred_classes=torch.ones(1).long(),
        )
        evaluator.process([record], [{"instances": found}])
    assert evaluator.evaluate() == {}
    written = json.loads((tmp_path / "out/coco_instances_results.json").read_text())
    assert len(written) == 8 and {found["category_id"] for found in written} == {2}
    with pytest.raises(InputError, match="no list of annotations"):
        use(*other.opts())
    use(
        *lists(other, other, split="TEST"), "DATASETS.CHECK.DUPLICATE_FILE", "merge", eval_only=True
    )
    assert trained_on("custom_test") == [(name, []) for name, _ in OF_OTHER]
    both = lists(eight, other, split="TEST")
    with pytest.raises(InputError, match=f"{other.json} has no list of .*, but {eight.json} has"):
        use(*both, eval_only=True)


@pytest.mark.parametrize("quoted", [True, False])
@pytest.mark.parametrize("place", ["command line", "file"])
def test_lists_are_read_from_files_and_command_lines(
    place: str, quoted: bool, eight: Eight, other: Eight, tmp_path: Path
) -> None:
    files = [str(eight.write().json), str(other.write().json)]
    text = str(files) if quoted else f"[{', '.join(files)}]"
    config_file, opts = SMALL, [f"{CUSTOM}TRAIN_JSON", text]
    if place == "file":
        config_file, opts = tmp_path / "config.yaml", []
        config_file.write_text(f"_BASE_: {SMALL}\nDATASETS: {{CUSTOM: {{TRAIN_JSON: {text}}}}}\n")
    cfg = load_config(str(config_file), opts)
    custom = dict(cfg.DATASETS.CUSTOM)
    assert custom["TRAIN_JSON"] == files
    # A saved config is read again, by yacs itself too, and the command line has the last word.
    saved = tmp_path / "saved.yaml"
    saved.write_text(cfg.dump())
    again = load_config(str(saved), [f"{CUSTOM}TRAIN_JSON", files[0], f"{CUSTOM}CLASSES", "[dog]"])
    custom = again.DATASETS.CUSTOM
    assert custom["TRAIN_JSON"] == files[0] and custom["CLASSES"] == ["dog"]
    again.merge_from_list([f"{CUSTOM}TRAIN_JSON", files[1]])
    assert custom["TRAIN_JSON"] == files[1]


def test_what_is_merged_is_checked_again(eight: Eight, tmp_path: Path) -> None:
    """Boxes that two files have of one image, and an image that is empty in one of them."""
    twin = Eight(tmp_path / "twin")
    twin.content["annotations"] = twin.content["annotations"][:7]
    merged = [*lists(eight, twin), f"{CUSTOM}TRAIN_IMAGES", [str(eight.images)] * 2]
    choices = ["DATASETS.CHECK.DUPLICATE_FILE", "merge", "DATASETS.CHECK.DUPLICATE_BOX", "drop"]
    use(*merged, *choices, "DATASETS.CHECK.EMPTY_IMAGE", "refuse")
    assert trained_on() == ALL
