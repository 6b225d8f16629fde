"""Outputs of a classifier and the class names they belong to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from retinanet_ext.data.coco_json import join_some, printable

CLASSIFIER = ("head.cls_score.weight", "head.cls_score.bias")
"""The parameters that have outputs for each class, here and in Detectron2's RetinaNet."""


def saved_class_names(content: Mapping[str, Any]) -> list[str]:
    """Return the class names in a checkpoint, empty where it has none (Detectron2's, older)."""
    names = content.get("class_names")
    is_list = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    return list(names) if is_list else []


def have_same_names(saved: Sequence[str], wanted: Sequence[str]) -> bool:
    """Tell whether two lists name the same classes in some order, each once."""
    return sorted(saved) == sorted(wanted) and len(set(wanted)) == len(wanted)


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


def match_weights(
    weights: dict[str, Tensor], saved: Sequence[str], wanted: Sequence[str], model: nn.Module
) -> None:
    """Apply :func:`match_classes` to the classifier in ``weights``, which is replaced there.

    Left as it is where its shape does not fit the model's for another reason than the number of
    classes.
    """
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


def describe_classes(names: Sequence[str], others: Sequence[str]) -> str:
    """Return the first class names as text, those that are not among the others before all."""
    first = sorted(names, key=lambda name: name in others)
    return f"{len(names)} classes ({join_some(map(printable, first), 5)})"
