"""The confusion matrix adds up, and what is shown of images and labels is there."""

import numpy as np
import pytest

from evaluation.box_sets import draw_boxes
from retinanet_ext.evaluation.box_data import BoxData
from retinanet_ext.evaluation.detection_matches import match_detections
from retinanet_ext.evaluation.error_examples import (
    confusion_matrix,
    label_doubts,
    worst_images,
)


def make_data(objects, detections):
    """Boxes of one image of three classes: (class, x, iscrowd) and (class, x, score), side 10."""
    content = {
        "images": [{"id": 4}],
        "categories": [{"id": k, "name": "abc"[k]} for k in range(3)],
        "annotations": [
            {
                "id": 10 + i,
                "image_id": 4,
                "category_id": k,
                "bbox": [x, 0, 10, 10],
                "iscrowd": crowd,
            }
            for i, (k, x, crowd) in enumerate(objects)
        ],
    }
    results = [
        {"image_id": 4, "category_id": k, "bbox": [x, 0, 10, 10], "score": score}
        for k, x, score in detections
    ]
    return match_detections(BoxData.from_coco(content, results))


@pytest.mark.parametrize("seed", range(4))
def test_rows_are_objects_and_columns_are_detections(seed):
    content, results = draw_boxes(seed)
    data = BoxData.from_coco(content, results)
    matches = match_detections(data)
    thresholds = np.array([0.2, 0.5, 0.9, 0.0])
    matrix = confusion_matrix(matches, thresholds)
    assert np.array_equal(matrix[:-1].sum(1), data.num_objects)
    counted = ~matches.is_ignored & (data.scores >= thresholds[data.dt_classes])
    assert np.array_equal(matrix[:, :-1].sum(0), np.bincount(data.dt_classes[counted], minlength=4))
    right = np.bincount(data.dt_classes[counted & matches.is_right], minlength=4)
    assert np.array_equal(np.diag(matrix)[:-1], right) and matrix[-1, -1] == 0
    assert matrix[:-1, :-1].sum() > np.trace(matrix) > 0


def test_confusion_by_hand():
    objects = [(0, 0, 0), (0, 100, 0), (1, 200, 0), (2, 300, 1), (1, 400, 0)]
    detections = [
        (0, 0, 0.9),  # right
        (1, 0, 0.95),  # another class on an object that is found
        (0, 1, 0.8),  # duplicate
        (1, 100, 0.7),  # confused
        (2, 100, 0.6),  # an object is confused once
        (2, 300, 0.9),  # on a crowd region of its class
        (1, 300, 0.9),  # on one of another class
        (1, 400, 0.2),  # below the threshold
    ]
    matrix = confusion_matrix(make_data(objects, detections), [0.5, 0.5, 0.5])
    assert matrix.tolist() == [[1, 1, 0, 0], [0, 0, 0, 2], [0, 0, 0, 0], [1, 2, 1, 0]]


def test_images_with_the_lowest_f1_come_first():
    content, results = draw_boxes(5)
    matches = match_detections(BoxData.from_coco(content, results))
    worst = worst_images(matches, [0.5] * 4, 5)
    assert [each["f1"] for each in worst] == sorted(each["f1"] for each in worst)
    for each in worst:
        found, errors = each["found"], each["false_positives"] + each["missed"]
        assert each["f1"] == pytest.approx(2 * found / (2 * found + errors)) and errors
        objects = [a for a in content["annotations"] if a["image_id"] == each["image_id"]]
        assert found + each["missed"] == sum(not a["iscrowd"] for a in objects)
    assert not worst_images(make_data([(0, 0, 0)], [(0, 0, 0.9)]), [0.5] * 3, 5)


def test_doubtful_labels():
    objects = [(0, 0, 0), (1, 100, 0), (0, 200, 1), (2, 300, 0), (0, 400, 0)]
    detections = [
        (0, 0, 0.6),  # right
        (2, 1, 0.9),  # another class, more confident
        (1, 0, 0.55),  # another class, less confident
        (0, 200, 0.9),  # on a crowd region of its class
        (1, 201, 0.9),  # and of another
        (1, 500, 0.8),  # nothing there
        (1, 600, 0.4),  # not confident
        (2, 304, 0.1),  # badly placed
        (1, 400, 0.1),  # of another class and not confident
    ]
    doubts = label_doubts(make_data(objects, detections), 9)
    scores = np.sort([d[2] for d in detections])[::-1]
    assert [scores[each["dt"]] for each in doubts["unlabelled"]] == [0.8]
    assert [each["gt"] for each in doubts["unfound"]] == [1, 3]
    assert [(scores[e["dt"]], e["gt"]) for e in doubts["class"]] == [(0.9, 0)]
