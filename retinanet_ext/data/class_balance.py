"""Alpha per class from the number of its objects."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import get_detection_dataset_dicts

from retinanet_ext.config_keys import CLASS_ALPHA, loss_parameter_keys, read_key
from retinanet_ext.data.images import AUTO
from retinanet_ext.errors import InputError
from retinanet_ext.losses import LOSSES
from retinanet_ext.losses.registry import UNBALANCED

logger = logging.getLogger(__name__)


def balance_class_alpha(cfg: CfgNode, class_names: Sequence[str], *, eval_only: bool) -> None:
    """Replace ``CLS_LOSS.CLASS_ALPHA auto`` by K numbers, from the training annotations.

    The odds alpha / (1 - alpha) of a class are those of the loss's alpha times sqrt(m / n), for n
    objects of the class and the geometric mean m over the classes. An evaluation, which need not
    have the training data, clears the key, because detections do not depend on it.

    Raises:
        InputError: the loss has no alpha, a class has no object, or an evaluation computes the loss
    """
    node = cfg.MODEL.RETINANET.CLS_LOSS
    if list(node.CLASS_ALPHA) != [AUTO]:
        return
    if eval_only:
        if cfg.TEST.LOSS:
            raise InputError(
                f"{CLASS_ALPHA} auto is not known in an evaluation with TEST.LOSS; use the run's "
                "config.yaml, which has the numbers"
            )
        node.CLASS_ALPHA = []
        return
    loss = LOSSES[node.NAME]
    if loss.alpha is None:
        raise InputError(f"{CLASS_ALPHA} is set, but loss {loss.name!r} has no alpha")
    counts = np.zeros(len(class_names))
    for record in get_detection_dataset_dicts(cfg.DATASETS.TRAIN, filter_empty=True):
        for annotation in record["annotations"]:
            counts[annotation["category_id"]] += not annotation.get("iscrowd", 0)
    absent = [name for name, count in zip(class_names, counts, strict=True) if not count]
    if absent:
        raise InputError(
            f"{CLASS_ALPHA} auto needs objects of every class, and DATASETS.TRAIN "
            f"{', '.join(cfg.DATASETS.TRAIN)} has none of {', '.join(absent)}; give numbers, or "
            "choose the other classes with DATASETS.CUSTOM.CLASSES"
        )
    alpha = read_key(cfg, loss_parameter_keys(loss)["alpha"])
    odds = 1.0 if alpha == UNBALANCED else alpha / max(1 - alpha, 1e-6)
    odds = odds * np.sqrt(np.exp(np.log(counts).mean()) / counts)
    node.CLASS_ALPHA = [round(float(value), 4) for value in odds / (1 + odds)]
    pairs = zip(class_names, node.CLASS_ALPHA, counts, strict=True)
    logger.info(
        "%s auto: %s",
        CLASS_ALPHA,
        ", ".join(f"{name} {value} ({count:.0f} objects)" for name, value, count in pairs),
    )
