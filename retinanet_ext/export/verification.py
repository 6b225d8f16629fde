"""An exported file, run in its own runtime, beside the model itself on real images.

Shapes: N images, C channels, K classes, M detections of one image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from torchvision.ops import clip_boxes_to_image

from retinanet_ext.errors import UnexpectedResultsError
from retinanet_ext.export.formats import Run
from retinanet_ext.modeling import RetinaNetExt
from retinanet_ext.modeling.inference import Candidates

LOGIT, SCORE, PIXELS = 1e-3, 1e-3, 0.1
"""Largest differences that are allowed: of logits and deltas (of the largest of them, if that is
above 1), of scores, and of corners in pixels."""

THUMBNAIL = (100, 64)
"""Height and width of the smallest image that is tried."""


@dataclass(frozen=True)
class Case:
    """Images that both programs get: a name, and uint8 (N, C, H, W)."""

    name: str
    images: np.ndarray


@dataclass(frozen=True)
class Comparison:
    """The largest differences of one case.

    Attributes:
        case: its name, number of images and size
        values: largest difference of scores; of ``raw`` that of logits and deltas, as a fraction of
            the largest of them if that is above 1
        pixels: largest difference of anchors or corners
        detections: of all images of the case by the model; None for the form ``raw``
    """

    case: str
    values: float
    pixels: float
    detections: int | None

    def __str__(self) -> str:
        found = "" if self.detections is None else f"{self.detections} detections, "
        return f"{self.case}: {found}differences {self.values:.1e}, {self.pixels:.1e} pixels"


def make_cases(
    photos: Sequence[np.ndarray], model: RetinaNetExt, thresholds: Sequence[float], min_side: int
) -> list[Case]:
    """Return one and two images, landscape and portrait, with and without objects, and a small one.

    The image without objects is black, white or of the mean pixel, whichever has the fewest
    detections.

    Args:
        photos: one or two images as the program takes them, uint8 (C, H, W)
        model: in eval mode, on the CPU
        thresholds: lowest score of a detection of each class, (K,)
        min_side: smallest height and width that the program takes
    """
    first, last = (_at_least(photo, min_side) for photo in (photos[0], photos[-1]))
    if first.shape[1] > first.shape[2]:
        first = first.transpose(0, 2, 1)
    turned, flipped = first.transpose(0, 2, 1), first[:, :, ::-1]
    colours = [np.zeros(len(first)), np.full(len(first), 255), model.pixel_mean.flatten().numpy()]
    # With noise, because in a plain image many scores are equal and any of them may be the best.
    noise = np.random.default_rng(0).integers(-3, 4, first.shape)
    plain = [(c[:, None, None] + noise).clip(0, 255).astype(np.uint8) for c in colours]
    counts = [len(found.scores) for found in _detections(model, np.stack(plain), thresholds)]
    empty = plain[int(np.argmin(counts))]
    cases = [
        Case("landscape", first[None]),
        Case("portrait", turned[None]),
        Case("plain", empty[None]),
        Case("landscape twice", np.stack([first, flipped])),
        Case("portrait and plain", np.stack([turned, empty.transpose(0, 2, 1)])),
        Case("another", last[None]),
    ]
    if min_side <= min(THUMBNAIL):
        height, width = THUMBNAIL
        cases.append(Case("thumbnail", _at_least(first, height)[None, :, :height, :width]))
    return [Case(case.name, np.ascontiguousarray(case.images)) for case in cases]


def _at_least(image: np.ndarray, side: int) -> np.ndarray:
    """Repeat an image (C, H, W) until its height and width are at least ``side``."""
    missing = [(0, max(side - length, 0)) for length in image.shape[1:]]
    return np.pad(image, [(0, 0), *missing], mode="wrap")


def verify(
    run: Run, model: RetinaNetExt, form: str, thresholds: Sequence[float], cases: Sequence[Case]
) -> list[Comparison]:
    """Compare the outputs of a file with the model's, as sets of detections.

    Args:
        run: the file in its own runtime
        model: in eval mode, on the CPU
        form: of the file
        thresholds: lowest score of a detection of each class, (K,)
        cases: from :func:`make_cases`

    Raises:
        UnexpectedResultsError: they differ by more than rounding
    """
    comparisons = []
    for case in cases:
        size = " x ".join(map(str, case.images.shape[2:]))
        name = f"{case.name} ({len(case.images)} x {size})"
        if form == "raw":
            compared = _compare_raw(name, run(case.images), model, case.images)
        else:
            compared = _compare_sets(name, run(case.images), model, form, thresholds, case.images)
        allowed = LOGIT if form == "raw" else SCORE
        if not (compared.values <= allowed and compared.pixels <= PIXELS):
            raise UnexpectedResultsError(
                f"the exported file differs from the model on {compared}; allowed are "
                f"{allowed:g} and {PIXELS:g} pixels; no file is left"
            )
        comparisons.append(compared)
    return comparisons


def _compare_raw(
    name: str, found: Sequence[np.ndarray], model: RetinaNetExt, images: np.ndarray
) -> Comparison:
    features, (logits, deltas) = _predict(model, images)
    expected = [
        torch.cat([permute_to_N_HWA_K(level, model.num_classes) for level in logits], 1),
        torch.cat([permute_to_N_HWA_K(level, 4) for level in deltas], 1),
        torch.cat([level.tensor for level in model.anchor_generator(features)]),
    ]
    largest = [max(float(level.abs().max()), 1.0) for level in expected[:2]]
    logits, deltas, anchors = map(_difference, found, expected)
    return Comparison(name, max(logits / largest[0], deltas / largest[1]), anchors, None)


def _difference(found: np.ndarray, expected: torch.Tensor) -> float:
    if found.shape != expected.shape:
        return np.inf
    return float(np.abs(found.astype(np.float64) - expected.numpy()).max())


@torch.no_grad()
def _predict(
    model: RetinaNetExt, images: np.ndarray
) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
    batch = model.preprocess_image([{"image": image} for image in torch.from_numpy(images)])
    features = model.backbone(batch.tensor)
    features = [features[name] for name in model.head_in_features]
    return features, model.head(features)


def _compare_sets(
    name: str,
    found: Sequence[np.ndarray],
    model: RetinaNetExt,
    form: str,
    thresholds: Sequence[float],
    images: np.ndarray,
) -> Comparison:
    lowest = np.array(thresholds, np.float32)
    if form == "boxes":
        lowest = np.full_like(lowest, model.test_score_thresh)
        expected, limit = _candidates(model, images), model.test_topk_candidates
    else:
        expected, limit = _detections(model, images, thresholds), model.max_detections_per_image
    values = pixels = 0.0
    for boxes, scores, classes, wanted in zip(*found, expected, strict=True):
        rows = scores > (model.test_score_thresh if form == "boxes" else 0)
        have = Candidates(boxes[rows], scores[rows], classes[rows])
        cut, may_differ = lowest, 0
        if form == "detections" and not lowest.any():
            # Among scores near 0, rounding decides which of two overlapping boxes remains.
            cut, may_differ = np.full_like(lowest, -np.inf), len(wanted.scores) // 10
        elif len(wanted.scores) >= limit:  # rounding decides which is the last
            if form == "boxes":  # of each level, from either side
                may_differ = 2 * len(model.head_in_features)
            else:
                last = max(each.scores.min(initial=1) for each in (have, wanted))
                cut = np.maximum(lowest, last)
        for one, other in ((have, wanted), (wanted, have)):
            value, pixel = largest_differences(one, other, cut, may_differ)
            values, pixels = max(values, value), max(pixels, pixel)
    return Comparison(name, values, pixels, sum(len(wanted.scores) for wanted in expected))


def _candidates(model: RetinaNetExt, images: np.ndarray) -> list[Candidates]:
    candidates = model.decode(*_predict(model, images))
    size = images.shape[2:]
    return [
        _to_numpy(each._replace(boxes=clip_boxes_to_image(each.boxes, size))) for each in candidates
    ]


@torch.no_grad()
def _detections(
    model: RetinaNetExt, images: np.ndarray, lowest: Sequence[float]
) -> list[Candidates]:
    outputs = model([{"image": image} for image in torch.from_numpy(images)])
    found = [output["instances"] for output in outputs]
    found = [each[each.scores >= torch.tensor(lowest)[each.pred_classes]] for each in found]
    return [
        _to_numpy(Candidates(each.pred_boxes.tensor, each.scores, each.pred_classes))
        for each in found
    ]


def _to_numpy(candidates: Candidates) -> Candidates:
    return Candidates(*(values.numpy() for values in candidates))


def largest_differences(
    one: Candidates, other: Candidates, lowest: np.ndarray, may_differ: int = 0
) -> tuple[float, float]:
    """Return the largest difference of scores and corners of ``one`` to the nearest of ``other``.

    A detection has the nearest detection of its class as its counterpart. One without a
    counterpart does not count if its score is the lowest of its class to rounding.

    Args:
        one, other: detections of one image, as arrays
        lowest: lowest score of each class, (K,)
        may_differ: number of detections that may lack a counterpart
    """
    rows = []
    for box, score, label in zip(*one, strict=True):
        same = other.classes == label
        # What is no number is infinitely far, so that it does not pass as equal.
        scores = np.nan_to_num(np.abs(other.scores[same] - score), nan=np.inf)
        pixels = np.nan_to_num(np.abs(other.boxes[same] - box).max(axis=1, initial=0), nan=np.inf)
        distance = np.maximum(scores / SCORE, pixels / PIXELS)
        nearest = distance.argmin() if same.any() else None
        if (nearest is None or distance[nearest] > 1) and abs(score - lowest[label]) <= SCORE:
            continue
        rows.append((float(score), np.inf) if nearest is None else
                    (float(scores[nearest]), float(pixels[nearest])))  # fmt: skip
    rows.sort(key=lambda row: max(row[0] / SCORE, row[1] / PIXELS))
    if may_differ:
        rows = rows[:-may_differ]
    return max((row[0] for row in rows), default=0.0), max((row[1] for row in rows), default=0.0)
