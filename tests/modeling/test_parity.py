"""At Detectron2's settings the detector is Detectron2's, number by number."""

from itertools import islice

import detectron2.modeling.meta_arch.retinanet as stock_module
import pytest
import torch
from detectron2.data import build_detection_train_loader
from detectron2.layers import batched_nms
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from torch.testing import assert_close
from torchvision.ops import sigmoid_focal_loss

import retinanet_ext.modeling.inference as our_module
from detectors import assert_same_detections, make_batch, make_model
from retinanet_ext.data import prepare_datasets
from retinanet_ext.engine import load_config
from retinanet_ext.modeling import to_detectron2_state_dict

BATCHES = {
    "mixed": [7, 1, 0],
    "crowded": [500],
    "single": [1],
    "empty": [0, 0],
}


def pair(*opts, dtype=torch.float32, **kwargs):
    """Detectron2's model and ours with the same weights, not the initial ones."""
    stock = make_model("MODEL.META_ARCHITECTURE", "RetinaNet", *opts, **kwargs)
    ours = make_model(*opts, **kwargs)
    with torch.no_grad():  # scores that pass the threshold, deltas that move boxes
        stock.head.cls_score.weight.mul_(20)
        stock.head.cls_score.bias.fill_(-2)
        stock.head.bbox_pred.weight.mul_(10)
    assert ours.load_state_dict(stock.state_dict(), strict=True)
    return (stock.double(), ours.double()) if dtype == torch.float64 else (stock, ours)


def losses_and_gradients(model, batch, dtype):
    batch = [{**inputs, "image": inputs["image"].to(dtype)} for inputs in batch]
    for inputs in batch:
        instances = inputs["instances"]
        instances.gt_boxes.tensor = instances.gt_boxes.tensor.to(dtype)
    with EventStorage():
        losses = model.train()(batch)
    model.zero_grad()
    sum(losses.values()).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {k: v.detach() for k, v in losses.items()}, gradients


def assert_same(ours, stock, tolerance):
    assert ours.keys() == stock.keys()
    for name in stock:
        # Relative to the largest entry: single entries can cancel to nothing.
        scale = max(stock[name].abs().max().item(), 1e-30)
        assert_close(ours[name], stock[name], rtol=0, atol=tolerance * scale, msg=lambda m, n=name:
                     f"{n}: {m}")  # fmt: skip


def stay_in_float64(monkeypatch):
    """Keep Detectron2 from rounding to float32 in its focal and GIoU losses."""
    monkeypatch.setattr(stock_module, "sigmoid_focal_loss_jit", sigmoid_focal_loss)
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)


def nms_in_float32(monkeypatch):
    """Let Detectron2, which always decodes boxes in float32, take float64 scores beside them."""

    def nms(boxes, scores, classes, threshold):
        return batched_nms(boxes, scores.to(boxes.dtype), classes, threshold)

    for module in (stock_module, our_module):
        monkeypatch.setattr(module, "batched_nms", nms)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("box_loss", ["smooth_l1", "giou"])
def test_losses_and_gradients(batch, dtype, tolerance, box_loss, monkeypatch):
    if dtype == torch.float64:
        stay_in_float64(monkeypatch)
    opts = ["MODEL.RETINANET.BBOX_REG_LOSS_TYPE", box_loss, "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA",
            0.1]  # fmt: skip
    stock, ours = pair(*opts, dtype=dtype)
    for step in range(2):  # the second step has the moving average of the first behind it
        data = [make_batch(BATCHES[batch], seed=step) for _ in range(2)]
        stock_losses, stock_gradients = losses_and_gradients(stock, data[0], dtype)
        losses, gradients = losses_and_gradients(ours, data[1], dtype)
        assert_same(losses, stock_losses, tolerance)
        assert_same(gradients, stock_gradients, tolerance)
    assert_close(ours.criterion.loss_normalizer.item(), stock.loss_normalizer, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_detections(dtype, tolerance, monkeypatch):
    stock, ours = pair(dtype=dtype)
    batch = make_batch([0, 0, 0])
    if dtype == torch.float64:
        nms_in_float32(monkeypatch)
        batch = [{**inputs, "image": inputs["image"].double()} for inputs in batch]
    for inputs in batch:
        inputs["height"], inputs["width"] = 321, 433  # boxes are scaled back to these
    with torch.no_grad():
        expected, found = stock.eval()(batch), ours.eval()(batch)
    assert sum(len(e["instances"]) for e in expected) > 50
    for e, f in zip(expected, found, strict=True):
        tolerances = {"rtol": tolerance, "box_rtol": tolerance, "box_atol": 433 * tolerance}
        assert_same_detections(f["instances"], e["instances"], **tolerances)


def test_r50_has_detectron2s_parameters_and_weights_go_both_ways():
    stock, ours = pair(depth=50, num_classes=80)
    assert sum(p.numel() for p in ours.parameters()) == 37_915_572
    exported = to_detectron2_state_dict(ours.state_dict())
    result = stock.load_state_dict(exported, strict=True)
    assert result.missing_keys == [] and result.unexpected_keys == []
    assert set(ours.state_dict()) - set(exported) == {"criterion.loss_normalizer"}
    data = [make_batch([7, 2], num_classes=80, size=(128, 160)) for _ in range(2)]
    stock_losses, _ = losses_and_gradients(stock, data[0], torch.float32)
    losses, _ = losses_and_gradients(ours, data[1], torch.float32)
    assert_same(losses, stock_losses, 1e-5)


def test_same_seed_gives_the_same_initial_weights():
    stock = make_model("MODEL.META_ARCHITECTURE", "RetinaNet")
    ours = make_model()
    for name, value in stock.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


def test_twenty_steps_on_real_images(monkeypatch):
    """In float64, for in float32 a different rounding of step 1 is a different run by step 10."""
    stay_in_float64(monkeypatch)
    cfg = load_config("tests/engine/tiny.yaml", ["MODEL.DEVICE", "cpu", "SEED", "0"])
    prepare_datasets(cfg, eval_only=False)
    losses = {}
    for architecture in ("RetinaNet", "RetinaNetExt"):
        seed_all_rng(0)
        cfg.MODEL.META_ARCHITECTURE = architecture
        model = build_model(cfg).double().train()
        optimizer = build_optimizer(cfg, model)
        losses[architecture] = []
        with EventStorage():
            for batch in islice(build_detection_train_loader(cfg), 20):
                for inputs in batch:
                    boxes = inputs["instances"].gt_boxes
                    boxes.tensor = boxes.tensor.double()
                loss = sum(model(batch).values())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses[architecture].append(loss.item())
    stock, ours = (torch.tensor(values, dtype=torch.float64) for values in losses.values())
    assert stock[-5:].mean() < 0.9 * stock[:5].mean()  # they did learn
    assert_close(ours, stock, rtol=1e-9, atol=0)
