"""How many background anchors stand to each foreground one (section 3), counted on any data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data.build import filter_images_with_only_crowd_annotations
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.modeling import build_anchor_generator, build_backbone
from detectron2.structures import Boxes, BoxMode, Instances

from retinanet_ext.data.anchor_coverage import padded_batch
from retinanet_ext.data.coco_json import read_coco_json, to_dataset_dicts
from retinanet_ext.data.findings import read_policy
from retinanet_ext.data.validation import check_coco
from retinanet_ext.modeling.matching import (
    AnchorMatcher,
    ignore_anchors,
    is_foreground,
    label_anchors,
)


@dataclass(frozen=True)
class Imbalance:
    """Counts over all images together.

    Attributes:
        num_images, num_boxes: images and boxes that were labelled.
        foreground, background: anchors with that label; ignored ones are in neither.
    """

    num_images: int
    num_boxes: int
    foreground: int
    background: int

    @property
    def ratio(self) -> float:
        """Return the background anchors to each foreground one, infinite if there is none."""
        return self.background / self.foreground if self.foreground else math.inf


@torch.no_grad()
def measure_imbalance(cfg: CfgNode, json_file: str, *, is_train: bool = True) -> Imbalance:
    """Count anchors as the detector of a config labels them in training, without its images.

    Sizes, anchors, thresholds, low-quality matches and, in training, what is ignored in crowd
    regions are the config's. Each image counts once for each of ``INPUT.MIN_SIZE_TRAIN``,
    unflipped and uncropped, and is padded as if alone in its batch.

    Args:
        cfg: the whole config
        json_file: in COCO's instances format
        is_train: resize as in training and leave out the images that training leaves out;
            otherwise resize as in testing and count all images

    Raises:
        InputError: the json, an anchor or a matching key cannot be used
    """
    node = cfg.MODEL.RETINANET
    with torch.device("meta"):  # for the shapes of its feature maps alone
        backbone = build_backbone(cfg).eval()
    shapes = [backbone.output_shape()[feature] for feature in node.IN_FEATURES]
    anchor_generator = build_anchor_generator(cfg, shapes)
    matcher = AnchorMatcher(node.IOU_THRESHOLDS, node.IOU_LABELS, node.LOW_QUALITY_MATCHES)

    @lru_cache(maxsize=32)
    def anchors_of(height: int, width: int) -> Boxes:
        features = backbone(padded_batch(cfg, backbone, (height, width), is_train=is_train))
        return Boxes.cat(anchor_generator([features[name] for name in node.IN_FEATURES]))

    ignores = node.IGNORE_IOA_THRESH if cfg.MODEL.META_ARCHITECTURE == "RetinaNetExt" else 0
    policy = read_policy(cfg.DATASETS.CHECK)
    checked = check_coco(json_file, read_coco_json(json_file), policy)
    checked.raise_refused()
    records = to_dataset_dicts(checked.content, image_root="")
    if is_train and cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        records = filter_images_with_only_crowd_annotations(records)
    short_sides = cfg.INPUT.MIN_SIZE_TRAIN if is_train else [cfg.INPUT.MIN_SIZE_TEST]
    max_size = cfg.INPUT.MAX_SIZE_TRAIN if is_train else cfg.INPUT.MAX_SIZE_TEST

    num_boxes = foreground = background = 0
    for short_side in short_sides:
        for record in records:
            size = height, width = record["height"], record["width"]
            if short_side:  # Detectron2's 0: images as they are
                size = ResizeShortestEdge.get_output_shape(height, width, short_side, max_size)
            scale = size[1] / width, size[0] / height
            gt_boxes, regions = (
                _boxes([a for a in record["annotations"] if a["iscrowd"] == flag], scale, size)
                for flag in (0, 1)
            )
            # One class: which of them it is changes nothing in what is foreground.
            gt_classes = torch.zeros(len(gt_boxes), dtype=torch.int64)
            instances = Instances(size, gt_boxes=gt_boxes, gt_classes=gt_classes)
            anchors = anchors_of(*size)
            labels, _ = label_anchors(matcher, anchors, [instances], num_classes=1)
            if is_train and ignores:
                labels = ignore_anchors(
                    labels, anchors.tensor, [regions.tensor], [size], 1, ignores
                )
            num_boxes += len(gt_boxes)
            foreground += int(is_foreground(labels, num_classes=1).sum())
            background += int((labels == 1).sum())
    return Imbalance(len(records) * len(short_sides), num_boxes, foreground, background)


def _boxes(
    annotations: list[dict[str, Any]], scale: tuple[float, float], size: tuple[int, int]
) -> Boxes:
    """Return the boxes of annotations in a resized image."""
    rows = torch.tensor([annotation["bbox"] for annotation in annotations]).reshape(-1, 4)
    boxes = Boxes(BoxMode.convert(rows, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS))
    boxes.scale(*scale)
    boxes.clip(size)
    return boxes
