"""A run is opened by its folder alone."""

import json
import shutil

import pytest
import torch
from PIL import Image, ImageOps

from retinanet_ext.cli import main
from retinanet_ext.engine import Predictor
from retinanet_ext.engine.run_folder import detect_test_data, load_run, register_test_data
from retinanet_ext.errors import InputError
from retinanet_ext.evaluation.thresholds import THRESHOLDS, Thresholds
from retinanet_ext.files import sha256_of
from runs import CLASS_NAMES, FIXTURE, make_run

IMAGES = sorted((FIXTURE / "images").glob("*.jpg"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "mine")


def test_a_moved_run_is_found_with_its_last_or_best_weights(run, tmp_path):
    moved = shutil.copytree(run, tmp_path / "moved")
    cfg = load_run(moved)
    assert str(moved / "model_0000009.pth") == cfg.MODEL.WEIGHTS
    assert str(moved) == cfg.OUTPUT_DIR
    shutil.copy(moved / "model_0000009.pth", moved / "model_best.pth")
    assert load_run(moved).MODEL.WEIGHTS.endswith("model_best.pth")
    given = ["MODEL.WEIGHTS", str(run / "model_0000009.pth")]
    assert given[1] == load_run(moved, given).MODEL.WEIGHTS


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("folder", "is not a folder"),
        ("config.yaml", "holds no config.yaml"),
        ("weights", "holds no checkpoint yet"),
    ],
)
def test_no_run(run, tmp_path, missing, message):
    folder = tmp_path / "run"
    if missing != "folder":
        folder.mkdir()
    if missing == "weights":
        shutil.copy(run / "config.yaml", folder)
    with pytest.raises(InputError, match=message):
        load_run(folder)


def test_detections_of_the_test_data_are_computed_once_for_the_same_weights(run):
    cfg = load_run(run)
    register_test_data(cfg)
    path = detect_test_data(cfg, "custom_test")
    found = json.loads(path.read_text())
    ids = {
        image["id"] for image in json.loads((FIXTURE / "instances_val.json").read_text())["images"]
    }
    assert found and {record["image_id"] for record in found} <= ids
    written = path.stat().st_mtime_ns
    assert detect_test_data(cfg, "custom_test") == path
    assert path.stat().st_mtime_ns == written
    cfg.TEST.DETECTIONS_PER_IMAGE = 2
    fewer = detect_test_data(cfg, "custom_test")
    assert fewer != path and len(json.loads(fewer.read_text())) <= 2 * len(ids)


def test_detections_are_of_the_images_as_they_are_and_of_this_version(run, tmp_path, monkeypatch):
    images = shutil.copytree(FIXTURE / "images", tmp_path / "images")
    folder = shutil.copytree(run, tmp_path / "run")
    cfg = load_run(folder, ["DATASETS.CUSTOM.TEST_IMAGES", str(images)])
    register_test_data(cfg)
    monkeypatch.delattr("retinanet_ext.evaluation.coco.evaluate_boxes")  # AP is not needed
    paths = [detect_test_data(cfg, "custom_test")]
    for image in images.iterdir():
        ImageOps.invert(Image.open(image)).save(image)
    paths.append(detect_test_data(cfg, "custom_test"))
    assert paths[0].read_bytes() != paths[1].read_bytes()
    monkeypatch.setattr("retinanet_ext.__version__", "0.0.0")
    paths.append(detect_test_data(cfg, "custom_test"))
    assert len(set(paths)) == 3


def test_a_folder_that_is_not_writable_is_refused_before_the_inference(run, tmp_path, monkeypatch):
    folder = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("evaluation"))
    (folder / "evaluation").touch()
    cfg = load_run(folder)
    register_test_data(cfg)
    monkeypatch.delattr("retinanet_ext.engine.run_folder.inference_on_dataset")
    with pytest.raises(InputError, match="evaluation cannot be made or written to"):
        detect_test_data(cfg, "custom_test")


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({}, "test data custom_test have no annotations in COCO's format, so there is no AP"),
        ({"annotations": []}, "the ground truth has no objects"),
    ],
)
def test_test_data_without_objects_are_refused_before_the_inference(
    lists, message, tmp_path, monkeypatch, capsys
):
    content = json.loads((FIXTURE / "instances_val.json").read_text())
    del content["annotations"]
    (tmp_path / "val.json").write_text(json.dumps(content | lists))
    run = make_run(tmp_path / "run", "DATASETS.CUSTOM.TEST_JSON", str(tmp_path / "val.json"))
    monkeypatch.delattr("retinanet_ext.engine.run_folder.inference_on_dataset")
    for command in (["evaluate", str(run)], ["compare", str(run), str(run)]):
        assert main(command) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


def test_saved_thresholds_cut_detections_by_class(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    cfg = load_run(folder)
    plain = list(Predictor(cfg)(IMAGES))
    scores = torch.cat([found.scores for found in plain])
    classes = torch.cat([found.pred_classes for found in plain])
    cut = [float(scores[classes == label].median()) for label in range(3)]
    weights = sha256_of(cfg.MODEL.WEIGHTS)
    thresholds = Thresholds(dict(zip(CLASS_NAMES, cut, strict=True)), "best F1", weights)
    thresholds.write(folder / THRESHOLDS)
    assert Thresholds.read(folder / THRESHOLDS) == thresholds

    found = list(Predictor(cfg)(IMAGES))
    assert 0 < sum(map(len, found)) < len(scores)
    for each, all_ in zip(found, plain, strict=True):
        lowest = torch.tensor(cut)[all_.pred_classes]
        assert torch.equal(each.scores, all_.scores[all_.scores >= lowest])
    assert sum(map(len, Predictor(cfg, thresholds=None)(IMAGES))) == len(scores)

    Thresholds(thresholds.scores, "best F1", "0" * 64).write(folder / THRESHOLDS)
    with pytest.raises(InputError, match=r"chosen for other weights .*--score .*thresholds=None"):
        Predictor(cfg)
    Thresholds({"RBC": 0.5, "cat": 0.5}, "", weights).write(folder / THRESHOLDS)
    with pytest.raises(InputError, match=r"other classes .* none for WBC, Platelets"):
        Predictor(cfg)


@pytest.mark.parametrize("content", ["", "[]", '{"scores": {"RBC": 2}}', '{"scores": [1]}'])
def test_damaged_thresholds(tmp_path, content):
    (tmp_path / THRESHOLDS).write_text(content)
    with pytest.raises(InputError, match=THRESHOLDS):
        Thresholds.read(tmp_path / THRESHOLDS)
