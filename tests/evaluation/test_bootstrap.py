"""Intervals against Student's and Welch's, and how often they hold the truth."""

import math

import numpy as np
import pytest
from scipy.stats import binom, ttest_1samp, ttest_ind

from retinanet_ext.evaluation.bootstrap import (
    contrast,
    draw_weights,
    images_and_seeds_interval,
    percentile_interval,
    welch_interval,
)
from retinanet_ext.evaluation.weighted_ap import Matching

RNG = np.random.default_rng


def test_interval_of_a_mean_is_students_also_for_few():
    values = RNG(0).normal(size=12)
    resampled = values @ draw_weights(12, 40_000, RNG(1)) / 12
    low, high = percentile_interval(resampled, 12)
    students = ttest_1samp(values, 0).confidence_interval(0.95)
    assert high - low == pytest.approx(students.high - students.low, rel=0.05)
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=0.05)


def test_undefined_values_are_left_out():
    values = RNG(0).normal(size=(3, 1000))
    values[1, 500:], values[2] = np.nan, np.nan
    low, high = percentile_interval(values, 50)
    assert low[1] == percentile_interval(values[1, :500], 50)[0]
    assert np.isnan([low[2], high[2]]).all() and low[0] < 0 < high[0]


def test_without_variance_of_images_the_joint_interval_is_welchs():
    a, b = [40.0, 41.0, 39.5], [42.0, 43.5]
    sides = (np.repeat(np.array(side)[:, None], 40_001, axis=1) for side in (a, b))
    joint = images_and_seeds_interval(*sides, 87, RNG(0))
    assert np.array(joint) == pytest.approx(np.array(welch_interval(b, a)), rel=0.02)


def test_without_variance_of_seeds_the_joint_interval_is_that_over_images():
    values = RNG(0).normal(size=87)
    weights = np.concatenate([np.ones((87, 1)), draw_weights(87, 40_000, RNG(1))], axis=1)
    means = np.tile(values @ weights / 87, (3, 1))
    low, high = images_and_seeds_interval(np.zeros_like(means), means, 87, RNG(2))
    expected = percentile_interval(means[0, 1:], 87)
    assert np.array([low, high]) == pytest.approx(np.array(expected), rel=0.03, abs=0.01)


def test_the_joint_interval_holds_the_true_difference_of_three_seeds_per_side():
    """A reduced form of benchmarks/bench_compare.py seeds."""
    rng, num_images, repeats = RNG(0), 60, 400
    hits = {"joint": 0, "images": 0}
    for _ in range(repeats):
        a, b = (
            spread * rng.normal(size=num_images)
            + 0.2 * rng.normal(size=(3, 1))
            + 0.3 * rng.normal(size=(3, num_images))
            for spread in (0, 1)
        )
        weights = np.ones((num_images, 101)) / num_images
        weights[:, 1:] = draw_weights(num_images, 100, rng) / num_images
        a, b = a @ weights, b @ weights
        low, high = images_and_seeds_interval(a, b, num_images, rng)
        hits["joint"] += bool(low <= 0 <= high)
        low, high = percentile_interval((b - a).mean(axis=0)[1:], num_images)
        hits["images"] += bool(low <= 0 <= high)
    assert binom.ppf(0.001, repeats, 0.93) <= hits["joint"] <= binom.ppf(0.999, repeats, 0.97)
    assert hits["images"] < 0.85 * repeats  # it is not of the seeds


def test_the_interval_holds_the_true_difference_of_two_detectors():
    """A reduced form of benchmarks/bench_compare.py, with one class and one IoU threshold."""
    rng, population, size, repeats = RNG(0), 4000, 60, 300
    num_objects = rng.poisson(3, population)
    hard = rng.normal(size=population)
    image = np.repeat(np.arange(population), 2 * num_objects)  # as many false as true ones
    detectors = []
    for quality in (0.6, 0.9):
        is_true = np.arange(len(image)) % 2 == 0
        is_true &= rng.normal(size=len(image)) < quality + 1 - hard[image] / 2
        score = rng.normal(size=len(image)) + quality * is_true - hard[image] / 2
        order = np.argsort(-score)
        ignored = np.zeros((1, len(image)), bool)
        detectors.append(Matching(image[order], is_true[None, order], ignored, num_objects))

    def difference(a, b, weights):
        return (b.average_precision(weights) - a.average_precision(weights))[0]

    truth = difference(*detectors, np.ones((population, 1), np.int64))
    hits = 0
    for _ in range(repeats):
        images = rng.choice(population, size, replace=False)
        sample = [detector.select(images) for detector in detectors]
        resampled = difference(*sample, draw_weights(size, 200, rng))
        low, high = percentile_interval(resampled, size)
        hits += bool(low <= truth[0] <= high)
    # Of 95 % ± 2; the bounds are passed once in 1000 times.
    assert binom.ppf(0.001, repeats, 0.93) <= hits <= binom.ppf(0.999, repeats, 0.97), hits


def test_contrast_of_two_means_is_scipys_welch_test():
    a, b = [30.0, 31.0, 32.5], [28.0, 29.0]
    found, expected = contrast([(1.0, a), (-1.0, b)]), ttest_ind(a, b, equal_var=False)
    interval = expected.confidence_interval(0.95)
    assert found.value == pytest.approx(sum(a) / 3 - 28.5)
    assert found.p == pytest.approx(expected.pvalue)
    assert found.interval == pytest.approx((interval.low, interval.high))
    same = contrast([(1.0, [31.5, 31.5]), (-1.0, [31.0, 31.0])])
    assert (same.interval, same.p) == ((0.5, 0.5), 0.0)
    assert contrast([(1.0, [31.0, 31.5]), (-1.0, [31.0])]) is None


def test_contrast_of_two_leads_by_hand():
    """Four samples of variance 1/2, 2, 1/2 and 2, two values each: df = 2.5^2 / (2 (1/16 + 1))."""
    samples = [30.0, 31.0], [28.0, 30.0], [20.0, 21.0], [24.0, 26.0]
    found = contrast(list(zip((1.0, -1.0, -1.0, 1.0), samples, strict=True)))
    half = student_quantile(0.975, 2.5**2 / 2.125) * math.sqrt(2.5)
    assert found.value == 6.0  # 1.5 - (-4.5)
    assert found.interval == pytest.approx((6 - half, 6 + half), abs=1e-3)
    bound = student_quantile(1 - found.p / 2, 2.5**2 / 2.125) * math.sqrt(2.5)
    assert bound == pytest.approx(6.0, abs=1e-3)


def student_quantile(probability, df):
    """Return a quantile of Student's t from its density alone."""
    scale = math.gamma((df + 1) / 2) / math.gamma(df / 2) / math.sqrt(df * math.pi)
    x, mass, step = 0.0, 0.5, 1e-4
    while mass < probability:
        mass += step * scale * (1 + (x + step / 2) ** 2 / df) ** (-(df + 1) / 2)
        x += step
    return x
