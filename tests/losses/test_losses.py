"""Every registered loss, against the closed form in float64 and against fvcore."""

import subprocess
import sys
from itertools import product

import fvcore.nn
import pytest
import torch
from torch.testing import assert_close

from retinanet_ext.errors import InputError
from retinanet_ext.losses import (
    LOSSES,
    register_loss,
    sigmoid_cross_entropy_loss,
    sigmoid_focal_loss,
    sigmoid_focal_loss_star,
    sigmoid_hinge_loss,
)

GAMMAS = [0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0]
ALPHAS = [-1.0, 0.0, 0.25, 0.5, 0.999, 1.0]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
OF_X_T = [name for name, loss in LOSSES.items() if not loss.is_module]
LOGITS = [-1e4, -1e3, -120.0, -17.5, -8.0, -1.0, -1e-3, 0.0, 0.3, 4.0, 16.75, 60.0, 1e3, 1e4]


def reference_value_and_gradient(name, x, t, alpha, gamma=2.0, beta=1.0, margin=0.5):
    """Value and derivative by the paper's formulas (equations 5, 9 to 11), in exact float64 terms.

    log p_t and 1 - p_t are taken from the side on which they do not cancel.
    """
    x, t = x.double(), t.double()
    y = 2 * t - 1
    x_t = y * x

    def p(z):
        return torch.where(z >= 0, 1 / (1 + (-z).exp()), z.exp() / (1 + z.exp()))

    def log_p(z):
        return torch.where(z >= 0, -torch.log1p((-z).exp()), z - torch.log1p(z.exp()))

    if name == "focal":
        power = torch.ones_like(x) if gamma == 0 else (gamma * log_p(-x_t)).exp()
        value = -power * log_p(x_t)
        gradient = power * (gamma * p(x_t) * log_p(x_t) - p(-x_t))
    elif name == "focal_star":
        value = -log_p(gamma * x_t + beta) / gamma
        gradient = -p(-(gamma * x_t + beta))
    elif name == "cross_entropy":
        value, gradient = -log_p(x_t), -p(-x_t)
    else:
        value = (margin - p(x_t)).clamp(min=0)
        gradient = torch.where(value > 0, -p(x_t) * p(-x_t), torch.zeros_like(x))
    weight = torch.ones_like(x) if alpha == -1 else t * alpha + (1 - t) * (1 - alpha)
    return weight * value, weight * y * gradient


def value_and_gradient(loss, x, t):
    x = x.clone().requires_grad_()
    value = loss(x, t)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    return value.detach(), gradient


def cases():
    for gamma in GAMMAS:
        yield "focal", {"gamma": gamma}, sigmoid_focal_loss
    for gamma, beta in [(2.0, 1.0), (4.0, 0.0), (1.0, 0.0), (4.0, -4.0), (0.1, 3.0), (3.0, 3.0)]:
        yield "focal_star", {"gamma": gamma, "beta": beta}, sigmoid_focal_loss_star
    yield "cross_entropy", {}, sigmoid_cross_entropy_loss
    for margin in (0.1, 0.5, 0.9, 1.0):
        yield "hinge", {"margin": margin}, sigmoid_hinge_loss


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "parameters", "loss"), list(cases()))
def test_value_and_gradient_equal_the_closed_form_up_to_1e4(name, parameters, loss, dtype):
    grid = torch.tensor(LOGITS + torch.linspace(-30, 30, 241).tolist())
    x = grid.to(dtype).repeat(2)
    t = torch.cat([torch.zeros(len(grid)), torch.ones(len(grid))])
    for alpha in [-1.0] if name == "hinge" else ALPHAS:
        arguments = parameters if name == "hinge" else {**parameters, "alpha": alpha}
        value, gradient = value_and_gradient(lambda x, t, a=arguments: loss(x, t, **a), x, t)
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert value.isfinite().all() and gradient.isfinite().all()
        expected = reference_value_and_gradient(name, x, t, alpha, **parameters)
        if name == "hinge":  # at the kink either one-sided derivative is right
            smooth = ((2 * t - 1) * x.double()).sigmoid().sub(parameters["margin"]).abs() > 1e-6
        else:
            smooth = torch.ones_like(t, dtype=torch.bool)
        precision = 1e-12 if dtype == torch.float64 else 2e-6
        assert_close(value.double(), expected[0], rtol=precision, atol=precision)
        # The gradient is returned in the type of the logits.
        rounding = max(precision, 2 * torch.finfo(dtype).eps)
        assert_close(gradient.double()[smooth], expected[1][smooth], rtol=rounding, atol=rounding)


@pytest.mark.parametrize(("alpha", "gamma"), list(product([-1.0, 0.25, 0.75], GAMMAS)))
def test_focal_equals_fvcore_wherever_fvcore_is_finite(alpha, gamma):
    generator = torch.Generator().manual_seed(0)
    x = 12 * torch.randn(4000, generator=generator)
    t = (torch.rand(4000, generator=generator) < 0.3).float()

    def fvcore_loss(x, t):
        return fvcore.nn.sigmoid_focal_loss(x, t, alpha=alpha, gamma=gamma)

    def loss(x, t):
        return sigmoid_focal_loss(x, t, alpha=alpha, gamma=gamma)

    value, gradient = value_and_gradient(loss, x, t)
    fvcore_value, fvcore_gradient = value_and_gradient(fvcore_loss, x, t)
    finite = fvcore_gradient.isfinite()
    # fvcore takes 1 - p_t in float32, where it keeps an absolute precision of 1e-7 only.
    assert_close(value, fvcore_value, rtol=1e-4, atol=1e-5)
    assert_close(gradient[finite], fvcore_gradient[finite], rtol=2e-3, atol=1e-4)
    assert gradient.isfinite().all()
    assert finite.all() or 0 < gamma < 1


@pytest.mark.parametrize("name", OF_X_T)
def test_gradcheck_and_second_derivative(name):
    torch.manual_seed(0)
    x = torch.empty(32, dtype=torch.float64).uniform_(-6, 6).requires_grad_()
    formula = LOSSES[name].bind()
    assert torch.autograd.gradcheck(formula, x)
    assert torch.autograd.gradgradcheck(formula, x)


@pytest.mark.parametrize("name", OF_X_T)
def test_contract_of_every_registered_loss(name):
    """What any loss must hold: finite, never negative, never rising in x_t, no NaN anywhere."""
    x = torch.tensor(LOGITS, dtype=torch.float64).sort().values.requires_grad_()
    value = LOSSES[name].bind()(x)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    assert value.isfinite().all() and gradient.isfinite().all()
    assert (value >= 0).all()
    assert (value.diff() <= 0).all() and value[0] > value[-1]
    assert LOSSES[name].reference


def test_worked_numbers_of_the_paper():
    """Section 3.2: gamma 2, p_t .9 is 100 times lower than CE, p_t .968 about 1000 times."""
    for p_t, factor, tolerance in [(0.9, 100, 1e-3), (0.968, 1000, 0.03)]:
        x = torch.logit(torch.tensor(p_t, dtype=torch.float64))
        one = torch.ones_like(x)
        ratio = sigmoid_cross_entropy_loss(x, one) / sigmoid_focal_loss(x, one, alpha=-1)
        assert abs(ratio.item() / factor - 1) < tolerance


def test_focal_gradient_dips_where_figure_6_shows_it():
    x = torch.linspace(-10, 10, 20001, dtype=torch.float64)
    _, gradient = value_and_gradient(
        lambda x, t: sigmoid_focal_loss(x, t, alpha=-1), x, torch.ones_like(x)
    )
    assert abs(gradient.min().item() + 1.129) < 1e-3
    assert abs(x[gradient.argmin()].item() + 2.80) < 0.01


def test_alpha_of_each_class():
    x, t = torch.randn(5, 3), torch.tensor([0.0, 1.0, 1.0]).expand(5, 3)
    alphas = [0.1, 0.5, 0.9]
    columns = [sigmoid_focal_loss(x[:, k], t[:, k], alpha=a) for k, a in enumerate(alphas)]
    assert_close(sigmoid_focal_loss(x, t, alpha=alphas), torch.stack(columns, 1))
    assert_close(sigmoid_focal_loss(x, t, alpha=torch.tensor(alphas)), torch.stack(columns, 1))


COMPILED_ALPHAS = [-1.0, 0.25, [0.1, 0.5, 0.9], torch.tensor(0.25), torch.tensor([0.1, 0.5, 0.9]),
                   torch.tensor(-1.0)]  # fmt: skip


@pytest.mark.parametrize(
    "loss",
    [sigmoid_focal_loss, sigmoid_focal_loss_star, sigmoid_cross_entropy_loss, sigmoid_hinge_loss],
)
def test_compiles_to_one_graph_and_equals_eager(loss):
    torch.manual_seed(0)
    x, t = 8 * torch.randn(40, 3), (torch.rand(40, 3) < 0.3).float()
    alphas = [{"alpha": alpha} for alpha in COMPILED_ALPHAS]
    for arguments in [{}] if loss is sigmoid_hinge_loss else alphas:
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda x, t, a=arguments: loss(x, t, **a), fullgraph=True, backend="aot_eager"
        )
        found = value_and_gradient(compiled, x, t)
        expected = value_and_gradient(lambda x, t, a=arguments: loss(x, t, **a), x, t)
        assert_close(found, expected, rtol=0, atol=0)
    soft = compiled(x, t.masked_fill(x > 8, 0.5))
    assert torch.equal(soft.isnan(), x > 8) and soft.isnan().any()


def test_compiled_code_answers_an_alpha_out_of_range_with_nan():
    x, t = torch.zeros(2, 3), torch.ones(2, 3)
    torch._dynamo.reset()
    compiled = torch.compile(sigmoid_focal_loss, fullgraph=True, backend="aot_eager")
    found = compiled(x, t, torch.tensor([0.5, 1.5, -1.0]))
    assert found.isnan().any(0).tolist() == [False, True, True]
    with pytest.raises(Exception, match="alpha has 2 values for 3 classes"):
        compiled(x, t, torch.tensor([0.5, 0.5]))


@pytest.mark.parametrize("target_type", [torch.float32, torch.int64, torch.bool, torch.uint8])
def test_targets_of_any_type_and_reductions(target_type):
    x, t = torch.randn(7, 3), torch.randint(0, 2, (7, 3)).to(target_type)
    value = sigmoid_focal_loss(x, t)
    assert_close(value, fvcore.nn.sigmoid_focal_loss(x, t.float(), alpha=0.25, gamma=2))
    assert_close(sigmoid_focal_loss(x, t, reduction="sum"), value.sum())
    assert_close(sigmoid_focal_loss(x, t, reduction="mean"), value.mean())


def test_inputs_are_left_as_they_were():
    x, t = torch.randn(7), torch.ones(7)
    before = x.clone(), t.clone()
    sigmoid_focal_loss(x, t)
    sigmoid_hinge_loss(x, t)
    assert torch.equal(x, before[0]) and torch.equal(t, before[1])


X, T = torch.zeros(2, 3), torch.ones(2, 3)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: sigmoid_focal_loss(X, T, gamma=-0.1), ["gamma", "[0, inf)", "-0.1"]),
        (lambda: sigmoid_focal_loss(X, T, gamma=float("nan")), ["gamma", "[0, inf)"]),
        (lambda: sigmoid_focal_loss(X, T, gamma=float("inf")), ["gamma", "[0, inf)"]),
        (lambda: sigmoid_focal_loss(X, T, alpha=7), ["alpha", "[0, 1]", "7"]),
        (lambda: sigmoid_focal_loss(X, T, alpha=-0.5), ["alpha", "[0, 1]", "-0.5"]),
        (lambda: sigmoid_focal_loss(X, T, alpha=[0.1, 0.2]), ["2 values", "3 classes"]),
        (lambda: sigmoid_focal_loss(X, T, alpha=[0.1, 2.0, 0.2]), ["alpha[1]", "[0, 1]", "2.0"]),
        (lambda: sigmoid_focal_loss(X, T, alpha=[0.1, -1.0, 0.2]), ["alpha[1]", "-1"]),
        (lambda: sigmoid_focal_loss_star(X, T, gamma=0.0), ["gamma", "(0, inf)"]),
        (lambda: sigmoid_focal_loss_star(X, T, beta=float("inf")), ["beta"]),
        (lambda: sigmoid_hinge_loss(X, T, margin=0.0), ["margin", "(0, 1]"]),
        (lambda: sigmoid_hinge_loss(X, T, margin=1.1), ["margin", "(0, 1]"]),
        (lambda: sigmoid_focal_loss(X, T, reduction="Sum"), ["reduction", '"sum"', "'Sum'"]),
        (lambda: sigmoid_focal_loss(X, T[:1]), ["(2, 3)", "(1, 3)"]),
        (lambda: sigmoid_focal_loss(X, 0.5 * T), ["targets", "0 or 1"]),
        (lambda: LOSSES["focl"], ["focl", "focal", "focal_star", "cross_entropy", "hinge"]),
    ],
)
def test_refusals_name_the_value_and_what_is_allowed(call, words):
    with pytest.raises(InputError) as error:
        call()
    for word in words:
        assert word in str(error.value)


def test_a_loss_states_the_range_of_each_parameter():
    with pytest.raises(InputError, match=r"'gama'.*default and a range"):
        register_loss("unstated", reference="none")(lambda x_t, *, gama=1.0: x_t)
    with pytest.raises(InputError, match="registered already"):
        register_loss("focal", reference="none")(lambda x_t: x_t)
    assert "unstated" not in LOSSES


def test_pure_part_imports_with_detectron2_blocked():
    program = (
        "import sys\n"
        "for name in ('detectron2', 'fvcore'): sys.modules[name] = None\n"
        "import retinanet_ext, retinanet_ext.errors, retinanet_ext.sampling\n"
        "from retinanet_ext.losses import LOSSES\n"
        "print(sorted(LOSSES))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    for name in ("cross_entropy", "focal", "focal_star", "hinge"):
        assert f"'{name}'" in run.stdout, run.stderr
