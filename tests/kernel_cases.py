"""The Triton kernels against float64 and against plain torch; run by ``test_kernels.py``.

On a CUDA device as they are, elsewhere in Triton's interpreter, which must be asked for before
Triton is imported: hence a process of its own.
"""

import os

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

import pytest  # noqa: E402
from detectron2.structures import Boxes, Instances  # noqa: E402
from torch.testing import assert_close  # noqa: E402

from retinanet_ext import kernels  # noqa: E402
from retinanet_ext.losses import LOSSES, dense  # noqa: E402
from retinanet_ext.modeling import matching  # noqa: E402

FOCAL = [("focal", {"gamma": gamma}) for gamma in (0.0, 0.1, 0.5, 1.0, 2.0, 5.0)]
STAR = [("focal_star", {"gamma": gamma, "beta": beta}) for gamma, beta in ((2.0, 1.0), (0.1, 0.0))]
OTHER = [("cross_entropy", {}), ("hinge", {}), ("hinge", {"margin": 0.9})]
K, A, N = 5, 3, 2


def make_level(size, dtype, channels_last, spread=8.0):
    """Logits (N, A, K, H, W) and the labels of the middle one of three levels."""
    rng = torch.Generator().manual_seed(0)
    logits = (spread * torch.randn(N, A * K, *size, generator=rng)).to(DEVICE, dtype)
    if channels_last:
        logits = logits.contiguous(memory_format=torch.channels_last)
    count = A * size[0] * size[1]
    labels = torch.randint(-1, K + 1, (N, count + 11), generator=rng).to(DEVICE)
    labels = labels[:, 7 : 7 + count].view(N, *size, A).permute(0, 3, 1, 2)
    return logits.unflatten(1, (A, K)), labels


def check(loss, logits, labels, alpha):
    weights = torch.tensor([0.7, 1.3], device=DEVICE)
    total, gradient = kernels.dense_loss_of_level(
        loss, logits, labels, weights, alpha, torch.float32
    )
    wanted = dense._sums_and_grad_in_blocks(
        loss, logits.double(), labels, weights.double(), alpha.double(), torch.float64
    )
    assert_close(total, wanted[0], rtol=1e-6, atol=0)
    assert_close(gradient.double(), wanted[1], rtol=1e-5, atol=1e-30)
    assert gradient.stride() == logits.stride()


@pytest.mark.parametrize(("name", "values"), [*FOCAL, *STAR, *OTHER])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_loss_and_gradient_equal_float64(name, values, dtype, channels_last):
    logits, labels = make_level((7, 9), dtype, channels_last)
    per_class = torch.linspace(0.1, 0.9, K, dtype=torch.float64)
    alpha = torch.stack([per_class, 1 - per_class]) if channels_last else torch.tensor([0.25, 0.75])
    check(LOSSES[name].bind(**values), logits, labels, alpha.to(DEVICE))


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (5, 1), (17, 19)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_odd_shapes(size, channels_last):
    logits, labels = make_level(size, torch.float32, channels_last)
    check(LOSSES["focal"].bind(), logits, labels, torch.tensor([0.25, 0.75], device=DEVICE))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_logits_of_any_size_and_ignored_ones(gamma):
    loss = LOSSES["focal"].bind(gamma=gamma)
    alpha = torch.tensor([0.25, 0.75], device=DEVICE)
    logits, labels = make_level((7, 9), torch.float32, False, spread=3000.0)
    check(loss, logits, labels, alpha)
    ignored = torch.full_like(labels, -1)
    for value in (torch.nan, torch.inf):
        bad = torch.full_like(logits, value)
        total, gradient = kernels.dense_loss_of_level(
            loss, bad, ignored, torch.ones(N, device=DEVICE), alpha, torch.float32
        )
        assert not total.any() and not gradient.any()
        background = torch.full_like(labels, K)
        total, _ = kernels.dense_loss_of_level(
            loss, bad, background, torch.ones(N, device=DEVICE), alpha, torch.float32
        )
        assert not total.isfinite().any()


def labels_by_kernel(matcher, anchors, images):
    boxes, classes = matching.pad_targets(images, 10)
    return kernels.label_anchors(
        *(tensor.to(DEVICE) for tensor in (anchors, boxes, classes)),
        num_classes=K,
        thresholds=matcher.thresholds,
        threshold_labels=matcher.labels,
        low_quality={"none": 0, "ignored_band": 1, "all": 2}[matcher.low_quality_matches],
    )


def random_boxes(count, rng):
    centre, side = torch.rand(count, 2, generator=rng) * 100, torch.rand(count, 2, generator=rng)
    return torch.cat([centre - 20 * side - 2, centre + 20 * side + 2], 1)


@pytest.mark.parametrize("policy", matching.LOW_QUALITY_MATCHES)
@pytest.mark.parametrize(
    "rule", [([0.4, 0.5], [0, -1, 1]), ([0.3, 0.4, 0.7], [-1, 0, -1, 1]), ([0.5], [0, 1])]
)
def test_labels_equal_those_of_plain_torch(policy, rule):
    """Ties, boxes that no anchor reaches, an image without boxes; more anchors than a block."""
    rng = torch.Generator().manual_seed(1)
    anchors = random_boxes(700, rng)
    anchors[100:110] = anchors[:10]
    images = []
    for count in (3, 0, 9):
        boxes = random_boxes(count, rng)
        if count == 9:
            boxes[2], boxes[3] = anchors[5], boxes[4]
            boxes[5] = torch.tensor([500.0, 500.0, 510.0, 510.0])
        classes = torch.randint(0, K, (count,), generator=rng)
        images.append(Instances((100, 100), gt_boxes=Boxes(boxes), gt_classes=classes))
    matcher = matching.AnchorMatcher(*rule, policy)
    wanted = matching.label_padded(matcher, anchors, *matching.pad_targets(images, 10), K)
    found = labels_by_kernel(matcher, anchors, images)
    assert torch.equal(found[0].cpu(), wanted[0])
    assert torch.equal(found[1].cpu(), wanted[1])


def test_images_without_boxes_alone():
    anchors = random_boxes(10, torch.Generator().manual_seed(2))
    empty = Instances((100, 100), gt_boxes=Boxes(torch.zeros(0, 4)))
    empty.gt_classes = torch.zeros(0, dtype=torch.int64)
    matcher = matching.AnchorMatcher([0.4, 0.5], [0, -1, 1])
    labels, matched = labels_by_kernel(matcher, anchors, [empty] * 2)
    assert (labels == K).all() and not matched.any()
