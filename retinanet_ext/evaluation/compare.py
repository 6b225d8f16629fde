"""Difference in AP between two detectors on the same images, with bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from retinanet_ext.evaluation.bootstrap import (
    Array,
    draw_weights,
    images_and_seeds_interval,
    percentile_interval,
    welch_interval,
)
from retinanet_ext.evaluation.detection_metrics import AREAS
from retinanet_ext.evaluation.weighted_ap import Matchings, mean_of_defined

METRICS = {"AP": slice(None), "AP50": slice(0, 1), "AP75": slice(5, 6)}
"""Name -> its IoU thresholds among COCO's ten."""

Bounds = tuple[float, float]


@dataclass(frozen=True)
class Difference:
    """A metric of two detectors, in percent; means over the seeds where there are several.

    A number is NaN where the metric is not defined, because there are no such objects.

    Attributes:
        a, b: the metric of either
        difference: b - a
        images: 95 % interval of the difference over images
        images_and_seeds: 95 % interval over images and seeds; None with one seed on a side
        seeds: Welch's 95 % interval over seeds, for these images; None with one seed on a side
    """

    a: float
    b: float
    difference: float
    images: Bounds
    images_and_seeds: Bounds | None = None
    seeds: Bounds | None = None


@dataclass(frozen=True)
class Group:
    """Objects whose AP is compared.

    Attributes:
        kind: "all", "size" or "class"
        name: "all", one of COCO's sizes, or a class name
        num_images: number of images with such objects
        metrics: one difference per name of :data:`METRICS`
    """

    kind: str
    name: str
    num_images: int
    metrics: dict[str, Difference]


@dataclass(frozen=True)
class ImageChange:
    """AP of one image by itself, in percent; a mean over the seeds where there are several."""

    image_id: int | str
    file_name: str
    a: float
    b: float
    change: float


@dataclass(frozen=True)
class Comparison:
    """Two detectors, or two groups of seeds, on the same images.

    Attributes:
        a, b: what is compared, such as the folders of runs
        num_images: number of test images
        num_resamples: number of resamples of the images
        groups: all objects first, then sizes, then classes
        images: the images with objects; the first gained most from a to b, the last lost most
        settings: config key -> its values in a and b, where they differ
    """

    a: Sequence[str]
    b: Sequence[str]
    num_images: int
    num_resamples: int
    groups: Sequence[Group]
    images: Sequence[ImageChange]
    settings: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def has_seeds(self) -> bool:
        """Return whether both sides have several runs."""
        return min(len(self.a), len(self.b)) > 1


def compare(
    a: Sequence[Matchings],
    b: Sequence[Matchings],
    class_names: Sequence[str],
    *,
    num_resamples: int,
    seed: int = 0,
) -> list[Group]:
    """Return the differences in AP, AP50 and AP75: overall, by size of object and by class.

    Every resample draws as many images as there are, with replacement, and the same ones for all
    detectors. The result depends only on the arguments.

    Args:
        a, b: one detector per side or several (seeds), matched on the same images
        class_names: names of classes 0..K-1
        num_resamples: number of resamples, at least 1
        seed: of the resampling
    """
    generator = np.random.default_rng(seed)
    num_images = len(a[0].image_ids)
    once = np.ones((num_images, 1), np.int64)
    weights = np.concatenate([once, draw_weights(num_images, num_resamples, generator)], axis=1)
    values_a, values_b = (
        np.stack([summarize(run.average_precision(weights)) for run in side]) for side in (a, b)
    )
    resampled = (values_b.mean(axis=0) - values_a.mean(axis=0))[..., 1:]
    intervals = {"images": percentile_interval(resampled, num_images)}
    if min(len(a), len(b)) > 1:
        intervals["images_and_seeds"] = images_and_seeds_interval(
            values_a, values_b, num_images, generator
        )
    groups = []
    for row, (kind, name, number) in enumerate(_list_groups(a[0], class_names)):
        metrics = {}
        for column, metric in enumerate(METRICS):
            bounds = {
                key: (float(low[row, column]), float(high[row, column]))
                for key, (low, high) in intervals.items()
            }
            seeds = values_a[:, row, column, 0], values_b[:, row, column, 0]
            metrics[metric] = _difference(*seeds, **bounds)
        groups.append(Group(kind, name, number, metrics))
    return groups


def _difference(a: Array, b: Array, **intervals: Bounds) -> Difference:
    """Return the difference of a metric from its values per seed."""
    mean_a, mean_b = float(a.mean()), float(b.mean())
    is_defined = not math.isnan(mean_a)
    seeds = welch_interval(b.tolist(), a.tolist()) if is_defined else None
    return Difference(mean_a, mean_b, mean_b - mean_a, seeds=seeds, **intervals)


def summarize(ap: Array) -> Array:
    """Return AP, AP50 and AP75 in percent per group, (4 + K, 3, B), from (T, K, 4, B) AP.

    The groups are all objects, the three sizes and the classes. As in COCO, classes without objects
    are left out of a mean.
    """
    metrics = np.stack([100 * ap[ious].mean(axis=0) for ious in METRICS.values()])
    over_classes = mean_of_defined(metrics, axis=1).swapaxes(0, 1)
    return np.concatenate([over_classes, metrics[:, :, 0].swapaxes(0, 1)])


def compare_images(
    a: Sequence[Matchings], b: Sequence[Matchings], file_names: Mapping[int | str, str]
) -> list[ImageChange]:
    """Return the images with objects; the first gained most from a to b, the last lost most."""
    of_a, of_b = (100 * np.mean([run.image_ap() for run in side], axis=0) for side in (a, b))
    changes = [
        ImageChange(image_id, file_names[image_id], ap_a, ap_b, ap_b - ap_a)
        for image_id, ap_a, ap_b in zip(a[0].image_ids, of_a.tolist(), of_b.tolist(), strict=True)
        if not math.isnan(ap_a)
    ]
    return sorted(changes, key=lambda image: -image.change)


def _list_groups(run: Matchings, class_names: Sequence[str]) -> list[tuple[str, str, int]]:
    """Return kind, name and number of images with objects of the groups of `summarize`."""
    has_objects = run.num_objects > 0
    names = [("all" if area == "all" else "size", area) for area in AREAS]
    names += [("class", name) for name in class_names]
    numbers = [*has_objects.any(axis=0).sum(axis=-1), *has_objects[:, 0].sum(axis=-1)]
    return [(*name, int(number)) for name, number in zip(names, numbers, strict=True)]
