"""What the criterion is built from: the loss and the selection that a config describes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode

from retinanet_ext.config_keys import CLASS_ALPHA, loss_parameter_keys, read_key
from retinanet_ext.errors import InputError
from retinanet_ext.losses import LOSSES, Interval
from retinanet_ext.losses.functional import Alpha, class_weights
from retinanet_ext.losses.module import LossModule
from retinanet_ext.losses.registry import ALPHA_RANGE, UNBALANCED, BoundLoss, check_alpha
from retinanet_ext.sampling import OHEM, SELECTIONS, SelectAll

logger = logging.getLogger(__name__)


def build_cls_loss(cfg: CfgNode) -> tuple[BoundLoss | LossModule, Alpha]:
    """Return the loss that ``MODEL.RETINANET.CLS_LOSS`` describes, and its alpha."""
    node = cfg.MODEL.RETINANET.CLS_LOSS
    try:
        loss = LOSSES[node.NAME]
    except InputError as error:
        raise InputError(f"MODEL.RETINANET.CLS_LOSS.NAME: {error}") from None
    keys = loss_parameter_keys(loss)
    values = {name: read_key(cfg, key) for name, key in keys.items()}
    alpha = UNBALANCED if loss.alpha is None else values.pop("alpha")
    for name, value in values.items():
        loss.parameters[name].allowed.check(keys[name], value)
    if loss.alpha is not None:
        check_alpha(keys["alpha"], alpha)
    if node.CLASS_ALPHA:
        if loss.alpha is None:
            raise InputError(f"{CLASS_ALPHA} is set, but loss {loss.name!r} has no alpha")
        alpha = _class_alpha(node.CLASS_ALPHA, cfg.MODEL.RETINANET.NUM_CLASSES)
    if loss.is_module:
        return loss.build(cfg.MODEL.RETINANET.NUM_CLASSES, **values), alpha
    return loss.bind(**values), alpha


def read_cls_loss_weight(cfg: CfgNode) -> float:
    """Return ``CLS_LOSS.WEIGHT`` as a number.

    "auto" gives a positive at the initial probability pi (section 3.3) the gradient that it has
    under cross entropy with alpha 0.75, which is 0.75 (1 - pi). The focal loss (gamma 2, alpha
    0.25) at pi 0.01 has about a third of it.
    """
    node = cfg.MODEL.RETINANET
    weight = node.CLS_LOSS.WEIGHT
    if weight != "auto":
        return float(Interval("[0, inf)").check("MODEL.RETINANET.CLS_LOSS.WEIGHT", weight))
    cls_loss, alpha = build_cls_loss(cfg)
    if isinstance(cls_loss, LossModule):
        raise InputError(
            "MODEL.RETINANET.CLS_LOSS.WEIGHT auto is for a loss of x_t; "
            f"{node.CLS_LOSS.NAME} takes a number, because its gradient at a positive depends on "
            "more"
        )
    alphas = class_weights(alpha, node.NUM_CLASSES)
    mean_alpha = 1.0 if alphas is None else alphas[0].mean().item()
    prior = node.PRIOR_PROB if node.PRIOR_INIT else 0.5
    _, gradient = cls_loss.value_and_grad(torch.tensor(prior, dtype=torch.float64).logit())
    if not mean_alpha * gradient:
        raise InputError("CLS_LOSS.WEIGHT auto: the loss has no gradient at a positive")
    return 0.75 * (1 - prior) / abs(mean_alpha * gradient.item())


def resolve_cls_loss_weight(cfg: CfgNode) -> None:
    """Replace ``CLS_LOSS.WEIGHT auto`` by its number, so that any code can read a saved config."""
    node = cfg.MODEL.RETINANET.CLS_LOSS
    if node.WEIGHT == "auto" and node.NAME in LOSSES:
        node.WEIGHT = read_cls_loss_weight(cfg)
        logger.info("MODEL.RETINANET.CLS_LOSS.WEIGHT auto: %.4g", node.WEIGHT)


def _class_alpha(given: Sequence[Any], num_classes: int) -> list[float]:
    if any(isinstance(value, (list, tuple, str)) for value in given):
        raise InputError(
            f"{CLASS_ALPHA} names classes or is auto, which train_net.py resolves from the data; "
            f"give {num_classes} numbers here, in the order of the classes"
        )
    if len(given) != num_classes:
        raise InputError(f"{CLASS_ALPHA} has {len(given)} values for {num_classes} classes")
    return [ALPHA_RANGE.check(f"{CLASS_ALPHA}[{i}]", value) for i, value in enumerate(given)]


def build_selection(cfg: CfgNode) -> SelectAll | OHEM:
    """Return the selection that ``MODEL.RETINANET.SELECTION`` describes."""
    node = cfg.MODEL.RETINANET.SELECTION
    if node.NAME not in SELECTIONS:
        raise InputError(
            f"MODEL.RETINANET.SELECTION.NAME is {node.NAME!r}; "
            f"known selections: {', '.join(SELECTIONS)}"
        )
    parameters = node.get(node.NAME.upper(), {})
    try:
        return SELECTIONS[node.NAME](**{key.lower(): value for key, value in parameters.items()})
    except InputError as error:
        raise InputError(f"MODEL.RETINANET.SELECTION.{node.NAME.upper()}: {error}") from None
