"""The configuration keys the plugin adds to Detectron2's, and nothing else.

Detectron2's own keys keep their defaults and meaning. Focal loss reads Detectron2's
``MODEL.RETINANET.FOCAL_LOSS_ALPHA`` and ``FOCAL_LOSS_GAMMA``.
"""

from __future__ import annotations

from detectron2.config import CfgNode

from retinanet_ext.config_keys import loss_parameter_keys
from retinanet_ext.data import findings
from retinanet_ext.data.images import AUTO
from retinanet_ext.data.sample_set import SampleSet
from retinanet_ext.losses import LOSSES
from retinanet_ext.open_image import MAX_PIXELS

RENAMED_KEYS = {
    "INPUT.PAD_MULTIPLE": "INPUT.SIZE_DIVISIBILITY",
    "MODEL.RETINANET.IGNORE_OVERLAP": "MODEL.RETINANET.IGNORE_IOA_THRESH",
    "SOLVER.ACCUMULATE": "SOLVER.GRAD_ACCUM_STEPS",
    "SOLVER.FUSED": "SOLVER.FUSED_OPTIMIZER",
}
"""Old name -> new name; a config with an old name is refused with the new one."""


def add_retinanet_ext_config(cfg: CfgNode) -> None:
    """Add the plugin's keys to a Detectron2 config.

    ``docs/keys.md`` is made from this function by ``python docs/make_keys.py``: the comment above
    a key is the key's description there.

    Args:
        cfg: as ``detectron2.config.get_cfg()`` gives it; changed in place
    """
    cfg.MODEL.RETINANET.CLS_LOSS = CfgNode()
    # Classification loss: "focal", "focal_star", "cross_entropy", "hinge", one of those published
    # later ("asymmetric", "equalized_focal", "ghm_c", "poly1_focal", "quality_focal", "varifocal"),
    # or another one that is registered in retinanet_ext/losses. Its parameters are in the node of
    # the same name; focal reads MODEL.RETINANET.FOCAL_LOSS_ALPHA and
    # MODEL.RETINANET.FOCAL_LOSS_GAMMA.
    cfg.MODEL.RETINANET.CLS_LOSS.NAME = "focal"
    # Alpha per class, in place of the loss's one alpha: K numbers in [0, 1], in the order of the
    # classes; or pairs `[["Platelets", 0.75], ...]`, in YAML also `{Platelets: 0.75}`, where
    # classes that are not named keep the loss's alpha; or "auto": classes with fewer objects in the
    # training data get a higher alpha. A run saves the numbers. `[]`: off.
    cfg.MODEL.RETINANET.CLS_LOSS.CLASS_ALPHA = []
    # Factor of the classification loss, at least 0. "auto": the gradient of a positive at the
    # initial probability MODEL.RETINANET.PRIOR_PROB becomes that of cross entropy with alpha 0.75;
    # Detectron2's own `merge_from_file` accepts numbers alone. A run saves the number.
    cfg.MODEL.RETINANET.CLS_LOSS.WEIGHT = 1.0
    for name, loss in LOSSES.items():
        for parameter, key in loss_parameter_keys(loss).items():
            if not key.startswith("MODEL.RETINANET.CLS_LOSS."):  # Detectron2 has it
                continue
            node = cfg.MODEL.RETINANET.CLS_LOSS.setdefault(name.upper(), CfgNode())
            own = loss.parameters.get(parameter)
            node[key.rsplit(".", 1)[1]] = loss.alpha if own is None else own.default

    cfg.MODEL.RETINANET.SELECTION = CfgNode()
    # Which anchors count in the loss:
    # - "all": all that are not ignored
    # - "ohem": a mini-batch of the anchors with the highest loss (section 5.3)
    cfg.MODEL.RETINANET.SELECTION.NAME = "all"
    cfg.MODEL.RETINANET.SELECTION.OHEM = CfgNode()
    # Number of anchors in the mini-batch, at least 1 ("batch size" in table 1d).
    cfg.MODEL.RETINANET.SELECTION.OHEM.BATCH_SIZE = 128
    # IoU in (0, 1]. Of two anchors that overlap by more, NMS suppresses the one with the lower
    # loss ("nms thr" in table 1d).
    cfg.MODEL.RETINANET.SELECTION.OHEM.NMS_THRESH = 0.5
    # Negatives per positive in the mini-batch, at least 0. 3.0 is the 1:3 variant of table 1d;
    # 0.0: no constraint.
    cfg.MODEL.RETINANET.SELECTION.OHEM.NEG_POS_RATIO = 0.0
    # Boxes that NMS compares: the "anchors", or the boxes predicted for them ("predictions").
    cfg.MODEL.RETINANET.SELECTION.OHEM.NMS_BOXES = "anchors"
    # One mini-batch per "image", or one per "process" for all its images.
    cfg.MODEL.RETINANET.SELECTION.OHEM.SCOPE = "image"

    # Number that the summed losses are divided by. A batch is that of all processes and
    # micro-batches; counts are never below 1.
    # - "foreground_ema": moving average of the number of foreground anchors per batch, as in
    #   Detectron2
    # - "foreground": per image, its number of foreground anchors; then the mean over images, as in
    #   the paper (section 4.1)
    # - "foreground_batch": number of foreground anchors in the batch
    # - "selected": number of anchors that count (the mini-batch of section 5.3)
    cfg.MODEL.RETINANET.LOSS_NORMALIZER = "foreground_ema"

    # Whether a ground-truth box with no anchor at IoU >= 0.5 is matched to its best anchor anyway:
    # - "all": yes, as in Detectron2
    # - "ignored_band": only if the IoU of that anchor is in [0.4, 0.5), as in the authors' code
    # - "none": no
    cfg.MODEL.RETINANET.LOW_QUALITY_MATCHES = "all"

    # Share of a background anchor's area, in [0, 1], that an ignore region (a crowd region, or
    # `ignore: 1` in the annotations) must cover for the anchor to be ignored. 0.0: off; ignore
    # regions are background, as in Detectron2 and in the paper.
    cfg.MODEL.RETINANET.IGNORE_IOA_THRESH = 0.5

    # Start the classifier at probability MODEL.RETINANET.PRIOR_PROB (pi in section 3.3). False:
    # start it at probability 0.5.
    cfg.MODEL.RETINANET.PRIOR_INIT = True

    # Fine-tune to other classes. Layers whose shape differs from that in MODEL.WEIGHTS start anew,
    # and so do the classifier's outputs for classes that the weights do not name. Outputs for
    # classes of the same name are kept. False: such weights are refused.
    # See docs/training.md#classes-of-weights.
    cfg.MODEL.RETINANET.REINIT_MISMATCHED = False

    # Clip candidates to the image before non-maximum suppression, as torchvision and MMDetection
    # do. False: clip the detections that it keeps, as in Detectron2.
    cfg.MODEL.RETINANET.CLIP_BEFORE_NMS = False

    cfg.MODEL.TIMM = CfgNode()
    # Name of a model of timm, such as "mobilenetv2_100"; `timm.list_models()` lists them. It needs
    # features at strides 8, 16 and 32, and images of any size. See docs/fine_tuning.md.
    cfg.MODEL.TIMM.NAME = ""
    # What fills the backbone when a training starts: a file with timm's names, or "pretrained",
    # which timm downloads. Not read when a run is resumed or evaluated, nor where MODEL.WEIGHTS is
    # set, because those weights hold the backbone too. Empty: random weights.
    cfg.MODEL.TIMM.WEIGHTS = ""
    # What the backbone's BatchNorm layers do in training. Other norms stay as they are.
    # - "EvalBN": they keep the mean and variance of the weights, and train weight and bias
    # - "FrozenBN": they keep all four, as Detectron2's FrozenBN
    # - "BN": they normalise by each batch, which random weights need
    cfg.MODEL.TIMM.NORM = "EvalBN"

    # Compile with torch.compile, at the first iteration (minutes): in training the whole step from
    # the padded images to the losses, labels of anchors included, and in inference backbone and
    # head. With MODEL.RETINANET.SELECTION.NAME "ohem", whose search branches on values, and with a
    # loss of more than x_t, backbone and head in training too. See
    # docs/speed.md#torchcompile-tracing-and-export.
    cfg.MODEL.COMPILE = False
    # Record the compiled training step as CUDA graphs, one per size of images, which saves the time
    # to launch kernels. Set INPUT.SIZE_DIVISIBILITY too, unless all images have one size.
    cfg.MODEL.CUDA_GRAPHS = False
    # Store images, features and weights in torch's channels_last memory format.
    cfg.MODEL.CHANNELS_LAST = False
    # Pad training images to sides that are a multiple of this many pixels, so that batches have few
    # sizes: compiled code and cuDNN's search for algorithms are slow at each new size. It must be a
    # multiple of the backbone's own, 32. 0: pad to that only.
    cfg.INPUT.SIZE_DIVISIBILITY = 0

    # Augmentations of the training images. Boxes and ignore regions follow. INPUT.RANDOM_FLIP and
    # INPUT.CROP are Detectron2's.
    # Range of a random factor on the resized image, such as [0.5, 2.0]. A larger image is cropped
    # to its original size at a random place ("large-scale jitter", arXiv 2012.07177).
    # [1.0, 1.0]: off.
    cfg.INPUT.SCALE_JITTER = [1.0, 1.0]
    # Largest relative change, in [0, 1], of brightness, contrast and, with INPUT.FORMAT "RGB" or
    # "BGR", saturation. 0.0: off.
    cfg.INPUT.COLOR_JITTER = 0.0
    # Flip images upside down with probability 0.5, as for views from above.
    cfg.INPUT.VERTICAL_FLIP = False
    # Turn each image by 0, 90, 180 or 270 degrees, at random.
    cfg.INPUT.QUARTER_TURNS = False

    # Grey levels that become 0 and 255 in images of more than 8 bits; 8-bit images stay as they
    # are. One word or two numbers, see docs/check_data.md#images:
    # - "auto": by the bit depth of each file: 0 and 65535, or less where a TIFF has fewer bits.
    #   Floats, 32-bit and signed integers have no such depth and are refused
    # - "percentiles": the 0.1st and 99.9th percentile of a sample of the training images. The
    #   run's config.yaml holds the two numbers, which evaluation and Predictor then use
    # - `[0, 4095]`: these two numbers; levels beyond them are clipped
    cfg.INPUT.PIXEL_RANGE = [AUTO]
    # Largest number of pixels per image; larger images are refused. Each pixel of a colour image
    # takes 15 bytes while it is read and resized, in every process that reads images. The default
    # is Pillow's own limit.
    cfg.INPUT.MAX_PIXELS = MAX_PIXELS

    # Number n of anchor scales per octave, 1 to 64 ("#sc" in table 1c). Anchor sides are
    # BASE_SCALE x stride x 2^(k/n) pixels, k = 0..n-1; MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS is
    # Detectron2's.
    cfg.MODEL.ANCHOR_GENERATOR.SCALES_PER_OCTAVE = 3
    # Side of the smallest anchor on each level, in strides of the level; above 0.
    cfg.MODEL.ANCHOR_GENERATOR.BASE_SCALE = 4.0

    # Your own data: annotations in COCO's format, YOLO labels or Pascal VOC XML. Class names and
    # NUM_CLASSES are taken from them; DATASETS.TRAIN and DATASETS.TEST are set to them.
    cfg.DATASETS.CUSTOM = CfgNode()
    # Annotation file of the training data: a json in COCO's format, a YOLO `data.yaml` (its train
    # images) or a folder of Pascal VOC XML. See docs/check_data.md#yolo-labels-and-pascal-voc-xml.
    # A list of files becomes one data set, with their classes united by name.
    # See docs/check_data.md#several-files-and-some-of-the-classes.
    cfg.DATASETS.CUSTOM.TRAIN_JSON = ""
    # Folder of the training images; of several files one folder for all, or a list with a folder
    # per file. Empty: a `data.yaml` and a Pascal VOC folder say where their images are.
    cfg.DATASETS.CUSTOM.TRAIN_IMAGES = ""
    # Annotation file of the test data, or a list of files. Of a `data.yaml` its val images, or its
    # test images if there is no val.
    cfg.DATASETS.CUSTOM.TEST_JSON = ""
    # Folder of the test images, or a list with a folder per file.
    cfg.DATASETS.CUSTOM.TEST_IMAGES = ""
    # Names of the classes to detect, in the order of their numbers. Objects of other classes are
    # background. `[]`: all classes.
    cfg.DATASETS.CUSTOM.CLASSES = []
    # Meaning of the four numbers of every `bbox`, in training and test data in COCO's format. In
    # pixels: "xywh" (left, top, width, height; COCO's), "xyxy" (two corners) or "cxcywh" (center
    # and size). As fractions of the image: "relative_xywh", "relative_xyxy" or "relative_cxcywh".
    # YOLO labels are "relative_cxcywh" unless another relative format is set.
    # See docs/check_data.md#annotations-as-tools-export-them.
    cfg.DATASETS.CUSTOM.BOX_FORMAT = "xywh"

    # What is done about each kind of finding in the data of DATASETS.CUSTOM and in the sample set.
    # Each kind is explained in docs/check_data.md#what-is-found-and-what-happens-then.
    # - "refuse": stop before training
    # - "drop": leave out what is faulty, and warn with a count
    # - "keep": use it
    # - "merge", "mend": correct it
    # - "object": take crowd regions as objects
    cfg.DATASETS.CHECK = CfgNode(findings.config_defaults())

    # Number of streams that DATALOADER.ASPECT_RATIO_GROUPING deals the samples to, 0 to 65536. Each
    # stream is grouped separately and gives IMS_PER_BATCH / streams images of one orientation to a
    # batch. With a number above 0 the batches are the same on any number of processes. 0: one
    # stream per micro-batch and process, as in Detectron2. A resumed run keeps its number.
    cfg.DATALOADER.ASPECT_RATIO_STREAMS = 0

    # Share of the training images, in (0, 1], that is drawn once and trained on.
    cfg.DATALOADER.RANDOM_SUBSET_RATIO = 1.0
    # How many times per epoch, on average, the images of a data set are drawn, as pairs
    # `[["mine_train", 2.5], ...]`. Data sets that are not named: once.
    cfg.DATASETS.TRAIN_REPEAT_FACTOR = []

    # Make runs bitwise reproducible on the same hardware, at some cost in time: non-deterministic
    # algorithms of torch are replaced or refused. If `SEED` < 0, a seed is drawn and logged.
    cfg.DETERMINISTIC = False

    # Optimizer: "SGD", or "AdamW", whose usual BASE_LR is 0.0001 to 0.001 and WEIGHT_DECAY 0.05.
    # AdamW does not decay norms and biases unless WEIGHT_DECAY_NORM or WEIGHT_DECAY_BIAS is set.
    cfg.SOLVER.OPTIMIZER = "SGD"
    # Share of the iterations, in [0, 1), that LR_SCHEDULER_NAME "WarmupFlatCosineLR" trains at
    # BASE_LR, before the rate falls along half a cosine to BASE_LR_END.
    cfg.SOLVER.FLAT_RATIO = 0.5
    cfg.SOLVER.EMA = CfgNode()
    # Decay per iteration, in [0, 1), of a moving average of the weights, which is what is evaluated
    # and saved. 0.0: off.
    cfg.SOLVER.EMA.DECAY = 0.0
    # Update all weights in one fused kernel per optimizer step.
    cfg.SOLVER.FUSED_OPTIMIZER = False

    # Precision of autocast in training: "float16" (Detectron2's; CUDA only), or "bfloat16", which
    # needs no loss scaling and also runs on a CPU. "auto" is "bfloat16" where the device has
    # instructions for it (a CPU: AVX512_BF16 or AMX), else "float16" on a GPU and float32 on a CPU.
    # TEST.PRECISION is the precision of detection.
    cfg.SOLVER.AMP.PRECISION = "float16"

    # Number of micro-batches per optimizer step, 1 to 65536. IMS_PER_BATCH counts the images of all
    # of them. A step equals that of one batch of as many images, including the loss normaliser,
    # except for what depends on a single micro-batch: padding to its largest image, BatchNorm,
    # MODEL.RETINANET.SELECTION.OHEM.SCOPE "process", and the gradient density of the loss "ghm_c".
    cfg.SOLVER.GRAD_ACCUM_STEPS = 1

    # Iterations between records of which anchors carry the loss of the batch and its gradient:
    # positives, hard and easy negatives, by class and level (figure 4 over the training). They are
    # lines of loss_film.json. It needs MODEL.COMPILE False and a loss of x_t. 0: off. See
    # docs/advise.md.
    cfg.SOLVER.LOSS_FILM_PERIOD = 0

    cfg.SOLVER.BEST = CfgNode()
    # Metric of the best model, as metrics.json names it, such as "bbox/AP", "bbox/AP50",
    # "bbox/AP-<class>" or, with TEST.LOSS, "validation/total_loss". The weights of the best
    # evaluation are kept in model_best.pth. With several data sets in DATASETS.TEST the name of one
    # comes first: "mine_val/bbox/AP". "": off. See docs/training.md#the-best-model.
    cfg.SOLVER.BEST.METRIC = ""
    cfg.SOLVER.EARLY_STOP = CfgNode()
    # Number of evaluations in a row without a better SOLVER.BEST.METRIC after which the run ends.
    # 0: it runs to SOLVER.MAX_ITER.
    cfg.SOLVER.EARLY_STOP.PATIENCE = 0

    cfg.SOLVER.NON_FINITE = CfgNode()
    # What is done about a step whose loss or gradient is infinite or NaN on any process: "raise" an
    # error, or "skip" the step and leave weights, optimizer and normaliser unchanged. Its likely
    # cause is explained in either case.
    cfg.SOLVER.NON_FINITE.POLICY = "raise"
    # Largest number of steps that are skipped; the next one ends the run. 0: no limit.
    cfg.SOLVER.NON_FINITE.MAX_SKIPPED = 0

    # Images per batch that the learning rate and the lengths in iterations are written for. For
    # another IMS_PER_BATCH they are scaled linearly, except that the learning rate of "AdamW" is
    # scaled by the square root (arXiv 2205.10287). 0: off.
    cfg.SOLVER.REFERENCE_BATCH = 0

    # The built-in sample set, drawn where DATASETS.TRAIN or DATASETS.TEST names it. Lengths are in
    # pixels, ranges are `[least, most]`.
    cfg.DATASETS.SAMPLE = CfgNode(SampleSet.config_defaults())

    # Precision of backbone and head in evaluation and in Predictor: "float32", "bfloat16", or
    # "float16" (CUDA only). Decoding, scoring and NMS stay in float32.
    cfg.TEST.PRECISION = "float32"

    # Evaluate the validation loss beside AP: the training losses on the test data. They are in
    # metrics.json as validation/loss_cls, validation/loss_box_reg and validation/total_loss.
    cfg.TEST.LOSS = False

    cfg.TEST.DETECTION_GRID = CfgNode()
    # Number of test images in the picture of ground truth and detections that is drawn after an
    # evaluation, 0 to 10000. 0: no picture.
    cfg.TEST.DETECTION_GRID.NUM_IMAGES = 8
    # Lowest score of the detections that are drawn in that picture, at least 0.
    cfg.TEST.DETECTION_GRID.SCORE_THRESH = 0.3

    for old, new in RENAMED_KEYS.items():
        cfg.register_renamed_key(old, new)
