"""Before and after a run: check everything, then write the first file; report the results."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger
from torch import nn

from retinanet_ext.config_keys import all_keys, read_key
from retinanet_ext.data import prepare_datasets
from retinanet_ext.data.anchor_coverage import warn_of_unreached_boxes
from retinanet_ext.data.register import registered_classes
from retinanet_ext.engine.checkpoint import Checkpointer
from retinanet_ext.engine.config_check import (
    check_config,
    resolve_precision,
    training_precision,
    use_cpu_without_cuda,
)
from retinanet_ext.engine.config_load import load_config
from retinanet_ext.engine.config_warnings import config_warnings
from retinanet_ext.engine.find_checkpoint import find_weights
from retinanet_ext.engine.launch import torchrun_store
from retinanet_ext.engine.run_info import write_run_info
from retinanet_ext.engine.scaling import scale_schedule
from retinanet_ext.engine.summary import summarize
from retinanet_ext.errors import InputError, UnexpectedResultsError
from retinanet_ext.modeling.loss_config import resolve_cls_loss_weight
from retinanet_ext.modeling.timm_backbone import timm_weights

RESULTS = ("last_checkpoint", "model_*.pth", "metrics.json", "inference")
"""What an earlier training or evaluation leaves in its OUTPUT_DIR once it has got that far."""

PER_MACHINE = (
    "OUTPUT_DIR",
    "MODEL.WEIGHTS",
    "MODEL.TIMM.WEIGHTS",
    "DATASETS.CUSTOM.TRAIN_",
    "DATASETS.CUSTOM.TEST_",
)
"""Prefixes of the keys that may differ between machines: paths."""

LOGGERS = ("retinanet_ext", "detectron2", "fvcore")

logger = logging.getLogger(__name__)


def prepare_run(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Check a config, its data and its weights, and register the data. Nothing is written yet.

    Every process calls it, and all of them get the same config.

    Args:
        cfg: as :func:`~retinanet_ext.engine.load_config` returns it; completed in place and frozen
        args: of the command line. Afterwards ``args.resume`` says whether a checkpoint is resumed,
            and ``args.weights`` which file is going to be loaded (empty: none).

    Raises:
        InputError: a value, file or data set cannot be used, or OUTPUT_DIR holds another run
    """
    _begin_logging()
    num_processes = comm.get_world_size()
    use_cpu_without_cuda(cfg, num_threads=torch.get_num_threads())
    check_config(cfg, num_processes=num_processes, eval_only=args.eval_only)
    _check_same_everywhere(cfg)
    for change in [] if args.eval_only else scale_schedule(cfg):
        logger.info("%s", change)
    args.resume = args.resume or _is_restart_of_own_run(cfg, args.eval_only)
    args.weights, args.resume = find_weights(cfg, resume=args.resume, eval_only=args.eval_only)
    args.weights = args.weights or timm_weights(cfg)
    if not args.eval_only:
        _choose_precision(cfg, args.resume)
    with _first_process_first():
        prepare_datasets(cfg, eval_only=args.eval_only)
    resolve_cls_loss_weight(cfg)
    if args.eval_only:
        cfg.MODEL.WEIGHTS = args.weights
        cfg.OUTPUT_DIR = comm.all_gather(_evaluation_folder(cfg.OUTPUT_DIR))[0]
    elif cfg.SEED < 0:
        cfg.SEED = comm.shared_random_seed()
        logger.info("SEED %d is drawn", cfg.SEED)
    if cfg.SEED >= 0:
        seed_all_rng(cfg.SEED + comm.get_rank())  # initial weights are drawn before default_setup
    if cfg.DETERMINISTIC:
        _make_deterministic()
    cfg.freeze()


def start_run(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Print warnings about the config, do Detectron2's ``default_setup`` and write run_info.json.

    The first files of a run are written here, once nothing can be refused any more: the model is
    built and its weights are loaded.

    Raises:
        InputError: OUTPUT_DIR cannot be written
    """
    if comm.is_main_process():
        warnings = config_warnings(cfg, args.weights, eval_only=args.eval_only)
        for line in [*warnings, *([] if args.eval_only else warn_of_unreached_boxes(cfg))]:
            logger.warning("%s", line)
    try:
        Path(cfg.OUTPUT_DIR).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"OUTPUT_DIR {cfg.OUTPUT_DIR}: {error.strerror}") from error
    own_logger, *others = map(logging.getLogger, LOGGERS)
    own_logger.removeHandler(_early_records)
    for other in others:  # default_setup adds its own handler for stdout
        other.handlers.clear()
    default_setup(cfg, args)
    rank = comm.get_rank()
    setup_logger(cfg.OUTPUT_DIR, rank, name="retinanet_ext", configure_stdout=False)
    _early_records.setTarget(own_logger.handlers[-1])  # log.txt
    _early_records.close()
    if comm.is_main_process():
        write_run_info(
            cfg,
            command=sys.argv,
            weights=args.weights,
            resumed=args.resume,
            eval_only=args.eval_only,
        )


def load_trained_weights(model: nn.Module, cfg: CfgNode, *, resume: bool) -> None:
    """Load ``MODEL.WEIGHTS``, which must fill the whole model, for an evaluation.

    Args:
        model: loaded in place
        cfg: as :func:`prepare_run` completes it
        resume: whether the weights are a run's last checkpoint. If it is damaged, the one before is
            loaded.

    Raises:
        InputError: the weights are damaged, or are those of another model or of other classes
    """
    class_names = registered_classes(cfg, "TEST", read=True)
    folder = str(Path(cfg.MODEL.WEIGHTS).parent) if resume else ""
    checkpointer = Checkpointer(model, folder, complete=True, class_names=class_names)
    checkpointer.load(cfg.MODEL.WEIGHTS)


def report_results(cfg: CfgNode, results: Mapping[str, Any]) -> None:
    """Log a run's results and files, on the main process.

    Raises:
        UnexpectedResultsError: ``TEST.EXPECTED_RESULTS`` are others
    """
    if not comm.is_main_process():
        return
    logger.info(summarize(cfg, results))
    try:
        verify_results(cfg, results)
    except SystemExit:  # Detectron2 has logged both
        raise UnexpectedResultsError(
            "the results are not those of TEST.EXPECTED_RESULTS; the log has both"
        ) from None


_early_records = MemoryHandler(capacity=100_000, flushLevel=sys.maxsize)


def _begin_logging() -> None:
    """Log to stdout, and keep the records for log.txt, which ``start_run`` opens."""
    _early_records.buffer.clear()
    for name in LOGGERS:
        early_logger = setup_logger(distributed_rank=comm.get_rank(), name=name)
        early_logger.addHandler(_early_records)


@contextmanager
def _first_process_first() -> Iterator[None]:
    """Let the first process per machine go first: what it caches, the others need not redo."""
    if comm.get_local_rank() > 0:
        comm.synchronize()
    yield
    if comm.get_local_rank() == 0:
        comm.synchronize()


def _check_same_everywhere(cfg: CfgNode) -> None:
    """Refuse machines that were started with different configs."""
    own = {key: read_key(cfg, key) for key in all_keys(cfg) if not key.startswith(PER_MACHINE)}
    all_values = comm.all_gather(own)
    for rank, values in enumerate(all_values):
        for key, expected in all_values[0].items():
            if values[key] != expected:
                raise InputError(
                    f"{key} is {expected} in process 0 and {values[key]} in process {rank}; start "
                    "all machines with the same config and command"
                )


def _choose_precision(cfg: CfgNode, resume: bool) -> None:
    """Resolve ``SOLVER.AMP.PRECISION`` "auto", to that of the run if it is resumed.

    Raises:
        InputError: the devices have no precision in common
    """
    file = Path(cfg.OUTPUT_DIR, "config.yaml")
    resolve_precision(cfg, load_config(file) if resume and file.is_file() else None)
    chosen = comm.all_gather(training_precision(cfg))
    for rank, precision in enumerate(chosen):
        if precision != chosen[0]:
            raise InputError(
                f"SOLVER.AMP.PRECISION auto is {chosen[0]} in process 0 and {precision} in process "
                f"{rank}; set one that all devices have"
            )


def _is_restart_of_own_run(cfg: CfgNode, eval_only: bool) -> bool:
    """Tell whether torchrun has restarted this training.

    Raises:
        InputError: OUTPUT_DIR holds the results of another run
    """
    restarted = False
    if comm.is_main_process() and not eval_only:
        store, mark = torchrun_store(), "retinanet_ext/training"
        restarted = store is not None and store.check([mark])
        if not restarted and (found := _find_results(cfg.OUTPUT_DIR)):
            raise InputError(
                f"OUTPUT_DIR {cfg.OUTPUT_DIR} holds an earlier run ({found}); choose another "
                "OUTPUT_DIR, or continue that run with --resume"
            )
        if store is not None:
            store.set(mark, "started")
    return comm.all_gather(restarted)[0]


def _evaluation_folder(output_dir: str) -> str:
    """Return OUTPUT_DIR, or a new folder below it where it holds a run already."""
    if not _find_results(output_dir):
        return output_dir
    folder = str(Path(output_dir, f"eval-{datetime.now():%Y%m%d-%H%M%S}"))
    logger.info("Results go to %s", folder)
    return folder


def _find_results(output_dir: str) -> str:
    """Return the name of a result that a run left in a folder; empty: there is none."""
    found = (path for pattern in RESULTS for path in Path(output_dir).glob(pattern))
    return next((path.name for path in found if path.is_dir() or path.stat().st_size), "")


def _make_deterministic() -> None:
    """Make runs bitwise reproducible, or fail where an operation has no deterministic form."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
