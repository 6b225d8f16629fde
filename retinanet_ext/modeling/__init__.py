"""The detector. Importing this package registers its classes in Detectron2's registries."""

import retinanet_ext.torch_jit  # noqa: F401
from retinanet_ext.modeling.anchor_generator import (
    OctaveAnchorGenerator,
    TorchvisionAnchorGenerator,
)
from retinanet_ext.modeling.criterion import RetinaNetCriterion
from retinanet_ext.modeling.head import RetinaNetExtHead
from retinanet_ext.modeling.matching import AnchorMatcher
from retinanet_ext.modeling.retinanet import RetinaNetExt, to_detectron2_state_dict
from retinanet_ext.modeling.timm_backbone import TimmBackbone
from retinanet_ext.modeling.weights import ConvertedWeights, convert_weights

__all__ = [
    "AnchorMatcher",
    "ConvertedWeights",
    "OctaveAnchorGenerator",
    "RetinaNetCriterion",
    "RetinaNetExt",
    "RetinaNetExtHead",
    "TimmBackbone",
    "TorchvisionAnchorGenerator",
    "convert_weights",
    "to_detectron2_state_dict",
]
