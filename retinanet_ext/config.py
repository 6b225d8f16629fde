"""The configuration keys the plugin adds to Detectron2's, and nothing else.

Detectron2's own keys keep their defaults and meaning. Focal loss reads Detectron2's
``MODEL.RETINANET.FOCAL_LOSS_ALPHA`` and ``FOCAL_LOSS_GAMMA``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from detectron2.config import CfgNode

from retinanet_ext.data import check
from retinanet_ext.data.images import AUTO, MAX_PIXELS
from retinanet_ext.data.sample_set import SampleSet
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
            "MODEL.RETINANET.IGNORE_OVERLAP",
            "MODEL.RETINANET.PRIOR_INIT",
            "MODEL.COMPILE",
            "MODEL.CHANNELS_LAST",
            "INPUT.PAD_MULTIPLE",
        ),
        _OURS,
    ),
    **{
        key: (_LOSS_NAME, (name,))
        for name, loss in LOSSES.items()
        for key in loss_parameter_keys(loss).values()
    },
    "MODEL.RETINANET.CLS_LOSS.COMPILE": ("MODEL.RETINANET.SELECTION.NAME", ("all",)),
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
    "SOLVER.BASE_LR_END": ("SOLVER.LR_SCHEDULER_NAME", ("WarmupCosineLR",)),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("SOLVER.CLIP_GRADIENTS.ENABLED", (True,)),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": ("SOLVER.CLIP_GRADIENTS.ENABLED", (True,)),
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", ("norm",)),
    "SOLVER.GAMMA": (
        "SOLVER.LR_SCHEDULER_NAME",
        ("WarmupMultiStepLR", "WarmupStepWithFixedGammaLR"),
    ),
    "SOLVER.NON_FINITE.MAX_SKIPPED": ("SOLVER.NON_FINITE.POLICY", ("skip",)),
    "SOLVER.NUM_DECAYS": ("SOLVER.LR_SCHEDULER_NAME", ("WarmupStepWithFixedGammaLR",)),
    "SOLVER.STEPS": ("SOLVER.LR_SCHEDULER_NAME", ("WarmupMultiStepLR",)),
    "DATASETS.SAMPLE.": ("DATASETS.TRAIN", ("retinanet_ext_sample_train",)),
    "TEST.PRECISE_BN.NUM_ITER": ("TEST.PRECISE_BN.ENABLED", (True,)),
}
"""A key, or how a group of keys begins -> the key and its values beside which it has an effect."""


def resolve_class_alpha(cfg: CfgNode, class_names: Sequence[str]) -> None:
    """Replace the pairs of class name and alpha in ``CLS_LOSS.CLASS_ALPHA`` by K numbers.

    So that the config that a run saves builds the model wherever it is read, without the data.

    Raises:
        InputError: an unknown class, a value out of range, or another number of values than classes
    """
    node = cfg.MODEL.RETINANET.CLS_LOSS
    given, key = node.CLASS_ALPHA, CLASS_ALPHA
    if not given or node.NAME not in LOSSES or LOSSES[node.NAME].alpha is None:
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
        if not isinstance(item, (list, tuple)) or len(item) != 2 or item[0] not in alphas:
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


def add_retinanet_ext_config(cfg: CfgNode) -> None:
    """Add the plugin's keys to a Detectron2 config and register the plugin's classes.

    Args:
        cfg: as ``detectron2.config.get_cfg()`` gives it; changed in place
    """
    import retinanet_ext.modeling  # noqa: F401  registers the plugin's classes; it reads this file

    retinanet = cfg.MODEL.RETINANET

    # The classification loss by name; its parameters in the node of the same name.
    retinanet.CLS_LOSS = CfgNode({"NAME": "focal"})
    # Alpha of each class in place of one number: K values in the order of the classes, or pairs
    # [["Platelets", 0.75], ...], the other classes keeping the loss's own alpha; prepare_datasets
    # makes numbers of names. Empty: off.
    retinanet.CLS_LOSS.CLASS_ALPHA = []
    # Generate code for the loss and its gradient at the first iteration (about half a minute). On a
    # GPU with Triton the paper's losses have kernels, which are faster and used all the same.
    retinanet.CLS_LOSS.COMPILE = False
    for name, loss in LOSSES.items():
        for parameter, key in loss_parameter_keys(loss).items():
            if (name, parameter) in _DETECTRON2_KEYS:
                continue
            node = retinanet.CLS_LOSS.setdefault(name.upper(), CfgNode())
            default = loss.alpha if parameter == "alpha" else loss.parameters[parameter].default
            node[key.rsplit(".", 1)[1]] = default

    # Which anchors count in the loss: "all", or "ohem" (section 5.3).
    retinanet.SELECTION = CfgNode({"NAME": "all"})
    retinanet.SELECTION.OHEM = CfgNode()
    # Anchors in a mini-batch ("batch size" in table 1d).
    retinanet.SELECTION.OHEM.BATCH_SIZE = 128
    # IoU above which the anchor of lower loss is suppressed ("nms thr" in table 1d).
    retinanet.SELECTION.OHEM.NMS_THRESH = 0.5
    # Negatives to each positive in the mini-batch; 0.0: no constraint; 3.0: "OHEM 1:3".
    retinanet.SELECTION.OHEM.NEG_POS_RATIO = 0.0
    # Boxes the NMS compares: "anchors", or the boxes predicted for them ("predictions").
    retinanet.SELECTION.OHEM.NMS_BOXES = "anchors"
    # One mini-batch an "image", or one for all images of a "process".
    retinanet.SELECTION.OHEM.SCOPE = "image"

    # What the summed losses are divided by:
    #   "foreground_ema"    Detectron2's: moving average of the foreground anchors of a batch
    #   "foreground"        the paper's: each image by its own foreground anchors (section 4.1),
    #                       then the mean over images
    #   "foreground_batch"  foreground anchors of the batch
    #   "selected"          anchors that count (section 5.3's mini-batch)
    # A batch is that of all processes and micro-batches. Counts are never below 1.
    retinanet.LOSS_NORMALIZER = "foreground_ema"

    # Whether a box that no anchor reaches at IoU .5 gets its best anchor all the same:
    #   "all"           yes (Detectron2's)
    #   "ignored_band"  only if that anchor's IoU is in [.4, .5) (the authors' code)
    #   "none"          no
    retinanet.LOW_QUALITY_MATCHES = "all"

    # Regions to ignore (crowd, or `ignore: 1` in the annotations): a background anchor with this
    # share of its area in one is not trained on. 0.0: the region is background, as in Detectron2
    # and in the paper.
    retinanet.IGNORE_OVERLAP = 0.5

    # Start the classifier at PRIOR_PROB (pi in section 3.3); False: at probability one half.
    retinanet.PRIOR_INIT = True

    # To fine-tune to other classes: layers whose shape differs from MODEL.WEIGHTS's start anew, and
    # so do the classifier's outputs of classes that the weights do not name. Outputs of classes of
    # the same name are kept. False: such weights are refused.
    retinanet.REINIT_MISMATCHED = False

    # Generate code for backbone and head, by torch.compile, at the first iteration (minutes).
    cfg.MODEL.COMPILE = False
    # Images, features and weights with the channel as the last dimension in memory.
    cfg.MODEL.CHANNELS_LAST = False
    # In training, pad the images of a batch to sides that this many pixels divide, so that few
    # sizes occur, as generated code and cuDNN's search for algorithms like it. 0: no more than
    # the backbone needs, 32.
    cfg.INPUT.PAD_MULTIPLE = 0

    # Which grey levels of images of more than 8 bits become 0 and 255; images of 8 bits stay as
    # they are. One word or two numbers:
    #   auto         by the bit depth of each file: 65535, or less where a TIFF has fewer bits
    #   percentiles  the 0.1st and 99.9th of a sample of the training images; the run's config.yaml
    #                has the two numbers, which evaluation and Predictor then use
    #   [0, 4095]    these; what is beyond them is clipped
    # Floats, 32-bit and signed integers have no depth that says what is white: not with auto.
    cfg.INPUT.PIXEL_RANGE = [AUTO]
    # Pixels of an image; larger ones are refused. In colour each takes 15 bytes while the image is
    # read and resized, in every process that reads images. The default is where Pillow stops.
    cfg.INPUT.MAX_PIXELS = MAX_PIXELS

    # For NAME: OctaveAnchorGenerator. Anchor sides are BASE_SCALE x stride x 2^(k/n) pixels,
    # k = 0..n-1, n = SCALES_PER_OCTAVE ("#sc" in table 1c). Aspect ratios are Detectron2's key.
    cfg.MODEL.ANCHOR_GENERATOR.SCALES_PER_OCTAVE = 3
    cfg.MODEL.ANCHOR_GENERATOR.BASE_SCALE = 4.0

    # Any COCO-format data: annotation files and the folders of their images. Class names and
    # NUM_CLASSES are taken from them; DATASETS.TRAIN and DATASETS.TEST are set to them. Each is a
    # path or a list of paths: several files become one data set, their classes united by name,
    # with a folder for each or one for all.
    cfg.DATASETS.CUSTOM = CfgNode(
        {"TRAIN_JSON": "", "TRAIN_IMAGES": "", "TEST_JSON": "", "TEST_IMAGES": ""}
    )
    # Names of the classes to detect, in the order of their numbers; objects of others are
    # background. Empty: all.
    cfg.DATASETS.CUSTOM.CLASSES = []
    # What the four numbers of a bbox are in both files: COCO's "xywh", corners "xyxy", or center
    # and size "cxcywh", in pixels; or "relative_xywh", "relative_xyxy" or "relative_cxcywh", as
    # fractions of the image.
    cfg.DATASETS.CUSTOM.BOX_FORMAT = "xywh"

    # What is done about each kind of fault in DATASETS.CUSTOM's data and the sample set: "refuse"
    # them, "drop" what is faulty, with a warning that counts it, "keep" it, or put it right where
    # that can be known ("merge", "mend"); CROWD "object" takes crowd regions as objects.
    # data/check.py says what the kinds are and what each allows.
    cfg.DATASETS.CHECK = CfgNode(check.config_defaults())

    # With DATALOADER.ASPECT_RATIO_GROUPING, how many streams the samples are dealt to. Each is
    # grouped by itself, and gives IMS_PER_BATCH / streams images of one orientation to a batch.
    # 0: one stream for each micro-batch of each process, which is Detectron2's grouping by process.
    # Another number gives the same batches on any number of processes. A run keeps its own.
    cfg.DATALOADER.ASPECT_RATIO_STREAMS = 0

    # What Detectron2's samplers read and its config lacks. RandomSubsetTrainingSampler: share of
    # the training images that is drawn, once, and trained on; (0, 1].
    cfg.DATALOADER.RANDOM_SUBSET_RATIO = 1.0
    # WeightedTrainingSampler, WeightedCategoryTrainingSampler: how often an epoch holds the images
    # of a data set, on average, as pairs [["mine_train", 2.5], ...]; data sets not named: once.
    cfg.DATASETS.TRAIN_REPEAT_FACTOR = []

    # Equal runs on equal hardware give equal bits: algorithms of torch that are not deterministic
    # are replaced or refused, at some cost in time. For a SEED below 0 one is drawn.
    cfg.DETERMINISTIC = False

    # One kernel for all weights in a step of the optimizer.
    cfg.SOLVER.FUSED = False

    # With SOLVER.AMP.ENABLED: "float16" (Detectron2's, CUDA alone) or "bfloat16", which needs no
    # scaling of the loss and runs on the CPU too. Training alone; of detection: TEST.PRECISION.
    cfg.SOLVER.AMP.PRECISION = "float16"

    # Batches whose gradients make one step. IMS_PER_BATCH is the images of all of them, and a step
    # is that of one batch of as many images, the normaliser of the loss included; not so what a
    # batch has of its own: padding to its largest image, BatchNorm, OHEM.SCOPE process.
    cfg.SOLVER.ACCUMULATE = 1

    # A step whose loss or gradient is not finite on any process: "raise" an error, or "skip" it,
    # which leaves weights, optimizer and normaliser as they were, at most MAX_SKIPPED times (0: no
    # limit). Either way its likely cause is told.
    cfg.SOLVER.NON_FINITE = CfgNode({"POLICY": "raise", "MAX_SKIPPED": 0})

    # Images in the batch that the learning rate and all lengths in iterations were written for;
    # for another IMS_PER_BATCH they are scaled linearly. 0: off.
    cfg.SOLVER.REFERENCE_BATCH = 0

    # What the built-in sample set holds where DATASETS.TRAIN or DATASETS.TEST names it: the fields
    # of data.sample_set.SampleSet. Lengths in pixels, ranges as [least, most].
    cfg.DATASETS.SAMPLE = CfgNode(SampleSet.config_defaults())

    # Backbone and head in evaluation and in Predictor: "float32", "bfloat16", or "float16" (CUDA
    # alone). Boxes are decoded, scored and suppressed in float32 all the same.
    cfg.TEST.PRECISION = "float32"

    # The picture of test images with ground truth and detections, drawn after an evaluation:
    # how many images (0: no picture) and from which score on detections are drawn.
    cfg.TEST.DETECTION_GRID = CfgNode({"NUM_IMAGES": 8, "SCORE_THRESH": 0.3})
