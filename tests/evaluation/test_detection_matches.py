"""Matches are COCO's; kinds of error and their costs are TIDE's."""

import contextlib
import io

import hotcoco
import numpy as np
import pytest
from torch import tensor
from torchvision.ops import box_iou

from evaluation.box_sets import draw_boxes, pycocotools_evaluation
from retinanet_ext.evaluation.box_data import BoxData
from retinanet_ext.evaluation.detection_matches import (
    ERROR_KINDS,
    error_costs,
    error_kinds,
    match_detections,
)
from retinanet_ext.evaluation.detection_metrics import precision_recall

SHORT = dict(zip(ERROR_KINDS, ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss"), strict=True))


def count(kinds, is_missed):
    found = {name: int((kinds == index).sum()) for index, name in enumerate(ERROR_KINDS)}
    return found | {"missed": int(is_missed.sum())}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("max_detections", [100, 5])
def test_matches_are_those_of_pycocotools(seed, max_detections):
    content, results = draw_boxes(seed, ties=seed % 2 == 0)
    data = BoxData.from_coco(content, results)
    matches = match_detections(data, max_detections)
    reference = pycocotools_evaluation(content, results, max_detections)
    shown = [e for e in reference.evalImgs if e and e["aRng"] == [0, 1e10]]
    num_right = sum((e["dtMatches"][0] > 0)[~e["dtIgnore"][0]].sum() for e in shown)
    num_ignored = sum(e["dtIgnore"][0].sum() for e in shown)
    num_beyond = len(results) - sum(len(e["dtIds"]) for e in shown)
    assert matches.is_right.sum() == num_right > 30
    assert matches.is_ignored.sum() == num_ignored + num_beyond > 0
    found = {
        (data.image_ids[data.dt_images[dt]], data.gt_ids[gt], data.scores[dt])
        for dt, gt in enumerate(matches.gt_of_dt)
        if gt >= 0
    }
    expected = {
        (e["image_id"], int(gt), score)
        for e in shown
        for gt, score, ignored in zip(
            e["dtMatches"][0], e["dtScores"], e["dtIgnore"][0], strict=True
        )
        if gt and not ignored
    }
    assert found == expected
    is_right = matches.gt_of_dt[matches.dt_of_gt[matches.gt_of_dt[matches.is_right]]]
    assert np.array_equal(is_right, matches.gt_of_dt[matches.is_right])


@pytest.mark.parametrize("seed", range(4))
def test_without_crowd_regions_kinds_and_costs_are_hotcocos(seed):
    """hotcoco takes crowd regions for objects here, so it is no reference with them."""
    content, results = draw_boxes(seed, crowd=False, ties=False)
    data = BoxData.from_coco(content, results)
    matches = match_detections(data)
    kinds, is_missed = error_kinds(matches)
    base, costs = error_costs(matches, kinds, is_missed)
    truth = hotcoco.COCO(content)
    evaluation = hotcoco.COCOeval(truth, truth.load_res(results), "bbox")
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
    tide = evaluation.tide_errors()
    assert {SHORT[k]: n for k, n in count(kinds, is_missed).items()} == tide["counts"]
    assert base == pytest.approx(tide["ap_base"], abs=1e-12)
    for name, cost in costs.items():
        assert cost == pytest.approx(tide["delta_ap"][SHORT[name]], abs=1e-12), name
    assert max(costs.values()) > 0.03


def kinds_by_hand(content, results):
    """Count TIDE's kinds per image, in plain loops."""
    counts = dict.fromkeys(ERROR_KINDS, 0)

    def iou(a, b):
        a, b = (tensor([[x, y, x + w, y + h]]).double() for x, y, w, h in (a, b))
        return float(box_iou(a, b))

    def share(a, b):  # of a in b, as for crowd regions
        sides = [min(a[i] + a[i + 2], b[i] + b[i + 2]) - max(a[i], b[i]) for i in (0, 1)]
        return max(sides[0], 0) * max(sides[1], 0) / (a[2] * a[3])

    for image in content["images"]:
        own = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        objects = [a for a in own if not a["iscrowd"]]
        found = [r for r in results if r["image_id"] == image["id"]]
        found.sort(key=lambda r: -r["score"])
        taken, wrong, usable = set(), [], set()
        for r in found:
            same = [a for a in own if a["category_id"] == r["category_id"]]
            free = [
                (iou(r["bbox"], a["bbox"]), a["id"])
                for a in same
                if not a["iscrowd"] and a["id"] not in taken
            ]
            if free and max(free)[0] >= 0.5:
                taken.add(max(free)[1])
            elif not any(a["iscrowd"] and share(r["bbox"], a["bbox"]) >= 0.5 for a in same):
                wrong.append(r)
        for r in wrong:
            ious = {(a["category_id"] == r["category_id"], a["id"]): iou(r["bbox"], a["bbox"])
                    for a in objects}  # fmt: skip
            own_iou, own_id = max(((v, k[1]) for k, v in ious.items() if k[0]), default=(0, 0))
            other, other_id = max(((v, k[1]) for k, v in ious.items() if not k[0]), default=(0, 0))
            if 0.1 <= own_iou < 0.5:
                counts["localisation"] += 1
                usable.add(own_id)
            elif other >= 0.5:
                counts["classification"] += 1
                usable.add(other_id)
            elif own_iou >= 0.5:
                counts["duplicate"] += 1
            else:
                counts["background" if max(own_iou, other) <= 0.1 else "both"] += 1
        counts["missed"] += len({a["id"] for a in objects} - taken - usable)
    return counts


def test_with_crowd_regions_kinds_are_those_counted_by_hand():
    content, results = draw_boxes(7, ties=False, num_images=6)
    matches = match_detections(BoxData.from_coco(content, results))
    counted = count(*error_kinds(matches))
    assert counted == kinds_by_hand(content, results) and min(counted.values()) > 0
    assert matches.is_ignored.sum() > 3


def test_costs_by_hand():
    """Two objects of a class: one found late, after a wrong detection; one missed."""
    content, _ = draw_boxes(0)
    content["annotations"] = [
        {"id": i, "image_id": 3, "category_id": 2, "bbox": [x, 0, 10, 10], "iscrowd": 0}
        for i, x in ((1, 0), (2, 100))
    ]
    results = [
        {"image_id": 3, "category_id": 2, "bbox": [200, 0, 10, 10], "score": 0.9},
        {"image_id": 3, "category_id": 2, "bbox": [0, 0, 10, 10], "score": 0.8},
    ]
    data = BoxData.from_coco(content, results)
    matches = match_detections(data)
    base, costs = error_costs(matches, *error_kinds(matches))
    # 51 of 101 points of recall are reached, at a precision of 1/2.
    assert base == pytest.approx(51 / 101 / 2) == pytest.approx(precision_recall(data).ap(iou=0.5))
    assert costs["background"] == pytest.approx(51 / 101 / 2)  # precision 1
    assert costs["missed"] == pytest.approx(1 / 2 - 51 / 101 / 2)  # the whole recall
    assert sum(costs.values()) == pytest.approx(costs["background"] + costs["missed"])
