"""Weights of other libraries give the detections they give there, or are refused in one line."""

import pickle
import re

import pytest
import timm
import torch
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import nn
from torch.nn.functional import interpolate
from torchvision.models import get_model
from torchvision.models.detection import (
    RetinaNet_ResNet50_FPN_Weights,
    retinanet_resnet50_fpn,
    retinanet_resnet50_fpn_v2,
)
from torchvision.ops import FrozenBatchNorm2d

from detectors import assert_same_detections, build_without_memory, make_model
from retinanet_ext.engine import Checkpointer, load_config
from retinanet_ext.errors import InputError

COCO = MetadataCatalog.get("coco_2017_val").thing_classes
LABELS = RetinaNet_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
BUILDERS = {"v1": retinanet_resnet50_fpn, "v2": retinanet_resnet50_fpn_v2}


def build(name, *opts):
    return build_model(load_config(f"configs/{name}.yaml", ["MODEL.DEVICE", "cpu", *opts])).eval()


def save(content, path):
    torch.save(content, path)
    return str(path)


@torch.no_grad()
def randomize(model, head):
    """Give no layer of a model the values that it starts with.

    ``head`` is how the names of its head begin.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            module.weight.uniform_(0.5, 1)
            module.bias.normal_(0, 0.1)
        elif isinstance(module, nn.Conv2d):
            if name.startswith(head):
                nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                module.bias.normal_(0, 0.1)


def make_torchvisions(version):
    """torchvision's model with random weights that find objects of many classes in noise."""
    torch.manual_seed(0)
    model = BUILDERS[version](weights=None, weights_backbone=None).eval()
    model.transform.resize = lambda image, target: (image, target)
    randomize(model, "head.")
    logits = model.head.classification_head.cls_logits
    with torch.no_grad():
        logits.weight.mul_(1.5)
        logits.bias.normal_(-6.5, 0.5)
        for label, name in enumerate(LABELS):
            if name not in COCO:  # as trained: the background and the gaps are never found
                logits.bias[label :: len(LABELS)] = -100
    return model


@torch.no_grad()
def freeze_as_published(model):
    """Replace the norms by those of the published v1: no epsilon, and variances down to 1e-8."""
    for parent in list(model.modules()):
        for name, norm in list(parent.named_children()):
            if isinstance(norm, nn.BatchNorm2d):
                frozen = FrozenBatchNorm2d(norm.num_features, eps=0.0)
                frozen.load_state_dict(norm.state_dict())
                frozen.running_var.copy_(10 ** torch.empty_like(norm.running_var).uniform_(-8, 0))
                frozen.weight.mul_(frozen.running_var.sqrt())
                setattr(parent, name, frozen)


def name_as_before_0_13(state):
    """The names in the published file of v1, which is older than torchvision's blocks."""
    old = {}
    for name, tensor in state.items():
        name = re.sub(r"(fpn\.\w+_blocks\.\d)\.0", r"\1", name)
        name = re.sub(r"conv\.(\d)\.0", lambda match: f"conv.{2 * int(match[1])}", name)
        old[name] = tensor
    return old


@pytest.fixture(scope="module", params=["v1", "v2", "v1 as published"])
def pair(request, tmp_path_factory):
    """torchvision's model, and the one of the config with its weights."""
    version = request.param[:2]
    theirs = make_torchvisions(version)
    state = theirs.state_dict()
    if request.param != version:
        freeze_as_published(theirs)
        state = name_as_before_0_13(theirs.state_dict())
        assert "head.classification_head.conv.6.weight" in state
        assert "backbone.fpn.layer_blocks.2.bias" in state
    file = save(state, tmp_path_factory.mktemp("weights") / "theirs.pth")
    ours = build(f"torchvision_retinanet_{version}")
    content = Checkpointer(ours, complete=True, class_names=COCO).load(file)
    assert content["class_names"] == COCO
    return theirs, ours


def make_images(sizes):
    rng = torch.Generator().manual_seed(len(sizes))
    images = []
    for size in sizes:
        noise = 255 * torch.rand(1, 3, 9, 9, generator=rng)
        images.append(interpolate(noise, size=size, mode="bilinear")[0].round().byte())
    return images


def to_instances(detections, size):
    """torchvision's detections of an image in Detectron2's form, without those of no area."""
    boxes = Boxes(detections["boxes"])
    classes = [COCO.index(LABELS[label]) for label in detections["labels"]]
    return Instances(
        size,
        pred_boxes=boxes,
        scores=detections["scores"],
        pred_classes=torch.tensor(classes, dtype=torch.int64),
    )[boxes.nonempty()]


def decided(detections):
    """The detections that rounding cannot have kept: their IoU with a better one is not 0.5."""
    ious = pairwise_iou(detections.pred_boxes, detections.pred_boxes)
    same_class = detections.pred_classes[:, None] == detections.pred_classes
    is_better = detections.scores[:, None] < detections.scores
    tied = (((ious - 0.5).abs() < 1e-4) & same_class & is_better).any(1)
    assert tied.sum() <= 0.02 * len(detections)
    return detections[~tied]


@pytest.mark.parametrize(
    "sizes", [[(128, 160)], [(96, 200), (131, 117)], [(224, 64), (33, 250), (160, 160)]], ids=str
)
def test_torchvisions_detections(pair, sizes):
    theirs, ours = pair
    images = make_images(sizes)
    with torch.no_grad():
        expected = theirs([image / 255 for image in images])
        found = ours([{"image": image} for image in images])
    for e, f, size in zip(expected, found, sizes, strict=True):
        e, f = decided(to_instances(e, size)), decided(f["instances"])
        assert len(e) > 10 and len(e.pred_classes.unique()) > 2
        assert_same_detections(f, e, rtol=0, atol=1e-5, box_rtol=0, box_atol=1e-2)


def test_torchvisions_predictions_on_every_level(pair):
    """Of P7 too, whose few boxes rarely reach the detections."""
    theirs, ours = pair
    image = torch.rand(1, 3, 128, 160)
    with torch.no_grad():
        expected = theirs.head(list(theirs.backbone(image).values()))["bbox_regression"]
        found = ours.head(list(ours.backbone(image).values()))[1]
    found = [level.unflatten(1, (3, 3, 4)).permute(0, 4, 5, 2, 1, 3) for level in found]
    found = torch.cat([level.reshape(1, -1, 4) for level in found], dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


class MMDetections(nn.Module):
    """The network of MMDetection's RetinaNet on R-18, under its names, written from its source."""

    def __init__(self):
        super().__init__()
        self.backbone = get_model("resnet18")
        del self.backbone.fc
        inputs = [128, 256, 512]
        self.neck = nn.ModuleDict()
        self.neck["lateral_convs"] = nn.ModuleList(conv_module(c, 256, 1) for c in inputs)
        self.neck["fpn_convs"] = nn.ModuleList(conv_module(256, 256, 3) for _ in inputs)
        self.neck["fpn_convs"].extend(conv_module(c, 256, 3, stride=2) for c in (512, 256))
        self.bbox_head = nn.ModuleDict()
        for convs in ("cls_convs", "reg_convs"):
            self.bbox_head[convs] = nn.ModuleList(conv_module(256, 256, 3) for _ in range(4))
        self.bbox_head["retina_cls"] = nn.Conv2d(256, 9 * 80, 3, padding=1)
        self.bbox_head["retina_reg"] = nn.Conv2d(256, 9 * 4, 3, padding=1)

    def forward(self, x):
        net = self.backbone
        x = net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(x)))))
        features = [x := layer(x) for layer in (net.layer2, net.layer3, net.layer4)]
        laterals = [m.conv(f) for m, f in zip(self.neck["lateral_convs"], features, strict=True)]
        for i in (1, 0):
            laterals[i] = laterals[i] + interpolate(laterals[i + 1], size=laterals[i].shape[2:])
        convs = self.neck["fpn_convs"]
        levels = [convs[i].conv(lateral) for i, lateral in enumerate(laterals)]
        levels.append(convs[3].conv(features[-1]))  # add_extra_convs="on_input"
        levels.append(convs[4].conv(levels[-1]))  # relu_before_extra_convs=False
        outputs = []
        for convs, last in (("cls_convs", "retina_cls"), ("reg_convs", "retina_reg")):
            outputs.append([])
            for level in levels:
                for module in self.bbox_head[convs]:
                    level = module.conv(level).relu()
                outputs[-1].append(self.bbox_head[last](level))
        return outputs


def conv_module(in_channels, out_channels, size, stride=1):
    conv = nn.Conv2d(in_channels, out_channels, size, stride=stride, padding=size // 2)
    return nn.ModuleDict({"conv": conv})


def test_mmdetections_network(tmp_path):
    torch.manual_seed(0)
    theirs = MMDetections().eval()
    randomize(theirs, "bbox_head.")
    names = [f"class {k}" for k in range(80)]
    file = save({"meta": {"CLASSES": names}, "state_dict": theirs.state_dict()}, tmp_path / "w.pth")
    r18 = ["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64]
    ours = build("mmdet_retinanet_R50_FPN", *r18)
    assert Checkpointer(ours, complete=True).load(file)["class_names"] == names

    image = torch.rand(2, 3, 96, 160)
    with torch.no_grad():
        expected = theirs(image)
        features = list(ours.backbone(image).values())
        found = ours.head(features)
    for e, f, dim in zip(expected, found, (80, 4), strict=True):
        for theirs_of_level, ours_of_level in zip(e, f, strict=True):
            by_ratio = theirs_of_level.unflatten(1, (3, 3, dim))  # ratio, size
            by_size = ours_of_level.unflatten(1, (3, 3, dim)).transpose(1, 2)
            torch.testing.assert_close(by_size, by_ratio, rtol=1e-4, atol=1e-4)
    # Anchors of AnchorGenerator(octave_base_scale=4, scales_per_octave=3, center_offset=0).
    ratios, scales = torch.tensor([0.5, 1.0, 2.0]), 4 * 2 ** (torch.arange(3) / 3)
    for stride, anchors in zip((8, 16, 32, 64, 128), ours.anchor_generator(features), strict=True):
        sides = [stride * ratio[:, None] * scales for ratio in (ratios**-0.5, ratios**0.5)]
        half = torch.stack(sides, dim=-1) / 2
        cell = anchors.tensor[:9].unflatten(0, (3, 3)).transpose(0, 1)
        torch.testing.assert_close(cell, torch.cat([-half, half], dim=-1), rtol=1e-5, atol=1e-4)


def detectrons_names(model):
    """R-18's weights under the names of Detectron's blobs (its FPN.py and retinanet_heads.py)."""
    blobs = {"lr": torch.zeros(1)}
    for name, tensor in model.state_dict().items():
        name = name.removeprefix("backbone.").removeprefix("bottom_up.")
        if name.endswith(("running_mean", "running_var")) or name.startswith("criterion."):
            continue
        name = re.sub(r"^stem\.conv1\.norm\.", "res_conv1_bn.", name)
        name = re.sub(r"^stem\.", "", name)
        name = re.sub(r"^fpn_lateral(\d)", lambda m: f"fpn_inner_res{m[1]}_1_sum_lateral", name)
        name = re.sub(r"^fpn_output(\d)", lambda m: f"fpn_res{m[1]}_1_sum", name)
        name = re.sub(r"^top_block\.p", "fpn_", name)
        name = re.sub(
            r"^head\.(cls|bbox)_subnet\.(\d)",
            lambda m: f"retnet_{m[1]}_conv_n{int(m[2]) // 2}_fpn3",
            name,
        )
        name = name.replace("head.cls_score", "retnet_cls_pred_fpn3")
        name = name.replace("head.bbox_pred", "retnet_bbox_pred_fpn3")
        for conv, branch in (("conv1", "2a"), ("conv2", "2b"), ("conv3", "2c"), ("shortcut", "1")):
            name = re.sub(rf"(res\d\.\d+)\.{conv}", rf"\1_branch{branch}", name)
        name = name.replace(".norm.weight", "_bn_s").replace(".norm.bias", "_bn_b")
        name = name.replace("_bn.weight", "_bn_s").replace("_bn.bias", "_bn_b")
        name = re.sub(r"\.weight$", "_w", name)
        blobs[re.sub(r"\.bias$", "_b", name).replace(".", "_")] = tensor
    return blobs


def test_detectrons_retinanet_fills_the_model(tmp_path):
    """Detectron2's own conversion knows the backbone and FPN alone."""
    source, model = make_model(), make_model()
    for parameter in source.parameters():
        nn.init.normal_(parameter)
    blobs = {name: tensor.numpy() for name, tensor in detectrons_names(source).items()}
    assert {"fpn_7_b", "retnet_bbox_conv_n3_fpn3_w", "fpn_inner_res5_1_sum_lateral_w"} <= {*blobs}
    file = tmp_path / "model_final.pkl"
    file.write_bytes(pickle.dumps({"blobs": blobs, "cfg": "MODEL: {}"}, protocol=2))
    Checkpointer(model, complete=True).load(str(file))
    loaded = model.state_dict()
    for name, tensor in source.named_parameters():
        assert torch.equal(loaded[name], tensor), name


@pytest.mark.parametrize(
    ("library", "name", "opts"),
    [
        ("torchvision", "resnet18", ["DEPTH", 18, "RES2_OUT_CHANNELS", 64]),
        ("torchvision", "resnext50_32x4d", ["NUM_GROUPS", 32, "WIDTH_PER_GROUP", 4]),
        ("timm", "resnet50", ["NORM", "BN"]),
    ],
)
def test_imagenet_backbones(library, name, opts, tmp_path):
    torch.manual_seed(0)
    theirs = get_model(name) if library == "torchvision" else timm.create_model(name)
    theirs.eval()
    randomize(theirs, "no head")
    keys = [f"MODEL.RESNETS.{opt}" if i % 2 == 0 else opt for i, opt in enumerate(opts)]
    ours = build("retinanet_R50_FPN", "MODEL.RESNETS.STRIDE_IN_1X1", False, *keys)
    Checkpointer(ours).load(save(theirs.state_dict(), tmp_path / "w.pth"))
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        x = theirs.maxpool(theirs.bn1(theirs.conv1(image)).relu())
        expected = theirs.layer4(theirs.layer3(theirs.layer2(theirs.layer1(x))))
        found = ours.backbone.bottom_up(image)["res5"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_fine_tuning_keeps_the_classes_of_the_same_name(tmp_path):
    torch.manual_seed(0)
    theirs = BUILDERS["v2"](weights=None, weights_backbone=None)
    logits = theirs.head.classification_head.cls_logits
    nn.init.normal_(logits.bias)
    file = save(theirs.state_dict(), tmp_path / "w.pth")
    names = ["zebra", "quagga", "person"]
    ours = build("torchvision_retinanet_v2", "MODEL.RETINANET.NUM_CLASSES", 3)
    with pytest.raises(InputError, match="REINIT_MISMATCHED True keeps"):
        Checkpointer(ours, class_names=names).load(file)
    Checkpointer(ours, class_names=names, reinit_mismatched=True).load(file)
    expected = logits.bias.unflatten(0, (3, 3, 91)).transpose(0, 1).flatten(0, 1)
    found = ours.head.cls_score.bias.unflatten(0, (9, 3))
    assert torch.equal(
        found[:, [0, 2]], expected[:, [LABELS.index("zebra"), LABELS.index("person")]]
    )
    assert (found[:, 1] == found[0, 1]).all()  # the prior


def state_of(model):
    """A model's weights without memory for them."""
    return {
        name: torch.zeros(()).expand(tensor.shape) for name, tensor in model.state_dict().items()
    }


def torchvisions(version, **kwargs):
    with torch.device("meta"):
        return state_of(BUILDERS[version](weights=None, weights_backbone=None, **kwargs))


def resnets(name, library=get_model):
    with torch.device("meta"):
        return state_of(library(name))


STRIDE = ("MODEL.RESNETS.STRIDE_IN_1X1", False)
REFUSED = {
    "v2 for v1's config": (
        lambda: torchvisions("v2"),
        ("torchvision_retinanet_v1",),
        [
            "are torchvision's RetinaNet v2 (ResNet-50, stride in the 3x3 convolution, P6 from C5, "
            "head of 4 convolutions with norms, 9 anchors), but the config's model is ResNet-50, "
            "stride in the 3x3 convolution, P6 from P5, head of 4 convolutions without norms, "
            "9 anchors; configs/torchvision_retinanet_v2.yaml fits"
        ],
    ),
    "v1 for the paper's config": (
        lambda: torchvisions("v1"),
        ("retinanet_R50_FPN",),
        ["P6 from P5", "P6 from C5", "1x1 convolution", "configs/torchvision_retinanet_v1.yaml"],
    ),
    "v2 for a deeper model": (
        lambda: torchvisions("v2"),
        ("torchvision_retinanet_v2", "MODEL.RESNETS.DEPTH", 101),
        ["ResNet-50", "ResNet-101"],
    ),
    "v2 for a narrower FPN": (
        lambda: torchvisions("v2"),
        ("torchvision_retinanet_v2", "MODEL.FPN.OUT_CHANNELS", 128),
        ["with another backbone.fpn_lateral3.bias"],
    ),
    "MMDetection's for a P7 with ReLU": (
        lambda: state_of(MMDetections()),
        ("retinanet_R50_FPN", "MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
        ["P7 without ReLU", "configs/mmdet_retinanet_R50_FPN.yaml"],
    ),
    "a backbone with the stride elsewhere": (
        lambda: resnets("resnet50"),
        ("retinanet_R50_FPN",),
        ["torchvision's or timm's ResNet (ResNet-50, stride in the 3x3", "1x1", "IN_1X1 False"],
    ),
    "a backbone of another depth": (
        lambda: resnets("resnet34"),
        ("retinanet_R50_FPN", *STRIDE),
        ["ResNet-34", "ResNet-50"],
    ),
    "a backbone of another width": (
        lambda: resnets("resnext50_32x4d"),
        ("retinanet_R50_FPN", *STRIDE),
        ["ResNet-50 32x4d", "is ResNet-50,"],
    ),
    "a ResNet of timm's with another stem": (
        lambda: resnets("resnet50d", timm.create_model),
        ("retinanet_R50_FPN", *STRIDE),
        ["torchvision's or timm's ResNet, but conv1.0.weight has no place"],
    ),
    "torchvision's on another backbone": (
        lambda: torchvisions("v1") | {"backbone.body.features.0.weight": torch.zeros(1)},
        ("torchvision_retinanet_v1",),
        ["backbone.body.features.0.weight has no place"],
    ),
    "another detector": (
        lambda: resnets(
            "fasterrcnn_resnet50_fpn", lambda name: get_model(name, weights_backbone=None)
        ),
        ("torchvision_retinanet_v1",),
        ["hold no tensor of this model", "such as backbone.body.conv1.weight", "MMDetection"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_weights_of_another_network_are_refused(case, tmp_path):
    make_state, (config, *opts), fragments = REFUSED[case]
    file = save(make_state(), tmp_path / "w.pth")
    cfg = load_config(f"configs/{config}.yaml", ["MODEL.DEVICE", "cpu", *opts])
    model = build_without_memory(cfg)
    with pytest.raises(InputError) as raised:
        Checkpointer(model).load(file)
    message = str(raised.value)
    assert "\n" not in message and file in message
    for fragment in fragments:
        assert fragment in message
