"""Differences between detectors: by group, by image, with seeds, on a page."""

import math

import numpy as np
import pytest

from browser import measure_page, needs_browser
from drawn_detections import NUM_IMAGES, draw
from retinanet_ext.evaluation.box_data import BoxData
from retinanet_ext.evaluation.compare import (
    Comparison,
    Difference,
    Group,
    ImageChange,
    compare,
    compare_images,
)
from retinanet_ext.evaluation.compare_report import conclude, explain, render_markdown, render_text
from retinanet_ext.evaluation.weighted_ap import Matchings
from retinanet_ext.page import render_page

NAMES = ["one", "two", "three"]
TRUTH, FOUND = draw(0)


def match(content, detections):
    return Matchings.compute(BoxData.from_coco(content, detections))


def moved(seed, pixels):
    """Return the detections with boxes that are located worse."""
    rng = np.random.default_rng(seed)
    return [
        {**d, "bbox": (np.array(d["bbox"]) + pixels * rng.normal(size=4)).tolist()} for d in FOUND
    ]


@pytest.fixture(scope="module")
def detectors():
    return [match(TRUTH, found) for found in (FOUND, moved(1, 12), moved(2, 12))]


def test_a_detector_against_itself_differs_by_exactly_zero(detectors):
    good, *_ = detectors
    for group in compare([good], [good], NAMES, num_resamples=200):
        for found in group.metrics.values():
            assert (found.a, found.difference, found.images) == (found.b, 0, (0, 0))
    images = compare_images([good], [good], dict.fromkeys(good.image_ids, ""))
    assert len(images) == NUM_IMAGES - 2 and {image.change for image in images} == {0}


def test_better_boxes_are_seen_in_every_group_and_image(detectors):
    good, bad, _ = detectors
    groups = compare([bad], [good], NAMES, num_resamples=300)
    assert [(g.kind, g.name) for g in groups] == [
        ("all", "all"),
        *(("size", size) for size in ("small", "medium", "large")),
        *(("class", name) for name in NAMES),
    ]
    objects = [a for a in TRUTH["annotations"] if not a["iscrowd"]]
    assert groups[0].num_images == len({a["image_id"] for a in objects})
    small = {a["image_id"] for a in objects if a["area"] < 32**2}
    assert groups[1].num_images == len(small)
    for metric in ("AP", "AP75"):
        found = groups[0].metrics[metric]
        low, high = found.images
        assert 0 < low < found.difference < high
    assert groups[1].metrics["AP"].difference > groups[3].metrics["AP"].difference > 0
    back = compare([good], [bad], NAMES, num_resamples=300)[0].metrics["AP"]
    low, high = groups[0].metrics["AP"].images
    assert back.images == pytest.approx((-high, -low))

    images = compare_images([bad], [good], {i: f"{i}.png" for i in good.image_ids})
    changes = [image.change for image in images]
    assert changes == sorted(changes, reverse=True) and changes[0] > 0
    assert all(image.file_name == f"{image.image_id}.png" for image in images)


def test_seeds_widen_the_interval_and_means_are_over_seeds(detectors):
    good, bad, worse = detectors
    one = compare([good], [bad], NAMES, num_resamples=200)[0].metrics["AP"]
    assert one.images_and_seeds is None and one.seeds is None
    close = match(TRUTH, moved(3, 0.5))
    found = compare([good, close], [bad, worse], NAMES, num_resamples=200)[0].metrics["AP"]
    other = compare([close], [worse], NAMES, num_resamples=200)[0].metrics["AP"]
    assert (found.a, found.b) == pytest.approx(((one.a + other.a) / 2, (one.b + other.b) / 2))
    assert found.difference == pytest.approx(found.b - found.a)
    width = {key: np.diff(getattr(found, key))[0] for key in ("images", "images_and_seeds")}
    assert width["images_and_seeds"] > width["images"] > 0
    low, high = found.seeds
    assert low < found.difference < high


def test_a_class_without_objects_is_not_defined():
    content = {**TRUTH, "annotations": [a for a in TRUTH["annotations"] if a["category_id"] != 5]}
    detector = match(content, FOUND)
    groups = compare([detector], [detector], NAMES, num_resamples=100)
    found = groups[5].metrics["AP"]
    assert groups[5].num_images == 0
    assert math.isnan(found.a) and math.isnan(found.difference) and math.isnan(found.images[0])
    assert groups[0].metrics["AP"].difference == 0


def large_comparison(num_classes):
    """Return a comparison of six seeds with many classes of long and hostile names."""
    metric = Difference(41.2, 42.44, 1.24, (-0.51, 2.96), (-1.23, 3.7), (-2.0, 4.4))
    nothing = Difference(*[math.nan] * 3, (math.nan, math.nan))
    names = [f"<b>|class* {i}" + "_of_a_long_name" * (i % 3) for i in range(num_classes)]
    groups = [
        Group("all" if i == 0 else "class", name, i, dict.fromkeys(("AP", "AP50", "AP75"), metric))
        for i, name in enumerate(names)
    ]
    groups[-1] = Group("class", "none", 0, dict.fromkeys(("AP", "AP50", "AP75"), nothing))
    images = [ImageChange(i, f"folder|x/{i:040}.jpg", 50.0, 50.0 - i, -i) for i in range(-5, 9)]
    sides = [[f"output/{side}{seed}" for seed in range(3)] for side in "ab"]
    settings = {"SOLVER.BASE_LR": ("0.01", "0.02")}
    return Comparison(*sides, 20, 1000, groups, images, settings)


def test_text_says_what_the_interval_means():
    comparison = large_comparison(4)
    text = render_text(comparison)
    assert "+1.2 (−0.5 to +3.0)" in text and "−1.2 to +3.7" in text and "−2.0 to +4.4" in text
    assert "of the images, not of the seeds" in explain(comparison) and explain(comparison) in text
    assert "5 better in b, 8 worse, 1 equal, 6 without objects" in text
    assert text.index("  +5.0  50.0 to 55.0") < text.index("  −8.0  50.0 to 42.0")
    assert "cannot be relied on" in text


@pytest.mark.parametrize(
    ("num_images", "num_seeds", "images", "images_and_seeds", "expected"),
    [
        (20, 1, (-0.84, 3.2), None, "The images do not decide between a and b (AP +1.4, −0.8 to"),
        (
            20,
            1,
            (0.1, 3.2),
            None,
            "b is ahead of a on images of this kind (AP +1.4, +0.1 to +3.2).",
        ),
        (20, 1, (-3.2, -0.1), None, "a is ahead of b on images of this kind (AP"),
        (20, 2, (0.1, 3.2), (-1.0, 4.0), "The images and seeds do not decide between a and b (AP"),
        (
            20,
            2,
            (-1.0, 2.0),
            (0.2, 4.0),
            "b is ahead of a on images of this kind, with other seeds",
        ),
        (20, 1, (0.0, 0.0), None, "The images do not decide"),
        (19, 1, (0.1, 3.2), None, "Fewer than 20 images do not decide between a and b (AP"),
    ],
)
def test_conclusion_is_that_of_the_interval(
    num_images, num_seeds, images, images_and_seeds, expected, tmp_path
):
    metric = Difference(50.0, 51.4, 1.4, images, images_and_seeds, (0.5, 1.0))
    group = Group("all", "all", num_images, dict.fromkeys(("AP", "AP50", "AP75"), metric))
    comparison = Comparison(["a"] * num_seeds, ["b"] * num_seeds, num_images, 1000, [group], [])
    conclusion = conclude(comparison)
    assert conclusion.startswith(expected)
    assert f"\n{conclusion}\n\n{explain(comparison)}" in render_text(comparison)
    assert f"**{conclusion}**" in render_markdown(comparison, tmp_path)


@pytest.mark.browser
@needs_browser[1]
@pytest.mark.parametrize("width", [360, 1280])
def test_page_fits_the_window(width, tmp_path):
    markdown = render_markdown(large_comparison(40), tmp_path)
    page = render_page(markdown, tmp_path, title="Comparison")
    found = measure_page(page, width, tmp_path)
    assert len(found["images"]) == 3
    assert "<b>" not in page and "+1.2 (−0.5 to +3.0)" in page
