"""What the paper's argument predicts: how much of the gradient positives have at the start.

Section 3.3: "the total loss due to easy negatives may dominate". docs/dial.md has the derivation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import get_cfg

from retinanet_ext import add_retinanet_ext_config
from retinanet_ext.losses.functional import Alpha, class_weights
from retinanet_ext.losses.registry import BoundLoss
from retinanet_ext.modeling.criterion import build_cls_loss

LOSS_KEYS = ("MODEL.RETINANET.CLS_LOSS.NAME", "MODEL.RETINANET.FOCAL_LOSS_")


def positive_share(
    cls_loss: BoundLoss, alpha: Alpha, background: float, *, num_classes: int, prior: float
) -> float:
    """Return the share of the classification gradient that positives have at initialisation.

    A positive is the entry of a foreground anchor and its class. All other entries are negatives:
    K - 1 of each foreground anchor and K of each background anchor. At the start every entry has
    the probability ``prior``. The share is of the sum of absolute gradients by the logits. A factor
    of the whole loss and the normaliser do not change it.

    Args:
        cls_loss, alpha: the loss and its class-balancing weight, one number
        background: number of background anchors per foreground anchor
        num_classes: K
        prior: probability pi (section 3.3)
    """
    logit = torch.tensor(prior, dtype=torch.float64).logit()
    weights = class_weights(alpha, 1)
    for_positives, for_negatives = (1.0, 1.0) if weights is None else weights.flatten().tolist()
    positive, negative = (abs(cls_loss.value_and_grad(x)[1].item()) for x in (logit, -logit))
    num_negatives = (background + 1) * num_classes - 1
    total = for_positives * positive + for_negatives * num_negatives * negative
    return for_positives * positive / total


def share_of_row(overrides: Mapping[str, Any], background: float, num_classes: int) -> float:
    """Return the share of positives under the loss that the config keys of a row describe."""
    cfg = get_cfg()
    add_retinanet_ext_config(cfg)
    pairs = {
        key: value
        for key, value in overrides.items()
        if key.startswith(LOSS_KEYS) or key.endswith(".ALPHA")
    }
    cfg.merge_from_list([part for pair in pairs.items() for part in pair])
    cls_loss, alpha = build_cls_loss(cfg)
    prior = cfg.MODEL.RETINANET.PRIOR_PROB
    return positive_share(cls_loss, alpha, background, num_classes=num_classes, prior=prior)
