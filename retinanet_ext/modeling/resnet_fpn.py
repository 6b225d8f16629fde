"""Detectron2's ResNet-FPN with the P6 and P7 of other libraries."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import FPN
from detectron2.modeling.backbone.fpn import LastLevelP6P7, build_retinanet_resnet_fpn_backbone
from torch import Tensor


class LastLevelP6P7WithoutReLU(LastLevelP6P7):
    """P6, and P7 computed from it without a ReLU in between, as in MMDetection's FPN."""

    def forward(self, c5: Tensor) -> list[Tensor]:
        p6 = self.p6(c5)
        return [p6, self.p7(p6)]


@BACKBONE_REGISTRY.register()
def build_retinanet_resnet_fpn_p5_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build Detectron2's RetinaNet backbone with P6 computed from P5, as in torchvision's v1.

    Detectron2 and the paper compute P6 from C5.
    """
    backbone = build_retinanet_resnet_fpn_backbone(cfg, input_shape)
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    backbone.top_block = LastLevelP6P7(channels, channels, in_feature="p5")
    return backbone


@BACKBONE_REGISTRY.register()
def build_mmdet_retinanet_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build Detectron2's RetinaNet backbone with P7 computed without a ReLU, as in MMDetection."""
    backbone = build_retinanet_resnet_fpn_backbone(cfg, input_shape)
    p6 = backbone.top_block.p6
    backbone.top_block = LastLevelP6P7WithoutReLU(p6.in_channels, p6.out_channels)
    return backbone
