"""From a config file and the command line to a config, merged by yacs."""

from __future__ import annotations

import ast
import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import yaml
from detectron2.config import CfgNode, get_cfg

from retinanet_ext import add_retinanet_ext_config
from retinanet_ext.config_keys import CLASS_ALPHA, all_keys, read_key
from retinanet_ext.data.images import AUTO, RANGE_KEY
from retinanet_ext.engine.config_warnings import FOREIGN_GROUPS
from retinanet_ext.errors import InputError, first_line, yaml_errors

AUTO_KEYS = ("MODEL.RETINANET.CLS_LOSS.WEIGHT",)
"""Keys of numbers that may be "auto" instead."""

PATHS = tuple(
    f"DATASETS.CUSTOM.{name}" for name in ("TRAIN_JSON", "TRAIN_IMAGES", "TEST_JSON", "TEST_IMAGES")
)
"""Keys that hold a path or a list of paths."""


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


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the arguments, and the keys and values of the config that follow them.

    The first key is the first argument that begins with a section of the config, such as MODEL.
    """
    sections = {key for key, value in get_cfg().items() if isinstance(value, CfgNode)}
    for index, argument in enumerate(arguments):
        section, dot, _ = argument.partition(".")
        if dot and section in sections:
            return [*arguments[:index]], [*arguments[index:]]
    return [*arguments], []


def _read_file(path: str, cfg: CfgNode) -> dict[str, Any]:
    try:
        with yaml_errors(path):
            values = CfgNode.load_yaml_with_base(path, allow_unsafe=False)
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
        if key in AUTO_KEYS:  # yacs insists on the type of the value before
            default = cfg[name] = AUTO if value == AUTO else 1.0
        if isinstance(default, CfgNode) and isinstance(value, dict):
            _convert(value, default, f"{key}.")
        elif value is None and default is not None:
            raise InputError(f"{key} has no value; leave it out for its default, {default!r}")
        elif isinstance(default, float) and type(value) is int:
            values[name] = float(value)
        elif isinstance(default, list) and isinstance(value, dict):
            values[name] = [[item, number] for item, number in value.items()]
        elif key in (RANGE_KEY, CLASS_ALPHA) and isinstance(value, str):
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
        or_auto = f", or {AUTO}" if key in AUTO_KEYS else ""
        raise InputError(
            f"{source}: {key} takes a value of type {type(default).__name__}, such as "
            f"{default!r}{or_auto}; got {value[:80]}"
        ) from None


def _suggestion(key: str, cfg: CfgNode) -> str:
    known = [name for name in all_keys(cfg) if not name.startswith(FOREIGN_GROUPS)]
    last = key.rpartition(".")[2]
    alike = [name for name in known if last in name.rpartition(".")[2]]
    nearest = difflib.get_close_matches(key.upper(), alike or known, n=2, cutoff=0.5)
    return f"; did you mean {' or '.join(nearest)}?" if nearest else ""
