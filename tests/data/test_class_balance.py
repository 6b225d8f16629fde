"""Alpha per class, computed from the annotations."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from detectron2.config import CfgNode
from detectron2.modeling.box_regression import Box2BoxTransform

from retinanet_ext.data import prepare_datasets
from retinanet_ext.errors import InputError
from retinanet_ext.modeling.criterion import RetinaNetCriterion

from .conftest import Bccd


def test_odds_follow_the_square_root_of_the_number_of_objects(bccd: Bccd, cfg: CfgNode) -> None:
    cfg.MODEL.RETINANET.CLS_LOSS.CLASS_ALPHA = ["auto"]
    prepare_datasets(bccd.use(cfg), eval_only=False)
    alphas = np.array(cfg.MODEL.RETINANET.CLS_LOSS.CLASS_ALPHA)
    odds = alphas / (1 - alphas)
    usable = (a for a in bccd.train["annotations"] if min(a["bbox"][2:]) > 0)
    counts = Counter(a["category_id"] for a in usable if not a.get("iscrowd"))
    numbers = np.array([counts[category["id"]] for category in bccd.train["categories"]])
    ratios = odds * np.sqrt(numbers)
    np.testing.assert_allclose(ratios, ratios[0], rtol=2e-3)  # four digits are kept
    # The product of the odds is that of the loss's alpha, .25.
    np.testing.assert_allclose(odds.prod(), (0.25 / 0.75) ** len(odds), rtol=2e-3)


def test_an_evaluation_needs_the_numbers_for_the_loss_alone(bccd: Bccd, cfg: CfgNode) -> None:
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.DEVICE = "RetinaNetExt", "cpu"
    cfg.MODEL.RETINANET.CLS_LOSS.CLASS_ALPHA, cfg.TEST.LOSS = ["auto"], True
    with pytest.raises(InputError, match=r"CLASS_ALPHA auto is not known .* the run's config.yaml"):
        prepare_datasets(bccd.use(cfg), eval_only=True)
    cfg.TEST.LOSS = False
    prepare_datasets(cfg, eval_only=True)
    assert RetinaNetCriterion.from_config(cfg, Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0)))


def test_a_class_without_objects_is_refused(bccd: Bccd, cfg: CfgNode) -> None:
    category = bccd.train["categories"][-1]
    annotations = bccd.train["annotations"]
    bccd.train["annotations"] = [a for a in annotations if a["category_id"] != category["id"]]
    cfg.MODEL.RETINANET.CLS_LOSS.CLASS_ALPHA = ["auto"]
    with pytest.raises(InputError, match=f"has none of {category['name']}; give numbers"):
        prepare_datasets(bccd.use(cfg), eval_only=False)


def test_a_loss_without_alpha_is_refused(bccd: Bccd, cfg: CfgNode) -> None:
    cfg.MODEL.RETINANET.CLS_LOSS.CLASS_ALPHA = ["auto"]
    cfg.MODEL.RETINANET.CLS_LOSS.NAME = "hinge"
    with pytest.raises(InputError, match="'hinge' has no alpha"):
        prepare_datasets(bccd.use(cfg), eval_only=False)
