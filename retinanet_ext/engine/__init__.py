"""Training and evaluation: what Detectron2's engine lacks."""

import retinanet_ext.torch_jit  # noqa: F401
from retinanet_ext.engine.checkpoint import Checkpointer, export_weights
from retinanet_ext.engine.config_load import load_config
from retinanet_ext.engine.launch import argument_parser, launch
from retinanet_ext.engine.predictor import Predictor
from retinanet_ext.engine.setup import (
    load_trained_weights,
    prepare_run,
    report_results,
    start_run,
)
from retinanet_ext.engine.trainer import Trainer

__all__ = [
    "Checkpointer",
    "Predictor",
    "Trainer",
    "argument_parser",
    "export_weights",
    "launch",
    "load_config",
    "load_trained_weights",
    "prepare_run",
    "report_results",
    "start_run",
]
