"""From a config file and the command line to a checked config."""

from __future__ import annotations

import ast
import difflib
import logging
import math
import os
import re
import reprlib
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import META_ARCH_REGISTRY

from retinanet_ext import add_retinanet_ext_config
from retinanet_ext.config_keys import all_keys, read_key
from retinanet_ext.data.images import RANGE_KEY, num_channels, parse_pixel_range
from retinanet_ext.engine.config_warnings import FOREIGN_GROUPS
from retinanet_ext.errors import InputError, first_line
from retinanet_ext.losses import Interval
from retinanet_ext.modeling import RetinaNetExt
from retinanet_ext.modeling.inference import check_precision

PATHS = tuple(
    f"DATASETS.CUSTOM.{name}" for name in ("TRAIN_JSON", "TRAIN_IMAGES", "TEST_JSON", "TEST_IMAGES")
)
"""Keys that hold a path or a list of paths."""

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
    "INPUT.SIZE_DIVISIBILITY": Interval("[0, 16384]"),
    "SOLVER.GRAD_ACCUM_STEPS": Interval("[1, 65536]"),
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
    "SOLVER.AMP.PRECISION": ("float16", "bfloat16"),
    "SOLVER.NON_FINITE.POLICY": ("raise", "skip"),
}

logger = logging.getLogger(__name__)


def load_config(config_file: str | os.PathLike[str], opts: Sequence[str] = ()) -> CfgNode:
    """Return Detectron2's config with the plugin's keys, the file's values and then ``opts``.

    yacs merges the values. Whole numbers are accepted where a key holds a float. No code in a file
    is run.

    Args:
        config_file: a YAML file in Detectron2's format, which may name another one by ``_BASE_``
        opts: alternating keys and values, as on the command line

    Returns:
        the config, not frozen

    Raises:
        InputError: a file that cannot be read, an unknown key, a value of another type

    Example::

        >>> cfg = load_config("configs/small_R18_FPN.yaml", ["SOLVER.BASE_LR", "1"])
        >>> cfg.SOLVER.BASE_LR
        1.0
    """
    if not config_file:
        raise InputError("--config-file is needed, such as configs/quickstart.yaml")
    cfg = get_cfg()
    add_retinanet_ext_config(cfg)
    for source, values in (
        (str(config_file), _read_file(str(config_file), cfg)),
        ("command line", _read_opts(opts, cfg)),
    ):
        with _yacs_errors(source, cfg):
            _convert(values, cfg)
            cfg.merge_from_other_cfg(CfgNode(values))
    return cfg


def _read_file(path: str, cfg: CfgNode) -> dict[str, Any]:
    try:
        values = CfgNode.load_yaml_with_base(path, allow_unsafe=False)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{mark.name}, line {mark.line + 1}" if mark else path
        raise InputError(f"{where}: not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid YAML: {first_line(error)}") from None
    except OSError as error:
        file = error.filename or path
        named = "" if file == path else f", named by _BASE_ in {path} or in its base"
        raise InputError(f"config file {file}{named}: {error.strerror or error}") from None
    except (AssertionError, AttributeError, RecursionError, TypeError):
        values = None
    if not isinstance(values, dict):
        raise InputError(
            f"{path}: the file and its _BASE_ must hold 'KEY: value' lines, and no file may be its "
            "own base"
        )
    if values.pop("VERSION", cfg.VERSION) != cfg.VERSION:
        raise InputError(f"{path}: only configs of VERSION {cfg.VERSION} are supported")
    return values


def _read_opts(opts: Sequence[str], cfg: CfgNode) -> dict[str, Any]:
    """Return KEY VALUE pairs as nested dicts, each value in the type that its text has in YAML."""
    flag = next((option for option in opts[::2] if str(option).startswith("--")), None)
    if flag or len(opts) % 2:
        stray = flag or next((option for option in opts if str(option).startswith("--")), None)
        raise InputError(
            f"{stray} must stand before the first KEY VALUE pair"
            if stray
            else f"config values come as pairs KEY VALUE, with a space; {opts[-1]!r} stands alone"
        )
    values: dict[str, Any] = {}
    for key in opts[::2]:
        if "=" in key:
            raise InputError(f"{key}: write KEY VALUE, with a space")
    for key, text in zip(opts[::2], opts[1::2], strict=True):
        *groups, name = key.split(".")
        node, default = values, cfg
        for group in groups:
            node = node.setdefault(group, {})
            default = default.get(group, {}) if isinstance(default, Mapping) else {}
        default = default.get(name) if isinstance(default, Mapping) else None
        is_list = str(text).startswith("[")
        is_text = isinstance(default, str) and not (key in PATHS and is_list)
        node[name] = text if is_text or not isinstance(text, str) else _parse(text)
    return values


def _parse(text: str) -> Any:
    """Return the Python literal or else the YAML value that a text is, such as [a, b]."""
    for parse, errors in (
        (ast.literal_eval, (ValueError, SyntaxError, MemoryError, RecursionError)),
        (yaml.safe_load, (ValueError, yaml.YAMLError, RecursionError)),
    ):
        with suppress(*errors):
            return parse(text)
    return text


def _convert(values: dict[Any, Any], cfg: CfgNode, prefix: str = "") -> None:
    """Bring values to the types on which yacs insists, in place."""
    for name, value in values.items():
        key, default = f"{prefix}{name}", cfg.get(name)
        if isinstance(default, CfgNode) and isinstance(value, dict):
            _convert(value, default, f"{key}.")
        elif value is None and default is not None:
            raise InputError(f"{key} has no value; leave it out for its default, {default!r}")
        elif isinstance(default, float) and type(value) is int:
            values[name] = float(value)
        elif isinstance(default, list) and isinstance(value, dict):
            values[name] = [[item, number] for item, number in value.items()]
        elif key == RANGE_KEY and isinstance(value, str):
            values[name] = [value]
        elif key in PATHS and isinstance(value, list):
            cfg[name] = []
        elif isinstance(value, str) and (key in PATHS or isinstance(default, str)):
            cfg[name] = ""
            values[name] = repr(value)  # yacs would read a folder named 2024 as a number


@contextmanager
def _yacs_errors(source: str, cfg: CfgNode) -> Iterator[None]:
    """Turn yacs's exceptions into one line that names the key and what is allowed."""
    try:
        yield
    except KeyError as error:
        message = str(error.args[0])
        key = message.removeprefix("Non-existent config key: ")
        if key == message:  # of a key that was renamed
            raise InputError(f"{source}: {first_line(message)}") from None
        name = key if key.isprintable() else repr(key)
        raise InputError(f"{source}: unknown key {name}{_suggestion(key, cfg)}") from None
    except (AssertionError, AttributeError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise InputError(f"{source}: {error}") from None
        text = str(error)
        found = re.search(r"with values \(.*? vs\. (.*)\) for config key: (\S+)", text, re.DOTALL)
        if not found:
            raise InputError(f"{source}: {first_line(error)[:300]}") from None
        value, key = found[1], found[2]
        default = read_key(cfg, key)
        if isinstance(default, CfgNode):
            raise InputError(
                f"{source}: {key} is a group of keys, not a value; got {value[:80]}"
            ) from None
        raise InputError(
            f"{source}: {key} takes a value of type {type(default).__name__}, such as "
            f"{default!r}; got {value[:80]}"
        ) from None


def _suggestion(key: str, cfg: CfgNode) -> str:
    known = [name for name in all_keys(cfg) if not name.startswith(FOREIGN_GROUPS)]
    last = key.rpartition(".")[2]
    alike = [name for name in known if last in name.rpartition(".")[2]]
    nearest = difflib.get_close_matches(key.upper(), alike or known, n=2, cutoff=0.5)
    return f"; did you mean {' or '.join(nearest)}?" if nearest else ""


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
        _check_solver(cfg, num_processes)


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
    streams, batch = cfg.DATALOADER.ASPECT_RATIO_STREAMS, solver.IMS_PER_BATCH
    if reference:
        batch = batch * num_processes // reference
    if streams and batch % streams:
        raise InputError(
            f"a batch of {batch} images (SOLVER.IMS_PER_BATCH) must be a multiple of "
            f"DATALOADER.ASPECT_RATIO_STREAMS {streams}"
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
    needs_cuda = {}
    if cfg.SOLVER.AMP.ENABLED and cfg.SOLVER.AMP.PRECISION == "float16":
        needs_cuda["SOLVER.AMP.PRECISION float16"] = "set bfloat16, or SOLVER.AMP.ENABLED False"
    if any(cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE):
        needs_cuda["MODEL.RESNETS.DEFORM_ON_PER_STAGE"] = "set it to [False, False, False, False]"
    for key in ("MODEL.RESNETS.NORM", "MODEL.FPN.NORM", "MODEL.RETINANET.NORM"):
        if read_key(cfg, key) == "SyncBN" and num_processes > 1:
            needs_cuda[f"{key} SyncBN"] = "set naiveSyncBN, which does the same on the CPU"
    for what, remedy in needs_cuda.items():
        raise InputError(f"{what} trains on CUDA devices alone, and this is the CPU: {remedy}")


def use_cpu_without_cuda(cfg: CfgNode, *, num_threads: int) -> None:
    """Set ``MODEL.DEVICE`` to the CPU, and say so, where CUDA is asked for and absent."""
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
        logger.warning("No CUDA device: running on the CPU with %d threads", num_threads)
