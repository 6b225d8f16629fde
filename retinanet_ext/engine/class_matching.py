"""Outputs of a classifier and the class names they belong to."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from retinanet_ext.data.coco_json import join_some, printable
from retinanet_ext.errors import InputError

CLASSIFIER = ("head.cls_score.weight", "head.cls_score.bias")
"""The parameters that have outputs for each class, here and in Detectron2's RetinaNet."""

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
    """Put the outputs of a checkpoint's classifier in the order of other class names.

    Nothing is done where the names are the same or either are not known.

    Args:
        checkpoint: with the weights under "model", where the classifier's are replaced
        wanted: names of classes 0..K-1 of the model
        model: that the weights will be loaded into
        source: of the weights, for messages
        reinit: classes that the checkpoint does not name start as the model has them
        remedy: what to do about other names without ``reinit``, for the message

    Raises:
        InputError: the names differ in more than their order, without ``reinit``
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
    _match_weights(checkpoint["model"], saved, wanted, model)


def _match_weights(
    weights: dict[str, Tensor], saved: Sequence[str], wanted: Sequence[str], model: nn.Module
) -> None:
    """Replace what has outputs for each class, but where other dimensions do not fit the model."""
    own = model.state_dict()
    for name in CLASSIFIER:
        if name not in weights or name not in own:
            continue
        (rows, *shape), (own_rows, *own_shape) = weights[name].shape, own[name].shape
        if shape == own_shape and rows * len(wanted) == own_rows * len(saved):
            weights[name] = match_classes(weights[name], saved, wanted, own[name])
        elif weights[name].shape == own[name].shape:
            del weights[
                name
            ]  # fits by chance: other anchors per cell and another number of classes


def match_classes(
    tensor: Tensor, saved: Sequence[str], wanted: Sequence[str], fresh: Tensor
) -> Tensor:
    """Return a classifier's weight or bias with its outputs in the order of other class names.

    Args:
        tensor: (A * K, ...), K fastest, of the K classes ``saved``
        saved: K names
        wanted: names of the L classes of the result
        fresh: (A * L, ...), the outputs of classes that are not in ``saved``; not changed
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
    """Apply :func:`match_classes` to what an optimizer keeps of the classifier, such as momentum.

    Both lists name the same classes.
    """
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {}) if name in CLASSIFIER else {}
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[key] = match_classes(value, saved, wanted, value)


def _describe(names: Sequence[str], others: Sequence[str]) -> str:
    """Return the first class names as text, those that are not among the others before all."""
    first = sorted(names, key=lambda name: name in others)
    noun = "class" if len(names) == 1 else "classes"
    return f"{len(names)} {noun} ({join_some(map(printable, first), 5)})"
