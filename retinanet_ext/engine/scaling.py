"""Scale a schedule that was written for one batch size to another."""

from __future__ import annotations

from detectron2.config import CfgNode

from retinanet_ext.config_keys import read_key
from retinanet_ext.errors import InputError

REFERENCE_BATCH = "SOLVER.REFERENCE_BATCH"
RATES = ("SOLVER.BASE_LR", "SOLVER.BASE_LR_END")
LENGTHS = (
    "SOLVER.WARMUP_ITERS",
    "SOLVER.STEPS",
    "SOLVER.MAX_ITER",
    "SOLVER.CHECKPOINT_PERIOD",
    "TEST.EVAL_PERIOD",
)


def scale_schedule(cfg: CfgNode) -> list[str]:
    """Scale the schedule from ``SOLVER.REFERENCE_BATCH`` images to ``SOLVER.IMS_PER_BATCH``.

    The linear rule (arXiv 1706.02677, section 2.1): for k times as many images per batch, the
    learning rates are multiplied by k and all lengths in iterations divided by k, so that the same
    number of images is seen. AdamW's rates are multiplied by the square root of k (arXiv
    2205.10287). A length is at least 1, a length of 0 (off) stays 0, and steps stay strictly
    increasing. The key is then set to the new batch, so that a saved config is not scaled twice.

    Args:
        cfg: a checked config; changed in place

    Returns:
        a line "key: old -> new" for each key that changed; none where the key is 0 (off)

    Raises:
        InputError: Detectron2's ``SOLVER.REFERENCE_WORLD_SIZE``, which scales too, is set as well
    """
    reference, batch = cfg.SOLVER.REFERENCE_BATCH, cfg.SOLVER.IMS_PER_BATCH
    if not reference:
        return []
    if cfg.SOLVER.REFERENCE_WORLD_SIZE:
        raise InputError(
            f"{REFERENCE_BATCH} {reference} and SOLVER.REFERENCE_WORLD_SIZE "
            f"{cfg.SOLVER.REFERENCE_WORLD_SIZE} both scale the schedule; set one of them to 0"
        )
    if reference == batch:
        return []
    factor = batch / reference
    if cfg.SOLVER.OPTIMIZER == "AdamW":
        factor **= 0.5
    new = {key: read_key(cfg, key) * factor for key in RATES}
    for key in LENGTHS:
        old = read_key(cfg, key)
        if key == "SOLVER.STEPS" and cfg.SOLVER.LR_SCHEDULER_NAME != "WarmupMultiStepLR":
            continue  # no other schedule reads it
        steps = [
            _scale_length(n, batch, reference) for n in (old if key.endswith("STEPS") else [old])
        ]
        for i in range(1, len(steps)):
            steps[i] = max(steps[i], steps[i - 1] + 1)
        new[key] = tuple(steps) if key.endswith("STEPS") else steps[0]
    new[REFERENCE_BATCH] = batch

    changes = {key: (read_key(cfg, key), value) for key, value in new.items()}
    cfg.merge_from_list([part for pair in new.items() for part in pair])
    return [f"{key}: {old} -> {value}" for key, (old, value) in changes.items() if old != value]


def _scale_length(iterations: int, batch: int, reference: int) -> int:
    # In integers, because float division is inexact beyond 2^53. Rounds half up.
    return max(1, (2 * iterations * reference + batch) // (2 * batch)) if iterations else 0
