"""Confidence intervals of a difference: over resampled images, over seeds, and over both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, variance

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, t

from retinanet_ext.evaluation.weighted_ap import mean_of_defined

LEVEL = 0.95

Array = NDArray[np.float64]


def draw_weights(
    num_images: int, num_resamples: int, generator: np.random.Generator
) -> NDArray[np.int64]:
    """Return how often each of I images is drawn if I are drawn with replacement, (I, B)."""
    shares = np.full(num_images, 1 / num_images)
    return generator.multinomial(num_images, shares, size=num_resamples).T


def percentile_interval(resampled: Array, sample_size: int) -> tuple[Array, Array]:
    """Return expanded percentile intervals of 95 % from resampled values.

    Plain percentiles are too narrow for small samples, because resampled values have (n - 1) / n of
    the variance, and because the variance itself is estimated. The levels make up for both: 2.3 and
    97.7 % for n = 87 in place of 2.5 and 97.5 %.

    Source: T. Hesterberg, What Teachers Should Know About the Bootstrap, The American Statistician
    69 (2015), doi 10.1080/00031305.2015.1089789.

    Args:
        resampled: (..., B); NaN where a value is not defined. Those are left out.
        sample_size: number n of what is resampled, at least 2

    Returns:
        lower and upper bounds, each (...); NaN where no value is defined
    """
    quantile = t.ppf((1 + LEVEL) / 2, sample_size - 1)
    level = norm.cdf(quantile * np.sqrt(sample_size / (sample_size - 1)))
    bounds = np.full((2, *resampled.shape[:-1]), np.nan)
    for index in np.ndindex(resampled.shape[:-1]):
        values = resampled[index]
        values = values[~np.isnan(values)]
        if len(values):
            bounds[(slice(None), *index)] = np.quantile(values, (1 - level, level))
    return bounds[0], bounds[1]


def images_and_seeds_interval(
    a: Array, b: Array, num_images: int, generator: np.random.Generator
) -> tuple[Array, Array]:
    """Return 95 % intervals of mean(b) - mean(a) over images and seeds together.

    The standard error is that of values whose images are resampled jointly, and whose seeds are
    resampled within a side. Student's quantile has Welch's degrees of freedom, of three parts of
    the variance: images, seeds of a, seeds of b. With two or three seeds percentiles would be far
    too narrow.

    Args:
        a, b: values per seed, (S, ..., 1 + B): of the images themselves, then of resampled images;
            at least two seeds
        num_images: number of images
        generator: draws the seeds

    Returns:
        lower and upper bounds, each (...); NaN where the values are not defined
    """
    estimate = b[..., 0].mean(axis=0) - a[..., 0].mean(axis=0)
    resampled = _resample_seeds(b[..., 1:], generator) - _resample_seeds(a[..., 1:], generator)
    centre = mean_of_defined(resampled, axis=-1)
    total = mean_of_defined((resampled - centre[..., None]) ** 2, axis=-1)
    of_seeds = [side[..., 0].var(axis=0, ddof=1) / len(side) for side in (a, b)]
    of_images = np.maximum(total - sum(of_seeds), 0)
    squares = of_images**2 / (num_images - 1)
    for side, part in zip((a, b), of_seeds, strict=True):
        squares = squares + part**2 / (len(side) - 1)
    freedom = total**2 / np.where(squares > 0, squares, 1)
    half = np.where(total > 0, t.ppf((1 + LEVEL) / 2, np.maximum(freedom, 1)), 0) * np.sqrt(total)
    return estimate - half, estimate + half


def _resample_seeds(values: Array, generator: np.random.Generator) -> Array:
    """Return means over S seeds drawn with replacement, from (S, ..., B) to (..., B).

    Such means have (S - 1) / S of the variance of means over new seeds, so their distances from the
    mean of all are enlarged.
    """
    num_seeds, num_resamples = len(values), values.shape[-1]
    times = draw_weights(num_seeds, num_resamples, generator)
    times = times.reshape(num_seeds, *[1] * (values.ndim - 2), num_resamples)
    mean = values.mean(axis=0)
    distance = (values * times).sum(axis=0) / num_seeds - mean
    return mean + distance * np.sqrt(num_seeds / (num_seeds - 1))


@dataclass(frozen=True)
class MeanDifference:
    """A weighted sum of means over seeds, with Welch's 95 % t interval and two-sided p."""

    value: float
    interval: tuple[float, float]
    p: float


def contrast(terms: Sequence[tuple[float, Sequence[float]]]) -> MeanDifference | None:
    """Compare means over seeds by Welch's t test, with Satterthwaite's degrees of freedom.

    The terms +1 and -1 give Welch's test of two means; four terms compare two differences.

    Args:
        terms: pairs of a factor and the values per seed

    Returns:
        the sum of factor x mean; None if a term has fewer than two values
    """
    if min(len(values) for _, values in terms) < 2:
        return None
    value = sum(factor * fmean(values) for factor, values in terms)
    parts = [factor**2 * variance(values) / len(values) for factor, values in terms]
    total = sum(parts)
    if total == 0:
        return MeanDifference(value, (value, value), float(value == 0))
    squares = [part**2 / (len(values) - 1) for part, (_, values) in zip(parts, terms, strict=True)]
    freedom, error = total**2 / sum(squares), total**0.5
    half = float(t.ppf((1 + LEVEL) / 2, freedom)) * error
    p = 2 * float(t.sf(abs(value) / error, freedom))
    return MeanDifference(value, (value - half, value + half), p)


def welch_interval(a: Sequence[float], b: Sequence[float]) -> tuple[float, float] | None:
    """Return Welch's 95 % t interval of mean(a) - mean(b), or None if a or b has one value only."""
    found = contrast([(1.0, a), (-1.0, b)])
    return found.interval if found else None
