"""A timm model as the backbone: its features are timm's, and it trains, compiles and exports."""

import copy
import sys

import pytest
import timm
import torch
from torch import nn
from torch.testing import assert_close

from detectors import make_batch, make_cfg, make_model
from retinanet_ext.errors import InputError
from retinanet_ext.modeling import TimmBackbone
from retinanet_ext.modeling.timm_backbone import BUILDER, load_timm_weights

FEATURES = ["res3", "res4", "res5"]
TIMM = ["MODEL.WEIGHTS", "", "MODEL.BACKBONE.NAME", BUILDER]
TIMM += ["MODEL.BACKBONE.FREEZE_AT", 0, "MODEL.TIMM.NAME"]
SMALL = [*TIMM, "mobilenetv2_035", "MODEL.RETINANET.NUM_CONVS", 1]


def randomize_norms(model):
    """Give the norms other values than those of the identity."""
    for name, tensor in model.state_dict().items():
        if tensor.dim() == 1:
            tensor.uniform_(0.5, 1.5) if name.endswith(("weight", "var")) else tensor.normal_()


@pytest.mark.parametrize("name", ["mobilenetv2_100", "resnet18", "convnext_atto"])
def test_features_are_timms_bit_for_bit(name, tmp_path):
    """The weights of a whole model of timm, read from a file."""
    torch.manual_seed(0)
    whole = timm.create_model(name, num_classes=7).eval()
    randomize_norms(whole)
    torch.save(whole.state_dict(), tmp_path / "weights.pth")
    cfg = make_cfg(*TIMM, name, "MODEL.TIMM.WEIGHTS", str(tmp_path / "weights.pth"))
    model = make_model(*TIMM, name).eval()
    load_timm_weights(model, cfg)
    bottom_up = model.backbone.bottom_up
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        found = bottom_up(images)
        *_, res3, res4, res5 = whole.forward_intermediates(images, intermediates_only=True)
        alone = timm.create_model(name, features_only=True).eval()
        alone.load_state_dict(bottom_up.timm_model.state_dict())
        listed = alone(images)[-3:]
    for feature, *expected in zip(FEATURES, (res3, res4, res5), listed, strict=True):
        assert all(torch.equal(found[feature], each) for each in expected)
        shape = bottom_up.output_shape()[feature]
        assert found[feature].shape == (2, shape.channels, 64 // shape.stride, 96 // shape.stride)
    assert list(model.backbone.output_shape()) == ["p3", "p4", "p5", "p6", "p7"]


def norms(module):
    return [each for each in module.modules() if isinstance(each, nn.BatchNorm2d)]


@pytest.mark.parametrize("freeze_at", [0, 2])
@pytest.mark.parametrize("norm", ["EvalBN", "FrozenBN", "BN"])
def test_what_norms_and_frozen_stages_train(norm, freeze_at):
    opts = ["MODEL.TIMM.NORM", norm, "MODEL.BACKBONE.FREEZE_AT", freeze_at]
    model = make_model(*SMALL, *opts).train()
    net = model.backbone.bottom_up.timm_model
    before = copy.deepcopy(net.state_dict())
    sum(model(make_batch([3, 1], size=(64, 96))).values()).backward()
    shallow = ("conv_stem", "bn1", "blocks.0", "blocks.1") if freeze_at else ()  # to stride 4
    of_norms = {id(weight) for each in norms(net) for weight in each.parameters()}
    for name, weight in net.named_parameters():
        is_frozen = name.startswith(shallow) or (norm == "FrozenBN" and id(weight) in of_norms)
        assert (weight.grad is None) == is_frozen, name
    for name, tensor in net.state_dict().items():
        is_statistic = "running" in name or "num_batches" in name
        changes = norm == "BN" and is_statistic and not name.startswith(shallow)
        assert torch.equal(tensor, before[name]) != changes, name
    assert not any(each.training for each in norms(model.eval().backbone))


def test_weights_fit_whatever_the_norms_train():
    states = [make_model(*SMALL, "MODEL.TIMM.NORM", n).state_dict() for n in ("EvalBN", "FrozenBN")]
    assert states[0].keys() == states[1].keys() == make_model(*SMALL).state_dict().keys()


def losses_and_gradients(model):
    losses = model.train()(make_batch([3, 0], size=(64, 96)))
    sum(losses.values()).backward()
    return losses, {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("key", ["MODEL.COMPILE", "MODEL.CHANNELS_LAST"])
def test_execution_changes_rounding_alone(key, compile_by):
    """Compiled as one graph, and traced alone: generating code takes minutes."""
    compile_by("eager")
    (losses, gradients), (expected, wanted) = (
        losses_and_gradients(make_model(*SMALL, key, value)) for value in (True, False)
    )
    assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    for name, gradient in wanted.items():  # without None: DDP waits for every weight
        scale = gradient.abs().max().item()
        assert_close(gradients[name], gradient, rtol=0, atol=1e-3 * scale + 1e-9, msg=name)


def test_autocast_reaches_the_backbone():
    model = make_model(*SMALL, "TEST.PRECISION", "bfloat16").eval()
    seen = []
    model.backbone.bottom_up.register_forward_hook(lambda *args: seen.extend(args[2].values()))
    with torch.no_grad():
        model(make_batch([0], size=(64, 96)))
    assert {feature.dtype for feature in seen} == {torch.bfloat16}


def test_a_traced_and_an_exported_backbone_give_eagers_features_at_another_size():
    backbone = make_model(*SMALL).eval().backbone
    first, other = torch.randn(1, 3, 160, 192), torch.randn(1, 3, 192, 256)
    shape = {2: 32 * torch.export.Dim("rows", min=5), 3: 32 * torch.export.Dim("columns", min=5)}
    with torch.no_grad():
        expected = backbone(other)
        traced = torch.jit.trace(backbone, first, strict=False)
        exported = torch.export.export(backbone, (first,), dynamic_shapes=(shape,)).module()
        for found in (traced(other), exported(other)):
            assert_close(found, expected)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("", "MODEL.TIMM.NAME is empty, .* such as resnet50"),
        ("mobilenet_v2", r"'mobilenet_v2' is not a model of timm .*; did you mean .*mobilenetv2_1"),
        ("resnet18.none", r"resnet18\.none: Invalid pretrained tag"),
        ("test_vit", "has features of the strides 16, 16, 16; the FPN needs 8, 16, 32"),
        ("visformer_tiny", "does not take images of any size, as a detector must: Input height"),
        ("mambaout_femto", r"shape \(1, 8, 12, 96\) at stride 8 .* needs \(1, 96, 8, 12\)"),
    ],
)
def test_a_model_that_cannot_be_a_backbone_is_refused(name, expected):
    with torch.device("meta"), pytest.raises(InputError, match=expected):
        TimmBackbone(name, FEATURES)


@pytest.mark.parametrize(
    ("opts", "expected"),
    [
        (["MODEL.TIMM.NORM", "SyncBN"], "'SyncBN' is unknown; known: 'EvalBN', 'FrozenBN', 'BN'"),
        (["MODEL.FPN.IN_FEATURES", ["p3"]], "MODEL.FPN.IN_FEATURES names 'p3'; .* res2, res3"),
    ],
)
def test_other_keys_of_the_backbone_are_refused(opts, expected):
    with pytest.raises(InputError, match=expected):
        make_model(*SMALL, *opts)


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match=r"needs timm: pip install retinanet_ext\[timm\]$"):
        make_model(*SMALL)
    make_model()  # with another backbone


@pytest.fixture(scope="module")
def weights():
    return timm.create_model("mobilenetv2_035").state_dict()


def spoil(weights, what):
    if what == "another width":
        return timm.create_model("mobilenetv2_050").state_dict()
    if what == "text":
        return weights | {"conv_stem.weight": "text"}
    return {key: tensor for key, tensor in weights.items() if not key.startswith(what)}


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("bn1.", r"leave 4 of 306 tensors of mobilenetv2_035 unfilled: bn1\.weight, bn1\.bias, "),
        ("another width", r"another shape: .* is \(.*\), that of mobilenetv2_035 is \("),
        ("text", "cannot be read as timm's weights: TypeError: it is not a dict of tensors"),
    ],
)
def test_a_file_that_does_not_fill_the_backbone_is_refused(what, expected, weights, tmp_path):
    model, file = make_model(*SMALL), str(tmp_path / "weights.pth")
    before = copy.deepcopy(model.state_dict())
    cfg = make_cfg(*SMALL, "MODEL.TIMM.WEIGHTS", file)
    with pytest.raises(InputError, match="is not a file; for timm's own download write pretrained"):
        load_timm_weights(model, cfg)
    torch.save(spoil(weights, what), file)
    with pytest.raises(InputError, match=expected):
        load_timm_weights(model, cfg)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


def test_timms_own_download(monkeypatch):
    """Whatever timm creates with ``pretrained=True``, whose failure is one line."""
    create = timm.create_model
    net = create("mobilenetv2_035", features_only=True)
    cfg = make_cfg(*SMALL, "MODEL.TIMM.WEIGHTS", "pretrained")
    model = make_model(*SMALL)
    asked = []

    def download(name, **kwargs):
        asked.append((name, kwargs))
        if len(asked) > 1:
            raise OSError("no route\nto host")
        return net

    monkeypatch.setattr(timm, "create_model", download)
    load_timm_weights(model, cfg)
    assert asked == [
        ("mobilenetv2_035", {"features_only": True, "pretrained": True, "in_chans": 3})
    ]
    loaded = model.backbone.bottom_up.timm_model.state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in net.state_dict().items())
    with pytest.raises(InputError, match=r"cannot load its weights .*\(no route\); name a file"):
        load_timm_weights(model, cfg)
