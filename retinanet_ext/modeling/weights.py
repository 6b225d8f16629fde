"""Convert weights of other libraries to Detectron2's names, and compare their network with a model.

Shapes: A anchors per cell, K classes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from detectron2.modeling.backbone.resnet import BottleneckBlock
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet_ResNet50_FPN_V2_Weights

from retinanet_ext.errors import InputError
from retinanet_ext.modeling.resnet_fpn import LastLevelP6P7WithoutReLU

KNOWN = (
    "Detectron2's and Detectron's weights, RetinaNet of torchvision and of MMDetection, and ResNet "
    "of torchvision and of timm"
)
"""What loads, for error messages."""

CLASSIFIER = ("head.cls_score.weight", "head.cls_score.bias")
BOX_REGRESSION = ("head.bbox_pred.weight", "head.bbox_pred.bias")

_RESNET = (
    (r"^conv1\.", "stem.conv1."),
    (r"^bn1\.", "stem.conv1.norm."),
    (r"\.bn(\d)\.", r".conv\1.norm."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
    *((rf"^layer{stage}\.", f"res{stage + 1}.") for stage in range(1, 5)),
)
"""Pattern -> replacement, applied in this order; the same in the tables below."""

# torchvision since 0.13 numbers the layers of a block: ".0." is a convolution, ".1." its norm.
_TORCHVISION = (
    *(
        (rf"^backbone\.fpn\.{theirs}_blocks\.{level}\.(0\.)?", f"backbone.fpn_{ours}{level + 3}.")
        for theirs, ours in (("inner", "lateral"), ("layer", "output"))
        for level in range(3)
    ),
    (r"^backbone\.fpn\.extra_blocks\.", "backbone.top_block."),
    (r"^head\.classification_head\.conv\.", "head.cls_subnet."),
    (r"^head\.classification_head\.cls_logits\.", "head.cls_score."),
    (r"^head\.regression_head\.conv\.", "head.bbox_subnet."),
    (r"^head\.regression_head\.bbox_reg\.", "head.bbox_pred."),
)

_MMDETECTION = (
    *((rf"^neck\.lateral_convs\.{i}\.conv\.", f"backbone.fpn_lateral{i + 3}.") for i in range(3)),
    *((rf"^neck\.fpn_convs\.{i}\.conv\.", f"backbone.fpn_output{i + 3}.") for i in range(3)),
    *((rf"^neck\.fpn_convs\.{i}\.conv\.", f"backbone.top_block.p{i + 3}.") for i in (3, 4)),
    (r"^bbox_head\.(cls|reg)_convs\.(\d)\.conv\.", r"head.\1_subnet.\2.0."),
    (r"^bbox_head\.(cls|reg)_convs\.(\d)\.gn\.", r"head.\1_subnet.\2.1."),
    (r"^head\.reg_", "head.bbox_"),
    (r"^bbox_head\.retina_cls\.", "head.cls_score."),
    (r"^bbox_head\.retina_reg\.", "head.bbox_pred."),
)

_DETECTRON2 = re.compile(
    r"backbone\.bottom_up\.(stem|res[2-5]\.\d+)\.(conv[123]|shortcut)(\.norm)?\.\w+"
    r"|backbone\.(fpn_(lateral|output)[345]|top_block\.p[67])\.\w+"
    r"|head\.((cls|bbox)_subnet\.\d(\.[01])?|cls_score|bbox_pred)\.\w+"
)
"""The names that a conversion may result in."""

_DEPTHS = {
    ((2, 2, 2, 2), False): 18,
    ((3, 4, 6, 3), False): 34,
    ((3, 4, 6, 3), True): 50,
    ((3, 4, 23, 3), True): 101,
    ((3, 8, 36, 3), True): 152,
}
"""Number of blocks per stage, and whether they are bottlenecks -> depth."""


@dataclass(frozen=True)
class ConvertedWeights:
    """Weights under Detectron2's names, and what they are.

    Attributes:
        weights: tensors by name
        origin: name of the architecture, such as "torchvision's RetinaNet v2"
        config: what to set so that the config fits
        class_names: names of the classes 0..K-1, empty if the weights do not tell
        stride_in_3x3: whether bottleneck blocks have their stride in the 3x3 convolution; None if
            the weights do not tell
        relu_before_p7: whether P7 is computed from the rectified P6
    """

    weights: dict[str, Tensor]
    origin: str
    config: str
    class_names: list[str] = field(default_factory=list)
    stride_in_3x3: bool | None = True
    relu_before_p7: bool = True

    @property
    def prefixes(self) -> tuple[str, ...]:
        """Prefixes of the names that the weights fill: the whole model's, or its backbone's."""
        is_detector = CLASSIFIER[0] in self.weights
        return ("backbone.", "head.") if is_detector else ("backbone.bottom_up.",)


def convert_weights(state: Mapping[str, Tensor], source: str) -> ConvertedWeights | None:
    """Convert weights that are recognised by their names.

    Args:
        state: tensors by name; not changed
        source: what to call the weights in messages

    Returns:
        None if they are of none of the libraries, as Detectron2's are

    Raises:
        InputError: they are recognised, but hold a layer that Detectron2's RetinaNet lacks

    Example:
        >>> from torchvision.models import resnet18
        >>> converted = convert_weights(resnet18().state_dict(), "resnet18.pth")
        >>> next(iter(converted.weights))
        'backbone.bottom_up.stem.conv1.weight'
    """
    if "head.classification_head.cls_logits.weight" in state:
        return _convert_torchvision(state, source)
    if "bbox_head.retina_cls.weight" in state:
        return _convert_mmdetection(state, source)
    if "layer1.0.conv1.weight" in state:
        origin = "torchvision's or timm's ResNet"
        layers = {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}
        return ConvertedWeights(
            _rename(layers, "", (), f"{source} are {origin}"),
            origin,
            "MODEL.RESNETS.DEPTH, NUM_GROUPS, WIDTH_PER_GROUP and STRIDE_IN_1X1 False make it fit",
        )
    return None


def rename_detectrons_retinanet(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the layers of Detectron's RetinaNet that Detectron2 has no names for.

    They are the head, P6 and P7. Their anchors and classes are in Detectron2's order.

    Args:
        weights: tensors under the names that ``convert_c2_detectron_names`` gives them
    """
    renamed = {}
    for name, tensor in weights.items():
        name = re.sub(r"^fpn\.([67])\.", r"top_block.p\1.", name)
        name = re.sub(r"^retnet\.cls\.pred\.fpn\d\.", "head.cls_score.", name)
        name = re.sub(r"^retnet\.bbox\.pred\.fpn\d\.", "head.bbox_pred.", name)
        match = re.fullmatch(r"retnet\.(cls|bbox)\.conv\.n(\d)\.fpn\d\.(\w+)", name)
        if match:
            name = f"head.{match[1]}_subnet.{2 * int(match[2])}.{match[3]}"
        renamed[name] = tensor
    return renamed


def _convert_torchvision(state: Mapping[str, Tensor], source: str) -> ConvertedWeights:
    is_v2 = "head.classification_head.conv.0.1.weight" in state
    version = "v2" if is_v2 else "v1"
    origin = f"torchvision's RetinaNet {version}"
    weights = _rename(state, "backbone.body.", _TORCHVISION, f"{source} are {origin}")
    if not is_v2 and not any(name.endswith("num_batches_tracked") for name in state):
        _fold_frozen_norms(weights)
    num_anchors = _reorder_anchors(weights, f"{source} are {origin}")
    # Output k of the classifier is label k: 0 is the background, which is never trained, and
    # COCO's labels are its category ids, ten of which have no class.
    categories = RetinaNet_ResNet50_FPN_V2_Weights.COCO_V1.meta["categories"]
    num_labels = len(weights[CLASSIFIER[1]]) // num_anchors
    labels, class_names = [*range(1, num_labels)], []
    if num_labels == len(categories):
        labels = [k for k in labels if categories[k] != "N/A"]
        class_names = [categories[k] for k in labels]
    for name in CLASSIFIER:
        weights[name] = weights[name].unflatten(0, (num_anchors, -1))[:, labels].flatten(0, 1)
    config = f"configs/torchvision_retinanet_{version}.yaml fits"
    return ConvertedWeights(weights, origin, config, class_names)


def _convert_mmdetection(state: Mapping[str, Tensor], source: str) -> ConvertedWeights:
    origin = "MMDetection's RetinaNet"
    weights = _rename(state, "backbone.", _MMDETECTION, f"{source} are {origin}")
    _reorder_anchors(weights, f"{source} are {origin}")
    return ConvertedWeights(
        weights,
        origin,
        "configs/mmdet_retinanet_R50_FPN.yaml fits an R-50",
        stride_in_3x3=None,  # the styles "pytorch" and "caffe" have the same names and shapes
        relu_before_p7=False,
    )


def _rename(
    state: Mapping[str, Tensor], backbone: str, table: Iterable[tuple[str, str]], what: str
) -> dict[str, Tensor]:
    """Return tensors under Detectron2's names.

    Args:
        state: tensors by name
        backbone: prefix of the ResNet's names
        table: patterns and replacements of the other names
        what: what to call the weights in messages
    """
    renamed = {}
    for given, tensor in state.items():
        is_bottom_up = given.startswith(backbone) and not given.startswith("backbone.fpn.")
        name = given.removeprefix(backbone) if is_bottom_up else given
        for pattern, replacement in _RESNET if is_bottom_up else table:
            name = re.sub(pattern, replacement, name)
        name = f"backbone.bottom_up.{name}" if is_bottom_up else name
        if not _DETECTRON2.fullmatch(name):
            raise InputError(f"{what}, but {given} has no place in Detectron2's RetinaNet")
        renamed[name] = tensor
    return _number_subnets(renamed)


def _number_subnets(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Number the layers of the head's subnets consecutively, where they are numbered per block.

    The convolutions get a zero bias before a norm, because Detectron2's have one there.
    """
    with_norm = "head.cls_subnet.0.1.weight" in weights
    layers_per_block = 3 if with_norm else 2  # convolution, norm if there is one, ReLU
    numbered = {}
    for name, tensor in weights.items():
        match = re.fullmatch(r"(head\.\w+_subnet)\.(\d)\.(\d)\.(\w+)", name)
        if match:
            layer = f"{match[1]}.{layers_per_block * int(match[2]) + int(match[3])}"
            name = f"{layer}.{match[4]}"
            if with_norm and match[3] == "0":
                numbered.setdefault(f"{layer}.bias", tensor.new_zeros(len(tensor)))
        numbered[name] = tensor
    return numbered


def _fold_frozen_norms(weights: dict[str, Tensor]) -> None:
    """Fold the variances of frozen norms into their weights, in place.

    torchvision sets the epsilon of the published v1 to 0, because it was trained so. Detectron2's
    frozen norms always have 1e-5. Files of frozen norms have no ``num_batches_tracked``.
    """
    for name, variance in list(weights.items()):
        if name.endswith(".norm.running_var"):
            weight = name.replace("running_var", "weight")
            weights[weight] = weights[weight] * variance.rsqrt()
            weights[name] = torch.ones_like(variance) - 1e-5


def _reorder_anchors(weights: dict[str, Tensor], what: str) -> int:
    """Order the head's outputs by size, then by aspect ratio, in place, and return A.

    torchvision and MMDetection order the anchors of a cell by aspect ratio first.
    """
    num_anchors = len(weights[BOX_REGRESSION[1]]) // 4
    if num_anchors != 9:
        raise InputError(
            f"{what} with {num_anchors} anchors per cell; 9 are known, of three sizes and three "
            "aspect ratios"
        )
    for name in (*CLASSIFIER, *BOX_REGRESSION):
        weights[name] = weights[name].unflatten(0, (3, 3, -1)).transpose(0, 1).flatten(0, 2)
    return num_anchors


def check_fits(converted: ConvertedWeights, model: nn.Module, source: str, *, reinit: bool) -> None:
    """Refuse converted weights of another network than the model's.

    Weights of a backbone are compared with the backbone alone. The number of classes is not
    compared.

    Args:
        converted: weights to load
        model: RetinaNet with Detectron2's names
        source: what to call the weights in messages
        reinit: accept other shapes in the head

    Raises:
        InputError: names both networks and the config that fits
    """
    given = _network(converted.weights, converted.prefixes)
    own = _network(model.state_dict(), converted.prefixes)
    differing = [
        name
        for name in sorted({*given, *own})
        if given.get(name) != own.get(name)
        and not (reinit and name.startswith("head.") and name in given and name in own)
    ]
    traits = (converted.stride_in_3x3, converted.relu_before_p7)
    own_traits = (_has_stride_in_3x3(model), _has_relu_before_p7(model))
    stride_differs = None not in (traits[0], own_traits[0]) and traits[0] != own_traits[0]
    p7_differs = len(converted.prefixes) > 1 and traits[1] != own_traits[1]
    if differing or stride_differs or p7_differs:
        theirs, ours = _describe(given, *traits), _describe(own, *own_traits)
        example = f" with another {differing[0]}" if theirs == ours else ""
        raise InputError(
            f"{source} are {converted.origin} ({theirs}), but the config's model is {ours}"
            f"{example}; {converted.config}"
        )


def _network(state: Mapping[str, Tensor], prefixes: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a network's tensors, without counters and the number of classes."""
    return {
        name: tuple(tensor.shape)[1 if name in CLASSIFIER else 0 :]
        for name, tensor in state.items()
        if name.startswith(prefixes) and not name.endswith("num_batches_tracked")
    }


def _has_stride_in_3x3(model: nn.Module) -> bool | None:
    """Tell where bottleneck blocks have their stride; None if the model has no such blocks."""
    stage: Any = getattr(getattr(model.backbone, "bottom_up", None), "res3", None)
    if stage is None or not isinstance(stage[0], BottleneckBlock):
        return None
    return stage[0].conv2.stride != (1, 1)


def _has_relu_before_p7(model: nn.Module) -> bool:
    return not isinstance(getattr(model.backbone, "top_block", None), LastLevelP6P7WithoutReLU)


def _describe(
    shapes: Mapping[str, tuple[int, ...]], stride_in_3x3: bool | None, relu_before_p7: bool
) -> str:
    """Describe a network for an error message, from the shapes of its tensors."""
    parts = [_describe_resnet(shapes, stride_in_3x3)]
    p6 = shapes.get("backbone.top_block.p6.weight")
    if p6:
        parts.append(f"P6 from {'P5' if p6[0] == p6[1] else 'C5'}")
        parts += [] if relu_before_p7 else ["P7 without ReLU"]
    convs = [name for name in shapes if re.fullmatch(r"head\.cls_subnet\.\d+\.weight", name)]
    if convs:
        norms = [name for name in convs if len(shapes[name]) == 1]
        kind = "with norms" if norms else "without norms"
        num_anchors = shapes[BOX_REGRESSION[1]][0] // 4
        parts.append(f"head of {len(convs) - len(norms)} convolutions {kind}")
        parts.append(f"{num_anchors} anchors")
    return ", ".join(parts)


def _describe_resnet(shapes: Mapping[str, tuple[int, ...]], stride_in_3x3: bool | None) -> str:
    bottom_up = "backbone.bottom_up."
    stages = [
        sum(
            re.fullmatch(rf"{re.escape(bottom_up)}res{stage}\.\d+\.conv1\.weight", name) is not None
            for name in shapes
        )
        for stage in range(2, 6)
    ]
    if not all(stages):
        return "no ResNet"
    is_bottleneck = f"{bottom_up}res2.0.conv3.weight" in shapes
    text = f"ResNet-{_DEPTHS.get((tuple(stages), is_bottleneck), f'of {stages} blocks')}"
    if is_bottleneck:
        width, width_per_group = shapes[f"{bottom_up}res2.0.conv2.weight"][:2]
        groups = width // width_per_group
        text += f" {groups}x{width_per_group}d" if (groups, width_per_group) != (1, 64) else ""
        if stride_in_3x3 is not None:
            text += f", stride in the {'3x3' if stride_in_3x3 else '1x1'} convolution"
    return text
