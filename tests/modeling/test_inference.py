"""Candidates and detections are those of Detectron2's DenseDetector."""

import copy
import math

import pytest
import torch
from detectron2.layers import batched_nms
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, ImageList, Instances
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from detectors import assert_same_detections, make_model
from retinanet_ext.modeling.inference import decode_candidates

TRANSFORM = Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0))
SIZES = [(6, 8), (3, 4), (2, 2), (1, 1)]  # levels, high to low resolution


def random_predictions(num_images, num_anchors, num_classes, seed, spread=3.0):
    """Logits without equals, deltas and anchors of four levels, as the head gives them."""
    rng = torch.Generator().manual_seed(seed)
    logits, deltas, anchors = [], [], []
    for height, width in SIZES:
        shape = (num_images, num_anchors * num_classes, height, width)
        order = torch.randperm(math.prod(shape), generator=rng).reshape(shape)
        logits.append(spread * (2 * order / order.numel() - 1))
        deltas.append(torch.randn(num_images, num_anchors * 4, height, width, generator=rng) * 0.3)
        corner = torch.rand(height * width * num_anchors, 2, generator=rng) * 100
        side = torch.rand(height * width * num_anchors, 2, generator=rng) * 30 + 2
        anchors.append(Boxes(torch.cat([corner, corner + side], 1)))
    return logits, deltas, anchors


def detectron2_candidates(model, logits, deltas, anchors, num_classes, score_thresh, topk):
    """Detectron2's path: a sigmoid of everything, then image by image and level by level."""
    logits, deltas = model._transpose_dense_predictions([logits, deltas], [num_classes, 4])
    scores = [level.sigmoid() for level in logits]
    return [
        model._decode_multi_level_predictions(
            anchors, [s[i] for s in scores], [d[i] for d in deltas], score_thresh, topk, (99, 99)
        )
        for i in range(len(logits[0]))
    ]


@pytest.fixture(scope="module")
def model():
    return make_model().eval()


def decode(logits, deltas, anchors, num_classes, score_thresh, topk):
    return decode_candidates(logits, deltas, anchors, num_classes=num_classes,
                             score_thresh=score_thresh, topk=topk,
                             box2box_transform=TRANSFORM)  # fmt: skip


TOLERANCES = {"rtol": 3e-7, "box_rtol": 1e-6, "box_atol": 1e-4}


def to_instances(candidates):
    boxes = Boxes(candidates.boxes)
    return Instances(
        (99, 99), scores=candidates.scores, pred_boxes=boxes, pred_classes=candidates.classes
    )


def assert_same(found, expected):
    """In the same order, which rounding cannot change: a level's logits lie 6e-4 apart."""
    for f, e in zip(found, expected, strict=True):
        assert torch.equal(f.classes, e.pred_classes)
        # Vectorized and scalar code differ in the last bit.
        assert_close(f.scores, e.scores, rtol=3e-7, atol=0)
        assert_close(f.boxes, e.pred_boxes.tensor, rtol=1e-6, atol=1e-4)


@settings(max_examples=60)
@given(
    num_images=st.integers(1, 3),
    num_anchors=st.sampled_from([1, 3, 9]),
    num_classes=st.sampled_from([1, 2, 7]),
    topk=st.sampled_from([1, 5, 20, 10_000]),
    score_thresh=st.sampled_from([0.0, 0.05, 0.5, 0.9, 1.0]),
    channels_last=st.booleans(),
    seed=st.integers(0, 99),
)
def test_candidates(
    model, num_images, num_anchors, num_classes, topk, score_thresh, channels_last, seed
):
    logits, deltas, anchors = random_predictions(num_images, num_anchors, num_classes, seed)
    if channels_last:
        logits = [level.to(memory_format=torch.channels_last) for level in logits]
        deltas = [level.to(memory_format=torch.channels_last) for level in deltas]
    args = (logits, deltas, anchors, num_classes, score_thresh, topk)
    assert_same(decode(*args), detectron2_candidates(model, *args))


def test_nothing_scores_0_or_more_than_1(model):
    """The threshold is exceeded by scores, not by logits: sigmoid rounds to 0 and to 1."""
    logits, deltas, anchors = random_predictions(1, 3, 4, seed=0, spread=200.0)
    for score_thresh in (0.0, 1.0, 0.999):
        args = (logits, deltas, anchors, 4, score_thresh, 10_000)
        (found,), (expected,) = decode(*args), detectron2_candidates(model, *args)
        assert (found.scores > score_thresh).all()
        assert found.boxes.isfinite().all()
        # Equal scores are in another order.
        assert_same_detections(to_instances(found), expected, **TOLERANCES)


def test_nan_is_no_candidate(model):
    logits, deltas, anchors = random_predictions(2, 3, 4, seed=1)
    for level in logits:
        level[0, ::2] = torch.nan
        level[1, 3] = -torch.inf
    args = (logits, deltas, anchors, 4, 0.05, 20)
    kept = [level.clone() for level in logits]
    assert_same(decode(*args), detectron2_candidates(model, *args))
    assert all(torch.equal(a, b) for a, b in zip(logits, kept, strict=True) if not a.isnan().any())
    nothing = [torch.full_like(level, torch.nan) for level in logits]
    assert [len(image.scores) for image in decode(nothing, *args[1:])] == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_scored_in_float32(model, dtype):
    logits, deltas, anchors = random_predictions(2, 3, 4, seed=2)
    halves = [[level.to(dtype) for level in kind] for kind in (logits, deltas)]
    widened = [[level.float() for level in kind] for kind in halves]
    found = decode(*halves, anchors, 4, 0.3, 10_000)
    expected = detectron2_candidates(model, *widened, anchors, 4, 0.3, 10_000)
    for f, e in zip(found, expected, strict=True):
        assert f.scores.dtype == f.boxes.dtype == torch.float32
        # Halves have equals, whose order is open.
        assert_same_detections(to_instances(f), e, **TOLERANCES)


@pytest.mark.parametrize("score_thresh", [0.05, 0.6, 0.999])
def test_detections_of_a_batch(model, score_thresh, monkeypatch):
    """Through the model: some detections, few, and none."""
    monkeypatch.setattr(model, "test_score_thresh", score_thresh)
    features = [torch.zeros(2, 1, -(-96 // s), -(-128 // s)) for s in (8, 16, 32, 64, 128)]
    anchors = model.anchor_generator(features)
    rng = torch.Generator().manual_seed(3)
    logits = [torch.randn(2, 36, *f.shape[2:], generator=rng) - 1 for f in features]
    deltas = [torch.randn(2, 36, *f.shape[2:], generator=rng) * 0.2 for f in features]
    images = ImageList(torch.zeros(2, 3, 96, 128), [(90, 128), (96, 100)])
    found = model.forward_inference(images, features, [logits, deltas])
    expected = detectron2_candidates(model, logits, deltas, anchors, 4, score_thresh, 1000)
    for f, e, size in zip(found, expected, images.image_sizes, strict=True):
        keep = batched_nms(e.pred_boxes.tensor, e.scores, e.pred_classes, model.test_nms_thresh)
        e = e[keep[: model.max_detections_per_image]]
        assert f.image_size == size
        assert_same_detections(f, e, **TOLERANCES)
    assert (len(found[0]) == 0) == (score_thresh == 0.999)


def test_the_comparison_of_detections_knows_ranks_from_differences():
    logits, deltas, anchors = random_predictions(1, 3, 4, seed=4)
    (candidates,) = decode(logits, deltas, anchors, 4, 0.5, 50)
    expected = to_instances(candidates)
    assert_same_detections(expected[torch.randperm(len(expected))], expected, **TOLERANCES)

    others = [expected[1:]]
    for field, value in (("pred_classes", 9), ("scores", 0.75), ("pred_boxes", 0.0)):
        others.append(copy.deepcopy(expected))
        changed = others[-1].get(field)
        getattr(changed, "tensor", changed)[1] = value
    others.append(copy.deepcopy(expected))
    others[-1].pred_boxes.tensor.add_(0.01)
    for other in others:
        with pytest.raises(AssertionError):
            assert_same_detections(other, expected, **TOLERANCES)
