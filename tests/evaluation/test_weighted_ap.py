"""AP of images that count several times, against pycocotools on data that hold them so often."""

import numpy as np
import pytest

from drawn_detections import CLASSES, NUM_IMAGES, draw
from evaluation.box_sets import pycocotools_evaluation
from retinanet_ext.evaluation.box_data import BoxData
from retinanet_ext.evaluation.compare import summarize
from retinanet_ext.evaluation.detection_metrics import AREAS
from retinanet_ext.evaluation.weighted_ap import Matchings


def match(content, detections, **options):
    return Matchings.compute(BoxData.from_coco(content, detections), **options)


def repeat(content, detections, times):
    """Return data in which each image really occurs that many times."""
    images, annotations, found = [], [], []
    for image, number in zip(content["images"], times, strict=True):
        for _ in range(number):
            new = {"image_id": len(images) + 1}
            images.append({**image, "id": len(images) + 1})
            own = [a for a in content["annotations"] if a["image_id"] == image["id"]]
            annotations += [{**a, **new} for a in own]
            found += [{**d, **new} for d in detections if d["image_id"] == image["id"]]
    annotations = [{**a, "id": number} for number, a in enumerate(annotations, start=1)]
    return {**content, "images": images, "annotations": annotations}, found


def coco_ap(content, detections, max_detections=100):
    """Return pycocotools' AP, (T, K, 4), and its AP, AP50, AP75, APs, APm, APl."""
    evaluation = pycocotools_evaluation(content, detections, max_detections)
    evaluation.summarize()
    precision = evaluation.eval["precision"][..., -1]
    return np.where(precision < 0, np.nan, precision).mean(axis=1), evaluation.stats[:6]


@pytest.mark.parametrize("max_detections", [100, 3])
def test_once_each_it_is_cocos_ap(max_detections):
    data = draw(0)
    matchings = match(*data, max_detections=max_detections)
    ap = matchings.average_precision(np.ones((NUM_IMAGES, 1), np.int64))
    expected, stats = coco_ap(*data, max_detections)
    np.testing.assert_allclose(ap[..., 0], expected, rtol=0, atol=1e-12)
    assert ap.shape == (10, len(CLASSES), len(AREAS), 1)
    groups = summarize(ap)[..., 0]
    ours = [*groups[0], *groups[1:4, 0]]
    if max_detections == 100:  # pycocotools prints AP at 100 alone
        np.testing.assert_allclose(ours, 100 * stats, rtol=0, atol=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_weights_are_repeated_images(seed):
    data = draw(seed)
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(NUM_IMAGES, np.full(NUM_IMAGES, 1 / NUM_IMAGES), size=3).T
    ap = match(*data).average_precision(weights)
    for resample in range(3):
        expected, _ = coco_ap(*repeat(*data, weights[:, resample]))
        np.testing.assert_allclose(ap[..., resample], expected, rtol=0, atol=1e-12)


def test_equal_scores_keep_cocos_order():
    data = draw(3, decimals=1)
    once = np.ones((NUM_IMAGES, 1), np.int64)
    ap = match(*data).average_precision(once)[..., 0]
    np.testing.assert_allclose(ap, coco_ap(*data)[0], rtol=0, atol=1e-12)


def test_many_weights_are_computed_in_blocks(monkeypatch):
    matchings = match(*draw(0))
    weights = np.random.default_rng(0).integers(0, 3, (NUM_IMAGES, 50))
    at_once = matchings.average_precision(weights)
    monkeypatch.setattr("retinanet_ext.evaluation.weighted_ap.BLOCK", 700)
    np.testing.assert_array_equal(matchings.average_precision(weights), at_once)


def test_some_images():
    content, detections = draw(0)
    chosen = np.array([4, 9, 17])
    chosen_matches = match(content, detections).select(chosen)
    ap = chosen_matches.average_precision(np.ones((3, 1), np.int64))
    times = np.isin(np.arange(NUM_IMAGES), chosen).astype(int)
    expected, _ = coco_ap(*repeat(content, detections, times))
    np.testing.assert_allclose(ap[..., 0], expected, rtol=0, atol=1e-12)


def test_ap_of_an_image_is_that_of_the_image_alone():
    data = draw(1)
    ap = match(*data).image_ap()
    for image in range(NUM_IMAGES):
        _, stats = coco_ap(*repeat(*data, np.eye(NUM_IMAGES, dtype=int)[image]))
        expected = np.nan if stats[0] < 0 else stats[0]
        np.testing.assert_allclose(ap[image], expected, rtol=0, atol=1e-12)
    assert np.isnan(ap[:2]).all() and not np.isnan(ap[2:]).any()


def test_no_detections():
    content, _ = draw(0)
    ap = match(content, []).average_precision(np.ones((NUM_IMAGES, 2), np.int64))
    assert (ap[:, :2, 0] == 0).all()
