"""Evaluation: what Detectron2's ``COCOEvaluator`` lacks."""

import retinanet_ext.torch_jit  # noqa: F401
from retinanet_ext.evaluation.coco import BoxEvaluator
from retinanet_ext.evaluation.detection_metrics import COCO_MAX_DETECTIONS
from retinanet_ext.evaluation.timing import InferenceTime
from retinanet_ext.evaluation.validation_loss import ValidationLoss

__all__ = [
    "COCO_MAX_DETECTIONS",
    "BoxEvaluator",
    "InferenceTime",
    "ValidationLoss",
]
