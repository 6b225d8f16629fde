"""The whole model as torch.compile, torch.jit.trace and torch.export take it."""

import copy

import pytest
import torch
from detectron2.export import TracingAdapter, scripting_with_instances
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from torch import nn
from torch.testing import assert_close

from detectors import (
    TinyBackbone,
    assert_same_outputs,
    make_batch,
    make_detecting_model,
    make_model,
)
from retinanet_ext.engine import load_config
from retinanet_ext.modeling import to_detectron2_state_dict
from retinanet_ext.modeling.anchor_generator import OctaveAnchorGenerator


def shrink(make, *opts):
    """Make a model with a head of one layer, and give it the tiny backbone."""
    model = make("MODEL.RETINANET.NUM_CONVS", 1, *opts)
    torch.manual_seed(0)
    model.backbone = TinyBackbone()
    return model


def losses_and_gradients(call, model, batch):
    model.zero_grad()
    losses = call(copy.deepcopy(batch))
    sum(losses.values()).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {name: loss.detach() for name, loss in losses.items()}, gradients


@pytest.mark.parametrize(("box_loss", "box_counts"), [("giou", [3, 1, 0]), ("smooth_l1", [0, 0])])
def test_training_compiles_to_one_graph_and_equals_eager(box_loss, box_counts):
    """Losses, gradients and the normaliser's moving average; images without boxes too."""
    opts = ["MODEL.RETINANET.BBOX_REG_LOSS_TYPE", box_loss]
    model, eager = shrink(make_model, *opts).train(), shrink(make_model, *opts).train()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        batch = make_batch(box_counts, size=(96, 128), seed=seed)
        found, gradients = losses_and_gradients(compiled, model, batch)
        wanted, wanted_gradients = losses_and_gradients(eager, eager, batch)
        assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        assert gradients.keys() == wanted_gradients.keys()
        for name, gradient in wanted_gradients.items():
            scale = gradient.abs().max().item()
            assert_close(gradients[name], gradient, rtol=0, atol=1e-4 * scale, msg=name)
    assert_close(model.criterion.loss_normalizer, eager.criterion.loss_normalizer)
    if sum(box_counts):  # what eager refuses
        batch[0]["instances"].gt_classes[0] = 4
        assert all(loss.isnan() for loss in compiled(batch).values())


def test_ohem_compiles_around_its_search():
    opts = ["MODEL.RETINANET.SELECTION.NAME", "ohem", "MODEL.RETINANET.LOSS_NORMALIZER", "selected"]
    batch = make_batch([3, 0], size=(96, 128))
    torch._dynamo.reset()
    compiled = torch.compile(shrink(make_model, *opts).train(), backend="eager")
    assert_close(compiled(copy.deepcopy(batch)), shrink(make_model, *opts).train()(batch))


@pytest.fixture(scope="module")
def model():
    return shrink(make_detecting_model)


def make_images(num_images, size):
    return [inputs["image"] for inputs in make_batch([0] * num_images, size=size, seed=1)]


def blank(size):
    """An image of the mean pixel, in which the detector finds nothing."""
    return torch.tensor([103.530, 116.280, 123.675]).view(3, 1, 1).repeat(1, *size)


def eager_detections(model, images):
    with torch.no_grad():
        return model([{"image": image} for image in images])


@pytest.mark.parametrize("num_images", [1, 2])
@pytest.mark.parametrize("traced_at", [(64, 64), (256, 320)])
def test_a_traced_model_gives_eagers_detections_at_other_sizes(model, num_images, traced_at):
    """Fewer anchors than candidates a level at 64 x 64, more at 256 x 320."""
    adapter = TracingAdapter(model, [{"image": x} for x in make_images(num_images, traced_at)])
    traced = torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
    for size in [(64, 64), (100, 180), (288, 352)]:
        images = make_images(num_images, size)
        for last in (images[-1], blank(images[-1].shape[1:])):
            images[-1] = last
            expected = eager_detections(model, images)
            found = adapter.outputs_schema(traced(*images))
            assert_same_outputs(found, expected)
        assert len(expected[-1]["instances"]) == 0
        assert num_images == 1 or len(expected[0]["instances"]) > 0


class Detect(nn.Module):
    """The model's detections as a list of tuples of tensors."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return [tuple(found) for found in self.model.detect(images)]


@pytest.mark.parametrize("num_images", [1, 2])
def test_an_exported_model_gives_eagers_detections_at_other_sizes(model, num_images):
    height, width = (torch.export.Dim(name, min=129, max=2048) for name in ("height", "width"))
    images = [torch.zeros(3, 160, 192) for _ in range(num_images)]
    shapes = [{1: height, 2: width}] * num_images
    with torch.no_grad():
        exported = torch.export.export(Detect(model), (images,), dynamic_shapes=(shapes,)).module()
    for size in [(130, 256), (160, 192), (288, 350)]:
        image = make_images(1, size)[0].float()
        for last in (image, blank(size)):
            images = [image, last][-num_images:]
            expected = eager_detections(model, images)
            found = [
                Instances(size, pred_boxes=Boxes(boxes), scores=scores, pred_classes=classes)
                for boxes, scores, classes in exported(images)
            ]
            assert_same_outputs([{"instances": each} for each in found], expected)
        assert len(expected[-1]["instances"]) == 0
        assert num_images == 1 or len(expected[0]["instances"]) > 0


@pytest.mark.parametrize("name", ["small_R18_FPN", "small_mobilenetv2_FPN"])
def test_small_configs_trace_and_export_at_any_size(name):
    """``torch.export`` at a fixed size, which takes seconds; see above for dynamic sizes."""
    torch.manual_seed(0)
    model = build_model(load_config(f"configs/{name}.yaml", ["MODEL.DEVICE", "cpu"])).eval()
    nn.init.constant_(model.head.cls_score.bias, -2.5)
    images = make_images(1, (160, 192))
    adapter = TracingAdapter(model, [{"image": images[0]}])
    traced = torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
    for size in [(160, 192), (100, 180)]:
        other = make_images(1, size)
        found = adapter.outputs_schema(traced(*other))
        assert len(found[0]["instances"]) > 0
        assert_same_outputs(found, eager_detections(model, other))
    with torch.no_grad():
        (found,) = torch.export.export(Detect(model), (images,)).module()(images)
    boxes, scores, classes = found
    found = Instances((160, 192), pred_boxes=Boxes(boxes), scores=scores, pred_classes=classes)
    assert_same_outputs([{"instances": found}], eager_detections(model, images))


def test_detectron2s_model_scripts_with_this_ones_weights():
    """The way round for torch.jit.script, which docs/deviations.md names."""
    ours = make_detecting_model()
    stock = make_model("MODEL.META_ARCHITECTURE", "RetinaNet").eval()
    stock.load_state_dict(to_detectron2_state_dict(ours.state_dict()))
    assert type(stock.anchor_generator) is OctaveAnchorGenerator
    fields = {"pred_boxes": Boxes, "scores": torch.Tensor, "pred_classes": torch.Tensor}
    images = [{"image": image} for image in make_images(2, (160, 192))]
    with torch.no_grad():
        expected = ours(images)
        found = scripting_with_instances(stock, fields)(images)
    for one, other in zip(found, expected, strict=True):
        other = other["instances"]
        scores = one.scores[one.pred_boxes.nonempty()]
        assert len(other) > 0
        assert_close(scores.sort().values, other.scores.sort().values)
