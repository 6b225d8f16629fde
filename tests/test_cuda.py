"""The same on a CUDA device as on the CPU, and mixed precision."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.export import TracingAdapter
from detectron2.utils.events import EventStorage
from torch.testing import assert_close

from detectors import (
    DENSE_CLASSES,
    assert_same_outputs,
    dense_case,
    make_batch,
    make_detecting_model,
    make_model,
)
from retinanet_ext.losses import LOSSES
from retinanet_ext.sampling import OHEM

pytestmark = pytest.mark.cuda
ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", [n for n, loss in LOSSES.items() if not loss.is_module])
def test_losses_and_gradients_equal_the_cpus(name):
    values, gradients = [], []
    for device in ("cpu", "cuda"):
        x = torch.cat([torch.linspace(-1e4, 1e4, 2001), torch.linspace(-30, 30, 2001)]).to(device)
        x.requires_grad_()
        value = LOSSES[name].bind()(x)
        gradients.append(torch.autograd.grad(value.sum(), x)[0].cpu())
        values.append(value.detach().cpu())
    assert_close(*values)
    assert_close(*gradients)


@pytest.mark.parametrize("neg_pos_ratio", [0.0, 3.0])
def test_ohem_selects_the_same_anchors(neg_pos_ratio):
    case = dense_case()
    ohem = OHEM(neg_pos_ratio=neg_pos_ratio)
    on_device = ohem(*(tensor.cuda() for tensor in case), DENSE_CLASSES)
    assert torch.equal(on_device.cpu(), ohem(*case, DENSE_CLASSES))


def test_model_losses_equal_the_cpus():
    losses = []
    for device in ("cpu", "cuda"):
        model = make_model("MODEL.DEVICE", device).train()
        with EventStorage():
            losses.append({k: v.cpu() for k, v in model(make_batch([7, 0])).items()})
    for name in losses[0]:
        assert_close(losses[1][name], losses[0][name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixed_precision_keeps_the_loss_in_float32(dtype):
    model = make_model("MODEL.DEVICE", "cuda").train()
    with EventStorage(), torch.autocast("cuda", dtype=dtype):
        losses = model(make_batch([7, 0]))
    sum(losses.values()).backward()
    assert all(value.dtype == torch.float32 for value in losses.values())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("box_loss", ["smooth_l1", "giou", "diou", "ciou"])
def test_labels_and_losses_never_wait_for_the_device(box_loss):
    """From the batch on, whose boxes are checked before they are copied to the device."""
    opts = ["MODEL.DEVICE", "cuda", "MODEL.RETINANET.BBOX_REG_LOSS_TYPE", box_loss]
    model = make_model(*opts).train()
    batch = make_batch([7, 0])
    images = model.preprocess_image(batch)
    targets = [inputs["instances"].to("cuda") for inputs in batch]
    regions = [torch.rand(2, 4, device="cuda") * 99 for _ in batch]

    def step():
        features = model.backbone(images.tensor)
        features = [features[name] for name in model.head_in_features]
        losses = model.forward_training(images, features, model.head(features), targets, regions)
        sum(losses.values()).backward()

    with EventStorage():
        step()  # what is set up once may wait
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("box_loss", ["smooth_l1", "giou"])
def test_the_whole_training_forward_compiles(box_loss):
    """One graph, from the images to the losses: values and gradients as without."""
    opts = ["MODEL.DEVICE", "cuda", "MODEL.RETINANET.BBOX_REG_LOSS_TYPE", box_loss]
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        model = make_model(*opts).train()
        losses = (torch.compile(model, fullgraph=True) if compiled else model)(make_batch([7, 0]))
        sum(losses.values()).backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append(({k: v.detach() for k, v in losses.items()}, gradients))
    (wanted, wanted_gradients), (found, gradients) = results
    assert_close(found, wanted, rtol=1e-3, atol=1e-5)
    for name, gradient in wanted_gradients.items():
        scale = gradient.abs().max().item()
        assert_close(gradients[name], gradient, rtol=0, atol=1e-2 * scale, msg=name)


@pytest.mark.parametrize("num_images", [1, 2])
def test_a_traced_model_gives_eagers_detections_at_another_size(num_images):
    model = make_detecting_model("MODEL.DEVICE", "cuda")
    small, large = (
        [{"image": x["image"].cuda()} for x in make_batch([0] * num_images, size=size)]
        for size in ((160, 192), (256, 320))
    )
    adapter = TracingAdapter(model, small)
    traced = torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
    found = adapter.outputs_schema(traced(*(inputs["image"] for inputs in large)))
    with torch.no_grad():
        expected = model(large)
    assert_same_outputs(found, expected)


def test_train_net_with_mixed_precision(tmp_path):
    command = "train_net.py --config-file tests/engine/tiny.yaml SOLVER.AMP.ENABLED True"
    run = subprocess.run(
        [sys.executable, *command.split(), "OUTPUT_DIR", str(tmp_path / "run")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "run/model_final.pth").is_file()
