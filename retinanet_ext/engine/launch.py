"""The command line: check everything in one process, then train or evaluate on all of them."""

from __future__ import annotations

import argparse
import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from datetime import datetime
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.evaluation import verify_results
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from retinanet_ext.data import prepare_datasets
from retinanet_ext.engine.checkpoint import Checkpointer
from retinanet_ext.engine.config import check_config, load_config, use_cpu_without_cuda
from retinanet_ext.engine.failures import explain, first_line
from retinanet_ext.engine.summary import summarize
from retinanet_ext.engine.trainer import Trainer
from retinanet_ext.errors import InputError

RESULTS = ("last_checkpoint", "model_*.pth", "metrics.json", "inference")
"""What an earlier training or evaluation leaves in its OUTPUT_DIR, once it has come that far."""

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``train_net.py`` and return its exit code.

    Returns:
        0, or with one line on stderr: 2 for an :class:`InputError`, 3 for a loss that is no
        longer finite
    """
    parser = argument_parser()
    args = parser.parse_args(argv)
    setup_logger(name="retinanet_ext")
    try:
        _check_and_launch(args)
    except (InputError, FloatingPointError) as error:
        code, line = explain(error)
        print(f"{parser.prog}: error: {line}", file=sys.stderr)
        return code
    return 0


def argument_parser() -> argparse.ArgumentParser:
    """Return Detectron2's parser with ``--allow-unsafe-config``, and a free port by default."""
    parser = default_argument_parser()
    parser.description = "Train a detector, or evaluate its weights with --eval-only."
    parser.add_argument(
        "--allow-unsafe-config",
        action="store_true",
        help="let python tags in the config file run code; for files you trust",
    )
    parser.set_defaults(dist_url="auto")
    return parser


def _check_and_launch(args: argparse.Namespace) -> None:
    """Check all that can be known before the first process starts; write nothing until then."""
    _check_arguments(args)
    num_processes = args.num_gpus * args.num_machines
    cfg, num_classes_is_set = load_config(
        args.config_file, args.opts, allow_unsafe=args.allow_unsafe_config
    )
    num_threads = _threads_per_process(args.num_gpus)
    use_cpu_without_cuda(cfg, num_threads=num_threads)
    check_config(cfg, num_processes=num_processes, eval_only=args.eval_only)
    if not (args.resume or args.eval_only) and args.machine_rank == 0:
        _refuse_earlier_run(cfg.OUTPUT_DIR)
    weights = find_weights(cfg, resume=args.resume, eval_only=args.eval_only)
    prepare_datasets(cfg, num_classes_is_set=num_classes_is_set, eval_only=args.eval_only)
    check_model(cfg, weights, resume=args.resume, eval_only=args.eval_only)
    if args.eval_only:
        cfg.MODEL.WEIGHTS = weights
    if args.machine_rank == 0:
        _make_output_dir(cfg, eval_only=args.eval_only)

    if num_processes == 1:
        _train_or_evaluate(cfg, args)
        return
    failures = multiprocessing.get_context("spawn").SimpleQueue()
    try:
        launch(
            _child,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(cfg, args, num_classes_is_set, num_threads, failures),
        )
    except (ProcessRaisedException, ProcessExitedException):
        # The first cause, not what it then did to the other processes.
        if failures.empty():
            raise
        raise failures.get() from None


def _check_arguments(args: argparse.Namespace) -> None:
    if not args.config_file:
        raise InputError("--config-file is needed, such as configs/quickstart.yaml")
    for name in ("num_gpus", "num_machines"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1")
    if not 0 <= args.machine_rank < args.num_machines:
        raise InputError(
            f"--machine-rank {args.machine_rank} must be from 0 to {args.num_machines - 1}, "
            "one less than --num-machines"
        )
    if args.num_machines > 1 and args.dist_url == "auto":
        raise InputError(
            "--num-machines above 1 needs --dist-url tcp://HOST:PORT, "
            "an address of machine 0 that all machines reach"
        )
    if torch.cuda.is_available() and args.num_gpus > torch.cuda.device_count():
        raise InputError(
            f"--num-gpus {args.num_gpus}: this machine has {torch.cuda.device_count()} CUDA devices"
        )


def _threads_per_process(num_processes: int) -> int:
    """Return the CPU threads of one process: OMP_NUM_THREADS, else its share of the cores."""
    threads = torch.get_num_threads()
    return threads if "OMP_NUM_THREADS" in os.environ else max(1, threads // num_processes)


def _refuse_earlier_run(output_dir: str) -> None:
    if found := _earlier_run(output_dir):
        raise InputError(
            f"OUTPUT_DIR {output_dir} holds an earlier run ({found}); "
            "choose another OUTPUT_DIR, or continue that run with --resume"
        )


def _earlier_run(output_dir: str) -> str:
    """Return the name of a result that a run left in the folder, empty if there is none."""
    found = (path for pattern in RESULTS for path in Path(output_dir).glob(pattern))
    return next((path.name for path in found if path.is_dir() or path.stat().st_size), "")


def find_weights(cfg: CfgNode, *, resume: bool, eval_only: bool) -> str:
    """Return what will be loaded: the last checkpoint with ``resume``, else MODEL.WEIGHTS."""
    tag = Path(cfg.OUTPUT_DIR, "last_checkpoint")
    if resume and tag.is_file():
        weights, source = str(Path(cfg.OUTPUT_DIR, tag.read_text().strip())), f"{tag} names"
    elif resume and eval_only:
        raise InputError(
            f"--eval-only --resume evaluates the last checkpoint of OUTPUT_DIR {cfg.OUTPUT_DIR}, "
            "which holds none; leave --resume out to evaluate MODEL.WEIGHTS"
        )
    else:
        if resume:
            if checkpoints := sorted(Path(cfg.OUTPUT_DIR).glob("model_*.pth")):
                raise InputError(
                    f"{tag} is missing, which names the checkpoint to resume from; write "
                    f"{checkpoints[-1].name} or another into it"
                )
            logger.warning(
                "Nothing to resume: %s holds no last_checkpoint. Training starts at iteration 0.",
                cfg.OUTPUT_DIR,
            )
        weights, source = cfg.MODEL.WEIGHTS, "MODEL.WEIGHTS is"
    if eval_only and not weights:
        raise InputError("--eval-only needs weights: MODEL.WEIGHTS FILE, or --resume for the last")
    # URLs are Detectron2's to resolve; "?matching_heuristics=True" may follow a name.
    if weights and "://" not in weights and not Path(weights.partition("?")[0]).is_file():
        raise InputError(f"{source} {weights}, which is not a file")
    return weights


def check_model(cfg: CfgNode, weights: str, *, resume: bool, eval_only: bool) -> None:
    """Build the model, the optimizer and the schedule and load weights, for their errors alone."""
    logging.disable(logging.WARNING)  # each process says the same again
    try:
        try:
            model = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)
            saved = {}
            if not eval_only:
                optimizer = Trainer.build_optimizer(cfg, model)
                Trainer.build_lr_scheduler(cfg, optimizer)
                if resume and weights != cfg.MODEL.WEIGHTS:
                    saved["trainer"] = _SavedTrainer(optimizer)
        except InputError:
            raise
        except Exception as error:  # whatever Detectron2 makes of a value it does not know
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise InputError(
                f"no model or optimizer can be built from this config: {type(error).__name__}: "
                f"{first_line(error)} ({Path(place.filename).name}, line {place.lineno})"
            ) from error
        if weights:
            reinit = cfg.MODEL.RETINANET.REINIT_MISMATCHED and not saved
            Checkpointer(model, reinit_mismatched=reinit, complete=eval_only, **saved).load(
                weights, None if saved else []
            )
    finally:
        logging.disable(logging.NOTSET)


class _SavedTrainer:
    """The part of a checkpointed trainer that depends on the config: the optimizer's state."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:  # asked for by fvcore, and not called
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["_trainer"]["optimizer"])


def _make_output_dir(cfg: CfgNode, *, eval_only: bool) -> None:
    """Make OUTPUT_DIR; an evaluation beside an earlier run gets a fresh folder below it."""
    if eval_only and _earlier_run(cfg.OUTPUT_DIR):
        cfg.OUTPUT_DIR = str(Path(cfg.OUTPUT_DIR, f"eval-{datetime.now():%Y%m%d-%H%M%S}"))
        logger.info("Results go to %s", cfg.OUTPUT_DIR)
    try:
        Path(cfg.OUTPUT_DIR).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"OUTPUT_DIR {cfg.OUTPUT_DIR}: {error.strerror}") from error


def end_with_parent() -> None:
    """Have Linux end this process when its parent is killed, so that no orphan goes on."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _child(
    cfg: CfgNode,
    args: argparse.Namespace,
    num_classes_is_set: bool,
    num_threads: int,
    failures: SimpleQueue,
) -> None:
    """Do one process's part; data sets are registered process by process."""
    end_with_parent()
    torch.set_num_threads(num_threads)
    # The parent has shown what the preparation of the data has to say.
    logging.getLogger("retinanet_ext").addHandler(logging.NullHandler())
    try:
        prepare_datasets(cfg, num_classes_is_set=num_classes_is_set, eval_only=args.eval_only)
        _train_or_evaluate(cfg, args)
    except (InputError, FloatingPointError) as error:
        failures.put(error)
        raise
    dist.destroy_process_group()


def _train_or_evaluate(cfg: CfgNode, args: argparse.Namespace) -> None:
    cfg.freeze()
    default_setup(cfg, args)
    setup_logger(
        cfg.OUTPUT_DIR,
        distributed_rank=comm.get_rank(),
        name="retinanet_ext",
        configure_stdout=comm.get_world_size() > 1,  # a single process has it since main()
    )
    logging.getLogger("detectron2.engine.train_loop").addFilter(_is_unexpected)
    try:
        if args.eval_only:
            model = Trainer.build_model(cfg)
            Checkpointer(model, complete=True).load(cfg.MODEL.WEIGHTS)
            results = Trainer.test(cfg, model)
        else:
            trainer = Trainer(cfg)
            trainer.resume_or_load(resume=args.resume)
            results = trainer.train()
    except (InputError, FloatingPointError) as error:
        logger.error(explain(error)[1])
        raise
    if comm.is_main_process():
        logger.info(summarize(cfg, results))
        if args.eval_only:
            verify_results(cfg, results)


def _is_unexpected(record: logging.LogRecord) -> bool:
    """Filter out tracebacks of errors that end in one line, here or in another process."""
    error = record.exc_info[1] if record.exc_info else None
    return error is None or (explain(error) is None and "closed by peer" not in str(error))
