"""The command line: check everything in one process, then train or evaluate on all of them."""

from __future__ import annotations

import argparse
import atexit
import io
import logging
import os
import pickle
import shutil
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import default_argument_parser, default_setup
from detectron2.evaluation import verify_results
from detectron2.layers import DeformConv, ModulatedDeformConv
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn

from retinanet_ext.config_keys import all_keys, read_key
from retinanet_ext.data import prepare_datasets
from retinanet_ext.data.anchor_coverage import warn_of_unreached_boxes
from retinanet_ext.data.register import find_sources, registered_classes
from retinanet_ext.data.sources import Source
from retinanet_ext.engine.checkpoint import Checkpointer, find_weights
from retinanet_ext.engine.config_check import check_config, load_config, use_cpu_without_cuda
from retinanet_ext.engine.config_warnings import config_warnings
from retinanet_ext.engine.distributed import (
    Group,
    GroupError,
    agree,
    find_group,
    is_restarted,
    job_ids,
    lost_peer,
    run,
    stop_at_interrupt,
)
from retinanet_ext.engine.resume import saved_seed
from retinanet_ext.engine.run_info import write_run_info
from retinanet_ext.engine.scaling import scale_schedule
from retinanet_ext.engine.summary import summarize
from retinanet_ext.engine.trainer import Trainer
from retinanet_ext.errors import (
    InputError,
    StoppedError,
    UnexpectedResultsError,
    explain,
    first_line,
)

RESULTS = ("last_checkpoint", "model_*.pth", "metrics.json", "inference")
"""What an earlier training or evaluation leaves in its OUTPUT_DIR, once it has come that far."""

OF_ONE_MACHINE = (
    *("OUTPUT_DIR", "MODEL.WEIGHTS"),
    *("DATASETS.CUSTOM.TRAIN_", "DATASETS.CUSTOM.TEST_"),
)
"""How the keys begin that may differ from machine to machine: paths."""

logger = logging.getLogger(__name__)


@dataclass
class Job:
    """What every process needs, as one process a machine has checked it.

    Attributes:
        cfg: not frozen yet.
        command: the command line.
        args: the flags; ``resume`` also where the job was started again.
        weights: the file that is loaded; empty for none.
        is_resumed: whether that is a checkpoint of this run.
        names: of the job in the manifest.
        num_threads: of each process.
        data: a file of what was registered in Detectron2's catalogs.
    """

    cfg: CfgNode
    command: list[str]
    args: argparse.Namespace
    weights: str
    is_resumed: bool
    names: list[str]
    num_threads: int
    data: str


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``train_net.py`` and return its exit code.

    Returns:
        0, or with one line on stderr: 2 for an :class:`InputError`, 3 for a loss that is no
        longer finite, 143 for a training that was stopped and can go on, 130 for an interrupt,
        1 for a lost process, for memory that ran out and for results other than
        ``TEST.EXPECTED_RESULTS``
    """
    parser = argument_parser()
    args = parser.parse_args(argv)
    _log_what_can_be_logged()
    is_main = True
    try:
        group = find_group(args)
        is_main = group.is_main
        setup_logger(name="retinanet_ext", distributed_rank=group.local_rank or 0)
        _run([sys.argv[0], *(sys.argv[1:] if argv is None else argv)], args, group)
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        end = (error.code, str(error)) if isinstance(error, GroupError) else explain(error)
        if end is None:
            raise
        code, line = end
        # All processes stop and diverge alike; the others tell of what they alone have met.
        if line and (is_main or not isinstance(error, StoppedError | FloatingPointError)):
            print(f"{parser.prog}: error: {line}", file=sys.stderr)
        return code
    return 0


def argument_parser() -> argparse.ArgumentParser:
    """Return Detectron2's parser with the plugin's flags, and a free port by default."""
    parser = default_argument_parser()
    parser.description = "Train a detector, or evaluate its weights with --eval-only."
    parser.add_argument(
        "--allow-unsafe-config",
        action="store_true",
        help="let python tags in the config file run code; for files you trust",
    )
    parser.add_argument(
        "--rendezvous-timeout",
        type=float,
        default=300,
        metavar="SECONDS",
        help="how long the processes may take to meet, 300 by default",
    )
    # None: not given. torchrun and srun say by themselves how many processes there are.
    parser.set_defaults(dist_url="auto", num_gpus=None, num_machines=None, machine_rank=None)
    return parser


def _run(command: list[str], args: argparse.Namespace, group: Group) -> None:
    """Train or evaluate on all processes; whatever can be checked is checked before it begins."""
    if not args.config_file:
        raise InputError("--config-file is needed, such as configs/quickstart.yaml")
    if not 0 < args.rendezvous_timeout < 1e6:
        raise InputError(
            f"--rendezvous-timeout takes seconds above 0, got {args.rendezvous_timeout:g}"
        )
    if group.local_rank is None:
        job = _prepare(command, args, group, job_ids())
        run(group, _work, (job,), timeout=args.rendezvous_timeout)
    else:
        run(group, _work_as_member, (command, args, group), timeout=args.rendezvous_timeout)


def _work_as_member(command: list[str], args: argparse.Namespace, group: Group) -> None:
    """Do the part of a process that torchrun or srun has started."""
    names = sorted({name for names in comm.all_gather(job_ids()) for name in names})
    _work(agree(lambda: _prepare(command, args, group, names)))


def _prepare(command: list[str], args: argparse.Namespace, group: Group, names: list[str]) -> Job:
    """Check all that one process can know, for this machine; write nothing until then."""
    cfg, num_classes_is_set = load_config(
        args.config_file, args.opts, allow_unsafe=args.allow_unsafe_config
    )
    num_threads = _threads_per_process(group.num_local)
    use_cpu_without_cuda(cfg, num_threads=num_threads)
    check_config(cfg, num_processes=group.size, eval_only=args.eval_only)
    for change in [] if args.eval_only else scale_schedule(cfg):
        logger.info("%s", change)
    args.resume = args.resume or _is_own_earlier_run(cfg.OUTPUT_DIR, names, args.eval_only)
    if not (args.resume or args.eval_only) and group.machine_rank == 0:
        _refuse_earlier_run(cfg.OUTPUT_DIR)
    weights, is_resumed = find_weights(cfg, resume=args.resume, eval_only=args.eval_only)
    prepare_datasets(cfg, num_classes_is_set=num_classes_is_set, eval_only=args.eval_only)
    check_model(cfg, weights, resume=is_resumed, eval_only=args.eval_only, num_processes=group.size)
    seed = saved_seed(weights) if is_resumed and not args.eval_only else -1
    if seed >= 0:
        if 0 <= cfg.SEED != seed:
            logger.warning("SEED %d of the run goes on, and not %d", seed, cfg.SEED)
        cfg.SEED = seed
    unreached = [] if args.eval_only else warn_of_unreached_boxes(cfg)
    for line in [*config_warnings(cfg, weights, eval_only=args.eval_only), *unreached]:
        logger.warning("%s", line)
    if args.eval_only:
        cfg.MODEL.WEIGHTS = weights
    if group.machine_rank == 0:
        _make_output_dir(cfg, eval_only=args.eval_only)
    data = _save_registered(find_sources(cfg, ["TEST"] if args.eval_only else ["TRAIN", "TEST"]))
    return Job(cfg, command, args, weights, is_resumed, names, num_threads, data)


def _log_what_can_be_logged() -> None:
    """Print no traceback for a line that a full disk or a closed pipe keeps out, and any name."""
    logging.raiseExceptions = False
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _is_own_earlier_run(output_dir: str, names: list[str], eval_only: bool) -> bool:
    """Tell whether torchrun or Slurm has started this job again, which goes on with its own run.

    An earlier run of another job is refused in every start, not just in the first.
    """
    return is_restarted() and not eval_only and bool(_earlier_run(output_dir))


def _save_registered(sources: list[Source]) -> str:
    """Write what the plugin has registered for the machine's other processes, and name the file.

    A file, since a large data set would hold up the start of process after process in a pipe.
    """
    folder = tempfile.mkdtemp(prefix="retinanet_ext_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    registered = {
        source.name: (DatasetCatalog[source.name], MetadataCatalog.get(source.name).as_dict())
        for source in sources
        if source.is_ours
    }
    file = Path(folder, "registered.pkl")
    file.write_bytes(pickle.dumps(registered))
    return str(file)


def _register(file: str) -> None:
    for name, (load, metadata) in pickle.loads(Path(file).read_bytes()).items():
        for catalog in (DatasetCatalog, MetadataCatalog):
            catalog.pop(name, None)
        DatasetCatalog.register(name, load)
        MetadataCatalog.get(name).set(**metadata)


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


def check_model(
    cfg: CfgNode, weights: str, *, resume: bool, eval_only: bool, num_processes: int = 1
) -> None:
    """Build the model, the optimizer and the schedule and load weights, for their errors alone."""
    logging.disable(logging.WARNING)  # each process says the same again
    try:
        try:
            model = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)
            saved: dict[str, Any] = {}
            if not eval_only:
                optimizer = Trainer.build_optimizer(cfg, model)
                Trainer.build_lr_scheduler(cfg, optimizer)
                if resume:
                    saved["trainer"] = _SavedTrainer(optimizer)
        except InputError:
            raise
        except Exception as error:  # whatever Detectron2 makes of a value it does not know
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise InputError(
                f"no model or optimizer can be built from this config: {type(error).__name__}: "
                f"{first_line(error)} ({Path(place.filename).name}, line {place.lineno})"
            ) from error
        if torch.device(cfg.MODEL.DEVICE).type != "cuda":
            _check_layers_on_cpu(model, eval_only=eval_only, num_processes=num_processes)
        if weights:
            reinit = cfg.MODEL.RETINANET.REINIT_MISMATCHED and not saved
            Checkpointer(
                model,
                str(Path(weights).parent) if resume else "",
                reinit_mismatched=reinit,
                complete=eval_only,
                class_names=registered_classes(
                    cfg, "TEST" if eval_only else "TRAIN", read=eval_only
                ),
                **saved,
            ).load(weights, None if resume else [])
    finally:
        logging.disable(logging.NOTSET)


def _check_layers_on_cpu(model: nn.Module, *, eval_only: bool, num_processes: int) -> None:
    """Refuse layers that Detectron2 or torch would refuse in the first iteration."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.SyncBatchNorm) and num_processes > 1 and not eval_only:
            raise InputError(
                f"{name} is SyncBN (MODEL.RESNETS.NORM, FPN.NORM or RETINANET.NORM), which several "
                "processes train on CUDA devices alone; naiveSyncBN, of Detectron2, does the same "
                "on the CPU"
            )
        evaluates = isinstance(layer, DeformConv) and layer.deformable_groups == 1
        if isinstance(layer, DeformConv | ModulatedDeformConv) and not (evaluates and eval_only):
            raise InputError(
                f"{name} is a deformable convolution (MODEL.RESNETS.DEFORM_ON_PER_STAGE), which "
                f"Detectron2 {'trains' if evaluates else 'computes'} on CUDA devices alone"
            )


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


def _work(job: Job) -> None:
    """Train or evaluate on one process of several, or on the only one."""
    cfg, args = job.cfg, job.args
    _log_what_can_be_logged()
    torch.set_num_threads(job.num_threads)
    _register(job.data)
    _check_same_everywhere(cfg, Path(job.weights).name if job.is_resumed else "")
    if args.eval_only:
        cfg.OUTPUT_DIR = comm.all_gather(cfg.OUTPUT_DIR)[0]
    seed_is_drawn = cfg.SEED < 0 and not args.eval_only
    if seed_is_drawn:
        cfg.SEED = comm.shared_random_seed()
    cfg.freeze()
    default_setup(cfg, args)
    setup_logger(
        cfg.OUTPUT_DIR,
        distributed_rank=comm.get_rank(),
        name="retinanet_ext",
        # A process that was not started by this one has it since main().
        configure_stdout=not logging.getLogger("retinanet_ext").handlers,
    )
    logging.getLogger("detectron2.engine.train_loop").addFilter(_is_unexpected)
    if cfg.DETERMINISTIC:
        _make_deterministic()
    if seed_is_drawn:
        logger.info("SEED %d is drawn", cfg.SEED)
    if comm.is_main_process():
        write_run_info(
            cfg,
            command=job.command,
            weights=job.weights,
            resumed=job.is_resumed,
            eval_only=args.eval_only,
        )
    try:
        results = _train_or_evaluate(cfg, args)
        if comm.is_main_process():
            logger.info(summarize(cfg, results))
            if args.eval_only:
                verify_results(cfg, results)
    except SystemExit:  # of verify_results, which training calls by itself
        if not cfg.TEST.EXPECTED_RESULTS:
            raise
        raise UnexpectedResultsError(
            "the results are not those of TEST.EXPECTED_RESULTS; the log has both"
        ) from None
    except Exception as error:
        if end := explain(error):
            logger.error(end[1])
        raise


def _train_or_evaluate(cfg: CfgNode, args: argparse.Namespace) -> Any:
    if args.eval_only:
        model = Trainer.build_model(cfg)
        class_names = registered_classes(cfg, "TEST", read=True)
        folder = str(Path(cfg.MODEL.WEIGHTS).parent) if args.resume else ""
        checkpointer = Checkpointer(model, folder, complete=True, class_names=class_names)
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        return Trainer.test(cfg, model)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    with stop_at_interrupt():
        return trainer.train()


def _check_same_everywhere(cfg: CfgNode, checkpoint: str) -> None:
    """Refuse processes that would train different models, or go on from different iterations."""
    own = {key: read_key(cfg, key) for key in all_keys(cfg) if not key.startswith(OF_ONE_MACHINE)}
    all_values = comm.all_gather({**own, "the checkpoint to resume from": checkpoint or "none"})
    for rank, values in enumerate(all_values):
        for key, expected in all_values[0].items():
            if values[key] != expected:
                raise InputError(
                    f"{key} is {expected} in process 0 and {values[key]} in process {rank}; start "
                    "all machines with the same config and command, and OUTPUT_DIR in a folder "
                    "that they share"
                )


def _make_deterministic() -> None:
    """Have equal runs on equal hardware give equal bits, or end where an operation cannot."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def _is_unexpected(record: logging.LogRecord) -> bool:
    """Filter out tracebacks of errors that end in one line, here or in another process."""
    error = record.exc_info[1] if record.exc_info else None
    return error is None or (explain(error) is None and not lost_peer(error))
