"""Match the outputs of a classifier to class names."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from retinanet_ext.data.coco_json import join_some, printable
from retinanet_ext.errors import InputError

CLASSIFIER = ("head.cls_score.weight", "head.cls_score.bias")
"""Parameters with one output per anchor and class, here and in Detectron2's RetinaNet."""

STATISTIC = "criterion.cls_loss.class_gradients"
"""That of the equalised focal loss: two numbers per class, laid out as outputs of two anchors."""

logger = logging.getLogger(__name__)


def saved_class_names(content: Mapping[str, Any]) -> list[str]:
    """Return the class names in a checkpoint, empty where it has none (Detectron2's, older)."""
    names = content.get("class_names")
    is_list = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    return list(names) if is_list else []


def match_checkpoint(
    checkpoint: dict[str, Any],
    wanted: Sequence[str],
    model: nn.Module,
    source: str,
    *,
    reinit: bool,
    remedy: str,
) -> None:
    """Reorder the outputs of a checkpoint's classifier to match the data's class names.

    Does nothing if the names are equal, or unknown on either side.

    Args:
        checkpoint: its "model" holds the weights; the classifier's are replaced
        wanted: names of the data's classes 0..K-1
        model: model to load the weights into
        source: what to call the weights in messages
        reinit: keep the model's initial outputs for classes that the checkpoint does not name
        remedy: advice in the error message

    Raises:
        InputError: the names differ in more than their order, and ``reinit`` is False
    """
    saved = saved_class_names(checkpoint)
    if not saved or not wanted or saved == list(wanted):
        return
    if sorted(saved) == sorted(wanted) and len(set(wanted)) == len(wanted):
        logger.info(
            "The classes of %s are in another order than the data's; the classifier's outputs are "
            "matched by class name",
            source,
        )
    elif reinit:
        logger.warning(
            "The classes of %s are not the data's; the classifier's outputs are kept for: %s; they "
            "start anew for: %s",
            source,
            join_some(printable(name) for name in wanted if name in saved) or "none",
            join_some(printable(name) for name in wanted if name not in saved) or "none",
        )
    else:
        raise InputError(
            f"{source} are of {_describe(saved, wanted)}, but the data have "
            f"{_describe(wanted, saved)}; {remedy}"
        )
    match_weights(checkpoint["model"], saved, wanted, model)


def match_weights(
    weights: dict[str, Tensor], saved: Sequence[str], wanted: Sequence[str], model: nn.Module
) -> None:
    """Replace the classifier's parameters, except where other dimensions do not fit the model."""
    own = model.state_dict()
    for name in (*CLASSIFIER, STATISTIC):
        if name not in weights or name not in own:
            continue
        (rows, *shape), (own_rows, *own_shape) = weights[name].shape, own[name].shape
        if shape == own_shape and rows * len(wanted) == own_rows * len(saved):
            tensor = torch.as_tensor(weights[name])  # of a .pkl file an array
            weights[name] = match_classes(tensor, saved, wanted, own[name])
        elif weights[name].shape == own[name].shape:
            # The shape fits by chance: other anchors per cell, and another number of classes.
            del weights[name]


def match_classes(
    tensor: Tensor, saved: Sequence[str], wanted: Sequence[str], fresh: Tensor
) -> Tensor:
    """Return a classifier's weight or bias with its outputs in the order of other class names.

    Args:
        tensor: (A * K, ...) for A anchors per cell, K varying fastest; not changed
        saved: names of the K classes of ``tensor``
        wanted: names of the L classes of the result
        fresh: (A * L, ...), the outputs for classes that are not in ``saved``; not changed
    """
    outputs = tensor.unflatten(0, (-1, len(saved)))
    matched = fresh.detach().clone().unflatten(0, (-1, len(wanted)))
    labels = {name: label for label, name in enumerate(saved)}
    for label, name in enumerate(wanted):
        if name in labels:
            matched[:, label] = outputs[:, labels[name]]
    return matched.flatten(0, 1)


def match_optimizer_state(
    optimizer: torch.optim.Optimizer, saved: Sequence[str], wanted: Sequence[str], model: nn.Module
) -> None:
    """Apply :func:`match_classes` to the optimizer's state of the classifier, such as momentum.

    Both lists must hold the same names.
    """
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {}) if name in CLASSIFIER else {}
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[key] = match_classes(value, saved, wanted, value)


def _describe(names: Sequence[str], others: Sequence[str]) -> str:
    """Return the number of classes and the first names, starting with those not in ``others``."""
    first = sorted(names, key=lambda name: name in others)
    noun = "class" if len(names) == 1 else "classes"
    return f"{len(names)} {noun} ({join_some(map(printable, first), 5)})"
