"""Reading config keys by name, and beside which other keys each of them counts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from detectron2.config import CfgNode

from retinanet_ext.errors import InputError
from retinanet_ext.losses import LOSSES
from retinanet_ext.losses.registry import ALPHA_RANGE, UNBALANCED, Loss

CLASS_ALPHA = "MODEL.RETINANET.CLS_LOSS.CLASS_ALPHA"

# Parameters of losses that Detectron2 has keys for.
_DETECTRON2_KEYS = {
    ("focal", "alpha"): "MODEL.RETINANET.FOCAL_LOSS_ALPHA",
    ("focal", "gamma"): "MODEL.RETINANET.FOCAL_LOSS_GAMMA",
}


def loss_parameter_keys(loss: Loss) -> dict[str, str]:
    """Return the config key of each parameter of a loss, alpha included if it takes one."""
    names = [*loss.parameters, *(["alpha"] if loss.alpha is not None else [])]
    node = f"MODEL.RETINANET.CLS_LOSS.{loss.name.upper()}"
    return {n: _DETECTRON2_KEYS.get((loss.name, n), f"{node}.{n.upper()}") for n in names}


def read_key(cfg: CfgNode, key: str) -> Any:
    """Return the value of a dotted key."""
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def all_keys(node: CfgNode, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of all values."""
    for name, value in node.items():
        if isinstance(value, CfgNode):
            yield from all_keys(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


_OURS = ("MODEL.META_ARCHITECTURE", ("RetinaNetExt",))
_LOSS_NAME = "MODEL.RETINANET.CLS_LOSS.NAME"

COUNTS_ONLY_IF: dict[str, tuple[str, tuple[Any, ...]]] = {
    # Of this detector, and not of Detectron2's RetinaNet.
    **dict.fromkeys(
        (
            "MODEL.RETINANET.CLS_LOSS.",
            "MODEL.RETINANET.SELECTION.",
            "MODEL.RETINANET.LOSS_NORMALIZER",
            "MODEL.RETINANET.LOW_QUALITY_MATCHES",
            "MODEL.RETINANET.IGNORE_IOA_THRESH",
            "MODEL.RETINANET.PRIOR_INIT",
            "MODEL.RETINANET.CLIP_BEFORE_NMS",
            "MODEL.COMPILE",
            "MODEL.CHANNELS_LAST",
            "INPUT.SIZE_DIVISIBILITY",
            "SOLVER.LOSS_FILM_PERIOD",
            "TEST.LOSS",
        ),
        _OURS,
    ),
    **{
        key: (_LOSS_NAME, (name,))
        for name, loss in LOSSES.items()
        for key in loss_parameter_keys(loss).values()
    },
    "MODEL.CUDA_GRAPHS": ("MODEL.COMPILE", (True,)),
    "MODEL.TIMM.": ("MODEL.BACKBONE.NAME", ("build_retinanet_timm_fpn_backbone",)),
    "MODEL.RETINANET.SELECTION.OHEM.": ("MODEL.RETINANET.SELECTION.NAME", ("ohem",)),
    "MODEL.RETINANET.PRIOR_PROB": ("MODEL.RETINANET.PRIOR_INIT", (True,)),
    "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA": (
        "MODEL.RETINANET.BBOX_REG_LOSS_TYPE",
        ("smooth_l1",),
    ),
    **dict.fromkeys(
        ("MODEL.ANCHOR_GENERATOR.SCALES_PER_OCTAVE", "MODEL.ANCHOR_GENERATOR.BASE_SCALE"),
        ("MODEL.ANCHOR_GENERATOR.NAME", ("OctaveAnchorGenerator",)),
    ),
    "MODEL.ANCHOR_GENERATOR.ANGLES": ("MODEL.ANCHOR_GENERATOR.NAME", ("RotatedAnchorGenerator",)),
    "DATALOADER.ASPECT_RATIO_STREAMS": ("DATALOADER.ASPECT_RATIO_GROUPING", (True,)),
    "DATALOADER.RANDOM_SUBSET_RATIO": (
        "DATALOADER.SAMPLER_TRAIN",
        ("RandomSubsetTrainingSampler",),
    ),
    "DATALOADER.REPEAT_THRESHOLD": ("DATALOADER.SAMPLER_TRAIN", ("RepeatFactorTrainingSampler",)),
    "DATASETS.TRAIN_REPEAT_FACTOR": (
        "DATALOADER.SAMPLER_TRAIN",
        ("WeightedTrainingSampler", "WeightedCategoryTrainingSampler"),
    ),
    "INPUT.CROP.TYPE": ("INPUT.CROP.ENABLED", (True,)),
    "INPUT.CROP.SIZE": ("INPUT.CROP.ENABLED", (True,)),
    "SOLVER.AMP.PRECISION": ("SOLVER.AMP.ENABLED", (True,)),
    "SOLVER.BASE_LR_END": (
        "SOLVER.LR_SCHEDULER_NAME",
        ("WarmupCosineLR", "WarmupFlatCosineLR"),
    ),
    "SOLVER.FLAT_RATIO": ("SOLVER.LR_SCHEDULER_NAME", ("WarmupFlatCosineLR",)),
    "SOLVER.MOMENTUM": ("SOLVER.OPTIMIZER", ("SGD",)),
    "SOLVER.NESTEROV": ("SOLVER.OPTIMIZER", ("SGD",)),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("SOLVER.CLIP_GRADIENTS.ENABLED", (True,)),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": ("SOLVER.CLIP_GRADIENTS.ENABLED", (True,)),
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", ("norm", "full_model")),
    "SOLVER.EARLY_STOP.PATIENCE": ("SOLVER.BEST.METRIC", ()),
    "SOLVER.GAMMA": (
        "SOLVER.LR_SCHEDULER_NAME",
        ("WarmupMultiStepLR", "WarmupStepWithFixedGammaLR"),
    ),
    "SOLVER.NON_FINITE.MAX_SKIPPED": ("SOLVER.NON_FINITE.POLICY", ("skip",)),
    "SOLVER.NUM_DECAYS": ("SOLVER.LR_SCHEDULER_NAME", ("WarmupStepWithFixedGammaLR",)),
    "SOLVER.STEPS": ("SOLVER.LR_SCHEDULER_NAME", ("WarmupMultiStepLR",)),
    "DATASETS.SAMPLE.": (
        "DATASETS.TRAIN",
        ("retinanet_ext_sample_train", "retinanet_ext_sample_val"),
    ),
    **dict.fromkeys(
        ("DATASETS.CUSTOM.CLASSES", "DATASETS.CUSTOM.BOX_FORMAT"),
        ("DATASETS.CUSTOM.TRAIN_JSON", ()),
    ),
    "SOLVER.WARMUP_FACTOR": ("SOLVER.WARMUP_ITERS", ()),
    "TEST.DETECTION_GRID.SCORE_THRESH": ("TEST.DETECTION_GRID.NUM_IMAGES", ()),
    "TEST.PRECISE_BN.NUM_ITER": ("TEST.PRECISE_BN.ENABLED", (True,)),
}
"""A key, or the prefix of a group of keys -> the key and its values beside which it has an effect.

No values: any but 0 and none. Names of data sets may be in ``DATASETS.TEST`` as well.
"""


def find_conditions(key: str) -> list[tuple[str, tuple[Any, ...]]]:
    """Return the other keys, each with its values, beside which a key has an effect."""
    return [
        (other, values)
        for start, (other, values) in COUNTS_ONLY_IF.items()
        if key != other and (key == start or (start.endswith(".") and key.startswith(start)))
    ]


def resolve_class_alpha(cfg: CfgNode, class_names: Sequence[str]) -> None:
    """Replace the pairs of class name and alpha in ``CLS_LOSS.CLASS_ALPHA`` by K numbers.

    So that the config that a run saves builds the model wherever it is read, without the data.

    Raises:
        InputError: an unknown class, a value out of range, or another number of values than classes
    """
    node = cfg.MODEL.RETINANET.CLS_LOSS
    given, key = node.CLASS_ALPHA, CLASS_ALPHA
    if list(given) in ([], ["auto"]) or node.NAME not in LOSSES or LOSSES[node.NAME].alpha is None:
        return  # the model refuses the latter two
    if not any(isinstance(item, (list, tuple)) for item in given):
        if len(given) != len(class_names):
            raise InputError(
                f"{key} has {len(given)} values for {len(class_names)} classes: "
                f"{', '.join(class_names)}"
            )
        return
    default_key = loss_parameter_keys(LOSSES[node.NAME])["alpha"]
    alphas = dict.fromkeys(class_names, read_key(cfg, default_key))
    for item in given:
        is_pair = isinstance(item, (list, tuple)) and len(item) == 2 and isinstance(item[0], str)
        if not is_pair or item[0] not in alphas:
            raise InputError(
                f"{key} takes pairs of a class name and a number, got {item!r}; "
                f"classes: {', '.join(class_names)}"
            )
        alphas[item[0]] = ALPHA_RANGE.check(f"{key}[{item[0]!r}]", item[1])
    left_out = [name for name, value in alphas.items() if value == UNBALANCED]
    if left_out:
        raise InputError(
            f"{key} leaves out {', '.join(left_out)}, and {default_key} is -1: "
            "name every class or set it"
        )
    node.CLASS_ALPHA = list(alphas.values())
