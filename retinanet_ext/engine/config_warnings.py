"""Warnings, printed before a run starts, about settings that are legal but rarely intended."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog

from retinanet_ext import add_retinanet_ext_config
from retinanet_ext.config_keys import all_keys, find_conditions, read_key
from retinanet_ext.engine.solver import FLAT_COSINE
from retinanet_ext.modeling.timm_backbone import BUILDER, pixel_statistics

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
"""Prefixes of the keys that no RetinaNet reads."""

# Detectron2's keys for the same thing in other detectors -> the key that RetinaNet reads.
_RENAMED = {
    "SMOOTH_L1_BETA": "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA",
    "NUM_CONV": "MODEL.RETINANET.NUM_CONVS",
    "NMS_THRESH": "MODEL.RETINANET.NMS_THRESH_TEST",
    "PRE_NMS_TOPK_TEST": "MODEL.RETINANET.TOPK_CANDIDATES_TEST",
    "POST_NMS_TOPK_TEST": "TEST.DETECTIONS_PER_IMAGE",
}

_BGR_MEAN, _RGB_MEAN = [103.530, 116.280, 123.675], [123.675, 116.280, 103.530]
_BGR_STD, _RGB_STD = [57.375, 57.120, 58.395], [58.395, 57.120, 57.375]

# Name of weights (first match) -> INPUT.FORMAT, PIXEL_MEAN and PIXEL_STD that they were trained
# with, from the configs and tools of Detectron2's model zoo, from torchvision and MMDetection.
_WEIGHTS = {
    r"torchvision|\br(18|34|50|101|152)\.pkl|retinanet_resnet50_fpn(_v2)?_coco": (
        "RGB",
        _RGB_MEAN,
        _RGB_STD,
    ),
    r"\b(wide_)?resnex?t\d+\w*-[0-9a-f]{8}\.pth": ("RGB", _RGB_MEAN, _RGB_STD),
    r"\bretinanet_r\d+_caffe_fpn_\w*coco": ("BGR", _BGR_MEAN, [1.0, 1.0, 1.0]),
    r"\bretinanet_[rx]\d+_\w*fpn_\w*coco": ("RGB", _RGB_MEAN, _RGB_STD),
    r"X[-_]101[-_]32x8d": ("BGR", _BGR_MEAN, _BGR_STD),
    r"MSRA/R-|\bR-(50|101)(-GN)?\.pkl|retinanet_R_(50|101)_FPN_\dx/": (
        "BGR",
        _BGR_MEAN,
        [1.0, 1.0, 1.0],
    ),
}

_OFFSET = "MODEL.ANCHOR_GENERATOR.OFFSET"
# Name of weights -> other keys that they were trained with and that their shapes do not tell.
_SETTINGS = {
    r"COCO-Detection/retinanet_R_": {_OFFSET: 0.0},
    r"\bretinanet_resnet50_fpn(_v2)?_coco": {
        "MODEL.ANCHOR_GENERATOR.NAME": "TorchvisionAnchorGenerator",
        _OFFSET: 0.0,
    },
    r"\bretinanet_[rx]\d+_\w*fpn_\w*coco": {_OFFSET: 0.0},
    r"\bretinanet_r\d+_caffe_fpn_\w*coco": {"MODEL.RESNETS.STRIDE_IN_1X1": True},
}

WAIT_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Environment variables that say how OpenMP's threads wait."""

Warnings = Iterator[str]


def config_warnings(cfg: CfgNode, weights: str, *, eval_only: bool) -> list[str]:
    """Return all warnings: of the model, the data and, unless ``eval_only``, the training.

    Args:
        cfg: a checked config whose data sets are registered, its schedule scaled to the batch
        weights: file or URL to load; empty if the model starts from random weights
        eval_only: leave out what concerns training only
    """
    lines = [*model_warnings(cfg, weights, eval_only=eval_only)]
    lines += _crowded_images(cfg, ["TEST"] if eval_only else ["TRAIN", "TEST"])
    if eval_only:
        return lines
    counts = [
        sum(MetadataCatalog.get(name).get(count, 0) for name in cfg.DATASETS.TRAIN)
        for count in ("num_images", "num_crowd_regions")
    ]
    return lines + training_warnings(cfg, weights, *counts) + shared_cpu_warnings(cfg)


def model_warnings(cfg: CfgNode, weights: str, *, eval_only: bool = False) -> list[str]:
    """Return the warnings about keys without effect and those that do not fit the weights.

    Args: as in :func:`config_warnings`; the data need not be registered.
    """
    ineffective = ineffective_keys(cfg, eval_only=eval_only)
    return [*ineffective, *_pixels(cfg, weights), *_settings(cfg, weights)]


def training_warnings(
    cfg: CfgNode, weights: str, num_images: int, num_crowd_regions: int
) -> list[str]:
    """Return the warnings about settings of a training that rarely end in a good detector.

    Args:
        cfg, weights: as in :func:`config_warnings`
        num_images, num_crowd_regions: of the training data; 0 if unknown
    """
    return [
        *_learning_rate(cfg),
        *_normalizer(cfg),
        *_unread_timm_weights(cfg),
        *_frozen_random_layers(cfg, weights),
        *_crowd(cfg, num_crowd_regions),
        *_schedule(cfg, num_images),
    ]


def shared_cpu_warnings(cfg: CfgNode) -> list[str]:
    """Return a warning if other processes use the cores whose threads spin while they wait.

    Spinning costs several times the step on a shared machine, and saves a tenth on an idle one.
    """
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    is_chosen = any(name in os.environ for name in WAIT_VARIABLES)
    spins = cfg.MODEL.DEVICE == "cpu" and torch.get_num_threads() > 1 and not is_chosen
    if not spins or load < cores / 2:
        return []
    return [
        f"Other processes use the CPU (load {load:.1f} on {cores} cores): with the environment "
        "variable OMP_WAIT_POLICY=passive, set before the command, a step may take a fraction of "
        "its time (docs/speed.md)"
    ]


def usual_learning_rate(cfg: CfgNode) -> tuple[float, float]:
    """Return the lowest and the highest usual learning rate for ``SOLVER.IMS_PER_BATCH`` images.

    The paper uses 0.01 for 16 images (section 4.1). With normalisation layers in FPN and head, 0.02
    is usual too (arXiv 1811.08883, section 4). Both scale linearly with the batch.
    """
    rate = 0.01 * cfg.SOLVER.IMS_PER_BATCH / 16
    normalized = cfg.MODEL.FPN.NORM and cfg.MODEL.RETINANET.NORM
    return rate, 2 * rate if normalized else rate


def _learning_rate(cfg: CfgNode) -> Warnings:
    if cfg.SOLVER.OPTIMIZER != "SGD" or cfg.SOLVER.REFERENCE_BATCH:
        return  # already scaled by the linear rule, from a batch that the user states
    low, high = usual_learning_rate(cfg)
    rate = cfg.SOLVER.BASE_LR
    if rate == 0:
        yield "SOLVER.BASE_LR 0 leaves all weights as they are: nothing is learned"
    elif rate > 2 * high or rate < low / 2:
        usual = high if rate > high else low
        times, effect = f"{rate / high:.3g} times", "the loss may become infinite"
        if rate < low:
            times, effect = f"1/{low / rate:.3g} of", "training will be slow"
        yield (
            f"SOLVER.BASE_LR {rate:g} is {times} the usual rate for SOLVER.IMS_PER_BATCH "
            f"{cfg.SOLVER.IMS_PER_BATCH}, {usual:g} (0.01 for 16 images, linearly): {effect}; "
            "SOLVER.REFERENCE_BATCH scales a schedule that was written for another batch"
        )


def _normalizer(cfg: CfgNode) -> Warnings:
    node = cfg.MODEL.RETINANET
    names = (cfg.MODEL.META_ARCHITECTURE, node.LOSS_NORMALIZER, node.SELECTION.NAME)
    if names == ("RetinaNetExt", "selected", "all"):
        yield (
            "MODEL.RETINANET.LOSS_NORMALIZER selected with SELECTION.NAME all divides the losses "
            "by the anchors that are not ignored, nearly all of them background, and makes them "
            "very small; foreground_ema divides by the foreground"
        )


def ineffective_keys(cfg: CfgNode, *, eval_only: bool = False) -> list[str]:
    """Return a line per key that differs from its default but is not read beside the others.

    Args:
        cfg: a whole config; its data sets need not be registered
        eval_only: leave out what concerns training only
    """
    defaults = get_cfg()
    add_retinanet_ext_config(defaults)
    # Compared as JSON, because a saved config holds lists where the default has tuples.
    changed = [
        key
        for key in all_keys(defaults)
        if json.dumps(read_key(cfg, key)) != json.dumps(read_key(defaults, key))
    ]
    checked = ("MODEL.ANCHOR_GENERATOR.", "TEST.") if eval_only else ("",)
    lines = [line for key in changed if key.startswith(checked) for line in _unmet(cfg, key)]
    return lines + [line for key in changed for line in _foreign(cfg, key)]


def _unmet(cfg: CfgNode, key: str) -> list[str]:
    """Return a line about the first condition under which the key counts and that does not hold."""
    is_ours = cfg.MODEL.META_ARCHITECTURE == "RetinaNetExt"
    for other, values in find_conditions(key):
        if not is_ours and other.endswith(("CLS_LOSS.NAME", "SELECTION.NAME")):
            continue  # Detectron2's RetinaNet does not read these
        found = read_key(cfg, other)
        if other == "DATASETS.TRAIN":
            found = [*found, *cfg.DATASETS.TEST]
        is_list = isinstance(found, list | tuple)
        found_values = {*found} if is_list else {found}
        if found_values & {*values} or (not values and found):
            continue
        given = json.dumps(found) if is_list else found or repr(found)
        wanted = " or ".join(map(str, values[:2])) or "set"
        return [
            f"{key} {read_key(cfg, key)} has no effect with {other} {given}; it counts with "
            f"{other} {wanted}"
        ]
    return []


def _foreign(cfg: CfgNode, key: str) -> Warnings:
    name = cfg.MODEL.META_ARCHITECTURE
    if name in ("RetinaNet", "RetinaNetExt") and key.startswith(FOREIGN_GROUPS):
        last = key.rpartition(".")[2]
        own = _RENAMED.get(last, f"MODEL.RETINANET.{last}")
        meant = own in all_keys(cfg) and f"; {own} {read_key(cfg, own)} is what counts"
        yield f"{key} {read_key(cfg, key)} has no effect: {name} does not read it{meant or ''}"
    if cfg.MODEL.BACKBONE.NAME == BUILDER and key.startswith("MODEL.RESNETS."):
        yield (
            f"{key} {read_key(cfg, key)} has no effect with MODEL.BACKBONE.NAME {BUILDER}, which "
            "reads MODEL.TIMM"
        )


def _pixels(cfg: CfgNode, weights: str) -> Warnings:
    own = (cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)
    keys = ("INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD")
    fitting = next((fits for name, fits in _WEIGHTS.items() if re.search(name, weights)), None)
    is_timm = cfg.MODEL.BACKBONE.NAME == BUILDER
    if is_timm and weights and weights == cfg.MODEL.TIMM.WEIGHTS:
        fitting = ("RGB", *pixel_statistics(cfg.MODEL.TIMM.NAME))
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


def _settings(cfg: CfgNode, weights: str) -> Warnings:
    fitting = {
        key: value
        for name, settings in _SETTINGS.items()
        if re.search(name, weights)
        for key, value in settings.items()
    }
    wrong = {key: value for key, value in fitting.items() if read_key(cfg, key) != value}
    if wrong:
        have = ", ".join(f"{key} {read_key(cfg, key)}" for key in wrong)
        need = ", ".join(f"{key} {value}" for key, value in wrong.items())
        effect = ": boxes would be off by up to half a stride" if _OFFSET in wrong else ""
        yield f"{have} does not fit the weights {weights}, which were trained with {need}{effect}"


def _close(given: Any, fitting: Any) -> bool:
    return len(given) == len(fitting) and np.allclose(given, fitting, rtol=0.01)


def _unread_timm_weights(cfg: CfgNode) -> Warnings:
    if cfg.MODEL.TIMM.WEIGHTS and cfg.MODEL.WEIGHTS and cfg.MODEL.BACKBONE.NAME == BUILDER:
        yield (
            f"MODEL.TIMM.WEIGHTS {cfg.MODEL.TIMM.WEIGHTS} is not read, because MODEL.WEIGHTS "
            f"{cfg.MODEL.WEIGHTS} is loaded, backbone included; set one of the two to ''"
        )


def _frozen_random_layers(cfg: CfgNode, weights: str) -> Warnings:
    is_timm = cfg.MODEL.BACKBONE.NAME == BUILDER
    if weights or not (is_timm or "resnet" in cfg.MODEL.BACKBONE.NAME):
        return
    if cfg.MODEL.BACKBONE.FREEZE_AT > 0:
        yield (
            f"MODEL.BACKBONE.FREEZE_AT {cfg.MODEL.BACKBONE.FREEZE_AT} freezes layers with random "
            "weights, for MODEL.WEIGHTS is empty; set FREEZE_AT 0, or name weights"
        )
    if is_timm and cfg.MODEL.TIMM.NORM != "BN":
        yield (
            f"MODEL.TIMM.NORM {cfg.MODEL.TIMM.NORM} normalises nothing with random weights, for "
            "MODEL.TIMM.WEIGHTS is empty; set BN, or name weights"
        )
    if not is_timm and cfg.MODEL.RESNETS.NORM == "FrozenBN":
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
    """Warn of images with more objects than the detector may return."""
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


def too_long(cfg: CfgNode, *keys: str) -> list[str]:
    """Return a line per key that is longer than the training, of all such keys if none is named."""
    effects = {
        "SOLVER.WARMUP_ITERS": "the learning rate never reaches SOLVER.BASE_LR",
        "SOLVER.CHECKPOINT_PERIOD": "nothing is saved before the end",
        "TEST.EVAL_PERIOD": "nothing is evaluated before the end",
    }
    end = cfg.SOLVER.MAX_ITER
    return [
        f"{key} {read_key(cfg, key)} is longer than SOLVER.MAX_ITER {end}: {effects[key]}"
        for key in keys or effects
        if read_key(cfg, key) > end
    ]


def _schedule(cfg: CfgNode, num_images: int) -> Warnings:
    solver = cfg.SOLVER
    end = f"SOLVER.MAX_ITER {solver.MAX_ITER}"
    yield from too_long(cfg)
    flat = round(solver.FLAT_RATIO * solver.MAX_ITER)
    if solver.LR_SCHEDULER_NAME == FLAT_COSINE and flat < solver.WARMUP_ITERS <= solver.MAX_ITER:
        yield (
            f"SOLVER.WARMUP_ITERS {solver.WARMUP_ITERS} is longer than the schedule's flat part, "
            f"{flat} iterations (SOLVER.FLAT_RATIO {solver.FLAT_RATIO:g} of {end}): warm-up leads "
            "to the lower rate that the schedule has then, and never reaches SOLVER.BASE_LR"
        )
    late = [step for step in solver.STEPS if step > solver.MAX_ITER]
    if late and solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR":
        yield f"SOLVER.STEPS {late} lie beyond {end}: the learning rate is not lowered there"
    seen = solver.MAX_ITER * solver.IMS_PER_BATCH
    if seen < num_images:
        yield (
            f"{end} batches of {solver.IMS_PER_BATCH} are {seen} images: the training data's "
            f"{num_images} are not each seen once"
        )
