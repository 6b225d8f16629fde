"""From predictions to detections (section 4.1, inference).

Shapes: N images, A anchors per cell, K classes, C candidates per image, D detections of one image.
Boxes: XYXY in input pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from detectron2.layers import batched_nms
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes
from torch import Tensor
from torch.nn.functional import pad
from torchvision.ops import clip_boxes_to_image, nms

from retinanet_ext.errors import InputError
from retinanet_ext.losses.functional import upcast_to_float32

PRECISIONS = ("float32", "bfloat16", "float16")
"""Values of ``TEST.PRECISION``."""


class Candidates(NamedTuple):
    """Boxes, (D, 4), scores, (D,), and classes, (D,), of one image; by level, best first."""

    boxes: Tensor
    scores: Tensor
    classes: Tensor

    def at(self, index: Tensor) -> Candidates:
        """Return the candidates at ``index``."""
        return Candidates(self.boxes[index], self.scores[index], self.classes[index])


def check_precision(precision: str, device: str) -> None:
    """Raise ``InputError`` if ``TEST.PRECISION`` is unknown or not supported on the device."""
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
    """Return the candidates of each image: the best scores of each level, with their boxes.

    Detectron2's ``DenseDetector`` does this per image and level. Here all images are decoded
    together, and only the candidates pass the sigmoid. Among equal scores the higher logit wins. A
    NaN is no candidate. Boxes and scores are float32 if the predictions are in half precision.

    Args:
        logits: logits of each level, (N, A K, H, W)
        deltas: box regression of each level, (N, A 4, H, W)
        anchors: anchors of each level, ordered by row, column and anchor
        num_classes: K
        score_thresh: candidates have a score above this
        topk: maximum number of candidates per level and image
        box2box_transform: turns deltas and anchors into boxes
    """
    # Top-k sorts NaN before every number, so a NaN is always seen here. A recorded program cannot
    # branch on it and always replaces NaN.
    recorded = is_recorded()
    if not recorded:
        top = best_of_levels(logits, deltas, anchors, num_classes, topk)
    if recorded or top[0].isnan().any():
        logits = [level.nan_to_num(-torch.inf, torch.inf, -torch.inf) for level in logits]
        top = best_of_levels(logits, deltas, anchors, num_classes, topk)
    results = []
    for top_logits, classes, top_deltas, top_anchors in zip(*top, strict=True):
        scores = upcast_to_float32(top_logits).sigmoid()
        index = (scores > score_thresh).nonzero().squeeze(1)
        boxes = box2box_transform.apply_deltas(top_deltas[index], top_anchors[index])
        results.append(Candidates(boxes, scores[index], classes[index]))
    return results


def best_of_levels(
    logits: Sequence[Tensor],
    deltas: Sequence[Tensor],
    anchors: Sequence[Boxes],
    num_classes: int,
    topk: int,
) -> list[Tensor]:
    """Return logits and classes, (N, C), and deltas and anchors, (N, C, 4), of the best candidates.

    They are at most ``topk`` per level and image, by level, best first. The arguments are those of
    :func:`decode_candidates`.
    """
    levels = zip(logits, deltas, anchors, strict=True)
    found = [_best_of_level(*level, num_classes, topk) for level in levels]
    return [torch.cat(values, dim=1) for values in zip(*found, strict=True)]


def is_recorded() -> bool:
    """Tell whether the program is traced or compiled, so that no value may decide a branch."""
    return torch.jit.is_tracing() or torch.compiler.is_compiling()


def suppress(candidates: Candidates, iou_thresh: float) -> Tensor:
    """Return the indices that class-wise non-maximum suppression keeps, best first."""
    boxes, scores, classes = candidates
    if not torch.compiler.is_compiling():
        return batched_nms(boxes, scores, classes, iou_thresh)
    # batched_nms branches on the number of boxes. This is its branch that shifts each class apart.
    # torchvision's exported nms assumes that two boxes remain: two without area are appended.
    boxes, classes = pad(boxes.float(), (0, 0, 0, 2)), pad(classes, (0, 2))
    boxes = boxes + (classes * (boxes.max() - boxes.min() + 1)).unsqueeze(1)
    return nms(boxes, pad(scores, (0, 2), value=-1.0), iou_thresh)[:-2]


def clip(candidates: Candidates, image_size: tuple[int, int]) -> Candidates:
    """Return candidates clipped to an image (height, width), without those outside it."""
    boxes = clip_boxes_to_image(candidates.boxes, image_size)
    inside = (boxes[:, 2:] > boxes[:, :2]).all(1)
    return candidates._replace(boxes=boxes).at(inside.nonzero().squeeze(1))


def _at_most(count: int, size: Any) -> Any:
    """Return min(count, size); ``size`` is an int, a tensor (traced) or a symbol (exported)."""
    return size.clamp(max=count) if isinstance(size, Tensor) else torch.sym_min(count, size)


def _best_of_level(
    logits: Tensor, deltas: Tensor, anchors: Boxes, num_classes: int, topk: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return logits and classes, (N, C), and deltas and anchors, (N, C, 4), of the top k logits.

    They all belong to the k anchors with the highest maximum over classes.
    """
    height, width = logits.shape[2:]
    logits = logits.unflatten(1, (-1, num_classes))
    deltas = deltas.unflatten(1, (-1, 4))
    num_anchors = logits.shape[1]
    image = torch.arange(logits.shape[0], device=logits.device)[:, None]

    best = logits.amax(2).flatten(1)
    index = best.topk(_at_most(topk, best.shape[1])).indices
    anchor = index // (height * width)
    cell = index - anchor * (height * width)
    y = cell // width
    x = cell - y * width
    candidates = logits[image, anchor, :, y, x].flatten(1)
    top, index = candidates.topk(_at_most(topk, candidates.shape[1]))
    anchor, y, x = (values.gather(1, index // num_classes) for values in (anchor, y, x))
    return (
        top,
        index % num_classes,
        deltas[image, anchor, :, y, x],
        anchors.tensor[(y * width + x) * num_anchors + anchor],
    )
