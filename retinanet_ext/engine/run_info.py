"""``OUTPUT_DIR/run_info.json``: what each start of a run needs to be reproduced."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.file_io import PathManager

import retinanet_ext
from retinanet_ext.data.register import find_sources, write_converted
from retinanet_ext.data.sources import Source
from retinanet_ext.errors import InputError
from retinanet_ext.files import sha256_of, to_json, write_file

RUN_INFO = "run_info.json"


def write_run_info(
    cfg: CfgNode, *, command: Sequence[str], weights: str, resumed: bool, eval_only: bool
) -> None:
    """Append a start to ``OUTPUT_DIR/run_info.json``. The main process calls this once per start.

    Data that are no COCO json are written beside it as one, which is what their checksum is of.
    The home folder is written as ``~``, and URLs without user and password.

    Args:
        cfg: the config in use
        command: the command line
        weights: file or URL that is loaded; empty for none
        resumed: whether the run is continued
        eval_only: record the data of ``DATASETS.TEST`` only

    Raises:
        InputError: ``run_info.json`` exists and is not a list of starts
    """
    path = Path(cfg.OUTPUT_DIR, RUN_INFO)
    try:
        starts = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        if not isinstance(starts, list):
            raise TypeError
        texts = [start["config"]["text"] for start in starts]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} is not a list of starts; move it away") from error
    config = {
        "sha256": "",
        "text": _without_person(cfg.dump(allow_unicode=True, width=float("inf"))),
    }
    config["sha256"] = hashlib.sha256(config["text"].encode(errors="backslashreplace")).hexdigest()
    if config["text"] == next((text for text in reversed(texts) if text), None):
        config["text"] = ""  # as in the start before
    sources = find_sources(cfg, ["TEST"] if eval_only else ["TRAIN", "TEST"])
    start = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": list(command),
        "resumed": resumed,
        "seed": cfg.SEED,
        # A URL is in the cache by now. "?matching_heuristics=True" may follow a name.
        "weights": weights and {"file": weights, "sha256": _sha256(weights.partition("?")[0])},
        "data": {source.name: _describe_data(source, cfg.OUTPUT_DIR) for source in sources},
        "commit": commit(),
        "versions": versions(),
        "processes": comm.get_world_size(),
        "config": config,
        "environment": collect_env_info(),
    }
    content = to_json([*starts, _without_person(start)], indent=1, ensure_ascii=False)
    write_file(path, content + "\n")


def _describe_data(source: Source, folder: str) -> dict[str, Any]:
    files = [write_converted(source, folder)] if source.is_converted else source.json_files
    data = {"json": source.json_file, "sha256": [_sha256(file) for file in files]}
    return {**data, "images": len(DatasetCatalog.get(source.name))} if source.is_ours else data


def _sha256(path: str) -> str:
    file = Path(PathManager.get_local_path(path))
    return sha256_of(file) if file.is_file() else ""


def _without_person(value: Any) -> Any:
    """Write the home folder as ~, and URLs without user and password, in all strings of a value."""
    if isinstance(value, dict):
        return {key: _without_person(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_person(inner) for inner in value]
    if not isinstance(value, str):
        return value
    home = Path.home()
    if len(home.parts) > 1:
        value = re.sub(rf"(?<![\w.~-]){re.escape(str(home))}(?![\w.-])", "~", value)
    return re.sub(r"(?<=://)[^/@\s\"']+@", "", value)


def versions() -> dict[str, str]:
    """Return the versions that results depend on."""
    packages = ("torch", "torchvision", "detectron2")
    own = {"retinanet_ext": retinanet_ext.__version__, "python": platform.python_version()}
    return own | {name: version(name) for name in packages}


def commit() -> str:
    """Return the project's commit, with a note if files differ from it; empty outside git."""
    root = Path(retinanet_ext.__file__).resolve().parents[1]
    if not (root / ".git").exists():  # installed, perhaps inside another project's repository
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=10", "--exclude=*"]
    try:
        done = subprocess.run([*command, "--dirty= with changes"], capture_output=True, text=True)
    except OSError:  # git is not installed
        return ""
    return done.stdout.strip()


def cpu_name() -> str:
    """Return the processor's name as the system gives it."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
