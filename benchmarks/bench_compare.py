"""Intervals of ``retinanet-ext compare``: how often they hold the true difference, and their time.

python benchmarks/bench_compare.py coverage --images 30 87 --save
python benchmarks/bench_compare.py seeds --images 87 --repeat 400 --save
python benchmarks/bench_compare.py time --images 5000 --classes 80 --save

``coverage`` draws many images and the detections of two detectors, whose difference over all of
them is the truth. It samples images again and again and counts how often an interval of the sample
holds the truth. Beside the interval that ``compare`` gives are the plain percentile interval and
BCa (B. Efron and R. Tibshirani, An Introduction to the Bootstrap, 1993, equation 14.10).

``seeds`` does so for several trainings per side and a mean over images in place of AP: a part that
is of the image (standard deviation 1), one of the training, and one of both together.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from common import argument_parser, save
from scipy.stats import norm
from tabulate import tabulate

from retinanet_ext.evaluation.bootstrap import (
    Array,
    draw_weights,
    images_and_seeds_interval,
    percentile_interval,
    welch_interval,
)
from retinanet_ext.evaluation.box_data import BoxData
from retinanet_ext.evaluation.compare import METRICS, compare, compare_images, summarize
from retinanet_ext.evaluation.weighted_ap import Matchings

OBJECTS = (12.0, 1.0, 1.0)
"""Mean number of objects per image of each class, about BCCD's."""

QUALITY_A, QUALITY_B = 1.6, 1.8

SPREADS = ((0.1, 0.5), (0.2, 0.5), (0.1, 2.0))
"""Standard deviations of a training, and of a training and an image together."""


def draw_images(num_images: int, rates: tuple[float, ...], rng: np.random.Generator) -> Any:
    """Return a COCO json, and how hard each image and each object is to detect."""
    annotations = []
    for image in range(1, num_images + 1):
        for label, rate in enumerate(rates, start=1):
            for _ in range(rng.poisson(rate)):
                width = float(np.exp(rng.normal(4, 0.6)))
                height = width * float(np.exp(rng.normal(0, 0.2)))
                x, y = rng.uniform(0, 1900, 2).tolist()
                annotation = {"image_id": image, "category_id": label, "iscrowd": 0}
                annotation |= {"bbox": [x, y, width, height], "area": width * height}
                annotations.append({"id": len(annotations) + 1, **annotation})
    of_images = rng.normal(size=num_images)
    indices = [annotation["image_id"] - 1 for annotation in annotations]
    hardness = 0.7 * of_images[indices] + 0.7 * rng.normal(size=len(annotations))
    content = {
        "info": {},
        "images": [{"id": i + 1, "width": 2000, "height": 2000} for i in range(num_images)],
        "categories": [{"id": i + 1, "name": f"class {i}"} for i in range(len(rates))],
        "annotations": annotations,
    }
    return content, of_images, hardness


def detect(
    drawn: Any, quality: float, rates: tuple[float, ...], rng: np.random.Generator
) -> list[dict[str, Any]]:
    """Return detections: hard objects are missed, scored low and located badly."""
    content, of_images, hardness = drawn
    annotations = content["annotations"]
    error = hardness + 0.7 * rng.normal(size=len(annotations))
    shifts = 0.11 / quality * np.exp(0.3 * error)[:, None] * rng.normal(size=(len(error), 4))
    scores = 1 / (1 + np.exp(-(quality - error + 0.5 * rng.normal(size=len(error)) - 1)))
    found = []
    for index in np.flatnonzero(error < quality):
        annotation = annotations[index]
        (x, y, w, h), (dx, dy, dw, dh) = annotation["bbox"], shifts[index]
        box = [x + dx * w, y + dy * h, w * np.exp(dw), h * np.exp(dh)]
        ids = {key: annotation[key] for key in ("image_id", "category_id")}
        found.append({**ids, "bbox": box, "score": float(scores[index])})
    for image, hard in enumerate(of_images, start=1):
        for label, rate in enumerate(rates, start=1):
            for _ in range(rng.poisson(0.3 * rate * np.exp(0.4 * hard))):
                box = [*rng.uniform(0, 1900, 2).tolist(), 50.0, 50.0]
                score = float(1 / (1 + np.exp(1.2 - rng.normal())))
                ids = {"image_id": image, "category_id": label}
                found.append({**ids, "bbox": box, "score": score})
    return found


def bca_interval(estimate: Array, resampled: Array, jackknife: Array) -> tuple[Array, Array]:
    """Return bias-corrected and accelerated intervals of rows."""
    below = (resampled < estimate[:, None]).mean(1) + (resampled == estimate[:, None]).mean(1) / 2
    bias = norm.ppf(np.clip(below, 1e-3, 1 - 1e-3))
    deviation = jackknife.mean(1, keepdims=True) - jackknife
    acceleration = (deviation**3).sum(1) / 6 / ((deviation**2).sum(1) ** 1.5)
    bounds = []
    for tail in norm.ppf([0.025, 0.975]):
        levels = norm.cdf(bias + (bias + tail) / (1 - acceleration * (bias + tail)))
        bounds.append(
            np.array([np.quantile(*pair) for pair in zip(resampled, levels, strict=True)])
        )
    return bounds[0], bounds[1]


def measures(run: Matchings, weights: Array) -> Array:
    """Return AP, AP50 and AP75 over all objects and AP of the second, rare class: (4, B)."""
    groups = summarize(run.average_precision(weights))
    return np.concatenate([groups[0], groups[-2, :1]])


def sample_intervals(
    a: Matchings, b: Matchings, resamples: int, rng: np.random.Generator
) -> dict[str, tuple[Array, Array]]:
    """Return each kind of interval of b - a on a sample of images."""
    n = len(a.image_ids)
    parts = (np.ones((n, 1), np.int64), 1 - np.eye(n, dtype=np.int64))
    weights = np.concatenate([*parts, draw_weights(n, resamples, rng)], axis=1)
    difference = measures(b, weights) - measures(a, weights)
    estimate, jackknife, resampled = np.split(difference, [1, n + 1], axis=1)
    return {
        "compare's": percentile_interval(resampled, n),
        "percentile": tuple(np.quantile(resampled, (0.025, 0.975), axis=1)),
        "BCa": bca_interval(estimate[:, 0], resampled, jackknife),
    }


def coverage(args: Any) -> list[dict[str, Any]]:
    """Return the share of samples whose interval holds the true difference."""
    rng = np.random.default_rng(args.seed)
    drawn = draw_images(args.population, OBJECTS, rng)
    detectors = []
    for quality in (QUALITY_A, QUALITY_B):
        found = detect(drawn, quality, OBJECTS, rng)
        run = Matchings.compute(BoxData.from_coco(drawn[0], found))
        # The sizes would take the time and are not looked at.
        detectors.append(Matchings(run.image_ids, [row[:1] for row in run.cells]))
    once = np.ones((args.population, 1), np.int64)
    values = [measures(run, once)[:, 0] for run in detectors]
    print("AP, AP50, AP75, AP of a rare class over all images:", *(x.round(2) for x in values))
    truth = values[1] - values[0]
    rows = []
    for num_images in args.images:
        hits: dict[str, list[Array]] = {}
        widths: dict[str, list[float]] = {}
        for _ in range(args.repeat):
            images = np.sort(rng.choice(args.population, num_images, replace=False))
            sample = [run.select(images) for run in detectors]
            for name, (low, high) in sample_intervals(*sample, args.resamples, rng).items():
                hits.setdefault(name, []).append((low <= truth) & (truth <= high))
                widths.setdefault(name, []).append(high[0] - low[0])
        for name, found in hits.items():
            row = {"images": num_images, "interval": name}
            shares = 100 * np.mean(found, axis=0)
            for metric, share in zip((*METRICS, "AP of a rare class"), shares, strict=True):
                row[f"{metric}: %"] = f"{share:.1f}"
            rows.append({**row, "mean width, AP": float(np.mean(widths[name]))})
    return rows


def seeds(args: Any) -> list[dict[str, Any]]:
    """Return how often intervals of trainings with several seeds hold the true difference, 0."""
    rng = np.random.default_rng(args.seed)
    (n,) = args.images
    rows = []
    for num_seeds in (2, 3, 5):
        for of_training, of_both in SPREADS:
            hits: dict[str, list[bool]] = {}
            for _ in range(args.repeat):
                of_image = np.array([[0.0], [1.0]]) * rng.normal(size=n)
                a, b = (
                    side
                    + of_training * rng.normal(size=(num_seeds, 1))
                    + of_both * rng.normal(size=(num_seeds, n))
                    for side in of_image
                )
                drawn = draw_weights(n, args.resamples, rng)
                weights = np.concatenate([np.ones((n, 1)), drawn], axis=1) / n
                a, b = a @ weights, b @ weights
                for name, (low, high) in {
                    "images and seeds": images_and_seeds_interval(a, b, n, rng),
                    "images": percentile_interval((b.mean(0) - a.mean(0))[1:], n),
                    "seeds (Welch)": welch_interval(b[:, 0].tolist(), a[:, 0].tolist()),
                }.items():
                    hits.setdefault(name, []).append(bool(low <= 0 <= high))
            row = {"seeds": num_seeds, "of a training": of_training, "of both": of_both}
            rows.append(row | {f"{k}: %": f"{100 * np.mean(v):.1f}" for k, v in hits.items()})
    return rows


def times(args: Any) -> list[dict[str, Any]]:
    """Return the seconds that each part of a comparison of two detectors takes."""
    rng = np.random.default_rng(args.seed)
    rates = tuple([7 / args.classes] * args.classes)
    (num_images,) = args.images
    drawn = draw_images(num_images, rates, rng)
    found = [detect(drawn, quality, rates, rng) for quality in (QUALITY_A, QUALITY_B)]
    start = time.perf_counter()
    a, b = (Matchings.compute(BoxData.from_coco(drawn[0], each)) for each in found)
    matched = time.perf_counter()
    names = [category["name"] for category in drawn[0]["categories"]]
    compare([a], [b], names, num_resamples=args.resamples)
    compared = time.perf_counter()
    compare_images([a], [b], dict.fromkeys(a.image_ids, ""))
    parts = {
        "matching, both": matched - start,
        f"{args.resamples} resamples, both": compared - matched,
        "AP of each image, both": time.perf_counter() - compared,
    }
    size = f"{num_images} images, {args.classes} classes, {len(found[0])} detections"
    return [{"part": p, "data": size, "seconds": round(s, 1)} for p, s in parts.items()]


def main() -> None:
    """Print the table, and save it if asked to."""
    parser = argument_parser(__doc__.splitlines()[0], repeat=1000)
    parser.add_argument("what", choices=("coverage", "seeds", "time"))
    parser.add_argument("--images", type=int, nargs="+", default=[87])
    parser.add_argument("--classes", type=int, default=80, help="of time")
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--population", type=int, default=4000, help="of coverage: images in all")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    rows = {"coverage": coverage, "seeds": seeds, "time": times}[args.what](args)
    print(tabulate(rows, headers="keys"))
    if args.save:
        print(f"Wrote {save(f'compare_{args.what}', rows, args)}")


if __name__ == "__main__":
    main()
