"""Evaluation: what Detectron2's ``COCOEvaluator`` lacks."""

from retinanet_ext.evaluation.coco import COCO_MAX_DETECTIONS, BoxEvaluator
from retinanet_ext.evaluation.pictures import draw_detection_grid
from retinanet_ext.evaluation.timing import InferenceTime

__all__ = ["COCO_MAX_DETECTIONS", "BoxEvaluator", "InferenceTime", "draw_detection_grid"]
