"""Thresholds are the best there are, on the data they are chosen on."""

import numpy as np
import pytest

from evaluation.box_sets import draw_boxes
from retinanet_ext.errors import InputError
from retinanet_ext.evaluation.box_data import BoxData
from retinanet_ext.evaluation.detection_matches import match_detections
from retinanet_ext.evaluation.score_curves import FROC_RATES, score_curve, score_curves
from retinanet_ext.evaluation.threshold_choice import Criterion, choose_thresholds


@pytest.fixture(scope="module")
def matches():
    content, results = draw_boxes(3, num_images=30)
    return match_detections(BoxData.from_coco(content, results))


def at(matches, label, threshold, images=None):
    """Precision, recall and F1, counted."""
    data = matches.data
    counted = (data.dt_classes == label) & ~matches.is_ignored & (data.scores >= threshold)
    objects = (data.gt_classes == label) & ~data.gt_is_crowd
    if images is not None:
        counted &= np.isin(data.dt_images, images)
        objects &= np.isin(data.gt_images, images)
    right = (counted & matches.is_right).sum()
    precision = right / max(counted.sum(), 1)
    recall = right / objects.sum()
    return precision, recall, 2 * right / (counted.sum() + objects.sum())


def test_no_other_threshold_is_better(matches):
    grid = np.linspace(0, 1, 401)
    for label in range(4):
        grid_values = np.array([at(matches, label, t) for t in grid])
        for criterion, index in (("f1", 2), ("precision=.4", 0), ("recall=.5", 1)):
            wanted = Criterion.parse(criterion)
            chosen = choose_thresholds(matches, wanted)[label]
            values = at(matches, label, chosen["threshold"])
            assert values == pytest.approx([chosen[k] for k in ("precision", "recall", "f1")])
            if criterion == "f1":
                assert values[2] >= grid_values[:, 2].max() - 1e-12
            elif not chosen["note"]:
                reached = grid_values[:, index] >= wanted.wanted
                assert values[index] >= wanted.wanted
                if index == 0:  # no other one with that precision has a higher recall
                    assert values[1] >= grid_values[reached, 1].max()
                else:  # nor a higher score
                    assert chosen["threshold"] >= grid[reached].max() - 0.01


def test_what_cannot_be_reached_is_said(matches):
    for each in choose_thresholds(matches, Criterion("precision", 1.0)):
        if each["precision"] < 1:
            assert each["note"] == f"precision 1 is not reached, at most {each['precision']:.3f}"
    recalls = choose_thresholds(matches, Criterion("recall", 1.0))
    assert all(each["note"] == f"recall 1 is not reached, at most {each['recall']:.3f}"
               for each in recalls)  # fmt: skip


def test_classes_without_objects_or_right_detections_get_one_half():
    content, results = draw_boxes(3)
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] != 5]
    results = [r for r in results if r["category_id"] != 9]
    matches = match_detections(BoxData.from_coco(content, results))
    chosen = choose_thresholds(matches, Criterion())
    assert [each["note"] for each in chosen] == [
        "",
        "no objects",
        "no detection finds an object",
        "",
    ]
    assert [each["threshold"] for each in chosen[1:3]] == [0.5, 0.5]
    assert np.isnan(chosen[1]["f1"]) and chosen[2]["f1"] == 0


def test_halves_share_no_image_and_are_the_same_each_time(matches):
    """What is reported is recounted on the images that the half threshold was not chosen on."""
    order = np.random.default_rng(0).permutation(30)
    first, second = order[:15], order[15:]
    chosen = choose_thresholds(matches, Criterion())
    for label, each in enumerate(chosen):
        f1 = at(matches, label, each["half_threshold"], second)[2]
        assert each["other_half"]["f1"] == pytest.approx(f1)
        assert each["other_half_at_0.5"]["f1"] == pytest.approx(at(matches, label, 0.5, second)[2])
        best = at(matches, label, each["half_threshold"], first)[2]
        assert best >= max(at(matches, label, t, first)[2] for t in np.linspace(0, 1, 101)) - 1e-12
    assert chosen == choose_thresholds(matches, Criterion())


def test_rounding_a_score_does_not_change_what_counts(matches):
    for label, each in enumerate(choose_thresholds(matches, Criterion())):
        assert at(matches, label, np.float32(each["threshold"])) == at(
            matches, label, each["threshold"]
        )
        of_class = matches.data.scores[matches.data.dt_classes == label]
        assert np.abs(of_class - each["threshold"]).min() > 1e-3


@pytest.mark.parametrize("text", ["F1", "precision", "precision=0", "recall=1.5", "f1=.5", ".9"])
def test_other_criteria_are_refused(text):
    with pytest.raises(InputError, match=r"f1, precision=P or recall=R .* got "):
        Criterion.parse(text)


def test_recall_at_false_positives_per_image(matches):
    data = matches.data
    for label, curve in [(None, score_curve(matches)), *enumerate(score_curves(matches))]:
        of_class = np.ones(len(data.scores), bool) if label is None else data.dt_classes == label
        objects = ~data.gt_is_crowd & (data.gt_classes == label if label is not None else True)
        for rate in FROC_RATES:
            best = 0.0
            for threshold in np.unique(data.scores):
                counted = of_class & (data.scores >= threshold)
                if (counted & matches.is_wrong).sum() / 30 <= rate:
                    best = max(best, (counted & matches.is_right).sum() / objects.sum())
            assert curve.recall_at(rate) == pytest.approx(best)
