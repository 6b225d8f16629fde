"""Labels and matches are those of Detectron2's whole IoU matrix, ties and all, at flat memory."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import build_anchor_generator
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, Instances, pairwise_ioa, pairwise_iou
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.common import peak_memory
from detectors import make_cfg
from retinanet_ext.modeling import matching
from retinanet_ext.modeling.matching import (
    LOW_QUALITY_MATCHES,
    AnchorMatcher,
    ignore_anchors,
    label_anchors,
    label_padded,
    num_padded,
    pad_regions,
    pad_targets,
)

K = 5
PAPER = ([0.4, 0.5], [0, -1, 1])
RULES = [PAPER, ([0.5], [0, 1]), ([0.3, 0.4, 0.7], [-1, 0, -1, 1]), ([0.5], [1, 0])]


class WholeMatrix(Matcher):
    """Detectron2's matcher on all of M x R, with the policies for low-quality matches."""

    def __init__(self, thresholds, labels, policy):
        super().__init__(list(thresholds), labels, policy != "none")
        self.policy = policy

    def set_low_quality_matches_(self, match_labels, match_quality_matrix):
        background = match_labels == 0
        reached = match_quality_matrix.amax(dim=1) > 0
        super().set_low_quality_matches_(match_labels, match_quality_matrix[reached])
        if self.policy == "ignored_band":
            match_labels[background] = 0


def whole_matrix_labels(matcher, anchors, gt_instances):
    labels, matches, first = [], [], 0
    for instances in gt_instances:
        match, match_labels = matcher(pairwise_iou(instances.gt_boxes, anchors))
        label = torch.full_like(match, K)
        if len(instances):
            label = instances.gt_classes[match]
            label[match_labels == 0] = K
            label[match_labels == -1] = -1
        labels.append(label)
        matches.append(match + first if len(instances) else match)
        first += len(instances)
    return torch.stack(labels), torch.stack(matches)


def make_gt(boxes):
    classes = torch.arange(len(boxes)) % K
    return Instances((256, 320), gt_boxes=Boxes(boxes), gt_classes=classes)


def random_boxes(count, rng, low=4.0, high=200.0):
    centre = torch.rand(count, 2, generator=rng) * torch.tensor([320.0, 256.0])
    side = low * (high / low) ** torch.rand(count, 2, generator=rng)
    return torch.cat([centre - side / 2, centre + side / 2], 1).clamp(min=0, max=320)


@pytest.fixture(scope="module")
def anchors():
    """The paper's anchors of a 256 x 320 image, 15,345."""
    strides = [8, 16, 32, 64, 128]
    generator = build_anchor_generator(make_cfg(), [ShapeSpec(stride=s) for s in strides])
    return Boxes.cat(generator([torch.empty(1, 1, -(-256 // s), -(-320 // s)) for s in strides]))


def assert_equal(rule, policy, anchors, gt_instances):
    labels, matches = label_anchors(AnchorMatcher(*rule, policy), anchors, gt_instances, K)
    expected = whole_matrix_labels(WholeMatrix(*rule, policy), anchors, gt_instances)
    assert labels.dtype == matches.dtype == torch.int64
    assert torch.equal(labels, expected[0])
    assert torch.equal(matches, expected[1])  # of all anchors, background too


@pytest.fixture(params=[True, False], ids=["as on a CPU", "as on a GPU"])
def _on_host(request, monkeypatch):
    monkeypatch.setattr(matching, "shapes_may_follow_values", lambda _: request.param)


@pytest.mark.parametrize("policy", LOW_QUALITY_MATCHES)
@pytest.mark.parametrize("pairs", [2**12, 2**18])
@pytest.mark.usefixtures("_on_host")
def test_real_anchors(policy, pairs, anchors, monkeypatch):
    """Images of every number of boxes; many blocks and one."""
    monkeypatch.setattr(matching, "PAIRS_CPU", pairs)
    rng = torch.Generator().manual_seed(0)
    gt_instances = [make_gt(random_boxes(count, rng)) for count in (7, 0, 1, 60, 300)]
    assert_equal(PAPER, policy, anchors, gt_instances)


@pytest.mark.parametrize("policy", LOW_QUALITY_MATCHES)
@pytest.mark.usefixtures("_on_host")
def test_ties_of_real_anchors(policy, anchors):
    """Boxes that are anchors, halves of them, the same twice, or between two anchors alike."""
    picked = anchors.tensor[torch.arange(40, len(anchors), 997)]
    half = picked.clone()
    half[:, 2] = (half[:, 0] + half[:, 2]) / 2
    between = picked + torch.tensor([4.0, 0, 4.0, 0])
    gt_instances = [make_gt(torch.cat(group)) for group in
                    [(half, picked, half, picked), (between,), (between, picked)]]  # fmt: skip
    assert_equal(PAPER, policy, anchors, gt_instances)


corner = st.integers(0, 6)
side = st.integers(0, 4)  # 0: a box without area
grid_boxes = st.lists(st.tuples(corner, corner, side, side), max_size=9)


@settings(max_examples=150)
@given(
    images=st.lists(grid_boxes, min_size=1, max_size=3),
    grid_anchors=st.lists(st.tuples(corner, corner, side, side), min_size=1, max_size=40),
    rule=st.sampled_from(RULES),
    policy=st.sampled_from(LOW_QUALITY_MATCHES),
    block=st.integers(1, 12),
    on_host=st.booleans(),
)
def test_ties_on_a_grid(images, grid_anchors, rule, policy, block, on_host):
    """Whole numbers, so that equal IoUs are the rule; anchors in any order and block."""

    def to_boxes(rows):
        xywh = torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)
        return torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching, "MIN_BLOCK", block)
        patch.setattr(matching, "PAIRS_CPU", 1)
        patch.setattr(matching, "PAIRS_GPU", 1)
        patch.setattr(matching, "shapes_may_follow_values", lambda _: on_host)
        gt_instances = [make_gt(to_boxes(rows)) for rows in images]
        assert_equal(rule, policy, Boxes(to_boxes(grid_anchors)), gt_instances)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("policy", LOW_QUALITY_MATCHES)
@pytest.mark.usefixtures("_on_host")
def test_padding_matches_nothing(rule, policy, anchors):
    """Labels and indices of the boxes alone, in every bit; ties, and an image without boxes."""
    rng = torch.Generator().manual_seed(4)
    picked = anchors.tensor[40::2997]
    gt_instances = [make_gt(boxes) for boxes in (random_boxes(20, rng), picked, picked[:0])]
    matcher = AnchorMatcher(*rule, policy)
    boxes, classes = pad_targets(gt_instances, 32)
    assert boxes.shape == (3, 32, 4) and classes.shape == (3, 32)
    labels, matches = label_padded(matcher, anchors.tensor, boxes, classes, K)
    for index, instances in enumerate(gt_instances):
        alone = whole_matrix_labels(WholeMatrix(*rule, policy), anchors, [instances])
        assert torch.equal(labels[index], alone[0][0]) and torch.equal(matches[index], alone[1][0])


def test_number_of_padded_boxes():
    assert [num_padded(count, 8) for count in (0, 8, 9, 16, 17, 1000)] == [8, 8, 16, 16, 32, 1024]


def test_iou_is_detectron2s_in_every_bit(anchors):
    boxes = random_boxes(50, torch.Generator().manual_seed(1))
    for dtype in (torch.float32, torch.float64):  # with float32 anchors in either case
        gt_boxes = Boxes(boxes)
        gt_boxes.tensor = boxes.to(dtype)
        found = matching._pairwise_iou(gt_boxes.tensor, anchors.tensor.T)
        assert torch.equal(found, pairwise_iou(gt_boxes, anchors))


def test_detectron2s_matcher_is_taken(anchors):
    gt_instances = [make_gt(random_boxes(20, torch.Generator().manual_seed(2)))]
    for low_quality, policy in ((True, "all"), (False, "none")):
        stock = Matcher([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=low_quality)
        labels, matches = label_anchors(stock, anchors, gt_instances, K)
        expected = whole_matrix_labels(WholeMatrix(*PAPER, policy), anchors, gt_instances)
        assert torch.equal(labels, expected[0]) and torch.equal(matches, expected[1])


def test_memory_does_not_grow_with_boxes(anchors):
    rng = torch.Generator().manual_seed(3)
    matcher = AnchorMatcher(*PAPER)
    peaks = {}
    for count in (10, 100, 1000):
        # All over the image, so that every box is near every block.
        boxes = random_boxes(count, rng, low=150, high=300)
        peaks[count] = peak_memory(lambda boxes=boxes: matcher(boxes, anchors.tensor))
    assert peaks[1000] < 1.5 * max(peaks[10], peaks[100])
    assert peaks[1000] < 4 * 1000 * len(anchors) / 10  # a tenth of the whole matrix


@pytest.mark.parametrize("overlap", [0.1, 0.5, 1.0])
def test_background_in_a_region_is_ignored_by_the_share_of_the_anchor(anchors, overlap):
    rng = torch.Generator().manual_seed(0)
    gt_instances = [make_gt(random_boxes(6, rng)), make_gt(random_boxes(6, rng))]
    labels, _ = label_anchors(AnchorMatcher(*PAPER), anchors, gt_instances, K)
    regions = random_boxes(7, rng, low=60.0)
    sizes = [(256, 320), (200, 280)]
    padded = pad_regions([None, regions], sizes)
    found, counts = ignore_anchors(labels, anchors.tensor, *padded, K, overlap)
    visible = anchors.clone()
    visible.clip(sizes[1])
    inside = (pairwise_ioa(Boxes(regions), visible) >= overlap).any(0)
    assert torch.equal(found[0], labels[0])
    assert torch.equal(found[1], torch.where(inside & (labels[1] == K), -1, labels[1]))
    assert counts.tolist() == [0, (found[1] != labels[1]).sum()]
    assert counts[1] > 100 and (inside & (labels[1] < K)).any()
