"""The registry of classification losses and what a loss states about itself.

A loss is one function of x_t, the logit signed by the label (appendix A: x_t = y x with
y = +1 for the object's class and -1 otherwise, so that p_t = sigmoid(x_t)). Which anchors count,
alpha-balancing, the sum and the normaliser are other people's business.
"""

from __future__ import annotations

import inspect
import reprlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from retinanet_ext.errors import InputError

Formula = Callable[..., Tensor]
ValueAndGrad = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Interval:
    """The allowed values of a number, in the usual notation: ``Interval("(0, 1]")``.

    Infinity and NaN are never inside.
    """

    text: str
    low: float = field(init=False)
    high: float = field(init=False)

    def __post_init__(self) -> None:
        low, high = self.text[1:-1].split(",")
        object.__setattr__(self, "low", float(low))
        object.__setattr__(self, "high", float(high))

    def __contains__(self, value: float) -> bool:
        above = value >= self.low if self.text[0] == "[" else value > self.low
        below = value <= self.high if self.text[-1] == "]" else value < self.high
        return abs(value) <= sys.float_info.max and above and below

    def check(self, name: str, value: float) -> float:
        """Return ``value``, or raise :class:`InputError` naming ``name`` and the allowed range."""
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value not in self:
            raise InputError(f"{name} must be a number in {self.text}, got {reprlib.repr(value)}")
        return value


ALPHA_RANGE = Interval("[0, 1]")
UNBALANCED = -1.0  # the alpha that means "no balancing", as in fvcore and torchvision


def check_alpha(name: str, value: float) -> float:
    """Return ``value`` if it is in [0, 1] or -1 (no balancing), else raise :class:`InputError`."""
    if value == UNBALANCED:
        return value
    try:
        return ALPHA_RANGE.check(name, value)
    except InputError as error:
        raise InputError(f"{name} must be in [0, 1], or -1 for no balancing, got {value!r}") from (
            error
        )


@dataclass(frozen=True)
class Parameter:
    """A parameter of a loss: its default and its allowed range."""

    default: float
    allowed: Interval


@dataclass(frozen=True)
class Loss:
    """A registered loss.

    Attributes:
        name: the name in a config, e.g. ``focal_star``
        formula: x_t of any shape -> the loss of each entry, same shape; keyword-only parameters
        reference: where it is defined, e.g. ``"section 3.2, equation 4"``
        parameters: name -> default and range, read from the formula's signature
        alpha: default of the class-balancing weight (-1: none), or None if it takes no alpha
        value_and_grad: x_t and the same parameters -> loss and dloss/dx_t in closed form, if given
    """

    name: str
    formula: Formula
    reference: str
    parameters: Mapping[str, Parameter]
    alpha: float | None
    value_and_grad: ValueAndGrad | None = None

    def bind(self, **values: float) -> BoundLoss:
        """Return the formula as a function of x_t alone; values out of range are refused."""
        for name, value in values.items():
            self.parameters[name].allowed.check(f"{self.name}: {name}", value)
        return BoundLoss(self, values)


@dataclass(frozen=True, eq=False)  # torch.compile hashes it, and a dict has no hash
class BoundLoss:
    """A loss with its parameters: a function of x_t."""

    loss: Loss
    values: Mapping[str, float]

    def __call__(self, x_t: Tensor) -> Tensor:
        """Return the loss of each entry, differentiable."""
        return self.loss.formula(x_t, **self.values)

    def value_and_grad(self, x_t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of each entry and its derivative by x_t, outside of autograd.

        Without a closed form the derivative is autograd's.
        """
        if self.loss.value_and_grad is not None:
            return self.loss.value_and_grad(x_t, **self.values)
        with torch.enable_grad():
            x_t = x_t.detach().requires_grad_()
            value = self(x_t)
            (grad,) = torch.autograd.grad(value.sum(), x_t)
        return value.detach(), grad


class LossRegistry(Mapping[str, Loss]):
    """The losses by name; an unknown name is answered with the known ones."""

    def __init__(self) -> None:
        self._losses: dict[str, Loss] = {}

    def __getitem__(self, name: str) -> Loss:
        if name not in self._losses:
            raise InputError(f"unknown loss {name!r}; known losses: {', '.join(sorted(self))}")
        return self._losses[name]

    def __contains__(self, name: object) -> bool:
        return name in self._losses

    def __iter__(self) -> Iterator[str]:
        return iter(self._losses)

    def __len__(self) -> int:
        return len(self._losses)

    def add(self, loss: Loss) -> None:
        """Add a loss; a name is given once."""
        if loss.name in self._losses:
            raise InputError(f"a loss named {loss.name!r} is registered already")
        self._losses[loss.name] = loss


LOSSES = LossRegistry()


def bind_loss(name: str, **values: float) -> BoundLoss:
    """Return the registered loss of a name as a function of x_t, its parameters set.

    Raises:
        InputError: an unknown name, or a value out of range
    """
    return LOSSES[name].bind(**values)


def register_loss(
    name: str,
    *,
    reference: str,
    alpha: float | None = None,
    value_and_grad: ValueAndGrad | None = None,
) -> Callable[[Formula], Formula]:
    """Register a formula under ``name``.

    The formula takes x_t and keyword-only parameters, each annotated with its range and given a
    default: ``gamma: Annotated[float, Interval("[0, inf)")] = 2.0``. Its config node and contract
    tests follow from that.

    Args:
        name: the name in a config, lower case
        reference: section and equation
        alpha: default class-balancing weight (-1: none); None if the loss is never balanced
        value_and_grad: loss and dloss/dx_t in closed form, from x_t and the formula's parameters;
            faster than autograd, and tested against it
    """

    def register(formula: Formula) -> Formula:
        LOSSES.add(
            Loss(name, formula, reference, _parameters(name, formula), alpha, value_and_grad)
        )
        return formula

    return register


def _parameters(name: str, formula: Formula) -> dict[str, Parameter]:
    hints: dict[str, Any] = get_type_hints(formula, include_extras=True)
    parameters = {}
    for parameter in inspect.signature(formula).parameters.values():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        hint = hints.get(parameter.name)
        ranges = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
        if parameter.default is inspect.Parameter.empty or not ranges:
            raise InputError(
                f"loss {name!r}: parameter {parameter.name!r} needs a default and a range, "
                'as in  gamma: Annotated[float, Interval("[0, inf)")] = 2.0'
            )
        allowed: Interval = ranges[0]
        allowed.check(f"loss {name!r}: default of {parameter.name}", parameter.default)
        parameters[parameter.name] = Parameter(float(parameter.default), allowed)
    return parameters
