"""Training and evaluation: only what Detectron2's engine lacks."""

from retinanet_ext.engine.checkpoint import Checkpointer, export_weights
from retinanet_ext.engine.config_check import load_config
from retinanet_ext.engine.launch import main
from retinanet_ext.engine.predictor import Predictor
from retinanet_ext.engine.trainer import Trainer

__all__ = ["Checkpointer", "Predictor", "Trainer", "export_weights", "load_config", "main"]
