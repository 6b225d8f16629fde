"""What an exported program returns: raw predictions, boxes or detections.

Shapes: N images, R anchors over all levels, K classes, C candidates per image, D the maximum number
of detections per image. Boxes: XYXY in pixels of the program's input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from torch import Tensor, nn
from torch.nn.functional import pad
from torchvision.ops import nms

from retinanet_ext.modeling import RetinaNetExt
from retinanet_ext.modeling.inference import best_of_levels

FORMS = {
    "raw": ("logits", "deltas", "anchors"),
    "boxes": ("boxes", "scores", "classes"),
    "detections": ("boxes", "scores", "classes"),
}
"""Names of the outputs of each form."""

THRESHOLDS = ("score_thresh", "thresholds")
"""Names of a program's buffers that hold scores: of candidates before suppression, and of the
detections of each class, (K,)."""

Suppress = Callable[[Tensor, Tensor, Tensor, int, float], Tensor]


class Program(nn.Module):
    """A detector from a batch of images of one size to the outputs of a form.

    The forms differ in where they stop:

    - ``raw``: logits (N, R, K), deltas (N, R, 4) and anchors (R, 4)
    - ``boxes``: boxes (N, C, 4), scores (N, C) and classes (N, C) of the best candidates of each
      level, by level, best first. Boxes are clipped to the image; no score threshold is applied.
    - ``detections``: boxes (N, D, 4), scores (N, D) and classes (N, D) after non-maximum
      suppression and the thresholds, best first. Rows of score 0 hold no detection.
    """

    def __init__(
        self,
        model: RetinaNetExt,
        form: str,
        thresholds: Sequence[float],
        suppress: Suppress | None = None,
    ) -> None:
        """
        Args:
            model: in eval mode, on the CPU
            form: one of :data:`FORMS`
            thresholds: lowest score of a detection of each class, (K,)
            suppress: class-wise non-maximum suppression; by default :func:`suppress_by_class`
        """
        super().__init__()
        self.model = model
        self.form = form
        self.suppress = suppress or suppress_by_class
        self.register_buffer("score_thresh", torch.tensor(model.test_score_thresh))
        self.register_buffer("thresholds", torch.tensor(thresholds))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs of the form.

        Args:
            images: uint8 (N, C, H, W), in the channels of ``INPUT.FORMAT``, of any size
        """
        model = self.model
        features = model.backbone(self.normalize_and_pad(images))
        features = [features[name] for name in model.head_in_features]
        logits, deltas = model.head(features)
        anchors = model.anchor_generator(features)
        if self.form == "raw":
            return (
                torch.cat([permute_to_N_HWA_K(level, model.num_classes) for level in logits], 1),
                torch.cat([permute_to_N_HWA_K(level, 4) for level in deltas], 1),
                torch.cat([level.tensor for level in anchors]),
            )
        top, classes, deltas, anchors = best_of_levels(
            [level.nan_to_num(-torch.inf, torch.inf, -torch.inf) for level in logits],
            deltas,
            anchors,
            model.num_classes,
            model.test_topk_candidates,
        )
        boxes = model.box2box_transform.apply_deltas(deltas.flatten(0, 1), anchors.flatten(0, 1))
        boxes, scores = boxes.unflatten(0, top.shape), top.sigmoid()
        if self.form == "boxes":
            return clip(boxes, images), scores, classes
        return self.detect(boxes, scores, classes, images)

    def normalize_and_pad(self, images: Tensor) -> Tensor:
        """Return normalised images, zero-padded at the right and bottom as in training."""
        images = (images.float() - self.model.pixel_mean) / self.model.pixel_std
        divisor = max(self.model.backbone.size_divisibility, 1)
        # Without negative numbers, which ONNX divides towards zero.
        height, width = images.shape[-2:]
        bottom = (height + divisor - 1) // divisor * divisor - height
        right = (width + divisor - 1) // divisor * divisor - width
        return pad(images, (0, right, 0, bottom))

    def detect(
        self, boxes: Tensor, scores: Tensor, classes: Tensor, images: Tensor
    ) -> tuple[Tensor, ...]:
        """Suppress, keep the best, and set the scores of those below their threshold to 0."""
        model, limit = self.model, self.model.max_detections_per_image
        if model.clip_before_nms:
            boxes = clip(boxes, images)
        scores = torch.where(scores > self.score_thresh, scores, 0)
        scores = self.suppress(boxes, scores, classes, model.num_classes, model.test_nms_thresh)
        scores, index = pad(scores, (0, limit)).topk(limit)  # at least D, whatever the size
        index = index.clamp(max=classes.shape[1] - 1)
        classes = classes.gather(1, index)
        boxes = clip(boxes.gather(1, index[..., None].expand(-1, -1, 4)), images)
        # Not by [classes], which ONNX's optimizer makes a constant that has another name.
        lowest = self.thresholds.index_select(0, classes.flatten()).view_as(classes)
        valid = (boxes[..., 2:] > boxes[..., :2]).all(2) & (scores >= lowest)
        scores, index = torch.where(valid, scores, 0).topk(limit)
        return boxes.gather(1, index[..., None].expand(-1, -1, 4)), scores, classes.gather(1, index)


def clip(boxes: Tensor, images: Tensor) -> Tensor:
    """Clip boxes (N, C, 4) to images (N, C, H, W)."""
    height, width = images.shape[-2:]
    x = boxes[..., 0::2].clamp(min=0).clamp(max=width)
    y = boxes[..., 1::2].clamp(min=0).clamp(max=height)
    return torch.stack([x, y], dim=3).flatten(2)


def suppress_by_class(
    boxes: Tensor, scores: Tensor, classes: Tensor, num_classes: int, iou_thresh: float
) -> Tensor:
    """Return the scores, (N, C), that class-wise non-maximum suppression keeps; 0 elsewhere.

    Args:
        boxes: (N, C, 4)
        scores: (N, C); 0 for what is no candidate
        classes: (N, C)
        num_classes: K
        iou_thresh: IoU above which the lower score of the same class is suppressed
    """
    image = torch.arange(scores.shape[0], device=scores.device)[:, None]
    groups, flat = (image * num_classes + classes).flatten(), scores.flatten()
    index = flat.nonzero().squeeze(1)
    # In double, so that shifting each class of each image apart rounds nothing. Two boxes without
    # area are appended, because torchvision's exported nms assumes that two boxes remain.
    apart = pad(boxes.flatten(0, 1)[index].double(), (0, 0, 0, 2))
    apart = apart + (pad(groups[index], (0, 2)) * (apart.max() - apart.min() + 1)).unsqueeze(1)
    kept = nms(apart, pad(flat[index].double(), (0, 2), value=-1.0), iou_thresh)[:-2]
    kept = index[kept]
    return torch.zeros_like(flat).scatter(0, kept, flat[kept]).view_as(scores)
