"""The paper's detector as a Detectron2 LazyConfig: docs/lazyconfig.md says how to train it."""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.model_zoo import get_config
from detectron2.modeling.backbone import FPN, BasicStem, ResNet
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from detectron2.modeling.box_regression import Box2BoxTransform

from retinanet_ext.losses import bind_loss
from retinanet_ext.modeling import (
    AnchorMatcher,
    OctaveAnchorGenerator,
    RetinaNetCriterion,
    RetinaNetExt,
    RetinaNetExtHead,
)

model = L(RetinaNetExt)(
    backbone=L(FPN)(
        bottom_up=L(ResNet)(
            stem=L(BasicStem)(in_channels=3, out_channels=64, norm="FrozenBN"),
            stages=L(ResNet.make_default_stages)(depth=50, stride_in_1x1=True, norm="FrozenBN"),
            out_features=["res3", "res4", "res5"],
            freeze_at=2,
        ),
        in_features=["res3", "res4", "res5"],
        out_channels=256,
        top_block=L(LastLevelP6P7)(in_channels=2048, out_channels="${..out_channels}"),
    ),
    head=L(RetinaNetExtHead)(
        input_shape=[ShapeSpec(channels=256)] * 5,
        num_classes="${..num_classes}",
        num_anchors=9,  # scales_per_octave times the number of aspect ratios
        conv_dims=[256, 256, 256, 256],
        prior_init=True,
        prior_prob=0.01,
    ),
    head_in_features=["p3", "p4", "p5", "p6", "p7"],
    anchor_generator=L(OctaveAnchorGenerator)(
        scales_per_octave=3,
        base_scale=4.0,
        aspect_ratios=[0.5, 1.0, 2.0],
        strides=[8, 16, 32, 64, 128],
        offset=0.5,
    ),
    anchor_matcher=L(AnchorMatcher)(
        thresholds=[0.4, 0.5], labels=[0, -1, 1], low_quality_matches="ignored_band"
    ),
    criterion=L(RetinaNetCriterion)(
        num_classes="${..num_classes}",
        cls_loss=L(bind_loss)(name="focal", gamma=2.0),
        alpha=0.25,  # or a number for each class
        normalizer="foreground",
        box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
        smooth_l1_beta=0.11,
    ),
    num_classes=80,
    pixel_mean=[103.530, 116.280, 123.675],
    pixel_std=[1.0, 1.0, 1.0],
)

# Data, schedule and optimizer as in Detectron2's COCO-Detection/retinanet_R_50_FPN_1x.py.
dataloader = get_config("common/data/coco.py").dataloader
dataloader.train.mapper.use_instance_mask = False
lr_multiplier = get_config("common/coco_schedule.py").lr_multiplier_1x
optimizer = get_config("common/optim.py").SGD
optimizer.lr = 0.01
train = get_config("common/train.py").train
train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
