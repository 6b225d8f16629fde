"""Anchor coverage of data at the training resize of a config."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.modeling import (
    META_ARCH_REGISTRY,
    Backbone,
    build_anchor_generator,
    build_backbone,
)
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import ImageList
from torch import Tensor

from retinanet_ext.analysis.anchors import (
    AnchorGrid,
    Suggestion,
    best_ious,
    count_positives,
    search_octaves,
)
from retinanet_ext.data.sources import find_sources
from retinanet_ext.errors import InputError

SIZES = {"small": 32**2, "medium": 96**2, "large": math.inf}
"""COCO's sizes: the area in square pixels below which a box is of a size."""

PAPER_ANCHORS = 9
"""Anchors a cell (section 4); the search never takes more than this or the config's number."""

MAX_UNREACHED = 0.05
"""Share of boxes without an anchor from which on a training warns."""

_WARNING_BOXES = 2000


@dataclass(frozen=True)
class TrainingBoxes:
    """The boxes of some images as training sees them, unflipped and uncropped.

    Each image counts once for each of ``INPUT.MIN_SIZE_TRAIN``, padded as if alone in its batch.

    Attributes:
        boxes: (M, 4) XYXY in pixels of the resized image, clipped to it
        labels: (M,) classes
        images: (M,) index of the image
        padded: (images, 2) width and height of each image with its padding
    """

    boxes: Tensor
    labels: Tensor
    images: Tensor
    padded: Tensor


def build_grid(cfg: CfgNode) -> tuple[Backbone, AnchorGrid]:
    """Return the backbone of a config, without weights, and the anchors.

    Raises:
        InputError: the config describes neither
    """
    try:
        with torch.device("meta"):  # for its strides and padding alone
            backbone = build_backbone(cfg)
        shapes = [backbone.output_shape()[name] for name in cfg.MODEL.RETINANET.IN_FEATURES]
        generator = build_anchor_generator(cfg, shapes)
    except InputError:
        raise
    except Exception as error:  # whatever Detectron2 makes of a value it does not know
        raise InputError(
            f"no anchors can be built from this config: {type(error).__name__}: {error}"
        ) from error
    sizes = [(cell[:, 2:] - cell[:, :2]).double() for cell in generator.cell_anchors]
    return backbone, AnchorGrid(sizes, generator.strides, generator.offset)


def padded_batch(
    cfg: CfgNode, backbone: Backbone, size: tuple[int, int], *, is_train: bool
) -> Tensor:
    """Return a batch of one resized image of (height, width) with its padding, without memory."""
    image = torch.empty(len(cfg.MODEL.PIXEL_MEAN), *size, device="meta")
    multiple = max(backbone.size_divisibility, cfg.INPUT.SIZE_DIVISIBILITY if is_train else 0)
    constraints = backbone.padding_constraints
    return ImageList.from_tensors([image], multiple, padding_constraints=constraints).tensor


def training_boxes(
    cfg: CfgNode, records: Sequence[dict[str, Any]], backbone: Backbone
) -> TrainingBoxes:
    """Return the boxes of dataset dicts (XYWH) after the training resize; crowd is left out.

    Raises:
        InputError: ``INPUT.MIN_SIZE_TRAIN`` cannot be used
    """

    @cache
    def resized(height: int, width: int, short_side: int) -> tuple[int, int]:
        if not short_side:  # Detectron2's 0: images as they are
            return height, width
        max_size = cfg.INPUT.MAX_SIZE_TRAIN
        return ResizeShortestEdge.get_output_shape(height, width, short_side, max_size)

    @cache
    def padded(height: int, width: int) -> list[int]:
        batch = padded_batch(cfg, backbone, (height, width), is_train=True)
        return list(batch.shape[:-3:-1])

    short_sides = cfg.INPUT.MIN_SIZE_TRAIN
    is_range = cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range"
    if not short_sides or (is_range and len(short_sides) != 2):
        wanted = "[least, most], for a range" if is_range else "short sides in pixels, [600]"
        raise InputError(f"INPUT.MIN_SIZE_TRAIN must be {wanted}, got {list(short_sides)}")
    if is_range:
        low, high = short_sides
        short_sides = [low, (low + high) // 2, high]
    rows: list[list[float]] = []
    labels: list[int] = []
    images: list[int] = []
    paddings: list[list[int]] = []
    for short_side in short_sides:
        for record in records:
            height, width = resized(record["height"], record["width"], short_side)
            scale = (width / record["width"], height / record["height"])
            for annotation in record["annotations"]:
                if not annotation["iscrowd"]:
                    x, y, w, h = annotation["bbox"]
                    corners = [max(x, 0), max(y, 0), x + w, y + h]
                    rows.append([corner * scale[k % 2] for k, corner in enumerate(corners)])
                    rows[-1][2:] = min(rows[-1][2], width), min(rows[-1][3], height)
                    labels.append(annotation["category_id"])
                    images.append(len(paddings))
            paddings.append(padded(height, width))
    return TrainingBoxes(
        torch.tensor(rows, dtype=torch.float64).reshape(-1, 4),
        torch.tensor(labels, dtype=torch.int64),
        torch.tensor(images, dtype=torch.int64),
        torch.tensor(paddings, dtype=torch.int64).reshape(-1, 2),
    )


def measure_coverage(
    cfg: CfgNode, data: TrainingBoxes, grid: AnchorGrid, class_names: Sequence[str]
) -> dict[str, Any]:
    """Return how well a config's anchors cover boxes, altogether, by class and by size."""
    low, high = cfg.MODEL.RETINANET.IOU_THRESHOLDS[0], cfg.MODEL.RETINANET.IOU_THRESHOLDS[-1]
    ious = best_ious(data.boxes, data.padded[data.images], grid)
    positives = count_positives(data.boxes, data.images, data.padded[data.images], grid, high)

    def describe(mask: Tensor) -> dict[str, Any]:
        iou, count = ious[mask], positives[mask]
        return {
            "boxes": len(iou),
            "mean_best_iou": float(iou.mean()),
            "below": float((iou < low).double().mean()),
            "between": float(((iou >= low) & (iou < high)).double().mean()),
            "reached": float((iou >= high).double().mean()),
            "positives_mean": float(count.double().mean()),
            "positives_min": int(count.min()),
        }

    everything = torch.ones(len(ious), dtype=torch.bool)
    areas = (data.boxes[:, 2:] - data.boxes[:, :2]).prod(1)
    size = torch.bucketize(areas, torch.tensor(list(SIZES.values())[:-1]).double(), right=True)
    groups = {
        "by_class": {name: data.labels == k for k, name in enumerate(class_names)},
        "by_size": {name: size == k for k, name in enumerate(SIZES)},
    }
    return {
        "short_sides": list(cfg.INPUT.MIN_SIZE_TRAIN),
        "max_size": cfg.INPUT.MAX_SIZE_TRAIN,
        "thresholds": [low, high],
        "low_quality_matches": cfg.MODEL.RETINANET.LOW_QUALITY_MATCHES,
        "images": len(data.padded),
        "anchors_an_image": float(grid.num_anchors(data.padded).double().mean()),
        "all": describe(everything),
        **{
            by: {name: describe(mask) for name, mask in masks.items() if mask.any()}
            for by, masks in groups.items()
        },
    }


def suggest_anchors(cfg: CfgNode, data: TrainingBoxes, grid: AnchorGrid) -> dict[str, Any]:
    """Search anchors that reach more of the boxes, as many a cell as now or the paper's 9."""
    now = max(len(sizes) for sizes in grid.sizes)
    found = search_octaves(
        data.boxes, data.padded[data.images], grid, max_anchors=max(now, PAPER_ANCHORS)
    )
    return {
        "is_better": found.is_better,
        "reached": [found.reached_before, found.reached],
        "mean_best_iou": [found.mean_iou_before, found.mean_iou],
        "anchors_a_cell": [now, found.octaves.num_anchors],
        "keys": _changed_keys(cfg, found) if found.is_better else {},
    }


def _changed_keys(cfg: CfgNode, found: Suggestion) -> dict[str, list[Any]]:
    """Return the keys to change, each with its old and new value."""
    node = cfg.MODEL.ANCHOR_GENERATOR
    new = {
        "NAME": "OctaveAnchorGenerator",
        "SIZES": get_cfg().MODEL.ANCHOR_GENERATOR.SIZES,  # it refuses others
        "BASE_SCALE": found.octaves.base_scale,
        "SCALES_PER_OCTAVE": found.octaves.scales_per_octave,
        "ASPECT_RATIOS": [list(found.octaves.aspect_ratios)],
    }
    return {
        f"MODEL.ANCHOR_GENERATOR.{key}": [node[key], value]
        for key, value in new.items()
        if node[key] != value
    }


def warn_of_unreached_boxes(cfg: CfgNode) -> list[str]:
    """Return a warning for each training set of which anchors miss many boxes, from a sample.

    Data that other code has registered are not read, and of another kind of detector there is
    nothing to say. ``prepare_datasets`` has been called before.

    Raises:
        InputError: no anchors can be built from the config
    """
    warnings: list[str] = []
    if not issubclass(META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE), DenseDetector):
        return warnings
    for source in find_sources(cfg, ["TRAIN"]):
        if not source.is_ours:
            continue
        records = DatasetCatalog.get(source.name)
        num_boxes = sum(len(record["annotations"]) for record in records)
        step = math.ceil(num_boxes * len(cfg.INPUT.MIN_SIZE_TRAIN) / _WARNING_BOXES)
        backbone, grid = build_grid(cfg)
        data = training_boxes(cfg, records[:: max(step, 1)], backbone)
        if not len(data.boxes):
            continue
        threshold = cfg.MODEL.RETINANET.IOU_THRESHOLDS[-1]
        ious = best_ious(data.boxes, data.padded[data.images], grid)
        missed = float((ious < threshold).double().mean())
        if missed > MAX_UNREACHED:
            warnings.append(
                f"{source.name}: no anchor reaches {100 * missed:.0f} % of the boxes at IoU "
                f"{threshold}; retinanet-ext check-data --search-anchors, with the --config-file "
                "and KEY VALUE pairs of this training, says which and searches better anchors"
            )
    return warnings
