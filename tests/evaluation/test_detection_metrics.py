"""hotcoco's numbers are those of pycocotools, which stays the number of record."""

import re
from pathlib import Path

import numpy as np
import pytest

import retinanet_ext
from evaluation.box_sets import draw_boxes, pycocotools_evaluation
from retinanet_ext.evaluation.box_data import BoxData
from retinanet_ext.evaluation.detection_metrics import (
    average_precision,
    calibration,
    precision_recall,
)


@pytest.mark.parametrize("max_detections", [100, 7, 150])
@pytest.mark.parametrize("seed", range(6))
def test_arrays_are_those_of_pycocotools_bit_for_bit(seed, max_detections):
    """With ties, crowd regions, areas of their own, ids in any order and images without boxes."""
    most = 200 if seed % 3 == 0 else 60
    content, results = draw_boxes(seed, ties=seed % 2 == 0, max_detections=most)
    reference = pycocotools_evaluation(content, results, max_detections)
    arrays = precision_recall(BoxData.from_coco(content, results), (1, 2, max_detections))
    for name in ("precision", "recall", "scores"):
        assert np.array_equal(getattr(arrays, name), reference.eval[name]), name
    assert arrays.precision.max() > 0.2
    if max_detections == 100:
        reference.summarize()
        sizes = [{}, {"iou": 0.5}, {"iou": 0.75}, *({"area": a} for a in ("small", "medium"))]
        assert [arrays.ap(**which) for which in sizes] == reference.stats[:5].tolist()
        of_class = reference.eval["precision"][:, :, 2, 0, 2]
        assert arrays.ap(label=2) == of_class[of_class > -1].mean()


def test_ids_may_be_texts():
    content, results = draw_boxes(1)
    arrays = precision_recall(BoxData.from_coco(content, results))
    for entries in (content["images"], content["annotations"], results):
        for entry in entries:
            key = "id" if entries is content["images"] else "image_id"
            entry[key] = f"image {entry[key]:04}"
    data = BoxData.from_coco(content, results)
    assert data.image_ids[0] == "image 0003"
    assert np.array_equal(precision_recall(data).precision, arrays.precision)


def test_no_detections_are_ap_0_and_no_objects_are_no_ap():
    content, results = draw_boxes(2)
    assert precision_recall(BoxData.from_coco(content, [])).ap() == 0
    content["annotations"] = []
    for found in (results, []):
        assert np.isnan(precision_recall(BoxData.from_coco(content, found)).ap())


def test_average_precision_by_hand():
    # Precision 1, 1/2, 2/3 at recall 1/4, 1/4, 2/4: 26 of 101 points at 1, and 25 at 2/3.
    assert average_precision(np.array([True, False, True]), 4) == pytest.approx(
        (26 + 25 * 2 / 3) / 101
    )
    assert average_precision(np.zeros(0, bool), 4) == 0


def test_calibration_by_hand():
    scores = np.array([0.05, 0.92, 0.95, 1.0, 0.45])
    is_right = np.array([False, True, False, True, True])
    bins, error = calibration(scores, is_right)
    filled = {each["count"]: each for each in bins if each["count"] > 1}
    assert filled[3]["avg_accuracy"] == pytest.approx(2 / 3)
    assert filled[3]["avg_confidence"] == pytest.approx(2.87 / 3)
    assert error == pytest.approx((0.05 + abs(2.87 - 2) + 0.55) / 5)
    assert sum(each["count"] for each in bins) == 5 and len(bins) == 10
    rng = np.random.default_rng(0)
    scores = rng.random(400)
    is_right = rng.random(400) < scores**2
    index = np.minimum((10 * scores).astype(int), 9)
    parts = [abs((scores - is_right)[index == i].sum()) for i in range(10)]
    assert calibration(scores, is_right)[1] == pytest.approx(sum(parts) / 400)
    assert np.isnan(calibration(scores[:0], is_right[:0])[1])


def test_one_module_imports_hotcoco():
    package = Path(retinanet_ext.__file__).parent
    found = [
        path.name
        for path in package.rglob("*.py")
        if re.search(r"^\s*(import|from) hotcoco", path.read_text(), re.M)
    ]
    assert found == ["detection_metrics.py"]
