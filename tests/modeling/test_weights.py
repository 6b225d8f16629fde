"""Weights of other libraries load, give the same detections, or are refused in one line."""

import re

import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from torch import nn
from torch.nn.functional import interpolate
from torchvision.models import resnet
from torchvision.models.detection import (
    RetinaNet_ResNet50_FPN_Weights,
    retinanet_resnet50_fpn,
    retinanet_resnet50_fpn_v2,
)

from detectors import assert_same_detections, make_model
from retinanet_ext.engine import Checkpointer, load_config
from retinanet_ext.errors import InputError
from retinanet_ext.modeling import convert_weights

COCO = MetadataCatalog.get("coco_2017_val").thing_classes
TORCHVISION = {"v1": retinanet_resnet50_fpn, "v2": retinanet_resnet50_fpn_v2}
# Heights and widths, also odd ones and of P7 of one cell, in batches that are padded.
BATCHES = [[(128, 160)], [(96, 200), (131, 117)], [(224, 64), (33, 250), (160, 160)]]


def randomize(model):
    """Give no layer the values that it starts with, and let the head find objects in noise."""
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            module.weight.uniform_(0.5, 1)
            module.bias.normal_(0, 0.1)
        elif isinstance(module, nn.Conv2d):
            if name.startswith("head.") or name.startswith("bbox_head."):
                nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                module.bias.normal_(0, 0.1)


def make_torchvisions(version):
    torch.manual_seed(0)
    model = TORCHVISION[version](weights=None, weights_backbone=None).eval()
    model.transform.resize = lambda image, target: (image, target)
    with torch.no_grad():
        randomize(model)
        head = model.head.classification_head
        head.cls_logits.weight.mul_(1.5)
        head.cls_logits.bias.normal_(-6.5, 0.5)
        # As trained: neither the background nor category ids without a class are found.
        categories = retinanet_categories()
        for label, name in enumerate(categories):
            if name not in COCO:
                head.cls_logits.bias[label :: len(categories)] = -100
    return model


def retinanet_categories():
    return RetinaNet_ResNet50_FPN_Weights.COCO_V1.meta["categories"]


def build(name, *opts):
    return build_model(load_config(f"configs/{name}.yaml", ["MODEL.DEVICE", "cpu", *opts])).eval()


def as_instances(detections, size):
    """torchvision's detections of an image as Detectron2's, without those of no area."""
    boxes = Boxes(detections["boxes"])
    keep = boxes.nonempty()
    categories = retinanet_categories()
    classes = [COCO.index(categories[label]) for label in detections["labels"]]
    return Instances(
        size,
        pred_boxes=boxes[keep],
        scores=detections["scores"][keep],
        pred_classes=torch.tensor(classes, dtype=torch.int64)[keep],
    )


@pytest.fixture(scope="module", params=["v1", "v2"])
def pair(request, tmp_path_factory):
    """torchvision's model and this project's with its weights."""
    theirs = make_torchvisions(request.param)
    file = tmp_path_factory.mktemp("weights") / "theirs.pth"
    torch.save(theirs.state_dict(), file)
    ours = build(f"torchvision_retinanet_{request.param}")
    content = Checkpointer(ours, complete=True, class_names=COCO).load(str(file))
    assert content["class_names"] == COCO
    return theirs, ours


@pytest.mark.parametrize("sizes", BATCHES, ids=str)
def test_torchvisions_detections(pair, sizes):
    theirs, ours = pair
    rng = torch.Generator().manual_seed(len(sizes))
    images = [
        interpolate(torch.rand(1, 3, 9, 9, generator=rng) * 255, size=size, mode="bilinear")[0]
        for size in sizes
    ]
    images = [image.round().byte() for image in images]
    with torch.no_grad():
        expected = theirs([image / 255 for image in images])
        found = ours([{"image": image} for image in images])
    for e, f, size in zip(expected, found, sizes, strict=True):
        e = as_instances(e, size)
        print(len(e), e.scores.min(), e.scores.max(), len(set(e.pred_classes.tolist())))
        assert len(e) >= 20
        assert_same_detections(f["instances"], e, rtol=0, atol=1e-5, box_rtol=0, box_atol=1e-2)
