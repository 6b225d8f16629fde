"""The validation loss is Detectron2's training loss on the test set, and changes nothing."""

import copy
import random

import numpy as np
import pytest
import torch
from detectron2.utils.events import EventStorage

from detectors import make_batch, make_model
from retinanet_ext.evaluation import ValidationLoss

BATCHES = [make_batch([3, 0], seed=1), make_batch([5], seed=2), [{"image": torch.zeros(3, 64, 64)}]]
NORMS = ("MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", 0)
NORMALIZER = "MODEL.RETINANET.LOSS_NORMALIZER"


def with_statistics(model):
    """Give the norms statistics that differ from those of any one batch."""
    torch.manual_seed(1)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.copy_(torch.rand_like(buffer) + 0.5)
    return model


def evaluate(model):
    loss = ValidationLoss(model)
    loss.reset()
    model.eval()
    with torch.no_grad():
        for batch in BATCHES:
            loss.process(batch, None)
    return loss.evaluate()["validation"]


def detectron2s_losses(model):
    """Return Detectron2's summed losses and number of foreground anchors of each image."""
    detector = make_model("MODEL.META_ARCHITECTURE", "RetinaNet", *NORMS)
    detector.load_state_dict(model.state_dict(), strict=False)
    detector.eval()
    for batch in BATCHES[:2]:
        for image in batch:
            images = detector.preprocess_image([image])
            features = detector.backbone(images.tensor)
            features = [features[name] for name in detector.head_in_features]
            with torch.no_grad(), EventStorage() as storage:
                losses = detector.forward_training(
                    images, features, detector.head(features), [image["instances"]]
                )
            sums = {name: loss * detector.loss_normalizer for name, loss in losses.items()}
            yield sums, storage.latest()["num_pos_anchors"][0]


@pytest.mark.parametrize("normalizer", ["foreground_ema", "foreground_batch", "foreground"])
def test_it_is_detectron2s_loss_of_the_whole_set(normalizer):
    model = with_statistics(make_model(NORMALIZER, normalizer, *NORMS))
    images = list(detectron2s_losses(model))
    found = evaluate(model)
    for name in ("loss_cls", "loss_box_reg"):
        if normalizer == "foreground":
            expected = sum(sums[name] / max(1, count) for sums, count in images) / len(images)
        else:
            expected = sum(sums[name] for sums, _ in images) / sum(count for _, count in images)
        assert found[name] == pytest.approx(expected.item(), rel=1e-5)
    assert found["total_loss"] == pytest.approx(found["loss_cls"] + found["loss_box_reg"])


def test_with_ohem_it_is_that_of_the_selected_anchors():
    """All anchors are in the mini-batch, so that the number of anchors is the divisor."""
    ohem = "MODEL.RETINANET.SELECTION."
    opts = (f"{ohem}NAME", "ohem", f"{ohem}OHEM.BATCH_SIZE", 10**6, f"{ohem}OHEM.NMS_THRESH", 1.0)
    everything = ("MODEL.RETINANET.IOU_THRESHOLDS", "[0.5]", "MODEL.RETINANET.IOU_LABELS", "[0, 1]")
    model = make_model(NORMALIZER, "selected", *opts, *everything)
    plain = make_model(NORMALIZER, "selected", *everything)
    assert evaluate(model)["loss_cls"] == pytest.approx(evaluate(plain)["loss_cls"], rel=1e-5)


def test_it_changes_nothing():
    model = with_statistics(make_model(*NORMS)).train()
    model.head.cls_subnet[0].eval()  # a part that is not as the others
    modes = [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    loss = ValidationLoss(model)
    loss.reset()
    with EventStorage() as storage, torch.no_grad():
        loss.process(BATCHES[0], None)
        loss.evaluate()
    assert not storage.latest()
    assert [module.training for module in model.modules()] == modes
    after = model.state_dict()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert all("running" in name or "tracked" in name for name in changed)  # in training mode
    evaluate(model)
    again = model.state_dict()
    assert all(torch.equal(after[name], again[name]) for name in after)
    assert random.getstate() == states[0] and np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    model.train()
    with EventStorage():
        model(BATCHES[0])  # the normaliser divides again
    assert model.criterion.loss_normalizer != before["criterion.loss_normalizer"]


def test_a_set_without_boxes_has_none():
    loss = ValidationLoss(make_model().eval())
    loss.reset()
    with torch.no_grad():
        loss.process(make_batch([0]), None)
    assert loss.evaluate() == {}
