"""Detectors side by side with Detectron2's, and batches of the kinds that go wrong."""

import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, build_model
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone import Backbone
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import nn
from torch.testing import assert_close

from retinanet_ext import add_retinanet_ext_config


class TinyBackbone(Backbone):
    """A convolution a level, P3 to P7: what is generated and exported is small."""

    size_divisibility = 32

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(channels, 32, 3, stride, 1, bias=False)
            for channels, stride in [(3, 8), (32, 2), (32, 2), (32, 2), (32, 2)]
        )

    def forward(self, x):
        features, x = {}, x / 64
        for level, conv in enumerate(self.convs, 3):
            x = features[f"p{level}"] = conv(x).relu()
        return features

    def output_shape(self):
        return {f"p{level}": ShapeSpec(channels=32, stride=2**level) for level in range(3, 8)}


@BACKBONE_REGISTRY.register()
def build_tiny_backbone(cfg, input_shape):
    return TinyBackbone()


def make_cfg(*opts, depth=18, num_classes=4):
    """A RetinaNet config: R-18 and narrow unless told otherwise, on the CPU."""
    cfg = get_cfg()
    add_retinanet_ext_config(cfg)
    cfg.merge_from_file("configs/retinanet_R50_FPN.yaml", allow_unsafe=False)
    small = ["RESNETS.RES2_OUT_CHANNELS", 64, "FPN.OUT_CHANNELS", 32] if depth < 50 else []
    values = ["DEVICE", "cpu", "RESNETS.DEPTH", depth, "RETINANET.NUM_CLASSES", num_classes, *small]
    # Detectron2's settings, where the paper's recipe differs.
    values += ["RETINANET.LOSS_NORMALIZER", "foreground_ema", "RETINANET.LOW_QUALITY_MATCHES"]
    values += ["all", "RETINANET.SMOOTH_L1_LOSS_BETA", 0.0, "ANCHOR_GENERATOR.OFFSET", 0.0]
    keys = [f"MODEL.{key}" if i % 2 == 0 else key for i, key in enumerate(values)]
    cfg.merge_from_list([*keys, "DATASETS.TRAIN", [], "DATASETS.TEST", [], *opts])
    return cfg


def make_model(*opts, **kwargs):
    torch.manual_seed(0)
    return build_model(make_cfg(*opts, **kwargs))


def make_detecting_model(*opts, **kwargs):
    """A model of random weights that finds objects in noise."""
    model = make_model(*opts, **kwargs).eval()
    with torch.no_grad():  # scores that pass the threshold, deltas that move boxes
        model.head.cls_score.weight.mul_(20)
        model.head.cls_score.bias.fill_(-3)
        model.head.bbox_pred.weight.mul_(10)
    return model


def build_without_memory(cfg):
    """Build the model that a config describes, for its errors alone."""
    with torch.device("meta"):
        return META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)


def assert_same_detections(found, expected, *, rtol, atol=0.0, box_rtol, box_atol):
    """Two sets of detections of an image are equal, whatever their order.

    Rounding swaps ranks of nearly equal scores, so detections are matched one to one, by class and
    IoU. One without a match may only be the last before a limit on their number.

    Args:
        found, expected: Instances with scores, pred_classes and pred_boxes
        rtol, atol: of the scores
        box_rtol, box_atol: of the corners, in pixels
    """
    assert len(found) == len(expected)
    if not len(found):
        return
    # In double, and the nearer score first where boxes of a class are equal.
    overlaps = pairwise_iou(Boxes(found.pred_boxes.tensor.double()),
                            Boxes(expected.pred_boxes.tensor.double()))  # fmt: skip
    likeness = overlaps - (found.scores[:, None] - expected.scores).abs()
    likeness[found.pred_classes[:, None] != expected.pred_classes] = -1
    likeness[overlaps < 0.99] = -1
    pairs, taken = [], likeness.clone()
    while taken.max() > -1:
        f, e = divmod(int(taken.argmax()), len(expected))
        pairs.append((f, e))
        taken[f], taken[:, e] = -1, -1
    f, e = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).unbind(1)
    assert_close(found.scores[f], expected.scores[e], rtol=rtol, atol=atol)
    boxes = found.pred_boxes.tensor[f], expected.pred_boxes.tensor[e]
    assert_close(*boxes, rtol=box_rtol, atol=box_atol)
    last = max(found.scores.min(), expected.scores.min())
    for instances, matched in ((found, f), (expected, e)):
        alone = torch.ones(len(instances), dtype=torch.bool)
        alone[matched] = False
        assert (instances.scores[alone] <= last * (1 + rtol) + atol).all(), instances[alone]


def assert_same_outputs(found, expected, **tolerances):
    """What two models return for a batch: for each image the same detections."""
    tolerances = {"rtol": 1e-4, "atol": 1e-5, "box_rtol": 1e-4, "box_atol": 1e-2} | tolerances
    for f, e in zip(found, expected, strict=True):
        assert tuple(f["instances"].image_size) == tuple(e["instances"].image_size)
        assert_same_detections(f["instances"].to("cpu"), e["instances"].to("cpu"), **tolerances)


def make_batch(box_counts, num_classes=4, size=(160, 192), seed=0):
    """Images of noise with that many boxes each."""
    rng = torch.Generator().manual_seed(seed)
    batch = []
    for index, count in enumerate(box_counts):
        height, width = size[0] - 16 * (index % 2), size[1] - 32 * (index % 3)
        scale = torch.tensor([width, height, width, height])
        centre = torch.rand(count, 2, generator=rng) * 0.8 + 0.1
        half = torch.rand(count, 2, generator=rng) * 0.2 + 0.02
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.cat([centre - half, centre + half], 1).clamp(0, 1) * scale)
        instances.gt_classes = torch.randint(0, num_classes, (count,), generator=rng)
        image = torch.randint(0, 256, (3, height, width), generator=rng, dtype=torch.uint8)
        batch.append({"image": image, "instances": instances, "file_name": f"{index}.png"})
    return batch


DENSE_CLASSES = 3


def dense_case(num_images=2, seed=0, side=128):
    """Anchors of five levels with losses as in training: few positives, a long easy tail."""
    generator = DefaultAnchorGenerator(
        sizes=[[s, s * 2 ** (1 / 3), s * 2 ** (2 / 3)] for s in (32, 64, 128)],
        aspect_ratios=[[0.5, 1.0, 2.0]],
        strides=[8, 16, 32],
    )
    features = [torch.zeros(1, 1, side // s, side // s) for s in (8, 16, 32)]
    anchors = torch.cat([level.tensor for level in generator(features)])
    rng = torch.Generator().manual_seed(seed)
    labels = torch.full((num_images, len(anchors)), DENSE_CLASSES)
    chance = torch.rand(labels.shape, generator=rng)
    labels[chance < 0.05] = -1
    labels[chance > 0.98] = 1
    losses = torch.rand(labels.shape, generator=rng).pow(8) + 0.3 * (labels == 1)
    return losses, labels, anchors
