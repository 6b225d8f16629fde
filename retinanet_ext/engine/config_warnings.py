"""Settings that are allowed and rarely meant: what a person is warned of before a run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog

from retinanet_ext import add_retinanet_ext_config
from retinanet_ext.config_keys import all_keys, find_conditions, read_key

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

_OWN_KEYS = ("MODEL.RETINANET.CLS_LOSS.NAME", "MODEL.RETINANET.SELECTION.NAME")
"""Keys that only this detector reads: beside another they decide nothing."""

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

Warnings = Iterator[str]


def config_warnings(cfg: CfgNode, weights: str, *, eval_only: bool) -> list[str]:
    """Return what :func:`model_warnings` and, for a training, :func:`training_warnings` say.

    Args:
        cfg: a checked config whose data sets are registered, its schedule scaled to the batch
        weights: as in :func:`model_warnings`
        eval_only: leave out what concerns training alone
    """
    lines = [
        *model_warnings(cfg, weights, eval_only=eval_only),
        *_crowded_images(cfg, ["TEST"] if eval_only else ["TRAIN", "TEST"]),
    ]
    if not eval_only:
        counts = [
            sum(MetadataCatalog.get(name).get(count, 0) for name in cfg.DATASETS.TRAIN)
            for count in ("num_images", "num_crowd_regions")
        ]
        lines += training_warnings(cfg, weights, *counts)
    return lines


def model_warnings(cfg: CfgNode, weights: str, *, eval_only: bool = False) -> list[str]:
    """Return a line for each setting of the model that training or evaluation would ignore or miss.

    Args:
        cfg: a checked config
        weights: the file or URL that will be loaded; empty: the model starts from random weights
        eval_only: leave out what concerns training alone
    """
    ineffective = ineffective_keys(cfg, eval_only=eval_only)
    return [*ineffective, *_pixels(cfg, weights), *_anchors(cfg, weights)]


def training_warnings(
    cfg: CfgNode, weights: str, num_images: int, num_crowd_regions: int
) -> list[str]:
    """Return a line for each setting of a training that will rarely end in a good detector.

    Args:
        cfg: a checked config, its schedule scaled to the batch
        weights: as in :func:`model_warnings`
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


def _learning_rate(cfg: CfgNode) -> Warnings:
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


def ineffective_keys(cfg: CfgNode, *, eval_only: bool = False) -> list[str]:
    """Return a line for each key that is set, and that nothing reads beside the other settings.

    Set is what differs from its default: a config that was saved holds all keys.

    Args:
        cfg: whole, its data sets registered or not
        eval_only: leave out what concerns training alone
    """
    defaults = get_cfg()
    add_retinanet_ext_config(defaults)
    own = ("MODEL.ANCHOR_GENERATOR.", "TEST.") if eval_only else ("",)
    # As json, for a config that was saved holds lists where the default has tuples.
    keys = [
        key
        for key in all_keys(defaults)
        if json.dumps(read_key(cfg, key)) != json.dumps(read_key(defaults, key))
    ]
    lines = [line for key in keys if key.startswith(own) for line in _without_effect(cfg, key)]
    return [*lines, *(line for key in keys for line in _foreign(cfg, key))]


def _without_effect(cfg: CfgNode, key: str) -> Warnings:
    """Yield in a line which other key would have to be set otherwise, if one."""
    for other, values in find_conditions(key):
        if other in _OWN_KEYS and not _is_ours(cfg):
            continue
        found = read_key(cfg, other)
        if other == "DATASETS.TRAIN":
            found = [*found, *cfg.DATASETS.TEST]
        if not values:
            counts = bool(found)
        elif isinstance(found, list | tuple):
            counts = bool({*found} & {*values})
        else:
            counts = found in values
        if not counts:
            given = json.dumps(found) if isinstance(found, list | tuple) else repr(found)
            given = found if isinstance(found, str) and found else given
            wanted = " or ".join(map(str, values[:2])) or "set"
            yield (
                f"{key} {read_key(cfg, key)} has no effect with {other} {given}; it counts with "
                f"{other} {wanted}"
            )
            return


def _is_ours(cfg: CfgNode) -> bool:
    return cfg.MODEL.META_ARCHITECTURE == "RetinaNetExt"


def _foreign(cfg: CfgNode, key: str) -> Warnings:
    name = cfg.MODEL.META_ARCHITECTURE
    if name in ("RetinaNet", "RetinaNetExt") and key.startswith(FOREIGN_GROUPS):
        last = key.rpartition(".")[2]
        own = _RENAMED.get(last, f"MODEL.RETINANET.{last}")
        meant = own in all_keys(cfg) and f"; {own} {read_key(cfg, own)} is what counts"
        yield f"{key} {read_key(cfg, key)} has no effect: {name} does not read it{meant or ''}"


def _pixels(cfg: CfgNode, weights: str) -> Warnings:
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


def _anchors(cfg: CfgNode, weights: str) -> Warnings:
    offset = cfg.MODEL.ANCHOR_GENERATOR.OFFSET
    if offset != 0 and re.search(r"COCO-Detection/retinanet_R_", weights):
        yield (
            f"MODEL.ANCHOR_GENERATOR.OFFSET {offset} does not fit the weights {weights}, which "
            "were trained with 0.0: boxes would be off by up to half a stride"
        )


def _close(given: Any, fitting: Any) -> bool:
    return len(given) == len(fitting) and np.allclose(given, fitting, rtol=0.01)


def _frozen_random_layers(cfg: CfgNode, weights: str) -> Warnings:
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


def _crowd(cfg: CfgNode, num_crowd_regions: int) -> Warnings:
    if not num_crowd_regions:
        return
    if cfg.MODEL.META_ARCHITECTURE != "RetinaNetExt":
        remedy = "MODEL.META_ARCHITECTURE RetinaNetExt can ignore them"
    elif not cfg.MODEL.RETINANET.IGNORE_IOA_THRESH:
        remedy = "MODEL.RETINANET.IGNORE_IOA_THRESH 0.5 ignores the anchors that lie in them"
    else:
        return
    yield f"{num_crowd_regions} crowd or ignored regions are trained as background; {remedy}"


def _crowded_images(cfg: CfgNode, splits: Sequence[str]) -> Warnings:
    """Tell of images with more objects than the detector may return."""
    limit = cfg.TEST.DETECTIONS_PER_IMAGE
    for name in dict.fromkeys(name for split in splits for name in cfg.DATASETS[split]):
        images_by_num_objects = MetadataCatalog.get(name).get("images_by_num_objects", {})
        crowded = {num: images for num, images in images_by_num_objects.items() if num > limit}
        if not crowded:
            continue
        role = "trained on in full, but " if name in cfg.DATASETS.TRAIN else ""
        most = max(crowded)
        yield (
            f"{name}: images with more objects than TEST.DETECTIONS_PER_IMAGE {limit}: "
            f"{sum(crowded.values())}, the fullest with {most}: {role}no more than {limit} are "
            "found per image, which bounds recall and AP; set TEST.DETECTIONS_PER_IMAGE above "
            f"{most}"
            + (" (AP then counts as many detections, COCO's counts 100)" if most >= 100 else "")
        )


def _schedule(cfg: CfgNode, num_images: int) -> Warnings:
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
