"""What a run was made of, written beside its results."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

import cv2
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from torch.utils import collect_env

from retinanet_ext.data.register import find_sources
from retinanet_ext.data.sources import Source
from retinanet_ext.errors import InputError
from retinanet_ext.files import to_json, write_file
from retinanet_ext.provenance import commit, cpu_name, versions

FORMAT = 1
MANIFEST = "run_info.json"


def read_manifest(output_dir: str) -> dict[str, Any]:
    """Return the manifest of a folder, without starts where there is none yet.

    Raises:
        InputError: the folder holds a file of that name that is no manifest of this format
    """
    path = Path(output_dir, MANIFEST)
    if not path.exists():
        return {"format": FORMAT, "configs": {}, "starts": []}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        starts, _ = content["starts"], content["configs"].items()
        if content["format"] == FORMAT and all(isinstance(s["jobs"], list) for s in starts):
            return content
        reason = f"its format is not {FORMAT}"
    except (OSError, ValueError) as error:
        reason = str(error)
    except (AttributeError, KeyError, TypeError):
        reason = "it is another file"
    raise InputError(f"{path} is no manifest that a start can be added to ({reason}); move it away")


def write_run_info(
    cfg: CfgNode,
    *,
    command: Sequence[str],
    weights: str,
    resumed: bool,
    eval_only: bool,
    jobs: Sequence[str] = (),
) -> None:
    """Add a start to ``OUTPUT_DIR/run_info.json``; what it holds of earlier starts stays.

    Called by the main process before the first iteration. Neither the environment's variables
    nor the host's name are written; the home folder is written as ``~``, and a user's name and
    password are left out of URLs. Contents of images are not hashed: their names and sizes in
    pixels are in the json, whose hash there is, and their bytes are counted.

    Args:
        cfg: as it is used
        command: the command line
        weights: the file that is loaded, of the last checkpoint when resuming; empty for none
        resumed: whether an earlier start is gone on with
        eval_only: whether only the data of ``DATASETS.TEST`` are used
        jobs: names of the job, see :func:`retinanet_ext.engine.distributed.job_ids`
    """
    manifest = read_manifest(cfg.OUTPUT_DIR)
    config = _without_person(cfg.dump(allow_unicode=True, width=float("inf")))
    key = hashlib.sha256(config.encode()).hexdigest()
    sources = find_sources(cfg, ["TEST"] if eval_only else ["TRAIN", "TEST"])
    start = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": list(command),
        "resumed": resumed,
        "config": key,
        "seed": cfg.SEED,
        "deterministic": cfg.DETERMINISTIC,
        "weights": _describe_weights(weights),
        "data": {source.name: _describe_data(source) for source in sources},
        "commit": commit(),
        "versions": _versions(),
        "cuda": _cuda(),
        "hardware": _hardware(),
        "os": platform.platform(),
        "processes": comm.get_world_size(),
        "processes_per_machine": comm.get_local_size(),
        "jobs": list(jobs),
    }
    manifest["configs"][key] = config
    manifest["starts"].append(_without_person(start))
    content = to_json(manifest, indent=1, ensure_ascii=False)
    write_file(Path(cfg.OUTPUT_DIR, MANIFEST), content + "\n")


def _without_person(value: Any) -> Any:
    """Write the home folder as ~, and URLs without user and password, in all text of a value."""
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


def _describe_data(source: Source) -> dict[str, Any]:
    digests = [_hash(file) if os.path.isfile(file) else "" for file in source.json_files]
    data = {"json": source.json_file, "sha256": ", ".join(digests)}
    if not source.is_ours:  # its records may be anything
        return data
    sizes = [os.stat(record["file_name"]).st_size for record in DatasetCatalog.get(source.name)]
    return {**data, "images": len(sizes), "bytes": sum(sizes)}


def _describe_weights(weights: str) -> dict[str, str]:
    if not weights:
        return {}
    # One from a URL is in the cache since it was checked.
    file = PathManager.get_local_path(weights.partition("?")[0])
    return {"file": weights, "sha256": _hash(file)}


def _hash(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    return {
        **versions(),
        "detectron2_commit": _commit_of_package("detectron2"),
        **{name: version(name) for name in ("fvcore", "numpy", "pycocotools")},
        "opencv": cv2.__version__,
    }


def _commit_of_package(name: str) -> str:
    """Return the commit that pip has installed a package from, empty where it does not know."""
    try:
        origin = json.loads(distribution(name).read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, ValueError):
        return ""
    return origin.get("vcs_info", {}).get("commit_id", "")


def _cuda() -> dict[str, str]:
    if not torch.cuda.is_available():
        return {}
    return {
        "toolkit": torch.version.cuda or "",
        "driver": collect_env.get_nvidia_driver_version(collect_env.run) or "",
        "cudnn": str(torch.backends.cudnn.version()),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
    }


def _hardware() -> dict[str, Any]:
    """Return what the first machine has."""
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads_per_process": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": [{"name": gpu.name, "memory_bytes": gpu.total_memory} for gpu in gpus],
    }
