"""Losses of more than x_t against each paper's formula, written naively in float64."""

from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from retinanet_ext.errors import InputError
from retinanet_ext.losses import LOSSES

MODULES = [name for name, loss in LOSSES.items() if loss.is_module]
K = 3
EXTREME = [-1e4, -1e3, -120.0, -17.5, -2.0, 0.0, 0.3, 4.0, 16.75, 60.0, 1e3, 1e4]


def make_case(seed=0, num_images=3, num_anchors=40, spread=3.0):
    rng = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(num_images, num_anchors, K, generator=rng, dtype=torch.float64)
    labels = torch.randint(-1, K + 1, (num_images, num_anchors), generator=rng)
    quality = torch.rand(num_images, num_anchors, generator=rng, dtype=torch.float64)
    return logits.requires_grad_(), labels, quality


def targets(labels):
    """Return the one-hot targets and whether an anchor counts, as float64."""
    hot = torch.nn.functional.one_hot(labels.clamp(min=0), K + 1)[..., :K].double()
    counted = (labels >= 0).double().unsqueeze(2)
    return hot * counted, counted


def cross_entropy(p, y):
    return -(y * p.log() + (1 - y) * (1 - p).log())


def asymmetric(x, t, y, counted, gamma_pos=0.0, gamma_neg=4.0, margin=0.05):
    p = x.sigmoid()
    p_m = (p - margin).clamp(min=0)
    return -t * (1 - p) ** gamma_pos * p.log() - (1 - t) * p_m**gamma_neg * (1 - p_m).log()


def quality_focal(x, t, y, counted, beta=2.0):
    return (t * y - x.sigmoid()).abs() ** beta * cross_entropy(x.sigmoid(), t * y)


def varifocal(x, t, y, counted, alpha=0.75, gamma=2.0):
    p, q = x.sigmoid(), t * y
    negative = -alpha * p**gamma * (1 - p).log()
    return torch.where(q > 0, q * cross_entropy(p, q), negative)


def equalized_focal(x, t, y, counted, alpha=0.25, gamma=2.0, scale=8.0, ratio=1.0):
    gammas = gamma + scale * (1 - torch.as_tensor(ratio, dtype=torch.float64))
    p_t = torch.where(t == 1, x.sigmoid(), 1 - x.sigmoid())
    alpha_t = torch.where(t == 1, alpha, 1 - alpha)
    return -alpha_t * gammas / gamma * (1 - p_t) ** gammas * p_t.log()


def ghm_c(x, t, y, counted, bins=30):
    """The paper's, of one batch, times the foreground that the normaliser divides by."""
    norm = (x.sigmoid() - t).abs().detach()
    counted = counted.bool().expand_as(norm)
    weight = torch.zeros_like(x)
    edges = torch.arange(bins + 1) / bins
    inside = [counted & (norm >= a) & (norm < b) for a, b in pairwise(edges)]
    filled = [group for group in inside if group.any()]
    for group in filled:
        weight[group] = t.sum() / (len(filled) * group.sum())
    return weight * cross_entropy(x.sigmoid(), t)


REFERENCES = {
    "asymmetric": (asymmetric, {"gamma_pos": 1.0, "gamma_neg": 2.5, "margin": 0.1}),
    "quality_focal": (quality_focal, {"beta": 1.5}),
    "varifocal": (varifocal, {"alpha": 0.5, "gamma": 1.5}),
    "equalized_focal": (equalized_focal, {"alpha": 0.4, "gamma": 1.5, "scale": 3.0}),
    "ghm_c": (ghm_c, {"bins": 7}),
}


def losses_and_gradients(loss, logits, labels, quality=None):
    leaf = logits.detach().clone().requires_grad_()
    values = loss(leaf, labels, quality)
    scale = torch.linspace(0.5, 2, values.numel(), dtype=torch.float64).view_as(values)
    return values.detach(), torch.autograd.grad((values * scale).sum(), leaf)[0]


def expected(formula, logits, labels, quality, **values):
    hot, counted = targets(labels)

    def loss(x, labels, quality):
        return (formula(x, hot, quality.unsqueeze(2), counted, **values) * counted).sum(2)

    return losses_and_gradients(loss, logits, labels, quality)


def test_each_has_a_reference():
    assert sorted(MODULES) == sorted(REFERENCES)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("defaults", [True, False])
def test_value_and_closed_form_equal_the_papers_formula_and_autograd(name, defaults):
    formula, others = REFERENCES[name]
    values = {} if defaults else others
    case = make_case()
    found = losses_and_gradients(LOSSES[name].build(K, **values), *case)
    wanted = expected(formula, *case, **values)
    for one, other in zip(found, wanted, strict=True):
        assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert not found[0][case[1] < 0].any() and not found[1][case[1] < 0].any()


@pytest.mark.parametrize("name", MODULES)
def test_gradient_equals_finite_differences(name):
    """In evaluation: the weights of GHM-C are constants, whatever the logits."""
    logits, labels, quality = make_case(num_images=1, num_anchors=12)
    loss = LOSSES[name].build(K)
    loss(logits.detach(), labels, quality)
    loss.eval()
    if name == "ghm_c":  # so that no logit changes its bin
        loss = LOSSES[name].build(K, bins=1).eval()
    assert torch.autograd.gradcheck(lambda x: loss(x, labels, quality), logits)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_finite_and_never_negative_up_to_1e4_in_any_precision(name, dtype):
    logits = torch.tensor(EXTREME, dtype=torch.float64).to(dtype).view(1, -1, 1).expand(2, -1, K)
    labels = torch.stack([torch.full((len(EXTREME),), label) for label in (1, K)])
    quality = torch.linspace(0, 1, len(EXTREME)).expand(2, -1)
    loss = LOSSES[name].build(K)
    values, gradient = losses_and_gradients(loss, logits, labels, quality)
    assert values.dtype == torch.promote_types(dtype, torch.float32) and gradient.dtype == dtype
    assert values.isfinite().all() and (values >= 0).all()
    assert gradient.isfinite().all()
    loss = LOSSES[name].build(K)
    wide = losses_and_gradients(loss, logits.double(), labels, quality)
    assert_close(values.double(), wide[0], rtol=2e-6, atol=1e-5)
    rounding = max(2e-6, 2 * torch.finfo(dtype).eps)
    assert_close(gradient.double(), wide[1], rtol=rounding, atol=rounding)


@pytest.mark.parametrize("name", MODULES)
def test_ignored_anchors_count_nothing_whatever_their_logits(name):
    logits, labels, quality = make_case()
    plain = losses_and_gradients(LOSSES[name].build(K), logits, labels, quality)
    spoilt = torch.where((labels < 0).unsqueeze(2), torch.nan, logits)
    quality = torch.where((labels < 0) | (labels == K), torch.nan, quality)
    found = losses_and_gradients(LOSSES[name].build(K), spoilt, labels, quality)
    assert_close(found, plain, rtol=0, atol=0)
    labels[:] = -1
    found = losses_and_gradients(LOSSES[name].build(K), spoilt, labels, quality)
    assert not found[0].any() and not found[1].any()


@pytest.mark.parametrize("name", MODULES)
def test_what_is_not_finite_is_not_hidden(name):
    logits, labels, quality = make_case(num_images=1)
    loss = LOSSES[name].build(K)
    if loss.needs_quality:
        positive = (labels == 1).nonzero()[0]
        spoilt = quality.clone()
        spoilt[tuple(positive)] = torch.nan
        assert loss(logits, labels, spoilt).isnan().sum() == 1
    spoilt = logits.detach().masked_fill(torch.arange(40).view(1, -1, 1) == 5, torch.nan)
    labels[:] = 0
    assert loss(spoilt, labels, quality).isnan().sum() == 1


def focal(x, t, y, counted, gamma=2.0):
    p_t = torch.where(t == 1, x.sigmoid(), 1 - x.sigmoid())
    return -((1 - p_t) ** gamma) * p_t.log()


def balanced_focal(x, t, y, counted):
    return torch.where(t == 1, 0.25, 0.75) * focal(x, t, y, counted)


def cross_entropy_over_count(x, t, y, counted):
    return cross_entropy(x.sigmoid(), t) * t.sum() / (K * counted.sum())


def plain_positives(x, t, y, counted):
    return torch.where(t == 1, -x.sigmoid().log(), 0.75 * focal(x, t, y, counted))


LIMITS = [
    ("asymmetric", {"gamma_pos": 2.0, "gamma_neg": 2.0, "margin": 0.0}, focal),
    ("quality_focal", {"beta": 2.0}, focal),
    ("varifocal", {}, plain_positives),
    ("equalized_focal", {}, balanced_focal),
    ("ghm_c", {"bins": 1, "momentum": 0.0}, cross_entropy_over_count),
]


@pytest.mark.parametrize(("name", "values", "limit"), LIMITS, ids=lambda v: str(v)[:20])
def test_limits_with_hard_targets_are_known_losses(name, values, limit):
    logits, labels, quality = make_case(seed=1)
    quality = torch.ones_like(quality)
    found = losses_and_gradients(LOSSES[name].build(K, **values), logits, labels, quality)
    wanted = expected(limit, logits, labels, quality)
    for one, other in zip(found, wanted, strict=True):
        assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_poly_1_without_epsilon_is_the_focal_loss_and_its_formula_with():
    x_t = torch.linspace(-20, 20, 401, dtype=torch.float64)
    plain = LOSSES["focal"].bind(gamma=1.5).value_and_grad(x_t)
    none = LOSSES["poly1_focal"].bind(gamma=1.5, epsilon=0.0).value_and_grad(x_t)
    assert_close(none, plain, rtol=0, atol=0)
    value, _ = LOSSES["poly1_focal"].bind(gamma=1.5, epsilon=-0.5).value_and_grad(x_t)
    assert_close(value, plain[0] - 0.5 * (1 - x_t.sigmoid()) ** 2.5)


def test_equalized_focal_uses_the_gradient_ratio_of_the_steps_before():
    logits, labels, _ = make_case(seed=2)
    logits = logits.detach() - 2  # class 2 has no positive
    labels[labels == 2] = 1
    loss = LOSSES["equalized_focal"].build(K)
    hot, counted = targets(labels)
    sums = torch.zeros(2, K, dtype=torch.float64)
    for _ in range(2):
        ratio = torch.where(sums[1] > 0, sums[0] / sums[1], 1).clamp(max=1)
        wanted, gradient = losses_and_gradients(
            lambda x, *_, r=ratio: (equalized_focal(x, hot, 0, 0, ratio=r) * counted).sum(2),
            *(logits, labels),
        )
        scale = torch.linspace(0.5, 2, labels.numel(), dtype=torch.float64).view(3, 40, 1)
        steepness = gradient.abs() / scale
        sums += torch.stack([(steepness * part).sum((0, 1)) for part in (hot, 1 - hot)])
        assert_close(loss(logits, labels), wanted, rtol=1e-9, atol=1e-12)
        assert_close(loss.class_gradients.view(2, K), sums)
    assert ratio[2] == 0 and ratio[1] > 0 and loss.gammas()[2] == 10


def test_density_is_the_moving_average_of_the_bins_that_are_not_empty():
    loss = LOSSES["ghm_c"].build(1, bins=2, momentum=0.75)
    labels = torch.tensor([[0, 1, 1, 1]])
    loss(torch.full((1, 4, 1), -3.0), labels)  # one steep positive, three flat negatives
    assert_close(loss.density, torch.tensor([0.75, 0.25, 0.25], dtype=torch.float64))
    values = loss(torch.tensor([[[3.0], [-3.0], [-3.0], [-3.0]]]), labels)  # no steep entry
    density = 0.75 * 0.75 + 0.25 * 4
    foreground = 0.75 * 0.25 + 0.25
    assert_close(loss.density, torch.tensor([density, 0.25, foreground], dtype=torch.float64))
    ce = torch.tensor(3.0).sigmoid().log().neg()
    assert_close(values[0], (ce * foreground / density).expand(4))


@pytest.mark.parametrize("name", ["ghm_c", "equalized_focal"])
def test_state_rests_in_evaluation_and_takes_a_step_of_micro_batches_once(name):
    logits, labels, _ = make_case(seed=3, num_images=4)
    whole, parts = LOSSES[name].build(K), LOSSES[name].build(K)
    for step in range(2):
        whole(logits - step, labels)
        parts.begin_batch(2)
        before = parts.state_dict()[parts.state].clone()
        for images in (slice(2), slice(2, 4)):
            parts((logits - step)[images], labels[images])
            assert torch.equal(parts.state_dict()[parts.state], before)
        parts.end_batch()
        assert_close(parts.state_dict(), whole.state_dict(), rtol=1e-12, atol=0)
    whole.eval()(logits, labels)
    assert_close(parts.state_dict(), whole.state_dict(), rtol=1e-12, atol=0)
    resumed = LOSSES[name].build(K)
    resumed.load_state_dict(parts.state_dict())
    parts(logits, labels), resumed(logits, labels)
    assert torch.equal(parts.state_dict()[parts.state], resumed.state_dict()[parts.state])


def test_micro_batches_that_are_alike_weigh_as_the_batch_does():
    logits, labels, _ = make_case(seed=4, num_images=1)
    twice = [tensor.repeat(2, *[1] * (tensor.dim() - 1)) for tensor in (logits, labels)]
    whole, parts = LOSSES["ghm_c"].build(K), LOSSES["ghm_c"].build(K)
    wanted = whole(*twice)
    parts.begin_batch(2)
    for image in range(2):
        assert_close(parts(logits, labels)[0], wanted[image], rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["quality_focal", "varifocal"])
def test_a_soft_target_without_boxes_is_refused(name):
    logits, labels, _ = make_case()
    with pytest.raises(InputError, match=r"needs the quality of each anchor \(N, R\): the IoU"):
        LOSSES[name].build(K)(logits, labels)


def test_a_module_is_not_bound_to_x_t():
    with pytest.raises(InputError, match="'ghm_c' depends on more than x_t"):
        LOSSES["ghm_c"].bind()
    with pytest.raises(InputError, match=r"ghm_c: momentum must be a number in \[0, 1\), got 1"):
        LOSSES["ghm_c"].build(K, momentum=1)
