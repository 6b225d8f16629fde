"""The two subnets (section 4) and their initialisation (sections 3.3 and 4.1).

Shapes: N images, A anchors per cell, K classes, H x W cells per level.
"""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from torch import nn

from retinanet_ext.losses import Interval


class RetinaNetExtHead(RetinaNetHead):
    """Detectron2's RetinaNet head with an optional prior initialisation.

    Without it the classifier starts at p = 1/2 for every anchor and class. In that setting the
    paper's training with cross entropy diverged (section 5.1).

    Example:
        >>> import torch
        >>> shapes = [ShapeSpec(channels=8)]
        >>> head = RetinaNetExtHead(
        ...     input_shape=shapes, num_classes=3, num_anchors=9, conv_dims=[8], prior_prob=0.01
        ... )
        >>> logits, deltas = head([torch.zeros(1, 8, 4, 5)])
        >>> logits[0].shape, logits[0].sigmoid().mean()
        (torch.Size([1, 27, 4, 5]), tensor(0.0100, grad_fn=<MeanBackward0>))
    """

    @configurable
    def __init__(self, *, prior_init: bool = True, prior_prob: float = 0.01, **kwargs: Any) -> None:
        """
        Args:
            prior_init: initialise the classifier's bias to -log((1 - prior_prob) / prior_prob)
            prior_prob: pi in section 3.3, in (0, 1)
            kwargs: arguments of Detectron2's ``RetinaNetHead``
        """
        Interval("(0, 1)").check("MODEL.RETINANET.PRIOR_PROB", prior_prob)
        super().__init__(prior_prob=prior_prob, **kwargs)
        if not prior_init:
            nn.init.zeros_(self.cls_score.bias)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: list[ShapeSpec]) -> dict[str, Any]:
        return {
            **super().from_config(cfg, input_shape),
            "prior_init": cfg.MODEL.RETINANET.PRIOR_INIT,
        }
