"""The loss of all anchors in one pass against autograd on one-hot targets."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from retinanet_ext.errors import InputError
from retinanet_ext.losses import LOSSES, dense
from retinanet_ext.losses.functional import class_weights, elementwise_loss

LEVELS = [(6, 5), (3, 3), (1, 2)]
OF_X_T = [name for name, loss in LOSSES.items() if not loss.is_module]
WAYS = ("eager", "operator", "expression")


def set_way(way, patch):
    """Compute in small blocks, or run what torch.compile sees as it stands."""
    patch.setattr(torch.compiler, "is_compiling", lambda: way != "eager")
    patch.setattr(dense, "BLOCK_PER_THREAD", 64)
    if way == "expression":  # that of a loss without a closed form of its derivative
        patch.setattr(dense, "LOSSES", {})


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    set_way(request.param, monkeypatch)
    return request.param


def make_case(num_classes, num_anchors=3, num_images=2, seed=0, spread=3.0, dtype=torch.float32):
    """Logits of three levels, labels with every kind of anchor, weights of the images."""
    rng = torch.Generator().manual_seed(seed)
    shapes = [(num_images, num_anchors * num_classes, *size) for size in LEVELS]
    levels = [spread * torch.randn(shape, generator=rng) for shape in shapes]
    count = sum(h * w for h, w in LEVELS) * num_anchors
    labels = torch.randint(-1, num_classes + 1, (num_images, count), generator=rng)
    labels[0] = torch.where(labels[0] >= 0, num_classes, -1)  # an image without positives
    weights = torch.rand(num_images, generator=rng, dtype=torch.float64) + 0.1
    return [level.to(dtype).requires_grad_() for level in levels], labels, weights


def reference(loss, levels, labels, weights, alpha, num_classes):
    """Permute, concatenate, one-hot, autograd: what the one pass replaces."""
    rows = [
        level.unflatten(1, (-1, num_classes)).permute(0, 3, 4, 1, 2).flatten(1, 3)
        for level in levels
    ]
    logits = torch.cat(rows, 1)
    targets = torch.nn.functional.one_hot(labels.clamp(min=0), num_classes + 1)[..., :-1]
    losses = elementwise_loss(loss, logits, targets.to(logits.dtype), alpha).sum(2)
    losses = torch.where(labels >= 0, losses, 0)
    return (losses.double().sum(1) * weights).sum()


def check(loss, levels, labels, weights, alpha, num_classes, **tolerance):
    expected = reference(loss, levels, labels, weights, alpha, num_classes)
    wanted = torch.autograd.grad(3 * expected, levels)
    total = dense.dense_loss(
        loss,
        levels,
        labels,
        weights,
        class_weights(alpha, num_classes),
        num_classes=num_classes,
    )
    found = torch.autograd.grad(3 * total, levels)  # a loss that is scaled
    assert_close(total.double(), expected.double(), **tolerance)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert_close(one, other, **tolerance)


@pytest.mark.parametrize("name", OF_X_T)
@pytest.mark.parametrize("num_classes", [1, 3, 80])
@pytest.mark.parametrize("alpha", [-1.0, 0.25, "each"])
@pytest.mark.usefixtures("way")
def test_equals_autograd_in_float64(name, num_classes, alpha):
    case = make_case(num_classes, dtype=torch.float64)
    if alpha == "each":
        alpha = torch.linspace(0.1, 0.9, num_classes).tolist()
    check(LOSSES[name].bind(), *case, alpha, num_classes, rtol=1e-10, atol=1e-12)


@given(
    gamma=st.sampled_from([0.0, 0.1, 0.5, 1.0, 2.0, 5.0]),
    spread=st.sampled_from([0.1, 3.0, 40.0, 3000.0]),
    seed=st.integers(0, 1000),
    block=st.sampled_from([1, 7, 64, 2**16]),
    way=st.sampled_from(WAYS),
)
def test_focal_at_any_gamma_logit_and_size_of_block(gamma, spread, seed, block, way):
    with pytest.MonkeyPatch.context() as patch:
        set_way(way, patch)
        patch.setattr(dense, "BLOCK_PER_THREAD", block)
        case = make_case(3, seed=seed, spread=spread)
        check(LOSSES["focal"].bind(gamma=gamma), *case, 0.25, 3, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", OF_X_T)
@pytest.mark.usefixtures("way")
def test_half_precision_logits_are_computed_in_float32(dtype, name):
    """Sums agree to float32; a gradient rounds once more to the logits' type."""
    levels, labels, weights = make_case(4, dtype=dtype)
    loss = LOSSES[name].bind()
    wide = [level.detach().float().requires_grad_() for level in levels]
    alpha = class_weights(0.25, 4)
    half = dense.dense_loss(loss, levels, labels, weights, alpha, num_classes=4)
    full = dense.dense_loss(loss, wide, labels, weights, alpha, num_classes=4)
    assert half.dtype == torch.float32 and half == full
    # A scale as of a gradient scaler: float16 must not lose the gradient before it is scaled.
    scale = 2.0**16 if dtype == torch.float16 else 1.0
    found = torch.autograd.grad(half * 1e-6 * scale, levels)
    wanted = torch.autograd.grad(full * 1e-6 * scale, wide)
    for one, other in zip(found, wanted, strict=True):
        assert_close(one, other.to(dtype), rtol=0.01, atol=0)


@pytest.mark.parametrize("name", OF_X_T)
def test_memory_formats_agree_and_keep_their_strides(name, way):
    levels, labels, weights = make_case(5, num_anchors=2)
    loss = LOSSES[name].bind()
    last = [
        level.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
        for level in levels
    ]
    sparse = [level.detach().repeat_interleave(2, 3)[..., ::2].requires_grad_() for level in levels]
    results = []
    for logits in (levels, last, sparse):
        total = dense.dense_loss(loss, logits, labels, weights, num_classes=5)
        results.append((total.detach(), torch.autograd.grad(total, logits)))
    for total, gradients in results[1:]:
        assert_close(total, results[0][0])
        for one, other in zip(gradients, results[0][1], strict=True):
            assert_close(one, other)
    # The compiler chooses the strides of the expression's gradient.
    assert way == "expression" or results[1][1][0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.usefixtures("way")
def test_ignored_anchors_count_nothing_whatever_their_logits(gamma, value):
    levels, labels, weights = make_case(3)
    labels[:, :3] = -1  # the first cell's anchors
    loss = LOSSES["focal"].bind(gamma=gamma)
    plain = dense.dense_loss(loss, levels, labels, weights, num_classes=3)
    expected = torch.autograd.grad(plain, levels)
    with torch.no_grad():
        levels[0][:, :, 0, 0] = value
    total = dense.dense_loss(loss, levels, labels, weights, num_classes=3)
    assert_close(total, plain)
    found = torch.autograd.grad(total, levels)
    assert not found[0][:, :, 0, 0].any()
    assert_close(found, expected)
    labels[:] = -1
    total = dense.dense_loss(loss, levels, labels, weights, num_classes=3)
    assert total == 0 and not any(g.any() for g in torch.autograd.grad(total, levels))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.usefixtures("way")
def test_a_logit_that_is_not_finite_is_not_hidden(gamma, value, dtype):
    levels, labels, weights = make_case(3, dtype=dtype)
    labels[:] = 3
    with torch.no_grad():
        levels[0][0, 0, 0, 0] = value
    loss = LOSSES["focal"].bind(gamma=gamma)
    total = dense.dense_loss(loss, levels, labels, weights, num_classes=3)
    assert not total.isfinite()


@pytest.mark.parametrize("own", [-30.0, 0.0, 50.0, 1000.0, 65504.0, torch.inf])
@pytest.mark.parametrize(
    ("name", "values"),
    [("cross_entropy", {}), *(("focal", {"gamma": gamma}) for gamma in (0.0, 0.5, 2.0))],
)
@pytest.mark.usefixtures("way")
def test_a_sure_positive_leaves_what_its_other_classes_lose(name, values, own):
    """One anchor in float32 against float64: a large term added and subtracted would show."""
    loss = LOSSES[name].bind(**values)
    logits = torch.full((1, 80, 1, 1), -9.0)
    logits[0, 5] = own
    label = torch.tensor([[5]])
    total = dense.dense_loss(loss, [logits], label, torch.ones(1), num_classes=80)
    x_t = torch.full((80,), 9.0, dtype=torch.float64)
    x_t[5] = min(own, 1e5)  # of infinity, the limit
    assert_close(total.double(), loss(x_t).sum(), rtol=1e-5, atol=0)


def test_backward_runs_once():
    levels, labels, weights = make_case(3)
    total = dense.dense_loss(LOSSES["focal"].bind(), levels, labels, weights, num_classes=3)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward runs once"):
        total.backward()


@pytest.mark.usefixtures("way")
def test_a_loss_without_a_closed_form_is_differentiated():
    levels, labels, weights = make_case(3, dtype=torch.float64)
    registered = LOSSES["focal"]
    plain = type(registered)(
        "plain", registered.formula, "", registered.parameters, registered.alpha
    ).bind(gamma=1.5)
    check(plain, levels, labels, weights, 0.25, 3, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", OF_X_T)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_closed_form_equals_autograd_of_the_formula(name, dtype):
    """From -1e4 to 1e4, at default parameters: what a loss states twice must agree."""
    loss = LOSSES[name]
    x_t = torch.cat([torch.linspace(-30, 30, 2001), torch.tensor([-1e4, -100.0, 100.0, 1e4])])
    x_t = x_t.to(dtype)
    value, grad = loss.bind().value_and_grad(x_t)
    plain = type(loss)("plain", loss.formula, "", loss.parameters, loss.alpha)
    expected, slope = plain.bind().value_and_grad(x_t)
    tolerance = {"rtol": 1e-12, "atol": 1e-14} if dtype == torch.float64 else {}
    assert_close(value, expected, **tolerance)
    assert_close(grad, slope, **tolerance)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda levels, labels: (levels, labels.fill_(4)), "labels go from 4 to 4; -1 .* to 3"),
        (lambda levels, labels: (levels, labels.fill_(-2)), "labels go from -2 to -2"),
        (
            lambda levels, labels: (levels, labels[:, 1:]),
            r"labels \(2, 122\) do not fit .*\(2, 9, 6",
        ),
        (lambda levels, labels: (levels, labels[:1]), r"labels \(1, 123\) do not fit"),
        (lambda levels, labels: ([x[:, 1:] for x in levels], labels), r"\(2, 8, 6, 5\)"),
        (lambda levels, labels: ([], labels), r"do not fit logits \[\]"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change, said):
    levels, labels, weights = make_case(3)
    levels, labels = change(levels, labels)
    with pytest.raises(InputError, match=said):
        dense.dense_loss(LOSSES["focal"].bind(), levels, labels, weights, num_classes=3)
