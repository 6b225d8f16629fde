"""The whole model as torch.compile, torch.jit.trace and torch.export take it."""

import copy
import os
import shutil

import pytest
import torch
from detectron2.export import TracingAdapter, scripting_with_instances
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
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
from retinanet_ext.engine.instrumented_pass import InstrumentedPass
from retinanet_ext.errors import InputError
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


def assert_same_gradients(found, wanted, tolerance):
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        scale = gradient.abs().max().item()
        assert_close(found[name], gradient, rtol=0, atol=tolerance * scale, msg=name)


def test_the_whole_model_compiles_to_one_graph_and_equals_eager():
    """By the user's own ``torch.compile``: losses, gradients and the moving average."""
    opts = ["MODEL.RETINANET.BBOX_REG_LOSS_TYPE", "giou"]
    model, eager = shrink(make_model, *opts).train(), shrink(make_model, *opts).train()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    batch = make_batch([3, 1, 0], size=(96, 128))
    found, gradients = losses_and_gradients(compiled, model, batch)
    wanted, wanted_gradients = losses_and_gradients(eager, eager, batch)
    assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert_same_gradients(gradients, wanted_gradients, 1e-5)
    assert_close(model.criterion.loss_normalizer, eager.criterion.loss_normalizer)
    batch[0]["instances"].gt_classes[0] = 4  # what eager refuses
    assert all(loss.isnan() for loss in compiled(batch).values())


def losses_gradients_and_counts(model, batch):
    with EventStorage() as storage:
        losses, gradients = losses_and_gradients(model, model, batch)
    return losses, gradients, {name: value for name, (value, _) in storage.latest().items()}


def assert_same_steps(model, eager, batches):
    for batch in batches:
        found, gradients, counts = losses_gradients_and_counts(model, batch)
        wanted, wanted_gradients, wanted_counts = losses_gradients_and_counts(eager, batch)
        assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        assert_same_gradients(gradients, wanted_gradients, 1e-5)
        assert counts == wanted_counts and counts["num_pos_anchors"] >= 0
    assert torch.equal(model.criterion.loss_normalizer, eager.criterion.loss_normalizer)


def batches_of_all_kinds():
    """Boxes of any number, none at all, and a region to ignore."""
    size = (96, 128)
    batches = [make_batch(counts, size=size) for counts in ([3, 1, 0], [0, 0, 0], [16, 5, 2])]
    batches[1][2]["ignore_regions"] = torch.tensor([[0.0, 0.0, 60.0, 60.0]])
    return batches


R = "MODEL.RETINANET."


@pytest.mark.parametrize(
    ("backend", "loss", "box_loss", "normalizer"),
    [
        ("aot_eager", "focal", "smooth_l1", "foreground_ema"),
        ("eager", "focal_star", "giou", "foreground"),
        ("eager", "hinge", "ciou", "selected"),
    ],
)
def test_a_compiled_step_is_one_graph_for_any_boxes_and_equals_eager(
    backend, loss, box_loss, normalizer, compile_by
):
    """A break of the graph is an error, because the step compiles with ``fullgraph=True``."""
    opts = [R + "CLS_LOSS.NAME", loss, R + "BBOX_REG_LOSS_TYPE", box_loss]
    opts += [R + "LOSS_NORMALIZER", normalizer]
    counter = compile_by(backend)
    model = shrink(make_model, "MODEL.COMPILE", True, *opts).train()
    eager = shrink(make_model, *opts).train()
    assert_same_steps(model, eager, batches_of_all_kinds())
    assert counter.frame_count == 1
    batch = batches_of_all_kinds()[0]
    batch[0]["instances"].gt_classes[0] = 4
    with pytest.raises(InputError, match=r"0\.png: box 0, .* has class 4; "):
        model(batch)


class OneConvolution(nn.Module):
    """A backbone of one level, and a head of a convolution per output: few kernels to generate."""

    size_divisibility, padding_constraints = 32, {}

    def __init__(self, *channels):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, each, 8, 8) for each in channels)

    def forward(self, x):
        if isinstance(x, torch.Tensor):
            return {"p3": self.convs[0](x)}
        return [[conv(level) for level in x] for conv in self.convs]


def make_smallest(*opts):
    model = make_model(R + "IN_FEATURES", ["p3"], *opts).train()
    torch.manual_seed(0)
    model.backbone, model.head = OneConvolution(3), OneConvolution(9 * 4, 9 * 4)
    for conv in model.head.convs:
        conv.weight = nn.Parameter(conv.weight[:, :, :1, :1].clone())
        conv.stride = (1, 1)
    return model


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="needs a C++ compiler")
def test_generated_code_equals_eager(compile_by):
    """Plain C++, without the search for the processor's instructions, which takes seconds."""
    opts = [R + "LOSS_NORMALIZER", "foreground_batch", R + "IGNORE_IOA_THRESH", 0.0]
    model, eager = make_smallest("MODEL.COMPILE", True, *opts), make_smallest(*opts)
    compile_by("inductor")
    plain = {"cpp.vec_isa_ok": False, "cpp_cache_precompile_headers": False, "compile_threads": 1}
    with torch._inductor.config.patch(plain):
        assert_same_steps(model, eager, batches_of_all_kinds())


def test_sizes_are_compiled_until_they_are_dynamic_and_past_the_limit_run_eagerly(
    compile_by, caplog
):
    counter = compile_by("eager")
    model, eager = make_smallest("MODEL.COMPILE", True), make_smallest()
    sizes = [(160, 192), (192, 160), (224, 256), (256, 192), (96, 416)]
    assert_same_steps(model, eager, [make_batch([2, 0], size=size) for size in sizes])
    assert counter.frame_count == 2

    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=1), caplog.at_level("WARNING"):
        assert_same_steps(model, eager, [make_batch([2, 0], size=size) for size in sizes])
    lines = [r.getMessage() for r in caplog.records if "is not compiled" in r.getMessage()]
    assert len(lines) == 1 and "(2, 3, 192, 160)" in lines[0] and "recompile_limit" in lines[0]


def test_a_copy_is_compiled_as_the_model(compile_by):
    """As the weight average is, which is evaluated in the model's place."""
    counter = compile_by("eager")
    average = copy.deepcopy(shrink(make_model, "MODEL.COMPILE", True)).eval()
    with torch.no_grad():
        average(make_batch([0], size=(96, 128)))
    assert counter.frame_count > 0


def test_an_explained_step_sees_what_compiled_code_hides(compile_by):
    counter = compile_by("eager")
    model = shrink(make_model, "MODEL.COMPILE", True).train()
    step = InstrumentedPass(
        model, make_batch([3, 0], size=(96, 128)), precision="float32", iteration=0, class_names=[]
    )
    assert step.terms["loss_cls"].sum() > 0 and step.predictions and counter.frame_count == 0


def test_ohem_compiles_the_network_alone(compile_by):
    opts = ["MODEL.RETINANET.SELECTION.NAME", "ohem", "MODEL.RETINANET.LOSS_NORMALIZER", "selected"]
    batch = make_batch([3, 0], size=(96, 128))
    counter = compile_by("eager")
    compiled = shrink(make_model, "MODEL.COMPILE", True, *opts).train()
    assert_close(compiled(copy.deepcopy(batch)), shrink(make_model, *opts).train()(batch))
    assert counter.frame_count > 0


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


def test_an_exported_model_gives_eagers_detections_at_other_sizes(model):
    height, width = (torch.export.Dim(name, min=129, max=2048) for name in ("height", "width"))
    images = [torch.zeros(3, 160, 192) for _ in range(2)]
    shapes = [{1: height, 2: width}] * 2
    with torch.no_grad():
        exported = torch.export.export(Detect(model), (images,), dynamic_shapes=(shapes,)).module()
    for size in [(130, 256), (160, 192), (288, 350)]:
        images = [make_images(1, size)[0].float(), blank(size)]
        expected = eager_detections(model, images)
        found = [
            Instances(size, pred_boxes=Boxes(boxes), scores=scores, pred_classes=classes)
            for boxes, scores, classes in exported(images)
        ]
        assert_same_outputs([{"instances": each} for each in found], expected)
        assert len(expected[0]["instances"]) > 0 and len(expected[1]["instances"]) == 0


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
