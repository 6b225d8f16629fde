"""OHEM against a plain full NMS, on anchors as the detector has them."""

import pytest
import torch
from torchvision.ops import nms

from detectors import DENSE_CLASSES as K
from detectors import dense_case
from retinanet_ext.errors import InputError
from retinanet_ext.sampling import OHEM, SelectAll


def full_nms(losses, labels, anchors, thresh):
    """Survivors of one image by torchvision over all anchors, hardest first."""
    valid = (labels >= 0).nonzero().squeeze(1)
    return valid[nms(anchors[valid], losses[valid], thresh)]


@pytest.mark.parametrize("nms_thresh", [0.3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("batch_size", [1, 64, 512, 100_000])
def test_ohem_keeps_the_hardest_survivors_of_a_full_nms(batch_size, nms_thresh):
    losses, labels, anchors = dense_case()
    mask = OHEM(batch_size=batch_size, nms_thresh=nms_thresh)(losses, labels, anchors, K)
    for image in range(2):
        kept = full_nms(losses[image], labels[image], anchors, nms_thresh)[:batch_size]
        assert set(mask[image].nonzero().squeeze(1).tolist()) == set(kept.tolist())


@pytest.mark.parametrize("batch_size", [4, 64, 512])
@pytest.mark.parametrize("easy_positives", [False, True])
def test_ohem_1_to_3_takes_positives_and_negatives_of_a_full_nms(batch_size, easy_positives):
    losses, labels, anchors = dense_case()
    if easy_positives:  # at the end of the ranking, where a search that stops early misses them
        losses[labels == 1] *= 1e-3
    mask = OHEM(batch_size=batch_size, neg_pos_ratio=3.0)(losses, labels, anchors, K)
    for image in range(2):
        kept = full_nms(losses[image], labels[image], anchors, 0.5)
        positive = labels[image][kept] != K
        positives = kept[positive][: batch_size // 4]
        negatives = kept[~positive][: 3 * len(positives)]
        expected = set(torch.cat([positives, negatives]).tolist())
        assert set(mask[image].nonzero().squeeze(1).tolist()) == expected


def test_ohem_1_to_3_stops_early():
    """Positives that hard neighbours suppress are decided long before the end of the ranking."""
    losses, labels, anchors = dense_case(num_images=1, side=320)
    losses[labels == 1] += 1
    ohem = OHEM(neg_pos_ratio=3.0)
    survivors = ohem._survivors(losses[0], labels[0] >= 0, labels[0] != K, anchors)
    full = full_nms(losses[0], labels[0], anchors, 0.5)
    assert len(survivors) < len(full) / 2
    assert torch.equal(survivors, full[: len(survivors)])


def test_ohem_1_to_3_of_an_image_without_objects_keeps_three_negatives():
    losses, labels, anchors = dense_case()
    labels[0] = K
    mask = OHEM(neg_pos_ratio=3.0)(losses, labels, anchors, K)
    assert mask[0].sum() == 3 and mask[0, losses[0].argmax()]


def test_ohem_of_a_process_is_one_mini_batch_for_all_images():
    losses, labels, anchors = dense_case(num_images=3)
    losses[1] *= 0.01  # an easy image gets no share of its own
    mask = OHEM(batch_size=30, scope="process")(losses, labels, anchors, K)
    assert mask.sum() == 30 and mask[1].sum() < 5
    kept = [full_nms(losses[i], labels[i], anchors, 0.5) for i in range(3)]
    hardest = torch.cat([losses[i, kept[i]] for i in range(3)]).topk(30).values
    assert torch.equal(losses[mask].sort().values, hardest.sort().values)


def test_ohem_suppresses_by_the_boxes_it_is_given():
    """Predictions that all coincide leave one anchor, however far apart the anchors are."""
    losses, labels, anchors = dense_case(num_images=1)
    predictions = anchors[:1].expand(1, len(anchors), 4)
    mask = OHEM(nms_boxes="predictions")(losses, labels, predictions, K)
    hardest = losses[0].where(labels[0] >= 0, 0).argmax()
    assert mask.nonzero().tolist() == [[0, hardest]]


@pytest.mark.parametrize("selection", [SelectAll(), OHEM(), OHEM(neg_pos_ratio=3.0)])
def test_ignored_anchors_never_count_and_inputs_stay(selection):
    losses, labels, anchors = dense_case()
    losses[labels == -1] = 1e6
    before = losses.clone(), labels.clone(), anchors.clone()
    mask = selection(losses, labels, anchors, K)
    assert mask.any() and not mask[labels == -1].any()
    assert all(torch.equal(*pair) for pair in zip(before, (losses, labels, anchors), strict=True))
    labels[:] = -1
    assert not selection(losses, labels, anchors, K).any()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"batch_size": 0}, ["batch_size", "[1, inf)", "0"]),
        ({"nms_thresh": 0.0}, ["nms_thresh", "(0, 1]"]),
        ({"nms_thresh": 1.5}, ["nms_thresh", "(0, 1]", "1.5"]),
        ({"neg_pos_ratio": -1.0}, ["neg_pos_ratio", "[0, inf)"]),
        ({"nms_boxes": "boxes"}, ["nms_boxes", "anchors", "predictions", "boxes"]),
        ({"scope": "batch"}, ["scope", "image", "process", "batch"]),
    ],
)
def test_ohem_refuses_values_out_of_range(arguments, words):
    with pytest.raises(InputError) as error:
        OHEM(**arguments)
    for word in words:
        assert word in str(error.value)
