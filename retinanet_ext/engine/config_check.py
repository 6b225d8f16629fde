"""Checks of a config's values, before anything is written."""

from __future__ import annotations

import logging
import math
import os
import re
import reprlib
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY

from retinanet_ext.config_keys import all_keys, read_key
from retinanet_ext.data.coco_json import count
from retinanet_ext.data.images import AUTO, num_channels, parse_pixel_range
from retinanet_ext.engine.solver import FLAT_COSINE
from retinanet_ext.errors import InputError, first_line
from retinanet_ext.losses import LOSSES, Interval
from retinanet_ext.modeling import RetinaNetExt
from retinanet_ext.modeling.inference import check_precision

RANGES = {
    "INPUT.MAX_PIXELS": Interval("[1, inf)"),
    "TEST.DETECTION_GRID.NUM_IMAGES": Interval("[0, 10000]"),
    "TEST.DETECTION_GRID.SCORE_THRESH": Interval("[0, inf)"),
    # Detectron2's keys that would fail late or not at all.
    "INPUT.MIN_SIZE_TEST": Interval("[0, 16384]"),
    "INPUT.MAX_SIZE_TEST": Interval("[1, 16384]"),
    "MODEL.PIXEL_STD": Interval("(0, inf)"),
    "MODEL.RETINANET.BBOX_REG_WEIGHTS": Interval("(0, inf)"),
    "MODEL.RETINANET.NUM_CLASSES": Interval("[1, 100000]"),
    "TEST.DETECTIONS_PER_IMAGE": Interval("[1, inf)"),
}
"""What each number of a key may be, in training and evaluation."""

TRAINING_RANGES = {
    "DATALOADER.ASPECT_RATIO_STREAMS": Interval("[0, 65536]"),
    "DATALOADER.RANDOM_SUBSET_RATIO": Interval("(0, 1]"),
    "INPUT.COLOR_JITTER": Interval("[0, 1]"),
    "INPUT.SCALE_JITTER": Interval("(0, 100]"),
    "INPUT.SIZE_DIVISIBILITY": Interval("[0, 16384]"),
    "SOLVER.EARLY_STOP.PATIENCE": Interval("[0, inf)"),
    "SOLVER.EMA.DECAY": Interval("[0, 1)"),
    "SOLVER.FLAT_RATIO": Interval("[0, 1)"),
    "SOLVER.GRAD_ACCUM_STEPS": Interval("[1, 65536]"),
    "SOLVER.LOSS_FILM_PERIOD": Interval("[0, inf)"),
    "SOLVER.NON_FINITE.MAX_SKIPPED": Interval("[0, inf)"),
    "SOLVER.REFERENCE_BATCH": Interval("[0, 65536]"),
    # Detectron2's keys that would fail late or not at all.
    "INPUT.MAX_SIZE_TRAIN": Interval("[1, 16384]"),
    "INPUT.MIN_SIZE_TRAIN": Interval("[1, 16384]"),
    "SOLVER.CHECKPOINT_PERIOD": Interval("[1, inf)"),
    "SOLVER.IMS_PER_BATCH": Interval("[1, 65536]"),
    "SOLVER.MAX_ITER": Interval("[1, 1000000000]"),
}
"""What each number of a key may be, in training."""

CHOICES = {
    "SOLVER.AMP.PRECISION": ("float16", "bfloat16", AUTO),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("value", "norm", "full_model"),
    "SOLVER.NON_FINITE.POLICY": ("raise", "skip"),
    "SOLVER.OPTIMIZER": ("SGD", "AdamW"),
}

logger = logging.getLogger(__name__)


@contextmanager
def config_errors() -> Iterator[None]:
    """Turn what Detectron2 raises for a value that it does not know into an :class:`InputError`.

    An error outside of Detectron2, fvcore and torch is a fault of the code: it keeps its traceback.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        if not re.search(r"/(detectron2|fvcore|torch)/", Path(place.filename).as_posix()):
            raise
        raise InputError(
            f"no model, optimizer or loader can be built from this config: {type(error).__name__}: "
            f"{first_line(error)} ({Path(place.filename).name}, line {place.lineno})"
        ) from error


def check_config(cfg: CfgNode, *, num_processes: int, eval_only: bool) -> None:
    """Refuse values that would fail late or silently.

    The model checks its own keys, ``prepare_datasets`` the data; Detectron2 and torch refuse the
    rest when the model, the optimizer and the loaders are built.

    Args:
        cfg: the whole config
        num_processes: processes on all machines
        eval_only: leave out what concerns training alone

    Raises:
        InputError: names the key, its value and what is allowed
    """
    for key in all_keys(cfg):
        values = _flat(read_key(cfg, key))
        if any(isinstance(value, float) and not math.isfinite(value) for value in values):
            raise InputError(f"{key} must be finite, got {read_key(cfg, key)}")
    for key, allowed in {**RANGES, **({} if eval_only else TRAINING_RANGES)}.items():
        for value in _flat(read_key(cfg, key)):
            allowed.check(key, value)
    for key, names in CHOICES.items():
        if read_key(cfg, key) not in names:
            known = ", ".join(map(repr, names))
            raise InputError(f"{key} {read_key(cfg, key)!r} is unknown; known: {known}")
    _check_output_dir(cfg.OUTPUT_DIR)
    _check_device(cfg, num_processes, eval_only)
    if cfg.MODEL.LOAD_PROPOSALS:
        raise InputError(
            "MODEL.LOAD_PROPOSALS must be False: this detector has no use for proposals, and "
            "Detectron2 unpickles DATASETS.PROPOSAL_FILES_*, which may run any code"
        )
    _check_precision(cfg)
    parse_pixel_range(cfg.INPUT.PIXEL_RANGE)
    channels = num_channels(cfg.INPUT.FORMAT)
    for key in ("MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"):
        if len(read_key(cfg, key)) != channels:
            raise InputError(
                f"{key} needs {channels} numbers, one per channel of INPUT.FORMAT "
                f"{cfg.INPUT.FORMAT}; got {read_key(cfg, key)}"
            )
    if not eval_only:
        jitter = cfg.INPUT.SCALE_JITTER
        if len(jitter) != 2 or jitter[0] > jitter[1]:
            raise InputError(f"INPUT.SCALE_JITTER takes [least, most], got {jitter}")
        if cfg.SOLVER.LOSS_FILM_PERIOD and cfg.MODEL.COMPILE:
            raise InputError(
                f"SOLVER.LOSS_FILM_PERIOD {cfg.SOLVER.LOSS_FILM_PERIOD} needs MODEL.COMPILE False, "
                "because compiled code does not hand out the gradient of the logits"
            )
        name = cfg.MODEL.RETINANET.CLS_LOSS.NAME
        if cfg.SOLVER.LOSS_FILM_PERIOD and name in LOSSES and LOSSES[name].is_module:
            raise InputError(
                f"SOLVER.LOSS_FILM_PERIOD {cfg.SOLVER.LOSS_FILM_PERIOD} takes a loss of x_t, and "
                f"MODEL.RETINANET.CLS_LOSS.NAME {name} depends on more: set the period to 0"
            )
        _check_solver(cfg, num_processes)
        _check_selection(cfg)


def _flat(value: Any) -> Iterator[Any]:
    """Yield the values in lists of any depth."""
    if isinstance(value, list | tuple):
        for item in value:
            yield from _flat(item)
    else:
        yield value


def _check_output_dir(name: str) -> None:
    if not name:
        raise InputError("OUTPUT_DIR is empty; name a folder for the results")
    try:
        os.stat(name)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:  # such as a name that is too long
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"OUTPUT_DIR {reprlib.repr(name)}: {reason}") from error


def _check_precision(cfg: CfgNode) -> None:
    check_precision(cfg.TEST.PRECISION, cfg.MODEL.DEVICE)
    name = cfg.MODEL.META_ARCHITECTURE
    architecture = META_ARCH_REGISTRY.get(name) if name in META_ARCH_REGISTRY else None
    is_own = isinstance(architecture, type) and issubclass(architecture, RetinaNetExt)
    if cfg.TEST.PRECISION != "float32" and architecture and not is_own:
        raise InputError(
            f"TEST.PRECISION {cfg.TEST.PRECISION} has no effect on MODEL.META_ARCHITECTURE {name}; "
            "it is RetinaNetExt's: set it to float32"
        )


def _check_solver(cfg: CfgNode, num_processes: int) -> None:
    solver = cfg.SOLVER
    falls_to_end = solver.LR_SCHEDULER_NAME in ("WarmupCosineLR", FLAT_COSINE)
    if falls_to_end and not (solver.BASE_LR > 0 and 0 <= solver.BASE_LR_END <= solver.BASE_LR):
        raise InputError(
            f"SOLVER.LR_SCHEDULER_NAME {solver.LR_SCHEDULER_NAME} falls from SOLVER.BASE_LR, above "
            f"0, to SOLVER.BASE_LR_END, from 0 to BASE_LR; got {solver.BASE_LR:g} and "
            f"{solver.BASE_LR_END:g}"
        )
    # With a reference, Detectron2 scales the batch to the number of processes.
    reference = solver.REFERENCE_WORLD_SIZE
    shares = {
        "SOLVER.REFERENCE_WORLD_SIZE" if reference else "the number of processes": (
            reference or num_processes
        ),
        "SOLVER.GRAD_ACCUM_STEPS": solver.GRAD_ACCUM_STEPS,
    }
    if solver.IMS_PER_BATCH % math.prod(shares.values()):
        what = " times ".join(f"{name}, {n}" for name, n in shares.items() if n > 1)
        raise InputError(
            f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH} must be a multiple of {what}"
        )
    if cfg.MODEL.COMPILE and cfg.MODEL.CUDA_GRAPHS and solver.GRAD_ACCUM_STEPS > 1:
        raise InputError(
            f"MODEL.CUDA_GRAPHS takes SOLVER.GRAD_ACCUM_STEPS 1, got {solver.GRAD_ACCUM_STEPS}: a "
            "graph that runs again overwrites the gradients of the micro-batch before"
        )
    streams, batch = cfg.DATALOADER.ASPECT_RATIO_STREAMS, solver.IMS_PER_BATCH
    if reference:
        batch = batch * num_processes // reference
    if streams and batch % streams:
        raise InputError(
            f"a batch of {batch} images (SOLVER.IMS_PER_BATCH) must be a multiple of "
            f"DATALOADER.ASPECT_RATIO_STREAMS {streams}"
        )


def _check_selection(cfg: CfgNode) -> None:
    metric, patience = cfg.SOLVER.BEST.METRIC, cfg.SOLVER.EARLY_STOP.PATIENCE
    if patience and not metric:
        raise InputError(
            f"SOLVER.EARLY_STOP.PATIENCE {patience} needs the metric that it waits for: set "
            "SOLVER.BEST.METRIC, such as bbox/AP"
        )
    if metric and cfg.TEST.EVAL_PERIOD < 1:
        raise InputError(
            f"SOLVER.BEST.METRIC {metric} needs evaluations during the training: set "
            "TEST.EVAL_PERIOD, the iterations between them, above 0"
        )


def _check_device(cfg: CfgNode, num_processes: int, eval_only: bool) -> None:
    name = cfg.MODEL.DEVICE
    if name not in ("cpu", "cuda") and not re.fullmatch(r"cuda:\d+", name):
        raise InputError(f"MODEL.DEVICE {name!r} is not a device; write cuda, cuda:0 or cpu")
    device = torch.device(name)
    if device.type == "cuda":
        if (device.index or 0) >= torch.cuda.device_count():
            raise InputError(
                f"MODEL.DEVICE {name!r}: this machine has {torch.cuda.device_count()} CUDA devices"
            )
        if device.index is not None and num_processes > 1:
            raise InputError(
                f"MODEL.DEVICE {name!r}: each of several processes takes its own; cuda"
            )
        return
    if torch.cuda.is_available() and num_processes > 1:
        raise InputError(
            f"MODEL.DEVICE {name!r} with several processes: hide the CUDA devices as well, with "
            "CUDA_VISIBLE_DEVICES= before the command"
        )
    if eval_only:
        return
    needs_cuda = _float16(cfg)
    if cfg.MODEL.COMPILE and cfg.MODEL.CUDA_GRAPHS:
        needs_cuda["MODEL.CUDA_GRAPHS True"] = "set it to False"
    if any(cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE):
        needs_cuda["MODEL.RESNETS.DEFORM_ON_PER_STAGE"] = "set it to [False, False, False, False]"
    for key in ("MODEL.RESNETS.NORM", "MODEL.FPN.NORM", "MODEL.RETINANET.NORM"):
        if read_key(cfg, key) == "SyncBN" and num_processes > 1:
            needs_cuda[f"{key} SyncBN"] = "set naiveSyncBN, which does the same on the CPU"
    _refuse_on_cpu(needs_cuda)


def _float16(cfg: CfgNode) -> dict[str, str]:
    """Return float16 as what needs CUDA, with the remedy; empty if it is not used."""
    if not cfg.SOLVER.AMP.ENABLED or cfg.SOLVER.AMP.PRECISION != "float16":
        return {}
    return {"SOLVER.AMP.PRECISION float16": "set bfloat16, or SOLVER.AMP.ENABLED False"}


def _refuse_on_cpu(needs_cuda: Mapping[str, str]) -> None:
    for what, remedy in needs_cuda.items():
        raise InputError(f"{what} trains on CUDA devices alone, and this is the CPU: {remedy}")


def use_cpu_without_cuda(cfg: CfgNode, *, num_threads: int) -> None:
    """Set ``MODEL.DEVICE`` to the CPU, and say so, where CUDA is asked for and absent."""
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
        threads = count(num_threads, "thread")
        logger.warning("No CUDA device: running on the CPU with %s", threads)


def training_precision(cfg: CfgNode) -> str:
    """Return the precision of autocast in training, with what "auto" stands for on this device.

    Returns:
        "float32" without ``SOLVER.AMP.ENABLED``. "auto" is "bfloat16" where the device has
        instructions for it, as far as torch tells; else "float16" on a GPU and "float32" on a CPU.
    """
    if not cfg.SOLVER.AMP.ENABLED:
        return "float32"
    if cfg.SOLVER.AMP.PRECISION != AUTO:
        return cfg.SOLVER.AMP.PRECISION
    if cfg.MODEL.DEVICE.startswith("cuda") and torch.cuda.is_available():
        with torch.cuda.device(cfg.MODEL.DEVICE):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if native else "float16"
    if not hasattr(torch.cpu, "get_capabilities"):
        logger.warning("torch %s does not tell whether this CPU has bfloat16", torch.__version__)
        return "float32"
    known = torch.cpu.get_capabilities()
    return "bfloat16" if known.get("avx512_bf16") or known.get("amx_bf16") else "float32"


def resolve_precision(cfg: CfgNode, earlier: CfgNode | None = None) -> None:
    """Replace ``SOLVER.AMP.PRECISION`` "auto" by what is used, and say so.

    Args:
        cfg: a checked config, changed in place
        earlier: config of the run that is resumed, whose precision goes on

    Raises:
        InputError: the run was trained in float16, and this is a CPU
    """
    if not cfg.SOLVER.AMP.ENABLED or cfg.SOLVER.AMP.PRECISION != AUTO:
        return
    precision = training_precision(earlier or cfg)
    cfg.SOLVER.AMP.ENABLED = precision != "float32"
    cfg.SOLVER.AMP.PRECISION = precision if cfg.SOLVER.AMP.ENABLED else "float16"
    if cfg.MODEL.DEVICE == "cpu":
        _refuse_on_cpu(_float16(cfg))
    where = "as in the run that is resumed" if earlier else "on this device"
    logger.info("SOLVER.AMP.PRECISION auto is %s, %s", precision, where)
