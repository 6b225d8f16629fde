"""From a config file and the command line to a checked config."""

from __future__ import annotations

import difflib
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import META_ARCH_REGISTRY

from retinanet_ext.config import add_retinanet_ext_config
from retinanet_ext.engine.failures import first_line
from retinanet_ext.errors import InputError

NUM_CLASSES_KEY = "MODEL.RETINANET.NUM_CLASSES"

logger = logging.getLogger(__name__)


def load_config(
    config_file: str, opts: Sequence[str] = (), *, allow_unsafe: bool = False
) -> tuple[CfgNode, bool]:
    """Return Detectron2's config with the plugin's keys, the file's values and then ``opts``.

    Whole numbers are accepted where a key holds a float. Nothing is executed unless
    ``allow_unsafe``; a file named by ``_BASE_`` is held to the same rule.

    Args:
        config_file: a YAML file in Detectron2's format
        opts: alternating keys and values, as on the command line
        allow_unsafe: let python tags in the file run code

    Returns:
        the config, not frozen, and whether ``MODEL.RETINANET.NUM_CLASSES`` was given.

    Raises:
        InputError: a file that cannot be read, an unknown key, a value of another type
    """
    cfg = get_cfg()
    add_retinanet_ext_config(cfg)
    content = _read_yaml(config_file, allow_unsafe)
    if content.pop("VERSION", cfg.VERSION) != cfg.VERSION:
        raise InputError(f"{config_file}: only configs of VERSION {cfg.VERSION} are supported")
    given = set()
    for key, value in _flatten(content, cfg):
        _set(cfg, key, value, config_file)
        given.add(key)
    for key, text in _pairs(opts):
        _set(cfg, key, text, "command line")
        given.add(key)
    return cfg, NUM_CLASSES_KEY in given


def check_config(cfg: CfgNode, *, num_processes: int, eval_only: bool) -> None:
    """Refuse values that training or evaluation would trip over later.

    The values of the model are checked by the model, the data by ``prepare_datasets``.

    Args:
        cfg: the whole config
        num_processes: processes on all machines
        eval_only: leave out what concerns training alone
    """
    _check_device(cfg.MODEL.DEVICE, num_processes)
    if cfg.MODEL.META_ARCHITECTURE not in META_ARCH_REGISTRY:
        known = ", ".join(sorted(name for name, _ in META_ARCH_REGISTRY))
        raise InputError(
            f"MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE!r} is unknown; known: {known}"
        )
    if 0 in cfg.MODEL.PIXEL_STD:
        raise InputError(f"MODEL.PIXEL_STD must not hold 0, got {cfg.MODEL.PIXEL_STD}")
    _check("DATALOADER.NUM_WORKERS", cfg.DATALOADER.NUM_WORKERS, minimum=0)
    _check("TEST.DETECTION_GRID.NUM_IMAGES", cfg.TEST.DETECTION_GRID.NUM_IMAGES, minimum=0)
    _check("TEST.DETECTION_GRID.SCORE_THRESH", cfg.TEST.DETECTION_GRID.SCORE_THRESH, minimum=0)
    if eval_only:
        return
    if not cfg.INPUT.MIN_SIZE_TRAIN:
        raise InputError("INPUT.MIN_SIZE_TRAIN is empty; give the short side in pixels, [600]")
    solver = cfg.SOLVER
    _check("SOLVER.MAX_ITER", solver.MAX_ITER, minimum=1)
    _check("SOLVER.CHECKPOINT_PERIOD", solver.CHECKPOINT_PERIOD, minimum=1)
    _check("SOLVER.IMS_PER_BATCH", solver.IMS_PER_BATCH, minimum=1)
    _check("SOLVER.REFERENCE_WORLD_SIZE", solver.REFERENCE_WORLD_SIZE, minimum=0)
    _check("SOLVER.BASE_LR", solver.BASE_LR, minimum=0)
    _check("SOLVER.WARMUP_ITERS", solver.WARMUP_ITERS, minimum=0)
    _check("TEST.EVAL_PERIOD", cfg.TEST.EVAL_PERIOD, minimum=0)
    # With a reference, Detectron2 scales the batch to the number of processes.
    shares = solver.REFERENCE_WORLD_SIZE or num_processes
    if solver.IMS_PER_BATCH % shares:
        what = "REFERENCE_WORLD_SIZE" if solver.REFERENCE_WORLD_SIZE else "the number of processes"
        raise InputError(
            f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH} must be a multiple of {what}, {shares}"
        )
    if solver.AMP.PRECISION not in ("float16", "bfloat16"):
        raise InputError(
            f"SOLVER.AMP.PRECISION must be float16 or bfloat16, got {solver.AMP.PRECISION!r}"
        )
    on_cpu = torch.device(cfg.MODEL.DEVICE).type != "cuda"
    if solver.AMP.ENABLED and solver.AMP.PRECISION == "float16" and on_cpu:
        raise InputError(
            "SOLVER.AMP.ENABLED in float16 needs a CUDA device; on the CPU set "
            "SOLVER.AMP.PRECISION bfloat16, or SOLVER.AMP.ENABLED False"
        )


def _check(key: str, value: float, *, minimum: float) -> None:
    if not minimum <= value < math.inf:
        raise InputError(f"{key} must be at least {minimum}, got {value}")


def _check_device(name: str, num_processes: int) -> None:
    if name not in ("cpu", "cuda") and not re.fullmatch(r"cuda:\d+", name):
        raise InputError(f"MODEL.DEVICE {name!r} is not a device; write cuda, cuda:0 or cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"MODEL.DEVICE {name!r}: this machine has {torch.cuda.device_count()} CUDA devices"
        )
    if device.index is not None and num_processes > 1:
        raise InputError(f"MODEL.DEVICE {name!r}: several processes take a device each; write cuda")
    if device.type != "cuda" and torch.cuda.is_available() and num_processes > 1:
        raise InputError(
            f"MODEL.DEVICE {name!r} with several processes: hide the CUDA devices as well, "
            "with CUDA_VISIBLE_DEVICES= before the command"
        )


def use_cpu_without_cuda(cfg: CfgNode, *, num_threads: int) -> None:
    """Set ``MODEL.DEVICE`` to the CPU, and say so, where CUDA is asked for and absent."""
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
        logger.warning("No CUDA device: running on the CPU with %d threads", num_threads)


def _read_yaml(path: str, allow_unsafe: bool) -> dict[str, Any]:
    try:
        content = CfgNode.load_yaml_with_base(path, allow_unsafe=allow_unsafe)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{mark.name}, line {mark.line + 1}" if mark else path
        if "tag:yaml.org,2002:python/" in (error.problem or ""):
            raise InputError(
                f"{where}: a python tag may run any code; if you trust the file, "
                "pass --allow-unsafe-config"
            ) from None
        raise InputError(f"{where}: not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid YAML: {first_line(error)}") from None
    except OSError as error:
        file = error.filename or path
        named = "" if file == path else f", named by _BASE_ in {path} or in its base"
        raise InputError(f"config file {file}{named}: {error.strerror or error}") from None
    except RecursionError:
        raise InputError(f"{path}: nested too deeply, or _BASE_ leads back to the file") from None
    except (AssertionError, AttributeError, TypeError):
        content = None
    if not isinstance(content, dict):
        raise InputError(f"{path}: the file and its _BASE_ must hold 'KEY: value' lines")
    return content


def _flatten(
    content: Mapping[Any, Any], known: CfgNode, prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """Yield full keys and values; a mapping is a group of keys where the config has a group."""
    for key, value in content.items():
        name = f"{prefix}{key}"
        group = known.get(key)
        if isinstance(value, Mapping) and isinstance(group, CfgNode):
            yield from _flatten(value, group, f"{name}.")
        else:
            yield name, value


def _pairs(opts: Sequence[str]) -> Iterator[tuple[str, str]]:
    for option in opts[::2]:
        if option.startswith("--"):
            raise InputError(f"{option} must stand before the first KEY VALUE pair")
    if len(opts) % 2:
        stray = next((option for option in opts if option.startswith("--")), None)
        if stray:
            raise InputError(f"{stray} must stand before the first KEY VALUE pair")
        raise InputError(
            f"config values come as pairs KEY VALUE, with a space; {opts[-1]!r} stands alone"
        )
    return zip(opts[::2], opts[1::2], strict=True)


def _set(cfg: CfgNode, key: str, value: Any, source: str) -> None:
    """Set one key as yacs does, with errors a person can act on."""
    node: Any = cfg
    for part in key.split("."):
        if not isinstance(node, CfgNode) or part not in node:
            raise InputError(f"{source}: unknown key {key}{_suggestion(key, cfg)}")
        node = node[part]
    default = node
    if isinstance(default, CfgNode):
        raise InputError(f"{source}: {key} is a group of keys, not a value; got {value!r}")
    try:
        # A folder named 2024 stays a string.
        if not (isinstance(default, str) and isinstance(value, str)):
            value = CfgNode._decode_cfg_value(value)
        if isinstance(default, float) and type(value) is int:
            value = float(value)
        if isinstance(default, list) and isinstance(value, Mapping):
            value = [[name, item] for name, item in value.items()]  # {name: number} as pairs
        if value is None and default is not None:
            raise ValueError
        cfg.merge_from_list([key, repr(value) if isinstance(value, str) else value])
    except (ValueError, TypeError, AssertionError, OverflowError, MemoryError, RecursionError):
        hint = ""
        if type(default) is int and type(value) is float and value.is_integer():
            hint = f"; write {int(value)}"
        elif isinstance(default, str) and isinstance(value, int | float):
            hint = f'; write "{value}"'
        raise InputError(
            f"{source}: {key} takes a value of type {type(default).__name__}, "
            f"such as {default!r}; got {repr(value)[:80]}{hint}"
        ) from None


def _suggestion(key: str, cfg: CfgNode) -> str:
    if "=" in key:
        return "; write KEY VALUE, with a space"
    known = list(_all_keys(cfg))
    last = key.rpartition(".")[2]
    alike = [name for name in known if last in name.rpartition(".")[2]]
    matches = difflib.get_close_matches(key.upper(), alike or known, n=2, cutoff=0.5)
    return f"; did you mean {' or '.join(matches)}?" if matches else ""


def _all_keys(node: CfgNode, prefix: str = "") -> Iterator[str]:
    for name, value in node.items():
        if isinstance(value, CfgNode):
            yield from _all_keys(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"
