"""From predictions to the candidates of non-maximum suppression (section 4.1, inference).

Shapes: N images, A anchors a cell, K classes, C candidates an image, D detections of one. Boxes:
XYXY in input pixels.
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
from torchvision.ops import nms

from retinanet_ext.errors import InputError
from retinanet_ext.losses.functional import upcast_to_float32

PRECISIONS = ("float32", "bfloat16", "float16")
"""What ``TEST.PRECISION`` may be."""


class Candidates(NamedTuple):
    """Boxes, (D, 4), scores, (D,), and classes, (D,), of one image; level by level, best first."""

    boxes: Tensor
    scores: Tensor
    classes: Tensor

    def at(self, index: Tensor) -> Candidates:
        """Return those at ``index``."""
        return Candidates(self.boxes[index], self.scores[index], self.classes[index])


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
    # NaN sorts before every number: none goes unseen. What is recorded cannot look, and has none.
    recorded = is_recorded()
    if not recorded:
        top = _best_of_levels(logits, deltas, anchors, num_classes, topk)
    if recorded or top[0].isnan().any():
        numbers = [level.nan_to_num(-torch.inf, torch.inf, -torch.inf) for level in logits]
        top = _best_of_levels(numbers, deltas, anchors, num_classes, topk)
    results = []
    for top_logits, classes, top_deltas, top_anchors in zip(*top, strict=True):
        scores = upcast_to_float32(top_logits).sigmoid()
        index = (scores > score_thresh).nonzero().squeeze(1)
        boxes = box2box_transform.apply_deltas(top_deltas[index], top_anchors[index])
        results.append(Candidates(boxes, scores[index], classes[index]))
    return results


def is_recorded() -> bool:
    """Tell whether the operations are recorded for other inputs: no value may steer Python."""
    return torch.jit.is_tracing() or torch.compiler.is_compiling()


def suppress(candidates: Candidates, iou_thresh: float) -> Tensor:
    """Return the indices of what class-wise non-maximum suppression keeps, best first."""
    boxes, scores, classes = candidates
    if not torch.compiler.is_compiling():
        return batched_nms(boxes, scores, classes, iou_thresh)
    # batched_nms steers by the number of boxes. This is its way of one call: each class elsewhere.
    # torchvision has an exported program expect that two boxes are left: two without area are.
    boxes, classes = pad(boxes.float(), (0, 0, 0, 2)), pad(classes, (0, 2))
    boxes = boxes + (classes * (boxes.max() - boxes.min() + 1)).unsqueeze(1)
    return nms(boxes, pad(scores, (0, 2), value=-1.0), iou_thresh)[:-2]


def clip(candidates: Candidates, image_size: tuple[int, int]) -> Candidates:
    """Return candidates clipped to an image (height, width), without those that lie outside."""
    height, width = image_size
    x, y = candidates.boxes[:, ::2].clamp(0, width), candidates.boxes[:, 1::2].clamp(0, height)
    clipped = candidates._replace(boxes=torch.stack([x, y], dim=2).flatten(1))
    return clipped.at(((x[:, 1] > x[:, 0]) & (y[:, 1] > y[:, 0])).nonzero().squeeze(1))


def _at_most(count: int, size: Any) -> Any:
    """Return the smaller: of a size that is a number, a tensor (traced) or a symbol (exported)."""
    return size.clamp(max=count) if isinstance(size, Tensor) else torch.sym_min(count, size)


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
