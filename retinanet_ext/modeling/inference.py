"""From predictions to the candidates of non-maximum suppression (section 4.1, inference).

Shapes: N images, A anchors a cell, K classes, C candidates an image, D detections of one. Boxes:
XYXY in input pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes
from torch import Tensor

from retinanet_ext.errors import InputError
from retinanet_ext.losses.functional import at_least_float32

PRECISIONS = ("float32", "bfloat16", "float16")
"""What ``TEST.PRECISION`` may be."""


class Candidates(NamedTuple):
    """Boxes, (D, 4), scores, (D,), and classes, (D,), of one image; level by level, best first."""

    boxes: Tensor
    scores: Tensor
    classes: Tensor


def check_precision(precision: str, device: str) -> None:
    """Refuse a ``TEST.PRECISION`` that is unknown, or that ``MODEL.DEVICE`` has no use for.

    Raises:
        InputError: names the key, its value and what is allowed
    """
    if precision not in PRECISIONS:
        known = ", ".join(map(repr, PRECISIONS))
        raise InputError(f"TEST.PRECISION {precision!r} is unknown; known: {known}")
    if precision == "float16" and torch.device(device).type != "cuda":
        raise InputError(
            "TEST.PRECISION float16 needs a CUDA device; on the CPU set TEST.PRECISION bfloat16"
        )


def decode_candidates(
    logits: Sequence[Tensor],
    deltas: Sequence[Tensor],
    anchors: Sequence[Boxes],
    *,
    num_classes: int,
    score_thresh: float,
    topk: int,
    box2box_transform: Box2BoxTransform,
) -> list[Candidates]:
    """Return the best scores of each level and image that exceed a threshold, with their boxes.

    What Detectron2's ``DenseDetector`` does image by image and level by level, for all images
    together and with a sigmoid of the candidates alone. Of equal scores the higher logit counts.
    A NaN is no candidate. Boxes and scores are in float32 where predictions are in half precision
    (``apply_deltas`` widens the deltas).

    Args:
        logits: of each level as the head gives them, (N, A K, H, W)
        deltas: (N, A 4, H, W)
        anchors: of each level, H W A boxes in this order
        num_classes: K
        score_thresh: candidates score more than this
        topk: candidates a level and image at most
        box2box_transform: deltas and anchors to boxes
    """
    top = _best_of_levels(logits, deltas, anchors, num_classes, topk)
    if top[0].isnan().any():  # NaN sorts before every number: none goes unseen
        numbers = [level.nan_to_num(-torch.inf, torch.inf, -torch.inf) for level in logits]
        top = _best_of_levels(numbers, deltas, anchors, num_classes, topk)
    top_logits, classes, top_deltas, top_anchors = top
    scores = at_least_float32(top_logits).sigmoid()
    good = scores > score_thresh
    counts = good.sum(1).tolist()
    image, candidate = good.nonzero(as_tuple=True)
    boxes = box2box_transform.apply_deltas(
        top_deltas[image, candidate], top_anchors[image, candidate]
    )
    split = [
        values.split(counts)
        for values in (boxes, scores[image, candidate], classes[image, candidate])
    ]
    return [Candidates(*values) for values in zip(*split, strict=True)]


def _best_of_levels(
    logits: Sequence[Tensor],
    deltas: Sequence[Tensor],
    anchors: Sequence[Boxes],
    num_classes: int,
    topk: int,
) -> list[Tensor]:
    """Return :func:`_best_of_level` of all levels, one after the other along C."""
    levels = [
        _best_of_level(*level, num_classes, topk)
        for level in zip(logits, deltas, anchors, strict=True)
    ]
    return [torch.cat(values, dim=1) for values in zip(*levels, strict=True)]


def _best_of_level(
    logits: Tensor, deltas: Tensor, anchors: Boxes, num_classes: int, topk: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return logits, classes, both (N, C), deltas and anchors, both (N, C, 4), of the top k.

    They are found among the k anchors with the highest logits: a pass over the maxima is all
    that the many others cost.
    """
    logits = logits.unflatten(1, (-1, num_classes))
    deltas = deltas.unflatten(1, (-1, 4))
    num_anchors, _, height, width = logits.shape[1:]
    image = torch.arange(len(logits), device=logits.device)[:, None]

    best = logits.amax(2).flatten(1)
    index = best.topk(min(topk, best.shape[1])).indices
    anchor, y, x = index // (height * width), index // width % height, index % width
    candidates = logits[image, anchor, :, y, x].flatten(1)
    top, index = candidates.topk(min(topk, candidates.shape[1]))
    anchor, y, x = (values.gather(1, index // num_classes) for values in (anchor, y, x))
    return (
        top,
        index % num_classes,
        deltas[image, anchor, :, y, x],
        anchors.tensor[(y * width + x) * num_anchors + anchor],
    )
