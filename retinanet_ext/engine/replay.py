"""A step that was not finite as a file, and the step once more from that file."""

from __future__ import annotations

import itertools
import json
import logging
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from torch import Tensor

from retinanet_ext import add_retinanet_ext_config
from retinanet_ext.engine.config_check import use_cpu_without_cuda
from retinanet_ext.engine.non_finite import Report, StepSnapshot, class_names, diagnose
from retinanet_ext.errors import InputError, first_line
from retinanet_ext.files import atomic_write, write_file

logger = logging.getLogger(__name__)


def save_step(step: StepSnapshot, report: Report, states: dict[str, Any] | None) -> Path | None:
    """Write ``OUTPUT_DIR/non_finite/iter_*_rank*.json``, and with ``states`` a ``.pth`` to replay.

    Args:
        step: of this process
        report: of :func:`~retinanet_ext.engine.non_finite.diagnose`
        states: as before the step, of "model" and whatever else shall be kept

    Returns:
        the report's file

    Raises:
        InputError: it cannot be written
    """
    stem = Path(step.cfg.OUTPUT_DIR, "non_finite", f"iter_{step.iteration:07d}_rank{step.rank}")
    names = (stem.with_name(f"{stem.name}{suffix}") for suffix in _suffixes())
    stem = next(name for name in names if not name.with_suffix(".json").exists())
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{stem.parent} cannot be made: {error.strerror or error}") from error
    if states is not None:
        content = {f.name: getattr(step, f.name) for f in fields(step)}
        content |= {"cfg": step.cfg.dump(), "class_names": class_names(step.cfg), **states}
        file = stem.with_suffix(".pth")
        with atomic_write(file) as stream:
            torch.save(_encode(content), stream)
        report = {**report, "replay": f"retinanet-ext replay {shlex.quote(str(file))}"}
    file = stem.with_suffix(".json")
    write_file(file, json.dumps(report, indent=2, allow_nan=False))
    return file


def replay_step(path: str | Path) -> Report:
    """Repeat a saved step on one process and return its report, as ``diagnose`` does.

    Raises:
        InputError: the file is missing, damaged, or not one of a step
    """
    try:
        saved = _decode(torch.load(path, map_location="cpu", weights_only=True))
        weights, names = saved["model"], saved["class_names"]
        values = {field.name: saved[field.name] for field in fields(StepSnapshot)}
    except Exception as error:  # pickle's documentation: a damaged file may raise anything
        raise InputError(
            f"{path} is missing, damaged or not a step saved in OUTPUT_DIR/non_finite "
            f"({type(error).__name__})"
        ) from error
    try:
        cfg = get_cfg()
        add_retinanet_ext_config(cfg)
        of_run = CfgNode.load_cfg(values["cfg"])
        of_run.DATASETS.pop("CUSTOM")  # not used here, and yacs takes no list where a path is
        cfg.merge_from_other_cfg(of_run)
        trained_on = cfg.MODEL.DEVICE
        use_cpu_without_cuda(cfg, num_threads=torch.get_num_threads())
        cfg.TEST.PRECISION = "float32"  # of detection, which no step is, and not for every device
        for name in cfg.DATASETS.TRAIN:
            if name not in MetadataCatalog:
                MetadataCatalog.get(name).thing_classes = names
        model = build_model(cfg).train()
        model.load_state_dict(weights)
    except Exception as error:  # whatever Detectron2 makes of a config that is not its own
        raise InputError(f"{path}: its model cannot be built: {first_line(error)}") from error
    step = StepSnapshot(**{**values, "cfg": cfg})
    logger.info(
        "Repeating iteration %d of rank %d on %s%s, %s",
        step.iteration,
        step.rank,
        cfg.MODEL.DEVICE,
        "" if trained_on == cfg.MODEL.DEVICE else f", which ran on {trained_on}",
        "in float32"
        if step.precision == "float32"
        else f"its network in {step.precision} by autocast; weights and losses are float32",
    )
    return diagnose(model, step)


def _suffixes() -> Any:
    return itertools.chain([""], (f"-{number}" for number in itertools.count(2)))


def _encode(value: Any) -> Any:
    """Return tensors, numbers, text and their containers; what is none of these is left out."""
    if isinstance(value, dict):
        return {key: _encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(item) for item in value]
    if isinstance(value, Instances):
        return {"image_size": list(value.image_size), **_encode(value.get_fields())}
    if isinstance(value, Boxes):
        return {"boxes": _encode(value.tensor)}
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, np.ndarray):
        return torch.as_tensor(value)
    if isinstance(value, np.generic):
        return value.item()
    return value if isinstance(value, str | int | float) else None


def _decode(value: Any) -> Any:
    """Undo :func:`_encode` in batches."""
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    content = {key: _decode(item) for key, item in value.items()}
    if "image_size" in content:
        return Instances(tuple(content.pop("image_size")), **content)
    return Boxes(content["boxes"]) if content.keys() == {"boxes"} else content
