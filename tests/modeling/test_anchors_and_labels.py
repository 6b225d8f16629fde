"""Anchors by the paper's numbers, labels by the three low-quality policies, refused targets."""

import math

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import build_anchor_generator
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, Instances, pairwise_iou

from detectors import make_batch, make_cfg, make_model
from retinanet_ext.errors import InputError
from retinanet_ext.modeling import AnchorMatcher, OctaveAnchorGenerator
from retinanet_ext.modeling.matching import label_anchors

STRIDES = [8, 16, 32, 64, 128]


def generator(*opts):
    return build_anchor_generator(make_cfg(*opts), [ShapeSpec(stride=s) for s in STRIDES])


def test_paper_anchors_cover_32_to_813_pixels_in_nine_a_cell():
    made = generator()
    assert isinstance(made, OctaveAnchorGenerator) and made.num_anchors == [9] * 5
    sides = [Boxes(level).area().sqrt() for level in made.cell_anchors]
    for level, side in enumerate(sides):
        octave = [32 * 2**level * 2 ** (k / 3) for k in range(3) for _ in range(3)]
        assert torch.allclose(side, torch.tensor(octave))
    assert sides[0].min().round() == 32 and math.floor(sides[-1].max()) == 812
    ratios = {round(float((b[3] - b[1]) / (b[2] - b[0])), 4) for b in list(made.cell_anchors)[2]}
    assert ratios == {0.5, 1.0, 2.0}


def test_paper_counts_of_anchors():
    """600 x 1000 padded to a multiple of 128 has 122,760 anchors, 800 x 1333 has 236,313."""
    for (height, width), expected in [((640, 1024), 122_760), ((896, 1408), 236_313)]:
        features = [torch.empty(1, 1, height // s, width // s) for s in STRIDES]
        assert sum(len(level) for level in generator()(features)) == expected


@pytest.mark.parametrize("scales", [1, 2, 3, 4])
def test_one_number_covers_table_1c(scales):
    made = generator("MODEL.ANCHOR_GENERATOR.SCALES_PER_OCTAVE", scales,
                     "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[1.0]])  # fmt: skip
    assert made.num_anchors == [scales] * 5
    finest = next(iter(made.cell_anchors))
    widths = finest[:, 2] - finest[:, 0]
    expected = torch.tensor([32 * 2 ** (k / scales) for k in range(scales)])
    assert torch.allclose(widths, expected)


def labels_of(policy, gt):
    """Four anchors that reach IoU 1, .45, .35 and 0 with boxes of their own."""
    anchors = Boxes(torch.tensor([[0, 0, 10, 10], [100, 0, 110, 10], [200, 0, 210, 10],
                                  [300, 0, 310, 10]]).float())  # fmt: skip
    matcher = AnchorMatcher([0.4, 0.5], [0, -1, 1], policy)
    instances = Instances((400, 400), gt_boxes=Boxes(gt), gt_classes=torch.arange(len(gt)))
    return label_anchors(matcher, anchors, [instances], 9)[0][0].tolist()


GT = torch.tensor([[0, 0, 10, 10], [100, 0, 104.5, 10], [200, 0, 203.5, 10]])


@pytest.mark.parametrize(
    ("policy", "expected"),
    [("all", [0, 1, 2, 9]), ("ignored_band", [0, 1, 9, 9]), ("none", [0, -1, 9, 9])],
)
def test_low_quality_policies(policy, expected):
    assert labels_of(policy, GT) == expected


def test_a_box_that_overlaps_no_anchor_matches_none():
    """Detectron2's matcher makes every anchor that such a box does not overlap foreground."""
    far = torch.tensor([[350.0, 350.0, 360.0, 360.0]])
    anchors = torch.tensor([[0.0, 0, 10, 10], [100, 0, 110, 10]])
    stock = Matcher([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=True)
    assert stock(pairwise_iou(Boxes(far), Boxes(anchors)))[1].tolist() == [1, 1]
    assert labels_of("all", far) == [9, 9, 9, 9]


def test_matches_index_the_boxes_of_all_images():
    model = make_model().train()
    batch = make_batch([3, 0, 2])
    gt_instances = [inputs["instances"] for inputs in batch]
    features = [torch.empty(1, 1, 160 // s + 1, 192 // s + 1) for s in STRIDES]
    anchors = Boxes.cat(model.anchor_generator(features))
    labels, matches = label_anchors(model.anchor_matcher, anchors, gt_instances, 4)
    assert (labels[1] == 4).all()
    boxes = Boxes.cat([g.gt_boxes for g in gt_instances])
    classes = torch.cat([g.gt_classes for g in gt_instances])
    owner = torch.tensor([0, 0, 0, 2, 2])
    for image, anchor in ((labels >= 0) & (labels < 4)).nonzero().tolist():
        match = matches[image, anchor]
        assert owner[match] == image and classes[match] == labels[image, anchor]
        iou = pairwise_iou(boxes, anchors[anchor])[:, 0]
        assert match == iou.where(owner == image, 0).argmax()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda i: i.gt_boxes.tensor[1].copy_(torch.tensor([5.0, 5, 5, 9])),
            ["box 1", "degenerate"],
        ),
        (
            lambda i: i.gt_boxes.tensor[1].copy_(torch.tensor([9.0, 9, 5, 5])),
            ["box 1", "degenerate"],
        ),
        (lambda i: i.gt_boxes.tensor[2, 0].fill_(float("nan")), ["box 2", "not finite"]),
        (lambda i: i.gt_classes[0].fill_(4), ["box 0", "class 4", "NUM_CLASSES", "0 to 3"]),
        (lambda i: i.gt_classes[0].fill_(-1), ["box 0", "class -1"]),
    ],
)
def test_a_bad_target_is_refused_with_its_image(change, words):
    """Each of these makes Detectron2's loss inf, NaN or silently wrong."""
    model, batch = make_model().train(), make_batch([2, 3])
    change(batch[1]["instances"])
    with pytest.raises(InputError) as error:
        model(batch)
    for word in ["image 1.png", *words]:
        assert word in str(error.value)


def test_nothing_is_learnt_from_a_region_to_ignore():
    """Logits inside it have no gradient, unless the region counts as background."""

    def gradients(model, region):
        (inputs,) = make_batch([0])
        inputs["ignore_regions"] = region
        seen = []
        hook = model.head.register_forward_hook(lambda _, __, outputs: seen.append(outputs[0][0]))
        losses = model.train()([inputs])
        hook.remove()
        (gradient,) = torch.autograd.grad(losses["loss_cls"], seen[0])
        return gradient.abs().sum((0, 1))  # (H, W) of P3

    region = torch.tensor([[0.0, 0.0, 96.0, 200.0]])
    model = make_model()
    assert model.ignore_ioa_thresh == 0.5
    inside = gradients(model, region)
    # P3's anchors are up to 71 pixels wide and 8 apart: half of each of the first 11 is inside,
    # none of the last ones.
    assert (inside[:, :11] == 0).all() and (inside[:, 17:] > 0).all()
    model = make_model("MODEL.RETINANET.IGNORE_IOA_THRESH", 0.0)
    assert (gradients(model, region) > 0).all()
