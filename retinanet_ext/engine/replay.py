"""Save a non-finite step to a file, and re-run it from that file."""

from __future__ import annotations

import itertools
import json
import logging
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from torch import Tensor

from retinanet_ext import add_retinanet_ext_config
from retinanet_ext.engine.config_check import use_cpu_without_cuda
from retinanet_ext.engine.instrumented_pass import Batch, Report
from retinanet_ext.engine.non_finite import StepSnapshot, class_names, diagnose
from retinanet_ext.errors import InputError, first_line
from retinanet_ext.files import atomic_write, make_folder, write_file

logger = logging.getLogger(__name__)


def save_step(step: StepSnapshot, report: Report, states: dict[str, Any] | None) -> Path | None:
    """Write ``OUTPUT_DIR/non_finite/iter_*_rank*.json``, and with ``states`` a ``.pth`` to replay.

    Args:
        step: this process's step
        report: as :func:`~retinanet_ext.engine.non_finite.diagnose` returns it
        states: state dicts before the step: "model", and others to keep

    Returns:
        path of the report

    Raises:
        InputError: a file cannot be written
    """
    name = f"iter_{step.iteration:07d}_rank{step.rank}"
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    stems = (Path(step.cfg.OUTPUT_DIR, "non_finite", name) for name in names)
    stem = next(stem for stem in stems if not stem.with_suffix(".json").exists())
    make_folder(stem.parent)
    if states is not None:
        content = {field.name: getattr(step, field.name) for field in fields(step)}
        content |= {"cfg": step.cfg.dump(), "class_names": class_names(step.cfg), **states}
        content["batches"] = [_saved_batch(batch) for batch in step.batches]
        file = stem.with_suffix(".pth")
        with atomic_write(file) as stream:
            torch.save(content, stream)
        report = {**report, "replay": f"retinanet-ext replay {shlex.quote(str(file))}"}
    file = stem.with_suffix(".json")
    write_file(file, json.dumps(report, indent=2, allow_nan=False))
    return file


def replay_step(path: str | Path) -> Report:
    """Re-run a saved step on one process and return the report of ``diagnose``.

    Raises:
        InputError: the file is missing, damaged or not a saved step
    """
    try:
        with torch.serialization.safe_globals([Instances, Boxes]):
            saved = torch.load(path, map_location="cpu", weights_only=True)
        weights, names = saved["model"], saved["class_names"]
        values = {field.name: saved[field.name] for field in fields(StepSnapshot)}
    except Exception as error:  # unpickling a damaged file may raise anything
        raise InputError(
            f"{path} is missing, damaged or not a step saved in OUTPUT_DIR/non_finite "
            f"({type(error).__name__})"
        ) from error
    try:
        cfg = get_cfg()
        add_retinanet_ext_config(cfg)
        of_run = CfgNode.load_cfg(values["cfg"])
        of_run.DATASETS.pop("CUSTOM")  # unused here; yacs takes no list in place of a path
        cfg.merge_from_other_cfg(of_run)
        trained_on = cfg.MODEL.DEVICE
        use_cpu_without_cuda(cfg, num_threads=torch.get_num_threads())
        cfg.TEST.PRECISION = "float32"  # for detection only, and not valid on every device
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


def _saved_batch(batch: Batch) -> Batch:
    """Return the batch without values that ``torch.load(weights_only=True)`` refuses."""
    allowed = Tensor | Instances | str | int | float
    return [{k: v for k, v in inputs.items() if isinstance(v, allowed)} for inputs in batch]
