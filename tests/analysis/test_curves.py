"""Curves against the paper's formulas and what its figures show."""

import subprocess
import sys
from typing import Annotated

import pytest
import torch

from retinanet_ext.analysis.curves import FIGURE_1, FIGURES_5_AND_6, loss_curve, parse_spec
from retinanet_ext.errors import InputError
from retinanet_ext.losses import LOSSES, Interval, register_loss

X_T = torch.linspace(-10, 10, 2001, dtype=torch.float64)
P_T = X_T.sigmoid()


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_cross_entropy_is_equation_9():
    curve = loss_curve("cross_entropy", X_T)
    close(curve.value, -P_T.log())
    close(curve.gradient, P_T - 1)
    assert torch.equal(curve.x_t, X_T)


@pytest.mark.parametrize("gamma", [0, 0.5, 1, 2, 5])
def test_focal_is_equation_10(gamma):
    curve = loss_curve(f"focal:gamma={gamma}", X_T)
    modulation = (1 - P_T) ** gamma
    close(curve.value, -modulation * P_T.log())
    close(curve.gradient, modulation * (gamma * P_T * P_T.log() + P_T - 1))


@pytest.mark.parametrize(("gamma", "beta"), [(2, 1), (4, 0), (3, -2)])
def test_focal_star_is_equation_11(gamma, beta):
    curve = loss_curve(f"focal_star:gamma={gamma},beta={beta}", X_T.float())
    p_star = (gamma * X_T.float().double() + beta).sigmoid()
    close(curve.value, -p_star.log() / gamma)
    close(curve.gradient, p_star - 1)


def test_figure_1():
    """Section 3.2: at p_t = .9 the loss is 100 times lower than cross entropy with gamma 2."""
    p_t = torch.tensor([0.9, 0.968, 0.5], dtype=torch.float64)
    values = {label: loss_curve(spec, p_t.logit()).value for label, spec in FIGURE_1.items()}
    ratio = values["γ = 0 (CE)"] / values["γ = 2"]
    assert ratio.tolist() == pytest.approx([100, 976.6, 4], rel=1e-3)
    assert len(values) == 5


def test_figure_6():
    """The focal loss alone has gradients beyond -1, -1.129 at x_t = -2.80."""
    curves = {label: loss_curve(spec, X_T) for label, spec in FIGURES_5_AND_6.items()}
    focal = curves.pop("FL, γ = 2")
    assert focal.gradient.min() == pytest.approx(-1.129, abs=5e-4)
    assert X_T[focal.gradient.argmin()] == pytest.approx(-2.80, abs=0.011)
    assert len(curves) == 3
    assert all(curve.gradient.min() >= -1 for curve in curves.values())


def test_spec_with_spaces_and_defaults():
    loss, values = parse_spec(" focal_star : gamma = 4 , beta = -1e-1 ")
    assert (loss, values) == (LOSSES["focal_star"], {"gamma": 4.0, "beta": -0.1})
    assert loss_curve("focal_star:beta=0", X_T).label == "focal_star, γ = 2, β = 0"
    close(loss_curve("focal", X_T).value, loss_curve("focal:gamma=2", X_T).value)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("focale", "unknown loss 'focale'; known losses: asymmetric, cross_entropy"),
        ("focal:gama=2", "'focal:gama=2': focal has no parameter 'gama'; it has: gamma"),
        ("focal:2", "no parameter '2'; it has: gamma"),
        ("cross_entropy:gamma=2", "it has: none"),
        ("focal:gamma=-1", r"gamma must be a number in \[0, inf\), got '-1'"),
        ("focal:gamma=two", r"gamma must be a number in \[0, inf\), got 'two'"),
        ("focal:gamma=nan", "got 'nan'"),
        ("focal:gamma", "got ''"),
        ("varifocal", "'varifocal' depends on more than x_t"),
        ("focal_star:gamma=0", r"in \(0, inf\), got '0'"),
    ],
)
def test_specs_that_are_refused(spec, expected):
    with pytest.raises(InputError, match=expected):
        loss_curve(spec, X_T)


def test_a_new_loss_needs_no_more_code(monkeypatch):
    monkeypatch.setitem(LOSSES, "squared", None)  # so that it is removed at the end
    del LOSSES["squared"]

    @register_loss("squared", reference="none")
    def squared(x_t, *, scale: Annotated[float, Interval("(0, inf)")] = 1.0):
        return scale * (1 - x_t.sigmoid()) ** 2

    curve = loss_curve("squared:scale=3", X_T)
    close(curve.gradient, -6 * (1 - P_T) ** 2 * P_T)
    assert curve.label == "squared, scale = 3"


def test_analysis_imports_with_detectron2_blocked():
    program = (
        "import sys\n"
        "for name in ('detectron2', 'fvcore'): sys.modules[name] = None\n"
        "from retinanet_ext.analysis import curves, loss_cdf, plots\n"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout == "False\n", run.stderr
