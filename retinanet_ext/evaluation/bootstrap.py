"""Confidence intervals of a difference: over resampled images, over seeds, and over both.

Source: B. Efron and R. Tibshirani, An Introduction to the Bootstrap, 1993, chapters 13 and 14.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, ttest_ind

LEVEL = 0.95
JACKKNIFE_GROUPS = 200

Array = NDArray[np.float64]


def draw_weights(
    num_images: int, num_resamples: int, generator: np.random.Generator
) -> NDArray[np.int64]:
    """Return how often each of I images is drawn if I are drawn with replacement, (I, B)."""
    shares = np.full(num_images, 1 / num_images)
    return generator.multinomial(num_images, shares, size=num_resamples).T


def jackknife_weights(num_images: int) -> NDArray[np.int64]:
    """Return weights that leave out one image, or one of 200 groups of images, each: (I, J)."""
    groups = np.arange(num_images) % JACKKNIFE_GROUPS
    return (groups[:, None] != np.unique(groups)).astype(np.int64)


def percentile_interval(resampled: Array) -> tuple[Array, Array]:
    """Return the bounds of the central 95 % of resampled values (section 13.3).

    Args:
        resampled: (..., B); NaN where a value is not defined. Those are left out.

    Returns:
        lower and upper bounds, each (...); NaN where no value is defined
    """
    levels = np.empty((2, *resampled.shape[:-1]))
    levels[0], levels[1] = (1 - LEVEL) / 2, (1 + LEVEL) / 2
    return _quantiles(resampled, levels)


def bca_interval(estimate: Array, resampled: Array, jackknife: Array) -> tuple[Array, Array]:
    """Return bias-corrected and accelerated intervals (equation 14.10).

    They are percentiles whose levels are shifted by the share of resampled values below the
    estimate, and by the skewness of the jackknife values.

    Args:
        estimate: values of the data themselves, (...)
        resampled: (..., B), as for :func:`percentile_interval`
        jackknife: values without one image, or one group of images, (..., J)

    Returns:
        lower and upper bounds, each (...); NaN where no value is defined
    """
    centre = estimate[..., None]
    num_defined = np.maximum((~np.isnan(resampled)).sum(axis=-1), 1)
    below = (resampled < centre).sum(axis=-1) + (resampled == centre).sum(axis=-1) / 2
    bias = norm.ppf(np.clip(below / num_defined, 1e-3, 1 - 1e-3))
    deviation = np.nan_to_num(jackknife.mean(axis=-1, keepdims=True) - jackknife)
    spread = (deviation**2).sum(axis=-1)
    acceleration = (deviation**3).sum(axis=-1) / (6 * np.where(spread > 0, spread, 1) ** 1.5)
    levels = []
    for tail in norm.ppf([(1 - LEVEL) / 2, (1 + LEVEL) / 2]):
        shifted = bias + tail
        levels.append(norm.cdf(bias + shifted / (1 - acceleration * shifted)))
    return _quantiles(resampled, np.array(levels))


def _quantiles(values: Array, levels: Array) -> tuple[Array, Array]:
    """Return two quantiles per row of (..., B) values, whose levels are (2, ...)."""
    bounds = np.full(levels.shape, np.nan)
    for index in np.ndindex(values.shape[:-1]):
        defined = values[index][~np.isnan(values[index])]
        if len(defined):
            bounds[(slice(None), *index)] = np.quantile(defined, levels[(slice(None), *index)])
    return bounds[0], bounds[1]


def resample_seeds(values: Array, generator: np.random.Generator) -> Array:
    """Return means over seeds that are drawn with replacement, another draw per resample.

    The mean of S drawn seeds varies by (S - 1) / S of the variance of a mean over S new ones, which
    is much for two or three seeds. So its distance from the mean of all is divided by the root.

    Args:
        values: (S, ..., B), at least two seeds

    Returns:
        (..., B)
    """
    num_seeds, num_resamples = len(values), values.shape[-1]
    drawn = generator.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), num_resamples).T
    drawn = drawn.reshape(num_seeds, *[1] * (values.ndim - 2), num_resamples)
    mean = values.mean(axis=0)
    distance = (values * drawn).sum(axis=0) / num_seeds - mean
    return mean + distance * np.sqrt(num_seeds / (num_seeds - 1))


def welch_interval(a: Sequence[float], b: Sequence[float]) -> tuple[float, float] | None:
    """Return Welch's 95 % t interval of mean(a) - mean(b), or None if a or b has one value only."""
    if min(len(a), len(b)) < 2:
        return None
    difference = fmean(a) - fmean(b)
    if stdev(a) == stdev(b) == 0:
        return difference, difference
    interval = ttest_ind(a, b, equal_var=False).confidence_interval(LEVEL)
    return float(interval.low), float(interval.high)
