from __future__ import annotations

import atexit
import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.datasets import register_coco_instances
from detectron2.modeling import build_model

from retinanet_ext.data import SampleSet, prepare_datasets
from retinanet_ext.data.register import registered_classes
from retinanet_ext.engine import load_config
from retinanet_ext.errors import InputError

from .conftest import Bccd


def prepare(cfg: CfgNode, *, eval_only: bool = False) -> CfgNode:
    prepare_datasets(cfg, eval_only=eval_only)
    return cfg


def test_custom_data_are_registered_and_counted(
    bccd: Bccd, cfg: CfgNode, log: pytest.LogCaptureFixture
) -> None:
    prepare(bccd.use(cfg))
    assert cfg.DATASETS.TRAIN == ("custom_train",)
    assert cfg.DATASETS.TEST == ("custom_test",)
    assert cfg.MODEL.RETINANET.NUM_CLASSES == 3
    metadata = MetadataCatalog.get("custom_train")
    assert metadata.thing_classes == ["RBC", "WBC", "Platelets"]
    assert metadata.thing_dataset_id_to_contiguous_id == {1: 0, 2: 1, 3: 2}
    assert metadata.json_file == str(bccd.train_json)  # complete, so no copy
    assert len(get_detection_dataset_dicts(["custom_train", "custom_test"])) == 5
    train = (
        "custom_train: 3 images, 35 boxes, 0 regions to ignore, 3 classes "
        f"(RBC 27, WBC 3, Platelets 5) from {bccd.train_json}"
    )
    assert train in log.messages
    assert (
        f"{bccd.train_json}: boxes without area, left out: 1: annotation 2288 of image 171 "
        "(BloodImage_00343.jpg): bbox [181.0, 329.0, 0.0, 0.0] has no area"
    ) in log.messages


def test_category_ids_with_gaps_become_contiguous(
    bccd: Bccd, cfg: CfgNode, log: pytest.LogCaptureFixture
) -> None:
    new_ids = {1: 7, 2: 0, 3: 90}
    for content in (bccd.train, bccd.val):
        for category in content["categories"]:
            category["id"] = new_ids[category["id"]]
        for annotation in content["annotations"]:
            annotation["category_id"] = new_ids[annotation["category_id"]]
    prepare(bccd.use(cfg))
    assert MetadataCatalog.get("custom_test").thing_classes == ["WBC", "RBC", "Platelets"]
    labels = [a["category_id"] for d in DatasetCatalog.get("custom_test") for a in d["annotations"]]
    assert [labels.count(label) for label in range(3)] == [2, 13, 3]
    assert "custom_test: category ids 0, 7, 90 stand for classes 0..2" in log.messages


@pytest.mark.parametrize(("filter_empty", "what"), [(True, "left out"), (False, "background")])
def test_images_without_objects_are_counted(
    filter_empty: bool, what: str, bccd: Bccd, cfg: CfgNode, log: pytest.LogCaptureFixture
) -> None:
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = filter_empty
    bccd.train["annotations"] = [a for a in bccd.train["annotations"] if a["image_id"] != 80]
    prepare(bccd.use(cfg))
    message = next(m for m in log.messages if "images without boxes" in m)
    assert message.endswith(": 1: image 80 (BloodImage_00164.jpg) has no box")
    assert what in message
    used = get_detection_dataset_dicts(["custom_train"], filter_empty=filter_empty)
    assert len(used) == 3 - filter_empty


@pytest.mark.parametrize("split", ["TRAIN", "TEST"])
def test_what_the_policy_drops_is_in_neither_records_nor_evaluation(
    split: str, bccd: Bccd, cfg: CfgNode, log: pytest.LogCaptureFixture
) -> None:
    content = bccd.train if split == "TRAIN" else bccd.val
    image, annotation = content["images"][0], content["annotations"][-1]
    (bccd.images / image["file_name"]).unlink()
    annotation["bbox"][0] = float("nan")
    cfg.DATASETS.CHECK.MISSING_IMAGE = "drop"
    cfg.DATASETS.CHECK.MALFORMED_BOX = "drop"
    prepare(bccd.use(cfg))
    name = f"custom_{split.lower()}"
    records = DatasetCatalog.get(name)
    assert {record["image_id"] for record in records} == {i["id"] for i in content["images"][1:]}
    boxes = [a["bbox"] for record in records for a in record["annotations"]]
    assert boxes and np.isfinite(boxes).all()
    warned = [r.getMessage() for r in log.records if r.levelname == "WARNING"]
    assert any("missing image files, left out: 1: " in message for message in warned)
    assert any("not four finite numbers, left out: 1: " in message for message in warned)
    metadata = MetadataCatalog.get(name)
    if split == "TEST":
        evaluated = json.loads(Path(metadata.json_file).read_text())
        assert [a["bbox"] for a in evaluated["annotations"]] == boxes
        assert len(evaluated["images"]) == len(records)
    else:  # nothing reads it
        assert metadata.json_file == str(bccd.train_json)


def test_every_reader_gets_its_own_copy(bccd: Bccd, cfg: CfgNode) -> None:
    prepare(bccd.use(cfg))
    first, second = DatasetCatalog.get("custom_train"), DatasetCatalog.get("custom_train")
    first[0]["annotations"].clear()
    assert second[0]["annotations"] and DatasetCatalog.get("custom_train") == second


@pytest.mark.parametrize(("split", "given"), [("TRAIN", "JSON"), ("TEST", "IMAGES")])
def test_half_of_the_custom_keys_is_refused(
    split: str, given: str, bccd: Bccd, cfg: CfgNode
) -> None:
    bccd.use(cfg)
    other = {"JSON": "IMAGES", "IMAGES": "JSON"}[given]
    cfg.DATASETS.CUSTOM[f"{split}_{other}"] = ""
    expected = rf"CUSTOM\.{split}_{given} is .*, but DATASETS\.CUSTOM\.{split}_{other} is empty"
    with pytest.raises(InputError, match=expected):
        prepare(cfg)


@pytest.mark.parametrize(("eval_only", "key"), [(False, "TRAIN"), (True, "TEST")])
def test_no_data_at_all_is_refused(eval_only: bool, key: str, cfg: CfgNode) -> None:
    with pytest.raises(InputError, match=rf"DATASETS\.{key} is empty.*CUSTOM\.{key}_JSON"):
        prepare(cfg, eval_only=eval_only)


def test_unknown_name_is_refused(cfg: CfgNode) -> None:
    cfg.DATASETS.TRAIN = ("coco_2017_trian",)
    with pytest.raises(InputError, match=r"TRAIN names 'coco_2017_trian'.*'coco_2017_train'"):
        prepare(cfg)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (lambda names: names[::-1], "class 0 is 'RBC' in custom_train .* 'Platelets' in"),
        (lambda names: names[:2], "class 2 is 'Platelets' in custom_train .*'missing' in"),
    ],
)
def test_class_lists_that_differ_are_refused(
    change: Any, difference: str, bccd: Bccd, cfg: CfgNode
) -> None:
    names = change([category["name"] for category in bccd.val["categories"]])
    bccd.val["categories"] = [{"id": i, "name": name} for i, name in enumerate(names, start=1)]
    bccd.val["annotations"] = [a for a in bccd.val["annotations"] if a["category_id"] == 1]
    with pytest.raises(InputError, match=difference):
        prepare(bccd.use(cfg))


def test_number_of_classes_set_by_hand_must_agree(bccd: Bccd, cfg: CfgNode) -> None:
    cfg.MODEL.RETINANET.NUM_CLASSES = 20
    with pytest.raises(InputError, match=r"NUM_CLASSES is 20, but .*3 classes \(RBC, WBC, Plat"):
        prepare(bccd.use(cfg))
    cfg.MODEL.RETINANET.NUM_CLASSES = 3
    prepare(cfg)


def test_missing_files_of_a_registered_set_are_named(cfg: CfgNode) -> None:
    register_coco_instances(
        "absent_train", {"thing_classes": ["a", "b"]}, "absent/train.json", "absent/images"
    )
    cfg.DATASETS.TRAIN = ("absent_train",)
    with pytest.raises(InputError, match=r"absent/train\.json.*absent_train.*DETECTRON2_DATASETS"):
        prepare(cfg)


def test_classes_of_a_registered_set_are_counted(cfg: CfgNode) -> None:
    def load() -> list[dict[str, Any]]:
        raise AssertionError("the data of another loader are not read in advance")

    DatasetCatalog.register("by_code", load)
    MetadataCatalog.get("by_code").set(thing_classes=["a", "b"], json_file="https://host/a.json")
    cfg.DATASETS.TRAIN = ("by_code",)
    assert prepare(cfg).MODEL.RETINANET.NUM_CLASSES == 2


def test_sample_set_is_registered(
    datasets_root: Path, cfg: CfgNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(datasets_root))
    cfg.DATASETS.TRAIN = ("retinanet_ext_sample_train",)
    cfg.DATASETS.TEST = ("retinanet_ext_sample_val",)
    prepare(cfg)
    assert cfg.MODEL.RETINANET.NUM_CLASSES == 5
    assert len(DatasetCatalog.get("retinanet_ext_sample_train")) == SampleSet().num_train
    assert len(DatasetCatalog.get("retinanet_ext_sample_val")) == SampleSet().num_val


def test_classes_of_other_codes_data_are_known_once_they_are_read(bccd: Bccd, cfg: CfgNode) -> None:
    bccd.write()
    register_coco_instances("read_later", {}, str(bccd.val_json), str(bccd.images))
    cfg.DATASETS.TEST = ("read_later",)
    assert registered_classes(cfg, "TRAIN", read=True) == []
    assert registered_classes(cfg, "TEST") == []
    assert registered_classes(cfg, "TEST", read=True) == ["RBC", "WBC", "Platelets"]


def strip(bccd: Bccd) -> None:
    for number, annotation in enumerate(bccd.val["annotations"]):
        del annotation["iscrowd"], annotation["area"]
        annotation["id"] = number  # from 0


def test_completed_json_goes_with_its_process(bccd: Bccd, cfg: CfgNode) -> None:
    strip(bccd)
    with patch.object(atexit, "register") as at_exit:
        prepare(bccd.use(cfg), eval_only=True)
    path = Path(MetadataCatalog.get("custom_test").json_file)
    assert path != bccd.val_json
    assert len(path.read_text()) > len(json.dumps(bccd.val))
    (call,) = at_exit.call_args_list
    function, *arguments = call.args
    function(*arguments, **call.kwargs)
    assert not path.parent.exists()


ALPHA = "MODEL.RETINANET.CLS_LOSS.CLASS_ALPHA"


def test_names_in_class_alpha_become_numbers_that_are_read_without_the_data(
    bccd: Bccd, cfg: CfgNode, tmp_path: Path
) -> None:
    cfg.merge_from_file("configs/small_R18_FPN.yaml", allow_unsafe=False)
    cfg.merge_from_list([ALPHA, [["Platelets", 0.75]], "MODEL.DEVICE", "cpu"])
    prepare(bccd.use(cfg))
    assert cfg.MODEL.RETINANET.CLS_LOSS.CLASS_ALPHA == [0.25, 0.25, 0.75]
    prepare(cfg)  # numbers stay
    (tmp_path / "config.yaml").write_text(cfg.dump())
    for name in ("custom_train", "custom_test"):
        DatasetCatalog.pop(name)
        MetadataCatalog.pop(name)
    model = build_model(load_config(tmp_path / "config.yaml"))
    assert model.criterion.alpha_weights[0].tolist() == [0.25, 0.25, 0.75]


@pytest.mark.parametrize(
    ("alpha", "said"),
    [
        ([["Platelet", 0.5]], "Platelet.*classes: RBC, WBC, Platelets"),
        ([["WBC", 3.0]], r"CLASS_ALPHA\['WBC'\] must be a number in \[0, 1\], got 3.0"),
        ([0.1, 0.2], "2 values for 3 classes: RBC, WBC, Platelets"),
        ([0.1, ["WBC", 0.2]], "pairs of a class name and a number, got 0.1"),
    ],
)
def test_class_alpha_that_does_not_fit_the_classes(
    alpha: list[Any], said: str, bccd: Bccd, cfg: CfgNode
) -> None:
    cfg.MODEL.RETINANET.CLS_LOSS.CLASS_ALPHA = alpha
    with pytest.raises(InputError, match=said):
        prepare(bccd.use(cfg))


def test_class_alpha_needs_every_name_where_the_loss_has_no_alpha(bccd: Bccd, cfg: CfgNode) -> None:
    cfg.merge_from_list(["MODEL.RETINANET.CLS_LOSS.NAME", "cross_entropy", ALPHA, [["WBC", 0.5]]])
    with pytest.raises(InputError, match=r"leaves out RBC, Platelets, and .*ALPHA is -1"):
        prepare(bccd.use(cfg))
