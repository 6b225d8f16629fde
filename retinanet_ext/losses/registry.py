"""The registry of classification losses, and what a registered loss states about itself.

A loss is one function of x_t, the logit signed by the target (appendix A): x_t = x for the object's
class and -x otherwise, so that p_t = sigmoid(x_t). The criterion chooses which anchors count,
balances by alpha, sums and normalises. A loss that needs more than x_t is a module, see
:class:`~retinanet_ext.losses.module.LossModule`.
"""

from __future__ import annotations

import inspect
import reprlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from retinanet_ext.errors import InputError
from retinanet_ext.losses.module import LossModule

Formula = Callable[..., Any]
ValueAndGrad = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Interval:
    """The range of a number in the usual notation; infinity and NaN are never inside.

    Example:
        >>> 0 in Interval("(0, 1]"), 1 in Interval("(0, 1]"), float("inf") in Interval("(0, inf)")
        (False, True, False)
    """

    text: str
    low: float = field(init=False)
    high: float = field(init=False)

    def __post_init__(self) -> None:
        low, high = self.text[1:-1].split(",")
        object.__setattr__(self, "low", float(low))
        object.__setattr__(self, "high", float(high))

    def __contains__(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        above = value >= self.low if self.text[0] == "[" else value > self.low
        below = value <= self.high if self.text[-1] == "]" else value < self.high
        return abs(value) <= sys.float_info.max and above and below

    def check(self, name: str, value: float) -> float:
        """Return ``value``; if it is outside, raise an ``InputError`` that names ``name``."""
        if value not in self:
            raise InputError(f"{name} must be a number in {self.text}, got {reprlib.repr(value)}")
        return value


ALPHA_RANGE = Interval("[0, 1]")
UNBALANCED = -1.0  # the alpha that means "no balancing", as in fvcore and torchvision


def check_alpha(name: str, value: float) -> float:
    """Return ``value`` if it is in [0, 1] or -1 (no balancing), else raise ``InputError``."""
    if value != UNBALANCED and value not in ALPHA_RANGE:
        raise InputError(f"{name} must be in [0, 1], or -1 for no balancing, got {value!r}")
    return value


@dataclass(frozen=True)
class Parameter:
    """A parameter of a loss: its default and its range."""

    default: float
    allowed: Interval


@dataclass(frozen=True)
class Loss:
    """A registered loss.

    Attributes:
        name: the name in a config, e.g. ``focal_star``
        formula: x_t of any shape -> loss of each entry, same shape; takes keyword-only parameters.
            Of a loss of more than x_t, its subclass of ``LossModule``
        reference: where it is defined, e.g. ``"section 3.2, equation 4"``
        parameters: name -> default and range, read from the formula's signature
        alpha: default class-balancing weight (-1: none); None if the loss is never balanced
        value_and_grad: closed form, x_t and the same parameters -> loss and dloss/dx_t
    """

    name: str
    formula: Formula
    reference: str
    parameters: Mapping[str, Parameter]
    alpha: float | None
    value_and_grad: ValueAndGrad | None = None

    @property
    def is_module(self) -> bool:
        """Whether the loss needs more than x_t; :meth:`build` then takes the place of ``bind``."""
        return isinstance(self.formula, type)

    def bind(self, **values: float) -> BoundLoss:
        """Return the loss as a function of x_t.

        Raises:
            InputError: a value is out of range, or the loss is not a function of x_t
        """
        if self.is_module:
            raise InputError(
                f"loss {self.name!r} depends on more than x_t (a target's sign or quality, the "
                "batch): it has no curve over x_t"
            )
        self._check(values)
        return BoundLoss(self, values)

    def build(self, num_classes: int, **values: float) -> LossModule:
        """Return the module of a loss of more than x_t.

        Raises:
            InputError: a value is out of range
        """
        self._check(values)
        module: LossModule = self.formula(num_classes, **values)
        return module

    def _check(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.parameters[name].allowed.check(f"{self.name}: {name}", value)


@dataclass(frozen=True, eq=False)  # by identity, because torch.compile hashes it
class BoundLoss:
    """A loss with its parameters: a function of x_t."""

    loss: Loss
    values: Mapping[str, float]

    def __call__(self, x_t: Tensor) -> Tensor:
        """Return the loss of each entry, differentiable."""
        value: Tensor = self.loss.formula(x_t, **self.values)
        return value

    def value_and_grad(self, x_t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of each entry and its derivative, neither of them differentiable.

        Autograd computes the derivative if the loss has no closed form.
        """
        if self.loss.value_and_grad is not None:
            return self.loss.value_and_grad(x_t, **self.values)
        with torch.enable_grad():
            x_t = x_t.detach().requires_grad_()
            value = self(x_t)
            (grad,) = torch.autograd.grad(value.sum(), x_t)
        return value.detach(), grad


class LossRegistry(dict[str, Loss]):
    """The registered losses by name; the error for an unknown name lists the known ones."""

    def __missing__(self, name: str) -> Loss:
        raise InputError(f"unknown loss {name!r}; known losses: {', '.join(sorted(self))}")


LOSSES = LossRegistry()


def bind_loss(name: str, **values: float) -> BoundLoss:
    """Return a registered loss as a function of x_t.

    Args:
        name: one of :data:`LOSSES`
        values: parameters of the loss; the others keep their defaults

    Raises:
        InputError: if the name is unknown or a value is out of range

    Example:
        >>> loss = bind_loss("focal", gamma=2.0)
        >>> loss(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([0.7019, 0.1733, 0.0227])
    """
    return LOSSES[name].bind(**values)


def register_loss(
    name: str,
    *,
    reference: str,
    alpha: float | None = None,
    value_and_grad: ValueAndGrad | None = None,
) -> Callable[[Formula], Formula]:
    """Register the decorated formula as a loss; docs/add_a_loss.md shows how to add one.

    The formula takes x_t and keyword-only parameters; a subclass of ``LossModule`` takes them in
    its ``__init__``. Each parameter has a default and is annotated
    with its range: ``gamma: Annotated[float, Interval("[0, inf)")] = 2.0``. Its config keys and the
    tests of its contract follow from the signature.

    Args:
        name: the name in a config, lower case
        reference: section and equation
        alpha: default class-balancing weight (-1: none); None if the loss is never balanced
        value_and_grad: closed form of the loss and dloss/dx_t as a function of x_t and the same
            parameters; faster than autograd, and tested against it

    Raises:
        InputError: if the name is taken, or a parameter has no default or no range

    Example:
        >>> @register_loss("squared", reference="none")
        ... def squared(x_t):
        ...     return (-x_t).sigmoid() ** 2
        >>> bind_loss("squared")(torch.zeros(1))
        tensor([0.2500])
        >>> del LOSSES["squared"]
    """

    def register(formula: Formula) -> Formula:
        if name in LOSSES:
            raise InputError(f"a loss named {name!r} is registered already")
        parameters = _parameters(name, formula)
        LOSSES[name] = Loss(name, formula, reference, parameters, alpha, value_and_grad)
        return formula

    return register


def _parameters(name: str, formula: Formula) -> dict[str, Parameter]:
    function = formula.__init__ if isinstance(formula, type) else formula  # type: ignore[misc]
    hints: dict[str, Any] = get_type_hints(function, include_extras=True)
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
        number_type = get_args(hint)[0]
        parameters[parameter.name] = Parameter(number_type(parameter.default), allowed)
    return parameters
