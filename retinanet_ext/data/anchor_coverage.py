"""How well the anchors of a config cover the boxes of its data after the training resize."""

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
    best_ious,
    count_positives,
    search_octaves,
)
from retinanet_ext.data.sources import find_sources
from retinanet_ext.errors import InputError

SIZES = {"small": 32**2, "medium": 96**2, "large": math.inf}
"""COCO's size ranges: name -> upper bound of the area in square pixels."""

PAPER_ANCHORS = 9
"""Anchors per cell (section 4). The search uses at most these, or as many as the config."""

MAX_UNREACHED = 0.05
"""Training warns if no anchor reaches more than this share of the boxes."""

_WARNING_BOXES = 2000
_BINS_PER_OCTAVE = 4  # of the histograms


@dataclass(frozen=True)
class TrainingBoxes:
    """Ground-truth boxes as in training, without flips and crops.

    Each image counts once per size in ``INPUT.MIN_SIZE_TRAIN``, padded as if alone in its batch.

    Attributes:
        boxes: (M, 4) XYXY in pixels of the resized image, clipped to it.
        labels: (M,) classes.
        images: (M,) index of the image.
        padded: (N, 2) width and height of each image with its padding.
    """

    boxes: Tensor
    labels: Tensor
    images: Tensor
    padded: Tensor


def build_grid(cfg: CfgNode) -> tuple[Backbone, AnchorGrid]:
    """Return the backbone of a config, without weights, and its anchors.

    Raises:
        InputError: the config describes no backbone or no anchors.
    """
    try:
        with torch.device("meta"):  # only its strides and padding are needed
            backbone = build_backbone(cfg)
        shapes = [backbone.output_shape()[name] for name in cfg.MODEL.RETINANET.IN_FEATURES]
        generator = build_anchor_generator(cfg, shapes)
    except InputError:
        raise
    except Exception as error:  # Detectron2 raises many types
        raise InputError(
            f"no anchors can be built from this config: {type(error).__name__}: {error}"
        ) from error
    sizes = [(cell[:, 2:] - cell[:, :2]).double() for cell in generator.cell_anchors]
    return backbone, AnchorGrid(sizes, generator.strides, generator.offset)


def training_boxes(
    cfg: CfgNode, records: Sequence[dict[str, Any]], backbone: Backbone
) -> TrainingBoxes:
    """Return the boxes of dataset dicts after the training resize; crowd regions are left out.

    Raises:
        InputError: ``INPUT.MIN_SIZE_TRAIN`` is empty, or no range although it should be one.
    """

    @cache
    def padded(width: int, height: int) -> list[int]:
        image = torch.empty(len(cfg.MODEL.PIXEL_MEAN), height, width, device="meta")
        multiple = max(backbone.size_divisibility, cfg.INPUT.SIZE_DIVISIBILITY)
        constraints = backbone.padding_constraints
        batch = ImageList.from_tensors([image], multiple, padding_constraints=constraints)
        return list(batch.tensor.shape[:-3:-1])

    objects = [
        (index, annotation)
        for index, record in enumerate(records)
        for annotation in record["annotations"]
        if not annotation["iscrowd"]
    ]
    images = torch.tensor([index for index, _ in objects], dtype=torch.int64)
    labels = torch.tensor([a["category_id"] for _, a in objects], dtype=torch.int64)
    xywh = torch.tensor([a["bbox"] for _, a in objects], dtype=torch.float64).reshape(-1, 4)
    corners = torch.cat([xywh[:, :2].clamp(min=0), xywh[:, :2] + xywh[:, 2:]], dim=1)
    sizes = [(record["width"], record["height"]) for record in records]
    boxes, paddings, owners = [], [], []
    for short_side in _short_sides(cfg):
        resized = [
            ResizeShortestEdge.get_output_shape(h, w, short_side, cfg.INPUT.MAX_SIZE_TRAIN)[::-1]
            if short_side  # in Detectron2, 0 means no resize
            else (w, h)
            for w, h in sizes
        ]
        limits = torch.tensor(resized, dtype=torch.float64).reshape(-1, 2).repeat(1, 2)
        scales = limits / torch.tensor(sizes).reshape(-1, 2).repeat(1, 2)
        boxes.append(torch.minimum(corners * scales[images], limits[images]))
        owners.append(images + len(paddings))
        paddings += [padded(*size) for size in resized]
    return TrainingBoxes(
        torch.cat(boxes),
        labels.repeat(len(boxes)),
        torch.cat(owners),
        torch.tensor(paddings, dtype=torch.int64).reshape(-1, 2),
    )


def _short_sides(cfg: CfgNode) -> list[int]:
    """Return the short sides of the training resize; of a range, both ends and the middle."""
    short_sides = list(cfg.INPUT.MIN_SIZE_TRAIN)
    is_range = cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range"
    if not short_sides or (is_range and len(short_sides) != 2):
        wanted = "[least, most], for a range" if is_range else "short sides in pixels, [600]"
        raise InputError(f"INPUT.MIN_SIZE_TRAIN must be {wanted}, got {short_sides}")
    return [short_sides[0], sum(short_sides) // 2, short_sides[1]] if is_range else short_sides


def measure_coverage(
    cfg: CfgNode, data: TrainingBoxes, grid: AnchorGrid, class_names: Sequence[str]
) -> dict[str, Any]:
    """Return how well a config's anchors cover boxes: all boxes, and by class and size."""
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
        "foreground_an_image": float(positives.sum()) / len(data.padded),
        "all": describe(torch.ones(len(ious), dtype=torch.bool)),
        **{
            by: {name: describe(mask) for name, mask in masks.items() if mask.any()}
            for by, masks in groups.items()
        },
    }


def describe_shapes(data: TrainingBoxes, grid: AnchorGrid) -> dict[str, Any]:
    """Return histograms of the boxes' "sides" and "aspect_ratios" after the resize.

    A side is the root of width times height in pixels, an aspect ratio is height / width. The bins
    are a quarter of an octave wide, and the outer ones hold what is beyond them. Each histogram has
    the ``edges`` of the bins, the ``counts`` in them, and the distinct values of the ``anchors``.
    """
    boxes = data.boxes[:, 2:] - data.boxes[:, :2]
    anchors = torch.cat([sizes.double() for sizes in grid.sizes])
    described = {}
    for name, measure, low, high in (  # in octaves
        ("sides", lambda sizes: sizes.prod(1).sqrt(), 2, 10),
        ("aspect_ratios", lambda sizes: sizes[:, 1] / sizes[:, 0], -3, 3),
    ):
        num_bins = (high - low) * _BINS_PER_OCTAVE
        bins = (measure(boxes).log2() - low).mul(_BINS_PER_OCTAVE).floor().long()
        described[name] = {
            "edges": [2 ** (low + index / _BINS_PER_OCTAVE) for index in range(num_bins + 1)],
            "counts": torch.bincount(bins.clamp(0, num_bins - 1), minlength=num_bins).tolist(),
            "anchors": sorted({round(value, 2) for value in measure(anchors).tolist()}),
        }
    return described


def suggest_anchors(cfg: CfgNode, data: TrainingBoxes, grid: AnchorGrid) -> dict[str, Any]:
    """Search for anchors that reach more boxes, with as many per cell as now or the paper's 9."""
    now = max(map(len, grid.sizes))
    padded = data.padded[data.images]
    found = search_octaves(data.boxes, padded, grid, max_anchors=max(now, PAPER_ANCHORS))
    node = cfg.MODEL.ANCHOR_GENERATOR
    suggested = {
        "NAME": "OctaveAnchorGenerator",
        "SIZES": get_cfg().MODEL.ANCHOR_GENERATOR.SIZES,  # the generator refuses others
        "BASE_SCALE": found.octaves.base_scale,
        "SCALES_PER_OCTAVE": found.octaves.scales_per_octave,
        "ASPECT_RATIOS": [list(found.octaves.aspect_ratios)],
    }
    return {
        "is_better": found.is_better,
        "reached": [found.reached_before, found.reached],
        "mean_best_iou": [found.mean_iou_before, found.mean_iou],
        "anchors_a_cell": [now, found.octaves.num_anchors],
        "keys": {
            f"MODEL.ANCHOR_GENERATOR.{key}": [node[key], value]
            for key, value in suggested.items()
            if found.is_better and node[key] != value
        },
    }


def warn_of_unreached_boxes(cfg: CfgNode) -> list[str]:
    """Return a warning for each training set with many boxes that no anchor reaches.

    A sample of the boxes is measured, after ``prepare_datasets``. Data that other code has
    registered are not loaded, and detectors without dense anchors have nothing to measure.

    Raises:
        InputError: no anchors can be built from the config.
    """
    if not issubclass(META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE), DenseDetector):
        return []
    warnings = []
    for source in (source for source in find_sources(cfg, ["TRAIN"]) if source.is_ours):
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
