"""Optimizers and learning-rate schedules that Detectron2 lacks."""

from __future__ import annotations

import torch
from detectron2 import solver as detectron2_solver
from detectron2.config import CfgNode
from detectron2.solver import LRMultiplier, WarmupParamScheduler, get_default_optimizer_params
from detectron2.solver.build import maybe_add_gradient_clipping
from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    ConstantParamScheduler,
    CosineParamScheduler,
)
from torch import nn

from retinanet_ext.errors import InputError

FULL_MODEL = "full_model"
FLAT_COSINE = "WarmupFlatCosineLR"
SCHEDULES = ("WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR", FLAT_COSINE)
"""Detectron2's schedules, and this one's."""


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer that ``SOLVER.OPTIMIZER`` names, with gradient clipping.

    ``SOLVER.CLIP_GRADIENTS.CLIP_TYPE`` may be ``full_model`` besides Detectron2's types: the norm
    of all gradients together is clipped.

    AdamW (arXiv 1711.05101) does not decay norms and biases unless ``WEIGHT_DECAY_NORM`` or
    ``WEIGHT_DECAY_BIAS`` is set.
    """
    solver = cfg.SOLVER
    clips_full_model = (
        solver.CLIP_GRADIENTS.ENABLED and solver.CLIP_GRADIENTS.CLIP_TYPE == FULL_MODEL
    )
    if clips_full_model:
        cfg = cfg.clone()
        cfg.defrost()
        cfg.SOLVER.CLIP_GRADIENTS.ENABLED = False  # Detectron2 does not know this type
    if solver.OPTIMIZER == "SGD":
        optimizer = detectron2_solver.build_optimizer(cfg, model)
    else:
        params = get_default_optimizer_params(
            model,
            base_lr=solver.BASE_LR,
            weight_decay=solver.WEIGHT_DECAY,
            weight_decay_norm=solver.WEIGHT_DECAY_NORM,
            weight_decay_bias=solver.WEIGHT_DECAY_BIAS or 0.0,
            bias_lr_factor=solver.BIAS_LR_FACTOR,
        )
        adamw = torch.optim.AdamW(params, lr=solver.BASE_LR, weight_decay=solver.WEIGHT_DECAY)
        optimizer = maybe_add_gradient_clipping(cfg, adamw)
    if clips_full_model:
        _clip_full_model(optimizer, solver.CLIP_GRADIENTS)
    if solver.FUSED_OPTIMIZER:
        for group in optimizer.param_groups:
            group.update(fused=True, foreach=False)
    return optimizer


def _clip_full_model(optimizer: torch.optim.Optimizer, settings: CfgNode) -> None:
    def clip(optimizer: torch.optim.Optimizer, *_: object) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(parameters, settings.CLIP_VALUE, settings.NORM_TYPE)

    optimizer.register_step_pre_hook(clip)


def build_lr_scheduler(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> LRMultiplier:
    """Return Detectron2's schedule, or ``WarmupFlatCosineLR``.

    ``WarmupFlatCosineLR`` keeps the base rate for the first ``SOLVER.FLAT_RATIO`` of the iterations
    and then lowers it along half a cosine to ``SOLVER.BASE_LR_END``.

    Raises:
        InputError: ``SOLVER.LR_SCHEDULER_NAME`` is unknown
    """
    solver = cfg.SOLVER
    if solver.LR_SCHEDULER_NAME not in SCHEDULES:
        raise InputError(
            f"SOLVER.LR_SCHEDULER_NAME {solver.LR_SCHEDULER_NAME!r} is unknown; known: "
            f"{', '.join(SCHEDULES)}"
        )
    if solver.LR_SCHEDULER_NAME != FLAT_COSINE:
        return detectron2_solver.build_lr_scheduler(cfg, optimizer)
    flat = solver.FLAT_RATIO
    schedule = CompositeParamScheduler(
        [
            ConstantParamScheduler(1.0),
            CosineParamScheduler(1.0, solver.BASE_LR_END / solver.BASE_LR),
        ],
        lengths=[flat, 1.0 - flat],
        interval_scaling=["rescaled", "rescaled"],
    )
    warmup = WarmupParamScheduler(
        schedule,
        solver.WARMUP_FACTOR,
        min(solver.WARMUP_ITERS / solver.MAX_ITER, 1.0),
        solver.WARMUP_METHOD,
        solver.RESCALE_INTERVAL,
    )
    return LRMultiplier(optimizer, multiplier=warmup, max_iter=solver.MAX_ITER)
