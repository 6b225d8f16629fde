"""Evaluation: only what Detectron2's ``COCOEvaluator`` lacks."""

from retinanet_ext.evaluation.grid import draw_detection_grid

__all__ = ["draw_detection_grid"]
