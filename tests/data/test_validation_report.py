"""The report and its command, on real data with faults."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, get_detection_dataset_dicts
from detectron2.modeling import build_model

from retinanet_ext.cli import main
from retinanet_ext.data import CheckedDatasetMapper, prepare_datasets
from retinanet_ext.data.anchor_coverage import (
    build_grid,
    measure_coverage,
    training_boxes,
    warn_of_unreached_boxes,
)
from retinanet_ext.data.findings import config_defaults
from retinanet_ext.data.validation_report import check_data
from retinanet_ext.errors import InputError

from .conftest import Bccd
from .eight_images import SMALL, small

TINY_ANCHORS = ("MODEL.ANCHOR_GENERATOR.BASE_SCALE", "0.5")


def run(*arguments: str) -> tuple[int, str, str]:
    """Run the command in this process and return its exit code, output and errors."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["check-data", "--config-file", str(SMALL), *arguments])
    return code, out.getvalue(), err.getvalue()


def test_command_ends_with_what_training_would_do(bccd: Bccd, tmp_path: Path) -> None:
    bccd.write()
    keys = [
        *("DATASETS.CUSTOM.TRAIN_JSON", str(bccd.train_json)),
        *("DATASETS.CUSTOM.TRAIN_IMAGES", str(bccd.images)),
    ]
    output = tmp_path / "new" / "report.json"
    code, text, _ = run("--output", str(output), *keys)
    assert code == 0
    assert text.endswith(f"left out: 1, kept: 0.\n\nWrote {output}\n")
    assert "annotation 2288 of image 171 (BloodImage_00343.jpg)" in text
    assert json.loads(output.read_text())["refused"] is False
    before = output.read_bytes()

    bccd.train["annotations"][0]["bbox"][2] *= -1
    bccd.write()
    code, _, errors = run("--output", str(output), *keys)
    assert code == 2 and errors.startswith(f"retinanet-ext check-data: error: {output} exists")
    assert output.read_bytes() == before
    nowhere = str(output / "page.html")
    code, text, errors = run("--report", nowhere, *keys)
    assert code == 2 and not text and f"folder {output} cannot be made" in errors
    code, text, errors = run(*keys)
    assert code == 1 and not errors
    assert "REFUSED  boxes of negative width or height: 1" in text
    assert text.endswith("refused: 1; DATASETS.CHECK.INVERTED_BOX drop leaves it out.\n")
    assert run(*keys, "DATASETS.CHECK.INVERTED_BOX", "drop")[0] == 0


def test_class_names_of_any_text_are_printed(bccd: Bccd) -> None:
    bccd.train["categories"][0]["name"] = "R\ud800BC"  # valid JSON, and no Unicode
    bccd.train["categories"][1]["name"] = "W\nB\x1bC"
    report = check_data(bccd.use(small()))
    text = report.text.encode().decode()
    assert "categories[0] (id 1): name is 'R\\ud800BC'; it must be a text of valid Uni" in text
    assert text.count("\nW\\nB\\x1bC ") == 2  # a row of each table
    assert report.exit_code == 1


@pytest.mark.parametrize("case", ["no data", "no json", "no folder", "policy"])
def test_what_cannot_be_checked_is_one_line(case: str, bccd: Bccd) -> None:
    cfg = bccd.use(small())
    if case == "no data":
        cfg = small()
    elif case == "no json":
        bccd.train_json.unlink()
    elif case == "no folder":
        shutil.rmtree(bccd.images)
    else:
        cfg.DATASETS.CHECK.CROWD = "ignore"
    with pytest.raises(InputError) as error:
        check_data(cfg)
    assert len(str(error.value).splitlines()) == 1


def test_report_counts_what_is_used(bccd: Bccd) -> None:
    bccd.train["annotations"][0]["ignore"] = 1
    (bccd.images / "BloodImage_00254.jpg").unlink()
    report = check_data(bccd.use(small("DATASETS.CHECK.MISSING_IMAGE", "drop")))
    train, test = report.content["data_sets"]
    facts = train["facts"]
    left = [a for a in bccd.train["annotations"] if a["image_id"] in (80, 171)]
    assert facts["images"] == 2 and facts["image_sizes"] == {"640 x 480": 2}
    assert facts["boxes"] == len(left) - 2 and facts["regions_to_ignore"] == 1
    assert sum(row["boxes"] for row in facts["classes"].values()) == facts["boxes"]
    for row in facts["classes"].values():
        assert row["small"] + row["medium"] + row["large"] == row["boxes"]
    found = {found["kind"]: found for found in train["findings"]}
    assert set(found) == {"missing_image", "zero_area_box", "ignore"}
    (item,) = found["zero_area_box"]["items"]
    assert (item["annotation_id"], item["image_id"]) == (2288, 171)
    assert found["missing_image"]["policy"] == "drop" and report.exit_code == 0
    assert test["findings"] == [] and "coverage" not in test
    assert json.loads(json.dumps(report.content)) == report.content


def test_class_lists_that_differ_and_nothing_to_learn_are_refused(bccd: Bccd) -> None:
    bccd.val["categories"][0]["name"] = "red"
    differ = check_data(bccd.use(small()))
    assert differ.exit_code == 1
    assert "class 0 is 'RBC' in custom_train" in differ.content["conclusion"]
    bccd.val["categories"][0]["name"] = "RBC"
    bccd.train["annotations"] = []
    nothing = check_data(bccd.use(small()))
    assert nothing.exit_code == 1 and "there is nothing to learn" in nothing.text


def test_coverage_is_of_what_the_detector_is_trained_on(bccd: Bccd) -> None:
    """Boxes and anchors equal those of the mapper and the model, at each training size."""
    bccd.train["annotations"][0]["iscrowd"] = 1
    bccd.train["annotations"][1]["bbox"] = [540, 380, 200, 160]
    for short_side in (100, 300):
        cfg = bccd.use(
            small(
                *("MODEL.DEVICE", "cpu", "INPUT.RANDOM_FLIP", "none"),
                *("INPUT.MIN_SIZE_TRAIN", [short_side], "INPUT.MAX_SIZE_TRAIN", 390),
            )
        )
        prepare_datasets(cfg, eval_only=False)
        records = get_detection_dataset_dicts(["custom_train"])
        backbone, grid = build_grid(cfg)
        data = training_boxes(cfg, records, backbone)
        model, mapper = build_model(cfg), CheckedDatasetMapper(cfg, is_train=True)
        mapped = [mapper(record) for record in records]
        boxes = torch.cat([inputs["instances"].gt_boxes.tensor for inputs in mapped])
        torch.testing.assert_close(data.boxes.float(), boxes, rtol=0, atol=1e-3)
        for index, inputs in enumerate(mapped):
            images = model.preprocess_image([inputs])
            assert data.padded[index].tolist() == [*images.tensor.shape[:-3:-1]]
            features = model.backbone(images.tensor)
            anchors = model.anchor_generator([features[n] for n in model.head_in_features])
            assert grid.num_anchors(data.padded[index]) == sum(map(len, anchors))
        coverage = measure_coverage(cfg, data, grid, ["RBC", "WBC", "Platelets"])
        assert coverage["all"]["boxes"] == len(boxes) == 34
        for by in ("by_class", "by_size"):
            assert sum(row["boxes"] for row in coverage[by].values()) == len(boxes)
        shares = [coverage["all"][share] for share in ("below", "between", "reached")]
        assert sum(shares) == pytest.approx(1)


def test_each_training_size_counts(bccd: Bccd) -> None:
    bccd.write()
    prepare_datasets(bccd.use(small()), eval_only=False)
    records = DatasetCatalog.get("custom_train")
    for sides, sampling, num in (([96, 128], "choice", 2), ([96, 128], "range", 3), ([0], "", 1)):
        cfg = small("INPUT.MIN_SIZE_TRAIN", sides)
        cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = sampling
        data = training_boxes(cfg, records, build_grid(cfg)[0])
        assert (len(data.boxes), len(data.padded)) == (num * 35, num * 3)
    for sides, sampling in (([], "choice"), ([96], "range")):
        cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = sides, sampling
        with pytest.raises(InputError, match=r"MIN_SIZE_TRAIN must be .*, got \["):
            training_boxes(cfg, records, build_grid(cfg)[0])


def test_suggested_keys_reach_more_boxes_when_pasted(bccd: Bccd) -> None:
    cfg = bccd.use(small(*TINY_ANCHORS))
    report = check_data(cfg, search_anchors=True)
    suggestion = report.content["data_sets"][0]["suggestion"]
    pairs = [item for key, (_, new) in suggestion["keys"].items() for item in (key, new)]
    for key, (old, new) in suggestion["keys"].items():
        assert f"{key} '{new}'" in report.text or f"{key} {new}" in report.text
        assert old != new
    again = check_data(bccd.use(small(*TINY_ANCHORS, *pairs)))
    before, after = (r.content["data_sets"][0]["coverage"]["all"] for r in (report, again))
    assert [before["reached"], after["reached"]] == pytest.approx(suggestion["reached"])
    assert after["reached"] > before["reached"] + 0.3
    best = check_data(bccd.use(small(*TINY_ANCHORS, *pairs)), search_anchors=True)
    assert not best.content["data_sets"][0]["suggestion"]["is_better"]
    assert "found no anchors that reach more boxes" in best.text


def test_training_warns_of_boxes_that_no_anchor_reaches(bccd: Bccd) -> None:
    for opts, num_warnings in ((TINY_ANCHORS, 1), ((), 0)):
        cfg = bccd.use(small(*opts))
        prepare_datasets(cfg, eval_only=False)
        warnings = warn_of_unreached_boxes(cfg)
        assert len(warnings) == num_warnings
        assert all("custom_train: no anchor reaches" in line for line in warnings)
        assert all("retinanet-ext check-data --search-anchors" in line for line in warnings)
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"  # without dense anchors
    assert warn_of_unreached_boxes(cfg) == []


def test_config_without_anchors_is_refused(bccd: Bccd, cfg: CfgNode) -> None:
    with pytest.raises(InputError, match="no anchors can be built from this config"):
        check_data(bccd.use(cfg))


def test_every_kind_with_a_choice_has_a_key(cfg: CfgNode) -> None:
    assert dict(cfg.DATASETS.CHECK) == config_defaults()
    text = Path("docs/check_data.md").read_text()
    for key, default in config_defaults().items():
        assert f"| `{key}` | {default}" in text


def test_keys_that_speak_of_classes_are_held_to_the_data(bccd: Bccd, cfg: CfgNode) -> None:
    cfg.merge_from_file("configs/small_R18_FPN.yaml", allow_unsafe=False)
    cfg.MODEL.RETINANET.NUM_CLASSES = 20
    report = check_data(bccd.use(cfg))
    assert report.exit_code == 1 and "NUM_CLASSES is 20, but custom_train has 3" in report.text
    cfg.MODEL.RETINANET.NUM_CLASSES = 3
    cfg.MODEL.RETINANET.CLS_LOSS.CLASS_ALPHA = [["nope", 0.5]]
    assert "CLASS_ALPHA takes pairs" in check_data(bccd.use(cfg)).text
