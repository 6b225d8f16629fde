"""Value and gradient of registered losses over x_t (figure 1, appendix A and B).

All without alpha, as in the paper's plots. x_t is the logit signed by the label, and
p_t = sigmoid(x_t).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from retinanet_ext.errors import InputError
from retinanet_ext.losses import LOSSES
from retinanet_ext.losses.registry import Loss

FIGURE_1: Mapping[str, str] = {
    "γ = 0 (CE)": "focal:gamma=0",
    "γ = 0.5": "focal:gamma=0.5",
    "γ = 1": "focal:gamma=1",
    "γ = 2": "focal:gamma=2",
    "γ = 5": "focal:gamma=5",
}
"""Label and spec of each curve of figure 1, which is drawn against p_t."""

FIGURES_5_AND_6: Mapping[str, str] = {
    "CE": "cross_entropy",
    "FL, γ = 2": "focal:gamma=2",
    "FL*, γ = 2, β = 1": "focal_star:gamma=2,beta=1",
    "FL*, γ = 4, β = 0": "focal_star:gamma=4,beta=0",
}
"""Label and spec of each curve of figures 5 (loss) and 6 (gradient)."""

SYMBOLS = {"alpha": "α", "beta": "β", "gamma": "γ"}


@dataclass(frozen=True)
class Curve:
    """A loss and its derivative by x_t, each float64 of the same shape as ``x_t``."""

    label: str
    x_t: Tensor
    value: Tensor
    gradient: Tensor


def loss_curve(spec: str, x_t: Tensor, label: str = "") -> Curve:
    """Evaluate a registered loss and, by autograd, its gradient, both in float64.

    Args:
        spec: a loss and its parameters, see :func:`parse_spec`
        x_t: points of any shape
        label: by default the name of the loss and all its parameters

    Raises:
        InputError: see :func:`parse_spec`
    """
    loss, values = parse_spec(spec)
    points = x_t.detach().double().requires_grad_()
    value = loss.bind(**values)(points)
    (gradient,) = torch.autograd.grad(value.sum(), points)
    return Curve(label or _label(loss, values), points.detach(), value.detach(), gradient)


def parse_spec(spec: str) -> tuple[Loss, dict[str, float]]:
    """Return the loss and the parameters that a text such as ``focal_star:gamma=4,beta=0`` names.

    Parameters that are left out keep their defaults and are not in the result.

    Raises:
        InputError: an unknown loss or parameter, no number, or a value out of range
    """
    name, _, rest = spec.partition(":")
    loss = LOSSES[name.strip()]
    values: dict[str, float] = {}
    for item in filter(None, rest.split(",")):
        key, _, text = (part.strip() for part in item.partition("="))
        if key not in loss.parameters:
            known = ", ".join(loss.parameters) or "none"
            raise InputError(f"{spec!r}: {loss.name} has no parameter {key!r}; it has: {known}")
        allowed = loss.parameters[key].allowed
        try:
            values[key] = allowed.check(key, float(text))
        except ValueError:  # InputError too
            raise InputError(
                f"{spec!r}: {key} must be a number in {allowed.text}, got {text!r}"
            ) from None
    return loss, values


def _label(loss: Loss, values: Mapping[str, float]) -> str:
    parts = [loss.name]
    for name, parameter in loss.parameters.items():
        parts.append(f"{SYMBOLS.get(name, name)} = {values.get(name, parameter.default):g}")
    return ", ".join(parts)
