"""The two subnets (section 4) and their initialisation (sections 3.3 and 4.1)."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from torch import nn

from retinanet_ext.losses import Interval


class RetinaNetExtHead(RetinaNetHead):
    """Detectron2's RetinaNet head, whose prior initialisation can be switched off.

    Without it the classifier starts at p = 1/2 for every anchor and class: the setting in which
    the paper's cross entropy diverged (section 5.1).
    """

    @configurable
    def __init__(self, *, prior_init: bool = True, prior_prob: float = 0.01, **kwargs: Any) -> None:
        """
        Args:
            prior_init: start the classifier's bias at -log((1 - prior_prob) / prior_prob)
            prior_prob: pi of section 3.3
            kwargs: see :class:`detectron2.modeling.meta_arch.retinanet.RetinaNetHead`
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
