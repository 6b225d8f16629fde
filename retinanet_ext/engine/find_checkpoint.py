"""Which weights and which checkpoint of a run to load, found by name."""

from __future__ import annotations

import logging
import math
import re
from pathlib import Path

import torch
from detectron2.config import CfgNode

from retinanet_ext.errors import InputError

TAG = "last_checkpoint"
"""Name of the file in OUTPUT_DIR that names the newest checkpoint, as in Detectron2."""

CHECKPOINT = re.compile(r"model_(\d+|final)\.pth$")

logger = logging.getLogger(__name__)


def find_weights(cfg: CfgNode, *, resume: bool, eval_only: bool) -> tuple[str, bool]:
    """Return the file or URL to load, and whether it is the run's last checkpoint.

    With ``resume`` it is the last checkpoint in OUTPUT_DIR, chosen by name. Without ``resume``, and
    where there is no checkpoint, it is MODEL.WEIGHTS. Nothing is read.

    Raises:
        InputError: there are no weights to evaluate, no such file, or no checkpoint is left
    """
    weights = last_checkpoint(cfg.OUTPUT_DIR) if resume else ""
    if weights:
        return weights, True
    if resume and eval_only:
        raise InputError(
            f"--eval-only --resume evaluates the last checkpoint of OUTPUT_DIR {cfg.OUTPUT_DIR}, "
            "which holds none; leave --resume out to evaluate MODEL.WEIGHTS"
        )
    if resume:
        logger.warning(
            "Nothing to resume: %s holds no checkpoint. Training starts at iteration 0.",
            cfg.OUTPUT_DIR,
        )
    weights = cfg.MODEL.WEIGHTS
    if eval_only and not weights:
        raise InputError("--eval-only needs weights: MODEL.WEIGHTS FILE, or --resume for the last")
    # Detectron2 resolves URLs. "?matching_heuristics=True" may follow a name.
    if weights and "://" not in weights and not Path(weights.partition("?")[0]).is_file():
        raise InputError(f"MODEL.WEIGHTS is {weights}, which is not a file")
    return weights, False


def last_checkpoint(folder: str | Path) -> str:
    """Return the newest checkpoint of a run by name, empty if the run has none.

    The file ``last_checkpoint`` names it. If the named file is missing, it is the newest before.
    Nothing but names is looked at; :meth:`Checkpointer.load` finds out whether the file is whole.

    Raises:
        InputError: ``last_checkpoint`` exists, but no checkpoint that it could mean
    """
    candidates, passed_over = run_checkpoints(folder)
    if not candidates and passed_over:
        raise no_checkpoint_left(passed_over)
    return str(candidates[0]) if candidates else ""


def run_checkpoints(folder: str | Path) -> tuple[list[Path], list[str]]:
    """Return the checkpoints to try, newest first, and why the first is not the named one."""
    tag = Path(folder, TAG)
    files = [path for path in Path(folder).glob("model_*.pth") if CHECKPOINT.match(path.name)]
    files.sort(key=lambda path: (_iteration(path), path.name), reverse=True)
    if not tag.is_file():
        return files, [f"{tag} is missing"] if files else []
    name = tag.read_text(errors="replace").strip()
    if not name.isprintable():
        return files, [f"{tag} is damaged"]
    named = Path(folder, name)
    # Later checkpoints stay unused: someone who names an earlier one has a reason to.
    earlier = [path for path in files if path != named and _iteration(path) <= _iteration(named)]
    if named.is_file():
        return [named, *earlier], []
    return earlier, [f"{tag} names {named}, which is missing"]


def no_checkpoint_left(passed_over: list[str]) -> InputError:
    """Return the error that no checkpoint is left; the arguments say why of each."""
    return InputError(
        f"{'; '.join(passed_over)}: no checkpoint is left to go on from; start anew in another "
        "OUTPUT_DIR"
    )


def _iteration(checkpoint: Path) -> float:
    """Return the iteration in a checkpoint's name, or for ``model_final.pth`` in its header.

    A file that does not say counts as the newest.
    """
    name = CHECKPOINT.match(checkpoint.name)
    if name and name[1] != "final":
        return int(name[1])
    try:
        content = torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True)
        return int(content["iteration"])
    except Exception:  # unpickling a damaged file may raise anything
        return math.inf
