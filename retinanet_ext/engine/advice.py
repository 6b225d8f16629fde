"""Settings that are allowed and rarely meant: what a person is warned of before a run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog

from retinanet_ext.config import all_keys, read_key

FOREIGN_GROUPS = (
    "MODEL.ROI_",
    "MODEL.RPN.",
    "MODEL.PROPOSAL_GENERATOR.",
    "MODEL.SEM_SEG_HEAD.",
    "MODEL.PANOPTIC_FPN.",
    "MODEL.MASK_ON",
    "MODEL.KEYPOINT_ON",
    "MODEL.LOAD_PROPOSALS",
    "DATASETS.PROPOSAL_FILES",
    "DATASETS.PRECOMPUTED_PROPOSAL",
    "TEST.AUG.",
)
"""How the keys begin that no RetinaNet reads."""

_RENAMED = {
    "SMOOTH_L1_BETA": "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA",
    "NUM_CONV": "MODEL.RETINANET.NUM_CONVS",
    "NMS_THRESH": "MODEL.RETINANET.NMS_THRESH_TEST",
    "PRE_NMS_TOPK_TEST": "MODEL.RETINANET.TOPK_CANDIDATES_TEST",
    "POST_NMS_TOPK_TEST": "TEST.DETECTIONS_PER_IMAGE",
}

_BGR_MEAN, _RGB_MEAN = [103.530, 116.280, 123.675], [123.675, 116.280, 103.530]
_BGR_STD, _RGB_STD = [57.375, 57.120, 58.395], [58.395, 57.120, 57.375]

# Weights by their name -> INPUT.FORMAT, PIXEL_MEAN and PIXEL_STD they were trained with; the first
# that matches. From the config files and tools of Detectron2's model zoo.
_WEIGHTS = {
    r"torchvision|\br(18|34|50|101|152)\.pkl": ("RGB", _RGB_MEAN, _RGB_STD),
    r"X[-_]101[-_]32x8d": ("BGR", _BGR_MEAN, _BGR_STD),
    r"MSRA/R-|\bR-(50|101)(-GN)?\.pkl|retinanet_R_(50|101)_FPN_\dx/": (
        "BGR",
        _BGR_MEAN,
        [1.0, 1.0, 1.0],
    ),
}

Advice = Iterator[str]


def advise(cfg: CfgNode, weights: str, *, eval_only: bool) -> list[str]:
    """Return what :func:`advise_on_model` and, for a training, :func:`advise_on_training` say.

    Args:
        cfg: a checked config whose data sets are registered, its schedule scaled to the batch
        weights: as in :func:`advise_on_model`
        eval_only: leave out what concerns training alone
    """
    lines = advise_on_model(cfg, weights)
    if not eval_only:
        counts = [
            sum(MetadataCatalog.get(name).get(count, 0) for name in cfg.DATASETS.TRAIN)
            for count in ("num_images", "num_crowd_regions")
        ]
        lines += advise_on_training(cfg, weights, *counts)
    return lines


def advise_on_model(cfg: CfgNode, weights: str) -> list[str]:
    """Return a line for each setting of the model that training or evaluation would ignore or miss.

    Args:
        cfg: a checked config
        weights: the file or URL that will be loaded; empty: the model starts from random weights
    """
    return [*_foreign_keys(cfg), *_pixels(cfg, weights)]


def advise_on_training(
    cfg: CfgNode, weights: str, num_images: int, num_crowd_regions: int
) -> list[str]:
    """Return a line for each setting of a training that will rarely end in a good detector.

    Args:
        cfg: a checked config, its schedule scaled to the batch
        weights: as in :func:`advise_on_model`
        num_images: of the training data; 0: not known
        num_crowd_regions: of the training data
    """
    return [
        *_learning_rate(cfg),
        *_frozen_random_layers(cfg, weights),
        *_crowd(cfg, num_crowd_regions),
        *_schedule(cfg, num_images),
    ]


def usual_learning_rate(cfg: CfgNode) -> tuple[float, float]:
    """Return the lowest and the highest rate that is usual for the batch of a config.

    The paper trains 16 images at 0.01 (section 4.1). Where all that is new has normalisation
    layers, 0.02 is usual too (arXiv 1811.08883, section 4). Both go linearly with the batch.
    """
    rate = 0.01 * cfg.SOLVER.IMS_PER_BATCH / 16
    normalized = cfg.MODEL.FPN.NORM and cfg.MODEL.RETINANET.NORM
    return rate, 2 * rate if normalized else rate


def _learning_rate(cfg: CfgNode) -> Advice:
    if cfg.SOLVER.REFERENCE_BATCH:
        return  # the rate is the linear rule's already, from a batch that a person vouches for
    low, high = usual_learning_rate(cfg)
    rate, batch = cfg.SOLVER.BASE_LR, cfg.SOLVER.IMS_PER_BATCH
    remedy = "SOLVER.REFERENCE_BATCH scales a schedule that was written for another batch"
    if rate > 2 * high:
        yield (
            f"SOLVER.BASE_LR {rate:g} is {rate / high:.3g} times the usual rate for "
            f"SOLVER.IMS_PER_BATCH {batch}, {high:g} (0.01 for 16 images, linearly): the loss may "
            f"become infinite; {remedy}"
        )
    elif rate == 0:
        yield "SOLVER.BASE_LR 0 leaves all weights as they are: nothing is learned"
    elif rate < low / 2:
        yield (
            f"SOLVER.BASE_LR {rate:g} is 1/{low / rate:.3g} of the usual rate for "
            f"SOLVER.IMS_PER_BATCH {batch}, {low:g} (0.01 for 16 images, linearly): training will "
            f"be slow; {remedy}"
        )


def _foreign_keys(cfg: CfgNode) -> Advice:
    name = cfg.MODEL.META_ARCHITECTURE
    if name not in ("RetinaNet", "RetinaNetExt"):
        return
    defaults = get_cfg()
    for key in all_keys(defaults):
        # As json, for a config that was saved holds lists where the default has tuples.
        value, default = (json.dumps(read_key(node, key)) for node in (cfg, defaults))
        if key.startswith(FOREIGN_GROUPS) and value != default:
            last = key.rpartition(".")[2]
            own = _RENAMED.get(last, f"MODEL.RETINANET.{last}")
            meant = own in all_keys(cfg) and f"; {own} {read_key(cfg, own)} is what counts"
            yield f"{key} {read_key(cfg, key)} has no effect: {name} does not read it{meant or ''}"


def _pixels(cfg: CfgNode, weights: str) -> Advice:
    own = (cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)
    keys = ("INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD")
    fitting = next((fits for name, fits in _WEIGHTS.items() if re.search(name, weights)), None)
    if fitting:
        wrong = [
            (key, given, fits)
            for key, given, fits in zip(keys, own, fitting, strict=True)
            if not (given == fits or (key != "INPUT.FORMAT" and _close(given, fits)))
        ]
        if wrong:
            have = ", ".join(f"{key} {given}" for key, given, _ in wrong)
            need = ", ".join(f"{key} {fits}" for key, _, fits in wrong)
            yield f"{have} does not fit the weights {weights}, which were trained with {need}"
        return
    image_format, mean, std = own
    other = {"RGB": ("BGR", _BGR_MEAN), "BGR": ("RGB", _RGB_MEAN)}.get(image_format)
    if other and _close(mean, other[1]):
        yield (
            f"MODEL.PIXEL_MEAN {mean} is in the order {other[0]}, "
            f"but INPUT.FORMAT is {image_format}"
        )
    if not weights and max(std) < 10:
        yield (
            f"MODEL.PIXEL_STD {std} leaves pixels in the range of 0 to 255, which suits weights "
            f"that were trained so; for random weights (MODEL.WEIGHTS is empty) set {_BGR_STD}"
        )


def _close(given: Any, fitting: Any) -> bool:
    return len(given) == len(fitting) and np.allclose(given, fitting, rtol=0.01)


def _frozen_random_layers(cfg: CfgNode, weights: str) -> Advice:
    if weights or "resnet" not in cfg.MODEL.BACKBONE.NAME:
        return
    if cfg.MODEL.BACKBONE.FREEZE_AT > 0:
        yield (
            f"MODEL.BACKBONE.FREEZE_AT {cfg.MODEL.BACKBONE.FREEZE_AT} freezes layers with random "
            "weights, for MODEL.WEIGHTS is empty; set FREEZE_AT 0, or name weights"
        )
    if cfg.MODEL.RESNETS.NORM == "FrozenBN":
        # torch's needs CUDA devices; Detectron2's runs on any.
        sync = "SyncBN" if cfg.MODEL.DEVICE.startswith("cuda") else "naiveSyncBN"
        yield (
            "MODEL.RESNETS.NORM FrozenBN normalises nothing with random weights, for MODEL.WEIGHTS "
            f"is empty; set BN, {sync} or GN, or name weights"
        )


def _crowd(cfg: CfgNode, num_crowd_regions: int) -> Advice:
    if not num_crowd_regions:
        return
    if cfg.MODEL.META_ARCHITECTURE != "RetinaNetExt":
        remedy = "MODEL.META_ARCHITECTURE RetinaNetExt can ignore them"
    elif not cfg.MODEL.RETINANET.IGNORE_OVERLAP:
        remedy = "MODEL.RETINANET.IGNORE_OVERLAP 0.5 ignores the anchors that lie in them"
    else:
        return
    yield f"{num_crowd_regions} crowd or ignored regions are trained as background; {remedy}"


def _schedule(cfg: CfgNode, num_images: int) -> Advice:
    solver = cfg.SOLVER
    end = f"SOLVER.MAX_ITER {solver.MAX_ITER}"
    if solver.WARMUP_ITERS > solver.MAX_ITER:
        yield (
            f"SOLVER.WARMUP_ITERS {solver.WARMUP_ITERS} is longer than {end}: the learning rate "
            "never reaches SOLVER.BASE_LR"
        )
    late = [step for step in solver.STEPS if step > solver.MAX_ITER]
    if late and solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR":
        yield f"SOLVER.STEPS {late} lie beyond {end}: the learning rate is not lowered there"
    if solver.CHECKPOINT_PERIOD > solver.MAX_ITER:
        yield (
            f"SOLVER.CHECKPOINT_PERIOD {solver.CHECKPOINT_PERIOD} is longer than {end}: nothing is "
            "saved before the end"
        )
    if cfg.TEST.EVAL_PERIOD > solver.MAX_ITER:
        yield (
            f"TEST.EVAL_PERIOD {cfg.TEST.EVAL_PERIOD} is longer than {end}: nothing is evaluated "
            "before the end"
        )
    seen = solver.MAX_ITER * solver.IMS_PER_BATCH
    if seen < num_images:
        yield (
            f"{end} batches of {solver.IMS_PER_BATCH} are {seen} images: the training data's "
            f"{num_images} are not each seen once"
        )
