"""From a config file and the command line to a checked config."""

from __future__ import annotations

import difflib
import io
import logging
import math
import os
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, pairwise
from typing import IO, Any

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

NUM_CLASSES_KEY = "MODEL.RETINANET.NUM_CLASSES"

PATHS = tuple(
    f"DATASETS.CUSTOM.{name}" for name in ("TRAIN_JSON", "TRAIN_IMAGES", "TEST_JSON", "TEST_IMAGES")
)
"""Keys that hold a path or a list of paths."""

MAX_SIDE = 16384
"""Pixels of an image's side: a batch of more fits no machine."""

MAX_VALUES = 100_000
"""Of a config file, with its aliases written out; real ones have hundreds."""

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


RANGES = {
    "DATALOADER.NUM_WORKERS": Interval("[0, 1024]"),
    "INPUT.MAX_PIXELS": Interval("[1, inf)"),
    "INPUT.MIN_SIZE_TEST": Interval(f"[0, {MAX_SIDE}]"),
    "INPUT.MAX_SIZE_TEST": Interval(f"[1, {MAX_SIDE}]"),
    "MODEL.FPN.OUT_CHANNELS": Interval("[1, 4096]"),
    "MODEL.PIXEL_MEAN": Interval("(-inf, inf)"),
    "MODEL.PIXEL_STD": Interval("(0, inf)"),
    "MODEL.RESNETS.NUM_GROUPS": Interval("[1, 4096]"),
    "MODEL.RESNETS.RES2_OUT_CHANNELS": Interval("[1, 4096]"),
    "MODEL.RESNETS.STEM_OUT_CHANNELS": Interval("[1, 4096]"),
    "MODEL.RESNETS.WIDTH_PER_GROUP": Interval("[1, 4096]"),
    "MODEL.RETINANET.BBOX_REG_WEIGHTS": Interval("(0, inf)"),
    "MODEL.RETINANET.NUM_CLASSES": Interval("[1, 100000]"),
    "MODEL.RETINANET.NUM_CONVS": Interval("[0, 64]"),
    "SEED": Interval("(-inf, 2147483647]"),
    "TEST.DETECTION_GRID.NUM_IMAGES": Interval("[0, 10000]"),
    "TEST.DETECTION_GRID.SCORE_THRESH": Interval("[0, inf)"),
    "TEST.DETECTIONS_PER_IMAGE": Interval("[1, inf)"),
}
"""What each number of a key may be, or each of its numbers where it holds several."""

TRAINING_RANGES = {
    "DATALOADER.ASPECT_RATIO_STREAMS": Interval("[0, 65536]"),
    "DATALOADER.RANDOM_SUBSET_RATIO": Interval("(0, 1]"),
    "DATALOADER.REPEAT_THRESHOLD": Interval("[0, inf)"),
    "INPUT.CROP.SIZE": Interval("(0, inf)"),
    "INPUT.SIZE_DIVISIBILITY": Interval(f"[0, {MAX_SIDE}]"),
    "INPUT.MAX_SIZE_TRAIN": Interval(f"[1, {MAX_SIDE}]"),
    "INPUT.MIN_SIZE_TRAIN": Interval(f"[1, {MAX_SIDE}]"),
    "SOLVER.GRAD_ACCUM_STEPS": Interval("[1, 65536]"),
    "SOLVER.BASE_LR": Interval("[0, inf)"),
    "SOLVER.BASE_LR_END": Interval("[0, inf)"),
    "SOLVER.BIAS_LR_FACTOR": Interval("[0, inf)"),
    "SOLVER.CHECKPOINT_PERIOD": Interval("[1, inf)"),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": Interval("(0, inf)"),
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": Interval("(0, inf)"),
    "SOLVER.GAMMA": Interval("[0, inf)"),
    "SOLVER.IMS_PER_BATCH": Interval("[1, 65536]"),
    "SOLVER.MAX_ITER": Interval("[1, 1000000000]"),
    "SOLVER.MOMENTUM": Interval("[0, 1)"),
    "SOLVER.NON_FINITE.MAX_SKIPPED": Interval("[0, inf)"),
    "SOLVER.NUM_DECAYS": Interval("[1, 1000]"),
    "SOLVER.REFERENCE_BATCH": Interval("[0, 65536]"),
    "SOLVER.REFERENCE_WORLD_SIZE": Interval("[0, 65536]"),
    "SOLVER.STEPS": Interval("[1, inf)"),
    "SOLVER.WARMUP_FACTOR": Interval("[0, 1]"),
    "SOLVER.WARMUP_ITERS": Interval("[0, inf)"),
    "SOLVER.WEIGHT_DECAY": Interval("[0, inf)"),
    "SOLVER.WEIGHT_DECAY_NORM": Interval("[0, inf)"),
    "TEST.EVAL_PERIOD": Interval("[0, inf)"),
    "TEST.PRECISE_BN.NUM_ITER": Interval("[1, inf)"),
    "VIS_PERIOD": Interval("[0, inf)"),
}

CHOICES = {
    "FLOAT32_PRECISION": ("", "highest", "high", "medium"),
}
TRAINING_CHOICES = {
    "DATALOADER.SAMPLER_TRAIN": (
        "TrainingSampler",
        "RepeatFactorTrainingSampler",
        "RandomSubsetTrainingSampler",
        "WeightedTrainingSampler",
        "WeightedCategoryTrainingSampler",
    ),
    "INPUT.CROP.TYPE": ("relative_range", "relative", "absolute", "absolute_range"),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("choice", "range"),
    "INPUT.RANDOM_FLIP": ("horizontal", "vertical", "none"),
    "SOLVER.AMP.PRECISION": ("float16", "bfloat16"),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("value", "norm"),
    "SOLVER.LR_SCHEDULER_NAME": (
        "WarmupMultiStepLR",
        "WarmupCosineLR",
        "WarmupStepWithFixedGammaLR",
    ),
    "SOLVER.NON_FINITE.POLICY": ("raise", "skip"),
    "SOLVER.WARMUP_METHOD": ("linear", "constant"),
}


def check_config(cfg: CfgNode, *, num_processes: int, eval_only: bool) -> None:
    """Refuse values that training or evaluation would trip over later.

    The values of the model's own keys are checked by the model, the data by ``prepare_datasets``.

    Args:
        cfg: the whole config
        num_processes: processes on all machines
        eval_only: leave out what concerns training alone

    Raises:
        InputError: names the key, its value and what is allowed
    """
    for key in all_keys(cfg):
        if any(
            isinstance(value, float) and not math.isfinite(value) for value in _leaves(cfg, key)
        ):
            raise InputError(f"{key} must be finite, got {read_key(cfg, key)}")
    _check_ranges(cfg, RANGES, CHOICES)
    _check_output_dir(cfg.OUTPUT_DIR)
    _check_device(cfg.MODEL.DEVICE, num_processes)
    if cfg.MODEL.META_ARCHITECTURE not in META_ARCH_REGISTRY:
        known = ", ".join(sorted(name for name, _ in META_ARCH_REGISTRY))
        raise InputError(
            f"MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE!r} is unknown; known: {known}"
        )
    if cfg.MODEL.LOAD_PROPOSALS:
        raise InputError(
            "MODEL.LOAD_PROPOSALS must be False: this detector has no use for proposals, and "
            "Detectron2 unpickles DATASETS.PROPOSAL_FILES_*, which may run any code"
        )
    check_precision(cfg.TEST.PRECISION, cfg.MODEL.DEVICE)
    architecture = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    ours = isinstance(architecture, type) and issubclass(architecture, RetinaNetExt)
    if cfg.TEST.PRECISION != "float32" and not ours:
        raise InputError(
            f"TEST.PRECISION {cfg.TEST.PRECISION} has no effect on MODEL.META_ARCHITECTURE "
            f"{cfg.MODEL.META_ARCHITECTURE}; it is RetinaNetExt's: set it to float32"
        )
    _check_pixels(cfg)
    _check_expected_results(cfg.TEST.EXPECTED_RESULTS)
    weights = cfg.MODEL.RETINANET.BBOX_REG_WEIGHTS
    if len(weights) != 4:
        raise InputError(
            "MODEL.RETINANET.BBOX_REG_WEIGHTS must be 4 numbers, of x, y, width and height; got "
            f"{weights}"
        )
    if not eval_only:
        _check_ranges(cfg, TRAINING_RANGES, TRAINING_CHOICES)
        _check_augmentation(cfg.INPUT)
        _check_repeat_factors(cfg.DATASETS.TRAIN_REPEAT_FACTOR)
        _check_solver(cfg, num_processes)


def _leaves(cfg: CfgNode, key: str) -> Iterator[Any]:
    """Yield the values that a key holds in lists of any depth."""
    values = [read_key(cfg, key)]
    while values:
        value = values.pop()
        if isinstance(value, list | tuple):
            values.extend(value)
        else:
            yield value


def _check_ranges(
    cfg: CfgNode, ranges: Mapping[str, Interval], choices: Mapping[str, Sequence[str]]
) -> None:
    for key, allowed in ranges.items():
        for value in _leaves(cfg, key):
            allowed.check(key, value)
    for key, names in choices.items():
        value = read_key(cfg, key)
        if value not in names:
            raise InputError(f"{key} {value!r} is unknown; known: {', '.join(map(repr, names))}")


def _check_output_dir(name: str) -> None:
    if not name:
        raise InputError("OUTPUT_DIR is empty; name a folder for the results")
    try:
        os.stat(name)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:  # such as a name that is too long, or has a zero byte
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"OUTPUT_DIR {reprlib.repr(name)}: {reason}") from error


def _check_pixels(cfg: CfgNode) -> None:
    """Refuse a mean and standard deviation of another number of channels than the images have.

    And a range of grey levels that is none.
    """
    parse_pixel_range(cfg.INPUT.PIXEL_RANGE)
    image_format = cfg.INPUT.FORMAT
    channels = num_channels(image_format)
    for key in ("MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"):
        value = read_key(cfg, key)
        if len(value) != channels:
            raise InputError(
                f"{key} needs {channels} numbers, one for each channel of INPUT.FORMAT "
                f"{image_format}; got {value}"
            )


def _check_expected_results(results: Sequence[Any]) -> None:
    """Refuse here what Detectron2 would trip over once training is over."""
    for result in results:
        types = [type(part) for part in result] if isinstance(result, list | tuple) else []
        fits = len(types) == 4 and types[1] is str and {*types[2:]} <= {int, float}
        if not fits or result[0] != "bbox":
            raise InputError(
                "TEST.EXPECTED_RESULTS must be a list of ['bbox', metric, value, tolerance], such "
                f"as [['bbox', 'AP', 38.5, 0.2]]; got {reprlib.repr(results)}"
            )


def _check_augmentation(node: CfgNode) -> None:
    key = "INPUT.MIN_SIZE_TRAIN"
    if not node.MIN_SIZE_TRAIN:
        raise InputError(f"{key} is empty; give the short side in pixels, [600]")
    sizes = list(node.MIN_SIZE_TRAIN)
    if node.MIN_SIZE_TRAIN_SAMPLING == "range" and (len(sizes) != 2 or sizes != sorted(sizes)):
        raise InputError(
            f"{key} must be two lengths, the least and the most, for "
            f"INPUT.MIN_SIZE_TRAIN_SAMPLING range; got {sizes}"
        )
    if node.CROP.ENABLED:
        size, kind = node.CROP.SIZE, node.CROP.TYPE
        share = kind.startswith("relative")
        if len(size) != 2 or (share and max(size) > 1) or (not share and min(size) < 1):
            allowed = "shares of the image in (0, 1]" if share else "lengths in pixels"
            raise InputError(
                f"INPUT.CROP.SIZE must be [height, width], two {allowed} for INPUT.CROP.TYPE "
                f"{kind}; got {size}"
            )


def _check_repeat_factors(pairs: Sequence[Any]) -> None:
    key = "DATASETS.TRAIN_REPEAT_FACTOR"
    for pair in pairs:
        types = [type(part) for part in pair] if isinstance(pair, list | tuple) else []
        if not (len(types) == 2 and types[0] is str and types[1] in (int, float)):
            raise InputError(
                f"{key} must be a list of [data set, factor], such as [['mine_train', 2.5]]; got "
                f"{reprlib.repr(pairs)}"
            )
        # An epoch is drawn as a whole: it must hold some images, and fit into memory.
        Interval("[0.001, 1000]").check(f"{key} {pair[0]}", pair[1])


def _check_solver(cfg: CfgNode, num_processes: int) -> None:
    solver = cfg.SOLVER
    steps = list(solver.STEPS)
    if any(first >= second for first, second in pairwise(steps)):
        raise InputError(f"SOLVER.STEPS must rise strictly, got {steps}")
    if solver.LR_SCHEDULER_NAME == "WarmupCosineLR" and solver.BASE_LR_END > solver.BASE_LR:
        raise InputError(
            f"SOLVER.BASE_LR_END {solver.BASE_LR_END} must be at most SOLVER.BASE_LR "
            f"{solver.BASE_LR} for WarmupCosineLR"
        )
    if solver.WEIGHT_DECAY_BIAS is not None:  # None: as WEIGHT_DECAY
        Interval("[0, inf)").check("SOLVER.WEIGHT_DECAY_BIAS", solver.WEIGHT_DECAY_BIAS)
    # With a reference, Detectron2 scales the batch to the number of processes.
    shares = {
        "SOLVER.REFERENCE_WORLD_SIZE"
        if solver.REFERENCE_WORLD_SIZE
        else "the number of processes": (solver.REFERENCE_WORLD_SIZE or num_processes),
        "SOLVER.GRAD_ACCUM_STEPS": solver.GRAD_ACCUM_STEPS,
    }
    if solver.IMS_PER_BATCH % math.prod(shares.values()):
        what = " times ".join(f"{name}, {n}" for name, n in shares.items() if n > 1)
        raise InputError(
            f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH} must be a multiple of {what}"
        )
    streams, batch = cfg.DATALOADER.ASPECT_RATIO_STREAMS, solver.IMS_PER_BATCH
    if solver.REFERENCE_WORLD_SIZE:
        batch = batch * num_processes // solver.REFERENCE_WORLD_SIZE
    if streams and batch % streams:
        raise InputError(
            f"a batch of {batch} images (SOLVER.IMS_PER_BATCH) must be a multiple of "
            f"DATALOADER.ASPECT_RATIO_STREAMS {streams}"
        )
    on_cpu = torch.device(cfg.MODEL.DEVICE).type != "cuda"
    if solver.AMP.ENABLED and solver.AMP.PRECISION == "float16" and on_cpu:
        raise InputError(
            "SOLVER.AMP.ENABLED in float16 needs a CUDA device; on the CPU set "
            "SOLVER.AMP.PRECISION bfloat16, or SOLVER.AMP.ENABLED False"
        )


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
        content = _BoundedCfgNode.load_yaml_with_base(path, allow_unsafe=allow_unsafe)
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


class _BoundedCfgNode(CfgNode):
    """Refuses a file, a ``_BASE_`` too, of few bytes whose aliases stand for billions of values."""

    @classmethod
    def _open_cfg(cls, filename: str) -> IO[str]:
        with super()._open_cfg(filename) as file:
            text = io.StringIO(file.read())  # a pipe can be read but once
        text.name = filename  # for the messages of the parser
        root = yaml.compose(text, yaml.SafeLoader)  # whose "<<" are not yet written out
        if root and _count_values(root, {}) > MAX_VALUES:
            raise InputError(
                f"{filename}: more than {MAX_VALUES:,} values, with each alias (*name) written out"
            )
        text.seek(0)
        return text


def _count_values(node: yaml.Node, counts: dict[yaml.Node, int]) -> int:
    """Return how many values a node stands for, itself included, in time linear in the file.

    Above ``MAX_VALUES`` it is one more; a node within itself is that at once.
    """
    if node not in counts:
        counts[node] = MAX_VALUES + 1
        children = [] if isinstance(node, yaml.ScalarNode) else node.value
        if isinstance(node, yaml.MappingNode):
            children = chain.from_iterable(children)
        total = 1 + sum(_count_values(child, counts) for child in children)
        counts[node] = min(total, MAX_VALUES + 1)
    return counts[node]


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
            name = key if key.isprintable() else repr(key)
            raise InputError(f"{source}: unknown key {name}{_suggestion(key, cfg)}")
        node = node[part]
    default = node
    if key in (*PATHS, "DATASETS.CUSTOM.CLASSES"):
        value = _read_texts(value)
        if key in PATHS and isinstance(value, str | list):
            # yacs takes only a value of the type that is there.
            group, _, name = key.rpartition(".")
            default = read_key(cfg, group)[name] = type(value)()
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
        if key == RANGE_KEY and isinstance(value, str):
            value = [value]  # yacs holds words and pairs of numbers in one type alone
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


def _read_texts(value: Any) -> Any:
    """Return the list that a text such as ``[a, b]`` is in YAML, other values as they are.

    yacs reads Python, where the items would need quotes.
    """
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        try:
            return yaml.safe_load(value)
        except yaml.YAMLError:
            pass
    return value


def _suggestion(key: str, cfg: CfgNode) -> str:
    if "=" in key:
        return "; write KEY VALUE, with a space"
    known = [name for name in all_keys(cfg) if not name.startswith(FOREIGN_GROUPS)]
    last = key.rpartition(".")[2]
    alike = [name for name in known if last in name.rpartition(".")[2]]
    matches = difflib.get_close_matches(key.upper(), alike or known, n=2, cutoff=0.5)
    return f"; did you mean {' or '.join(matches)}?" if matches else ""
