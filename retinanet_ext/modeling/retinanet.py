"""The meta-architecture.

Shapes: N images, A anchors per cell, K classes, M boxes. Boxes: XYXY in input pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_anchor_generator, build_backbone
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.meta_arch.dense_detector import DenseDetector, permute_to_N_HWA_K
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn
from torch.nn.functional import pad
from torchvision.ops import clip_boxes_to_image

from retinanet_ext.errors import InputError
from retinanet_ext.losses import Interval
from retinanet_ext.modeling.compiled_step import compiled_sums
from retinanet_ext.modeling.criterion import RetinaNetCriterion, log_mean_count
from retinanet_ext.modeling.head import RetinaNetExtHead
from retinanet_ext.modeling.inference import (
    Candidates,
    check_precision,
    clip,
    decode_candidates,
    suppress,
)
from retinanet_ext.modeling.matching import (
    AnchorMatcher,
    check_targets,
    ignore_anchors,
    label_anchors,
    pad_regions,
    undefined_targets,
)


@META_ARCH_REGISTRY.register()
class RetinaNetExt(DenseDetector):
    """RetinaNet with configurable loss, anchor selection, normaliser and labels.

    Parameters are named as in Detectron2's ``RetinaNet``, so that weights load in both directions.
    The only addition is the criterion's normaliser (see :func:`to_detectron2_state_dict`).

    Example:
        >>> from detectron2.config import get_cfg
        >>> from detectron2.modeling import build_model
        >>> from retinanet_ext import add_retinanet_ext_config
        >>> cfg = get_cfg()
        >>> add_retinanet_ext_config(cfg)
        >>> cfg.merge_from_file("configs/small_R18_FPN.yaml")
        >>> cfg.MODEL.DEVICE = "cpu"
        >>> model = build_model(cfg).eval()
        >>> (output,) = model([{"image": torch.zeros(3, 64, 96)}])
        >>> output["instances"].image_size
        (64, 96)
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: nn.Module,
        head_in_features: list[str],
        anchor_generator: nn.Module,
        anchor_matcher: AnchorMatcher,
        criterion: RetinaNetCriterion,
        num_classes: int,
        test_score_thresh: float = 0.05,
        test_topk_candidates: int = 1000,
        test_nms_thresh: float = 0.5,
        clip_before_nms: bool = False,
        max_detections_per_image: int = 100,
        test_precision: str = "float32",
        pixel_mean: list[float],
        pixel_std: list[float],
        ignore_ioa_thresh: float = 0.0,
        channels_last: bool = False,
        size_divisibility: int = 0,
        compile_mode: str = "",
    ) -> None:
        """
        Args:
            backbone: Detectron2's ResNet-FPN, P3 to P7
            head: features of each level -> logits (N, A K, H, W) and deltas (N, A 4, H, W)
            head_in_features: names of the levels, from high to low resolution
            anchor_generator: features -> anchors of each level
            anchor_matcher: IoU -> foreground, background or ignore
            criterion: labels and predictions -> losses; holds the box coder
            num_classes: K
            test_score_thresh: detections have a score above this
            test_topk_candidates: candidates per level before non-maximum suppression
            test_nms_thresh: IoU above which the lower score of the same class is suppressed
            clip_before_nms: clip candidates to the image before suppression, not after it
            max_detections_per_image: number of detections kept, the highest scores
            test_precision: autocast dtype in inference; ``float32`` keeps the caller's autocast
            pixel_mean, pixel_std: per channel in the order of ``INPUT.FORMAT``, 0 to 255
            ignore_ioa_thresh: lowest IoA, with a region to ignore, of ignored anchors; 0: off
            channels_last: memory format of images, features and weights
            size_divisibility: training images are padded to sides that are multiples of it; 0: off
            compile_mode: ``torch.compile``'s, "default" or "reduce-overhead" (CUDA graphs); "": off
        """
        super().__init__(
            backbone, head, head_in_features, pixel_mean=pixel_mean, pixel_std=pixel_std
        )
        self.anchor_generator = anchor_generator
        self.anchor_matcher = anchor_matcher
        self.criterion = criterion
        self.box2box_transform = criterion.box2box_transform
        self.num_classes = num_classes
        self.test_score_thresh = test_score_thresh
        self.test_topk_candidates = test_topk_candidates
        self.test_nms_thresh = test_nms_thresh
        self.clip_before_nms = clip_before_nms
        self.max_detections_per_image = max_detections_per_image
        self.test_precision = test_precision
        self.ignore_ioa_thresh = ignore_ioa_thresh
        self._set_execution(channels_last, size_divisibility, compile_mode)

    def _set_execution(
        self, channels_last: bool, size_divisibility: int, compile_mode: str
    ) -> None:
        self.size_divisibility = size_divisibility
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.to(memory_format=self.memory_format)
        self.compile_mode = compile_mode
        self._compile_network()

    def _compile_network(self) -> None:
        if self.compile_mode:
            self.backbone.compile()
            self.head.compile()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._compile_network()  # because torch copies modules without their compiled code

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        node = cfg.MODEL.RETINANET
        for key in ("SCORE_THRESH_TEST", "NMS_THRESH_TEST", "IGNORE_IOA_THRESH"):
            Interval("[0, 1]").check(f"MODEL.RETINANET.{key}", node[key])
        for key in ("NUM_CLASSES", "TOPK_CANDIDATES_TEST"):
            Interval("[1, inf)").check(f"MODEL.RETINANET.{key}", node[key])
        check_precision(cfg.TEST.PRECISION, cfg.MODEL.DEVICE)
        backbone = build_backbone(cfg)
        if cfg.INPUT.SIZE_DIVISIBILITY % max(backbone.size_divisibility, 1):
            raise InputError(
                f"INPUT.SIZE_DIVISIBILITY {cfg.INPUT.SIZE_DIVISIBILITY} must be a multiple of the "
                f"backbone's {backbone.size_divisibility}, or 0"
            )
        compile_mode = "reduce-overhead" if cfg.MODEL.CUDA_GRAPHS else "default"
        shapes = [backbone.output_shape()[feature] for feature in node.IN_FEATURES]
        return {
            "backbone": backbone,
            "head": RetinaNetExtHead(cfg, shapes),
            "head_in_features": node.IN_FEATURES,
            "anchor_generator": build_anchor_generator(cfg, shapes),
            "anchor_matcher": AnchorMatcher(
                node.IOU_THRESHOLDS, node.IOU_LABELS, node.LOW_QUALITY_MATCHES
            ),
            "criterion": RetinaNetCriterion.from_config(
                cfg, Box2BoxTransform(weights=node.BBOX_REG_WEIGHTS)
            ),
            "num_classes": node.NUM_CLASSES,
            "test_score_thresh": node.SCORE_THRESH_TEST,
            "test_topk_candidates": node.TOPK_CANDIDATES_TEST,
            "test_nms_thresh": node.NMS_THRESH_TEST,
            "clip_before_nms": node.CLIP_BEFORE_NMS,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "test_precision": cfg.TEST.PRECISION,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "ignore_ioa_thresh": node.IGNORE_IOA_THRESH,
            "channels_last": cfg.MODEL.CHANNELS_LAST,
            "size_divisibility": cfg.INPUT.SIZE_DIVISIBILITY,
            "compile_mode": compile_mode if cfg.MODEL.COMPILE else "",
        }

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Return losses in training and detections in inference, as Detectron2's models do.

        Args:
            batched_inputs: a batch in Detectron2's format. In training ``ignore_regions``, (M, 4),
                are regions of an image whose background anchors are ignored.

        Raises:
            InputError: in training, if the loss is undefined on a box or class. In compiled code,
                which cannot raise by value, the losses are NaN instead.
        """
        if not self.training:
            # What follows the head has no operation that autocast lowers to half precision.
            with self._test_autocast():
                return super().forward(batched_inputs)
        is_eager = not torch.compiler.is_compiling()
        if is_eager:
            check_targets(batched_inputs, self.num_classes)
        images = self.preprocess_image(batched_inputs)
        if is_eager and self.compile_mode and self.criterion.is_dense:
            sums = compiled_sums(self, images, batched_inputs)
            if sums is not None:
                return self.criterion.divide(sums)
        features = self.backbone(images.tensor)
        features = [features[name] for name in self.head_in_features]
        gt_instances = [inputs["instances"].to(self.device) for inputs in batched_inputs]
        regions = [inputs.get("ignore_regions") for inputs in batched_inputs]
        losses = self.forward_training(images, features, self.head(features), gt_instances, regions)
        if not is_eager:
            undefined = [undefined_targets(gt, self.num_classes) for gt in gt_instances]
            bad = torch.cat([mask for masks in undefined for mask in masks]).any()
            losses = {name: torch.where(bad, torch.nan, loss) for name, loss in losses.items()}
        return losses

    def _test_autocast(self) -> AbstractContextManager:
        if self.test_precision == "float32":
            return nullcontext()  # keeps the caller's autocast
        return torch.autocast(self.device.type, getattr(torch, self.test_precision))

    def preprocess_image(self, batched_inputs: list[dict[str, Any]]) -> ImageList:
        """Normalise, pad and batch the images."""
        if torch.compiler.is_compiling():
            images = self._batch_of_known_sizes([inputs["image"] for inputs in batched_inputs])
        else:
            images = super().preprocess_image(batched_inputs)
        tensor = images.tensor
        if self.training and self.size_divisibility:
            height, width = (-side % self.size_divisibility for side in tensor.shape[-2:])
            tensor = pad(tensor, (0, width, 0, height))
        return ImageList(tensor.contiguous(memory_format=self.memory_format), images.image_sizes)

    def _batch_of_known_sizes(self, images: list[Tensor]) -> ImageList:
        """Batch images as Detectron2 does, but with int sizes, which torch.compile can trace."""
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        constraints = self.backbone.padding_constraints
        divisor = constraints.get("size_divisibility", self.backbone.size_divisibility)
        square = constraints.get("square_size", 0)
        height, width = (square or max(sides) for sides in zip(*sizes, strict=True))
        if divisor > 1:
            height, width = (-(-side // divisor) * divisor for side in (height, width))
        batch = [
            pad(
                (image.to(self.device) - self.pixel_mean) / self.pixel_std,
                (0, width - w, 0, height - h),
            )
            for image, (h, w) in zip(images, sizes, strict=True)
        ]
        return ImageList(torch.stack(batch), sizes)

    def forward_training(
        self,
        images: ImageList,
        features: list[Tensor],
        predictions: list[list[Tensor]],
        gt_instances: list[Instances],
        ignore_regions: Sequence[Tensor | None] = (),
    ) -> dict[str, Tensor]:
        logits, deltas = predictions
        anchors = Boxes.cat(self.anchor_generator(features))
        labels, matched_idxs = label_anchors(
            self.anchor_matcher, anchors, gt_instances, self.num_classes
        )
        if self.ignore_ioa_thresh and any(
            boxes is not None and len(boxes) for boxes in ignore_regions
        ):
            labels, num_ignored = ignore_anchors(
                labels,
                anchors.tensor,
                *pad_regions(ignore_regions, images.image_sizes),
                self.num_classes,
                self.ignore_ioa_thresh,
            )
            log_mean_count("num_anchors_in_ignored_regions", num_ignored)
        gt_boxes = Boxes.cat([instances.gt_boxes for instances in gt_instances])
        return self.criterion(
            anchors.tensor,
            logits,
            torch.cat([permute_to_N_HWA_K(level, 4) for level in deltas], dim=1),
            labels,
            matched_idxs,
            gt_boxes.tensor,
        )

    def detect(self, images: Sequence[Tensor]) -> list[Candidates]:
        """Return the detections of each image, (C, H, W), as tensors of boxes, scores and classes.

        They are those of :meth:`forward`. ``torch.export`` needs this method, because Detectron2's
        ``Boxes`` branches on the number of boxes.
        """
        batch = self.preprocess_image([{"image": image} for image in images])
        with self._test_autocast():
            features = self.backbone(batch.tensor)
            features = [features[name] for name in self.head_in_features]
            found = self._detections(features, self.head(features), batch.image_sizes)
        return [clip(each, size) for each, size in zip(found, batch.image_sizes, strict=True)]

    def forward_inference(
        self, images: ImageList, features: list[Tensor], predictions: list[list[Tensor]]
    ) -> list[Instances]:
        return [
            Instances(
                size, pred_boxes=Boxes(found.boxes), scores=found.scores, pred_classes=found.classes
            )
            for size, found in zip(
                images.image_sizes,
                self._detections(features, predictions, images.image_sizes),
                strict=True,
            )
        ]

    def decode(self, features: list[Tensor], predictions: list[list[Tensor]]) -> list[Candidates]:
        """Return the candidates of each image: decoded, but neither suppressed nor clipped."""
        return decode_candidates(
            *predictions,
            self.anchor_generator(features),
            num_classes=self.num_classes,
            score_thresh=self.test_score_thresh,
            topk=self.test_topk_candidates,
            box2box_transform=self.box2box_transform,
        )

    def _detections(
        self,
        features: list[Tensor],
        predictions: list[list[Tensor]],
        image_sizes: Sequence[tuple[int, int]],
    ) -> list[Candidates]:
        candidates = self.decode(features, predictions)
        if self.clip_before_nms:
            candidates = [
                found._replace(boxes=clip_boxes_to_image(found.boxes, size))
                for found, size in zip(candidates, image_sizes, strict=True)
            ]
        kept = [
            suppress(found, self.test_nms_thresh)[: self.max_detections_per_image]
            for found in candidates
        ]
        return [found.at(index) for found, index in zip(candidates, kept, strict=True)]


def to_detectron2_state_dict(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of Detectron2's ``RetinaNet``: all except the criterion's state.

    Example:
        >>> weights = {"head.cls_score.bias": torch.zeros(9)}
        >>> state = {**weights, "criterion.loss_normalizer": torch.tensor(100.0)}
        >>> list(to_detectron2_state_dict(state))
        ['head.cls_score.bias']
    """
    return {key: value for key, value in state_dict.items() if not key.startswith("criterion.")}
