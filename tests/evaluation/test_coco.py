"""AP has pycocotools' digits, also beyond COCO's 100 detections and of nothing."""

import json
import math
import sys
from copy import deepcopy

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.evaluation.coco_evaluation import _evaluate_predictions_on_coco
from detectron2.structures import Boxes, BoxMode, Instances
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from evaluation.box_sets import draw_boxes
from retinanet_ext.data.coco_json import to_dataset_dicts
from retinanet_ext.evaluation import BoxEvaluator
from retinanet_ext.evaluation.coco import evaluate_boxes

NAME = "evaluation_test"
COUNTS = (120, 150, 199)
CLASSES = ["nucleus", "mitosis"]


@pytest.fixture
def register(tmp_path):
    """Register images with as many objects each, all above COCO's small size."""

    def make(counts, category_ids=(1,)):
        annotations = []
        for image, count in enumerate(counts):
            for i in range(count):
                box = [50 * (i % 15) + image, 50 * (i // 15), 40 + i % 9, 40]
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image + 1,
                        "category_id": category_ids[i % len(category_ids)],
                        "bbox": box,
                        "area": box[2] * box[3],
                        "iscrowd": 0,
                    }
                )
        content = {
            "info": {},
            "images": [
                {"id": i + 1, "file_name": f"{i}.png", "width": 800, "height": 800}
                for i in range(len(counts))
            ],
            "categories": [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)],
            "annotations": annotations,
        }
        json_file = tmp_path / "instances.json"
        json_file.write_text(json.dumps(content))
        DatasetCatalog.register(NAME, lambda: to_dataset_dicts(content, ""))
        MetadataCatalog.get(NAME).set(
            json_file=str(json_file),
            thing_classes=CLASSES,
            thing_dataset_id_to_contiguous_id={1: 0, 2: 1},
        )
        return json_file

    yield make
    DatasetCatalog.pop(NAME, None)
    MetadataCatalog.pop(NAME, None)


def evaluate(evaluator, limit):
    """Metrics of detections that are the ground truth, as many per image as a detector returns."""
    evaluator.reset()
    for record in DatasetCatalog.get(NAME):
        annotations = record["annotations"][:limit]
        boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
        found = Instances(
            (record["height"], record["width"]),
            pred_boxes=Boxes(torch.tensor(boxes).reshape(-1, 4)),
            scores=torch.linspace(0.9, 0.1, len(boxes)),
            pred_classes=torch.tensor([a["category_id"] for a in annotations], dtype=torch.int64),
        )
        evaluator.process([record], [{"instances": found}])
    return evaluator.evaluate()["bbox"]


def make_evaluator(tmp_path, limit=100):
    return BoxEvaluator(NAME, max_detections=limit, output_dir=str(tmp_path / "out"))


def test_perfect_detections_of_crowded_images_score_100(register, tmp_path):
    register(COUNTS)
    assert evaluate(make_evaluator(tmp_path, 199), 199)["AP"] == pytest.approx(100)
    cocos = evaluate(make_evaluator(tmp_path, 100), 100)["AP"]
    assert cocos == evaluate(COCOEvaluator(NAME, output_dir=str(tmp_path / "stock")), 100)["AP"]
    assert cocos < 66  # 300 of 469 objects


def test_ap_of_another_limit_is_that_of_pycocotools(register, tmp_path):
    json_file = register(COUNTS, category_ids=(1, 1, 1, 1, 1, 2))
    metrics = evaluate(make_evaluator(tmp_path, 130), 199)
    truth = COCO(str(json_file))
    found = truth.loadRes(str(tmp_path / "out/coco_instances_results.json"))
    reference = COCOeval(truth, found, "bbox")
    reference.params.maxDets = [130]
    reference.evaluate()
    reference.accumulate()
    precision = reference.eval["precision"][..., 0, 0]  # all areas
    assert metrics["AP"] == pytest.approx(100 * np.mean(precision[precision > -1]))
    assert metrics["AP-nucleus"] == pytest.approx(100 * precision[:, :, 0].mean())
    assert metrics["AP-mitosis"] == pytest.approx(100) and metrics["AP"] < 100


def test_another_limit_is_said(register, tmp_path, caplog):
    register([3])
    with caplog.at_level("INFO", "retinanet_ext.evaluation.coco"):
        for limit in (10, 100):
            make_evaluator(tmp_path, limit)
        assert not caplog.records
        make_evaluator(tmp_path, 101)
    (record,) = caplog.records
    assert "up to 101 detections per image" in record.getMessage()
    assert "not COCO's, which counts 100" in record.getMessage()


@pytest.mark.parametrize("limit", [100, 300])
def test_no_detection_is_ap_0_where_there_are_objects(register, tmp_path, limit):
    register([3, 0])
    metrics = evaluate(make_evaluator(tmp_path, limit), 0)
    assert {name: metrics[name] for name in ("AP", "AP50", "AP75", "APm", "AP-nucleus")} == {
        "AP": 0, "AP50": 0, "AP75": 0, "APm": 0, "AP-nucleus": 0,
    }  # fmt: skip
    assert all(math.isnan(metrics[name]) for name in ("APs", "APl", "AP-mitosis"))


@pytest.mark.parametrize("with_detections", [False, True])
def test_no_object_is_no_ap(register, tmp_path, with_detections):
    register([2, 1] if with_detections else [0, 0])
    evaluator = make_evaluator(tmp_path)
    if with_detections:  # what there is to find is no object
        for annotation in evaluator._coco_api.anns.values():
            annotation["iscrowd"] = 1
    assert all(map(math.isnan, evaluate(evaluator, 100).values()))


def evaluate_as_before(content, results, limit):
    """Detectron2's own evaluation of results by pycocotools."""
    truth = make_truth(content)
    return _evaluate_predictions_on_coco(
        truth, deepcopy(results), "bbox", cocoeval_fn=COCOeval, max_dets_per_image=[1, 10, limit]
    )


def make_truth(content):
    truth = COCO()
    truth.dataset = deepcopy(content)
    truth.createIndex()
    return truth


@pytest.mark.parametrize("limit", [100, 130])
@pytest.mark.parametrize("blocked", [False, True])
def test_evaluation_has_the_digits_of_pycocotools(limit, blocked, monkeypatch):
    """Also where Detectron2's compiled extension cannot be imported."""
    if blocked:
        monkeypatch.setitem(sys.modules, "detectron2._C", None)
    monkeypatch.setattr(COCOeval, "accumulate", None)  # hotcoco takes its place
    content, results = draw_boxes(0, max_detections=200)
    evaluated = evaluate_boxes(make_truth(content), results, limit)
    monkeypatch.undo()
    reference = evaluate_as_before(content, results, limit)
    assert np.array_equal(evaluated.stats, reference.stats) and evaluated.stats[0] > 0
    for name in ("precision", "recall", "scores"):
        assert np.array_equal(evaluated.eval[name], reference.eval[name])


@pytest.mark.parametrize(
    "change",
    [
        lambda content, results: content["annotations"][0].update(id=0),
        lambda content, results: content["annotations"][0].update(id=2),
        lambda content, results: content["annotations"][3].update(ignore=1, iscrowd=0),
        lambda content, results: results[0].update(bbox=[float("nan"), 0.0, 5.0, 5.0]),
    ],
    ids=["id 0", "an id twice", "ignored, no crowd", "not finite"],
)
def test_what_hotcoco_may_count_differently_is_left_to_pycocotools(change, monkeypatch):
    content, results = draw_boxes(1)
    change(content, results)
    reference = evaluate_as_before(content, results, 100)
    monkeypatch.setattr("retinanet_ext.evaluation.coco.precision_recall", None)
    evaluated = evaluate_boxes(make_truth(content), deepcopy(results))
    assert np.array_equal(evaluated.stats, reference.stats)
    some = [image["id"] for image in content["images"][:5]]
    few = evaluate_boxes(make_truth(content), deepcopy(results), image_ids=some)
    assert few.params.imgIds == sorted(some) and few.stats[0] != evaluated.stats[0]
