"""Any convolutional timm model as the backbone of a RetinaNet with FPN."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from torch import Tensor, nn

from retinanet_ext.errors import InputError, first_line

BUILDER = "build_retinanet_timm_fpn_backbone"
PRETRAINED = "pretrained"
"""Value of ``MODEL.TIMM.WEIGHTS`` for the weights that timm downloads."""

NORMS = ("EvalBN", "FrozenBN", "BN")
STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}
"""Detectron2's names of a backbone's features, and their strides."""

logger = logging.getLogger(__name__)


class TimmBackbone(Backbone):
    """Features of a timm model, under Detectron2's names, such as ``res3`` for stride 8.

    Attributes:
        timm_model: timm's model, made with ``features_only=True``

    Example:
        >>> backbone = TimmBackbone("mobilenetv2_100", ["res3", "res4", "res5"])
        >>> {name: shape.channels for name, shape in backbone.output_shape().items()}
        {'res3': 32, 'res4': 96, 'res5': 320}
    """

    def __init__(
        self,
        name: str,
        out_features: list[str],
        *,
        norm: str = "EvalBN",
        freeze_at: int = 0,
        in_channels: int = 3,
    ) -> None:
        """
        Args:
            name: timm's name of the model; its weights are random
            out_features: names of the features to return, of ``res2`` to ``res5``
            norm: what its BatchNorm layers do in training, see ``MODEL.TIMM.NORM``
            freeze_at: all weights that features of a stride up to 2^freeze_at depend on are frozen,
                so that 1 is the stem and 2 adds ``res2``, as in Detectron2; 0: none
            in_channels: channels of the images

        Raises:
            InputError: timm is not installed or has no such model, or its features do not fit
        """
        super().__init__()
        if norm not in NORMS:
            known = ", ".join(map(repr, NORMS))
            raise InputError(f"MODEL.TIMM.NORM {norm!r} is unknown; known: {known}")
        self.norm = norm
        self.timm_model = _create(name, in_chans=in_channels)
        strides = self.timm_model.feature_info.reduction()
        if unknown := [feature for feature in out_features if feature not in STRIDES]:
            raise InputError(
                f"MODEL.FPN.IN_FEATURES names {unknown[0]!r}; the features of a timm model are "
                f"{', '.join(STRIDES)}"
            )
        if {STRIDES[feature] for feature in out_features} - {*strides}:
            needed = ", ".join(str(STRIDES[feature]) for feature in out_features)
            raise InputError(
                f"MODEL.TIMM.NAME {name} has features of the strides "
                f"{', '.join(map(str, strides))}; the FPN needs {needed}"
            )
        channels = self.timm_model.feature_info.channels()
        self._indices = {feature: strides.index(STRIDES[feature]) for feature in out_features}
        self._out_features = list(out_features)
        self._out_feature_strides = {feature: STRIDES[feature] for feature in out_features}
        self._out_feature_channels = {key: channels[i] for key, i in self._indices.items()}
        self._freeze(self._try(name, in_channels), strides, freeze_at)
        self.train()

    def _try(self, name: str, in_channels: int) -> list[Tensor]:
        """Return the features of a small image, in evaluation mode and with their gradient graph.

        Raises:
            InputError: the model takes images of one size only, or pads them in its own way
        """
        size = (64, 96)
        try:
            with torch.enable_grad():
                features = self.timm_model.eval()(torch.zeros(1, in_channels, *size))
        except Exception as error:  # timm's models raise many types
            raise InputError(
                f"MODEL.TIMM.NAME {name} does not take images of any size, as a detector must: "
                f"{first_line(error)}"
            ) from error
        for feature, spec in self.output_shape().items():
            found = tuple(features[self._indices[feature]].shape)
            wanted = (1, spec.channels, *(side // spec.stride for side in size))
            if found != wanted:
                raise InputError(
                    f"MODEL.TIMM.NAME {name} gives features of shape {found} at stride "
                    f"{spec.stride} for an image of {size[0]} x {size[1]}; the FPN needs {wanted}"
                )
        return features

    def _freeze(self, features: list[Tensor], strides: list[int], freeze_at: int) -> None:
        """Freeze what ``norm`` and ``freeze_at`` say; the gradient tells which weights matter."""
        if self.norm == "FrozenBN":
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.requires_grad_(False)
        frozen = [f.sum() for f, s in zip(features, strides, strict=True) if s <= 2**freeze_at]
        if freeze_at and frozen:
            weights = [weight for weight in self.parameters() if weight.requires_grad]
            gradients = torch.autograd.grad(sum(frozen), weights, allow_unused=True)
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.requires_grad_(gradient is None)

    def train(self, mode: bool = True) -> TimmBackbone:
        """Set the training mode, except for BatchNorm layers with fixed statistics."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                is_frozen = module.affine and not module.weight.requires_grad
                if is_frozen or self.norm != "BN":
                    module.eval()
        return self

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.timm_model(images)
        return {name: features[index] for name, index in self._indices.items()}


@BACKBONE_REGISTRY.register()
def build_retinanet_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Build Detectron2's FPN, P3 to P7, on the timm model ``MODEL.TIMM.NAME`` of random weights."""
    in_features, channels = cfg.MODEL.FPN.IN_FEATURES, cfg.MODEL.FPN.OUT_CHANNELS
    bottom_up = TimmBackbone(
        cfg.MODEL.TIMM.NAME,
        sorted({*in_features, "res5"}),
        norm=cfg.MODEL.TIMM.NORM,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        in_channels=input_shape.channels,
    )
    return FPN(
        bottom_up=bottom_up,
        in_features=in_features,
        out_channels=channels,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelP6P7(bottom_up.output_shape()["res5"].channels, channels),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


def timm_weights(cfg: CfgNode) -> str:
    """Return what a new training fills its timm backbone with: a file, ``pretrained``, or nothing.

    It is ``MODEL.TIMM.WEIGHTS``; empty if the backbone is not timm's, or if ``MODEL.WEIGHTS`` is
    set, which holds the backbone too.

    Raises:
        InputError: there is no such file
    """
    weights = cfg.MODEL.TIMM.WEIGHTS
    if cfg.MODEL.BACKBONE.NAME != BUILDER or cfg.MODEL.WEIGHTS:
        return ""
    if weights and weights != PRETRAINED and not Path(weights).is_file():
        raise InputError(
            f"MODEL.TIMM.WEIGHTS is {weights}, which is not a file; for timm's own download write "
            f"{PRETRAINED}"
        )
    return weights


def load_timm_weights(model: nn.Module, cfg: CfgNode) -> None:
    """Fill the timm backbone of a model with :func:`timm_weights`.

    Raises:
        InputError: the weights cannot be read or downloaded, or leave a layer unfilled
    """
    name, source = cfg.MODEL.TIMM.NAME, timm_weights(cfg)
    bottom_up = model.backbone.bottom_up.timm_model
    own = bottom_up.state_dict()
    if source == PRETRAINED:
        weights = _download(name, in_chans=len(cfg.MODEL.PIXEL_MEAN))
    else:
        weights = _read(source)
    # features_only flattens some modules: stages.0.weight of the whole model is stages_0.weight.
    given = {key.replace(".", "_"): tensor for key, tensor in weights.items()}
    filled = {key: given[key.replace(".", "_")] for key in own if key.replace(".", "_") in given}
    missing = [key for key in own if key not in filled and not key.endswith("num_batches_tracked")]
    what = f"MODEL.TIMM.WEIGHTS {source}"
    if missing:
        raise InputError(
            f"{what} leave {len(missing)} of {len(own)} tensors of {name} unfilled: "
            f"{', '.join(missing[:5])}{' ...' if missing[5:] else ''}"
        )
    for key, tensor in filled.items():
        if tensor.shape != own[key].shape:
            raise InputError(
                f"{what} have another shape: {key} is {tuple(tensor.shape)}, that of {name} is "
                f"{tuple(own[key].shape)}"
            )
    bottom_up.load_state_dict(filled, strict=False)
    logger.info("%s fill the backbone, timm's %s", what, name)


def pixel_statistics(name: str) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of the images of a timm model's weights.

    They are per channel in the order RGB, on the scale of 0 to 255.
    """
    settings = _import_timm().get_pretrained_cfg(name)
    mean, std = ([round(255 * v, 3) for v in values] for values in (settings.mean, settings.std))
    return mean, std


def _import_timm() -> Any:
    try:
        import timm  # here, because only this backbone needs it
    except ImportError as error:
        raise InputError(
            f"MODEL.BACKBONE.NAME {BUILDER} needs timm: pip install retinanet_ext[timm]"
        ) from error
    return timm


def _create(name: str, **kwargs: Any) -> nn.Module:
    timm = _import_timm()
    if not name:
        raise InputError(
            f"MODEL.TIMM.NAME is empty, and MODEL.BACKBONE.NAME {BUILDER} needs the name of a "
            "model of timm, such as resnet50"
        )
    if not timm.is_model(name):
        nearest = difflib.get_close_matches(name, timm.list_models(), n=3)
        suggestion = f"; did you mean {' or '.join(nearest)}?" if nearest else ""
        raise InputError(
            f"MODEL.TIMM.NAME {name!r} is not a model of timm {timm.__version__}{suggestion}"
        )
    try:
        return timm.create_model(name, features_only=True, **kwargs)
    except RuntimeError as error:  # such as an unknown tag of pretrained weights
        raise InputError(f"MODEL.TIMM.NAME {name}: {first_line(error)}") from error


def _download(name: str, **kwargs: Any) -> Mapping[str, Tensor]:
    try:
        return _create(name, pretrained=True, **kwargs).state_dict()
    except Exception as error:  # of timm, or of one of the libraries that it downloads with
        raise InputError(
            f"MODEL.TIMM.WEIGHTS {PRETRAINED}: timm cannot load its weights of {name} "
            f"({first_line(error)}); name a file that holds them"
        ) from error


def _read(file: str) -> Mapping[str, Tensor]:
    try:
        weights = _import_timm().models.load_state_dict(file, weights_only=True)
        if not all(isinstance(tensor, Tensor) for tensor in weights.values()):
            raise TypeError("it is not a dict of tensors by name")
    except Exception as error:  # unpickling a damaged file may raise anything
        raise InputError(
            f"MODEL.TIMM.WEIGHTS {file} cannot be read as timm's weights: {type(error).__name__}: "
            f"{first_line(error)[:100]}"
        ) from error
    return weights
