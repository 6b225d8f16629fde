"""The training step as one graph of ``torch.compile``: padded images and boxes to sums per image.

Shapes: N images, M boxes per image, padded. Boxes: XYXY in input pixels.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from detectron2.modeling.meta_arch.dense_detector import DenseDetector, permute_to_N_HWA_K
from detectron2.structures import Boxes, ImageList
from detectron2.utils.logger import log_first_n
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit

from retinanet_ext.modeling.criterion import ImageSums, log_mean_count
from retinanet_ext.modeling.matching import (
    ignore_anchors,
    label_padded,
    num_padded,
    pad_regions,
    pad_targets,
)

LEAST_BOXES = 16


def compiled_sums(
    model: DenseDetector, images: ImageList, batched_inputs: list[dict[str, Any]]
) -> ImageSums | None:
    """Return the undivided losses of a batch, computed by compiled code.

    The number of boxes is padded to a power of two, so that it rarely calls for other code.

    Args:
        model: a ``RetinaNetExt`` in training
        images: the images of the batch, normalised and padded
        batched_inputs: see ``RetinaNetExt.forward``

    Returns:
        None where torch does not run compiled code: past its limit of recompilations, which is
        logged once, or because it was told not to (``torch.compiler.set_stance``)
    """
    gt_instances = [inputs["instances"] for inputs in batched_inputs]
    num_boxes = num_padded(max(map(len, gt_instances)), LEAST_BOXES)
    arguments = list(pad_targets(gt_instances, num_boxes))
    regions = [inputs.get("ignore_regions") for inputs in batched_inputs]
    if model.ignore_ioa_thresh:
        arguments += pad_regions(regions, images.image_sizes)
    arguments = [tensor.to(model.device) for tensor in arguments]
    try:
        found = compiled_graph(model.compile_mode)(model, images.tensor, *arguments)
    except FailOnRecompileLimitHit:
        log_first_n(
            logging.WARNING,
            f"The step of a batch of {tuple(images.tensor.shape)} is not compiled, because torch "
            "has compiled as often as torch._dynamo.config.recompile_limit allows; "
            "INPUT.SIZE_DIVISIBILITY makes the sizes fewer",
        )
        return None
    if found is None:
        return None
    sums, num_ignored = found
    if num_ignored is not None and any(boxes is not None and len(boxes) for boxes in regions):
        log_mean_count("num_anchors_in_ignored_regions", num_ignored)
    return sums


@functools.cache
def compiled_graph(mode: str) -> Callable[..., tuple[ImageSums, Tensor | None] | None]:
    """Return :func:`image_sums` as ``torch.compile`` makes it in a mode, one for all models."""
    return torch.compile(image_sums, fullgraph=True, mode=mode)


def image_sums(
    model: DenseDetector,
    images: Tensor,
    gt_boxes: Tensor,
    gt_classes: Tensor,
    regions: Tensor | None = None,
    corners: Tensor | None = None,
) -> tuple[ImageSums, Tensor | None] | None:
    """Return the undivided losses, and the number of anchors in regions to ignore, (N,).

    Uncompiled it returns None, because then the model computes its losses faster by itself.

    Args:
        model: a ``RetinaNetExt`` in training
        images: normalised and padded, (N, C, H, W)
        gt_boxes: (N, M, 4), see :func:`~retinanet_ext.modeling.matching.pad_targets`
        gt_classes: (N, M)
        regions, corners: see :func:`~retinanet_ext.modeling.matching.pad_regions`
    """
    if not torch.compiler.is_compiling():
        return None
    features = model.backbone(images)
    features = [features[name] for name in model.head_in_features]
    logits, deltas = model.head(features)
    anchors = Boxes.cat(model.anchor_generator(features)).tensor
    labels, matched_idxs = label_padded(
        model.anchor_matcher, anchors, gt_boxes, gt_classes, model.num_classes
    )
    num_ignored = None
    if regions is not None and corners is not None:
        labels, num_ignored = ignore_anchors(
            labels, anchors, regions, corners, model.num_classes, model.ignore_ioa_thresh
        )
    num_images, num_boxes = gt_classes.shape
    first = torch.arange(num_images, device=labels.device).unsqueeze(1) * num_boxes
    sums = model.criterion.sums_per_image(
        anchors,
        logits,
        torch.cat([permute_to_N_HWA_K(level, 4) for level in deltas], dim=1),
        labels,
        matched_idxs + first,
        gt_boxes.flatten(0, 1),
    )
    return sums, num_ignored
