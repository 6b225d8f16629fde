"""Legal but rarely intended settings are warned of; the project's own configs give no warning."""

from pathlib import Path

import pytest

from retinanet_ext.config_keys import COUNTS_ONLY_IF, all_keys
from retinanet_ext.data import prepare_datasets
from retinanet_ext.engine.config_load import load_config
from retinanet_ext.engine.config_warnings import (
    WAIT_VARIABLES,
    config_warnings,
    ineffective_keys,
    model_warnings,
    shared_cpu_warnings,
    training_warnings,
)
from training import run_train_net

R50 = "configs/retinanet_R50_FPN.yaml"
R18 = "configs/small_R18_FPN.yaml"
MOBILENET = "configs/small_mobilenetv2_FPN.yaml"
BGR_STD = "[57.375, 57.120, 58.395]"
FAIR = "detectron2://ImageNetPretrained/FAIR/X-101-32x8d.pkl"
TORCHVISION = "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
RGB = [
    *("INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", "[123.675, 116.28, 103.53]"),
    *("MODEL.PIXEL_STD", "[58.395, 57.12, 57.375]"),
]


def warnings_of(config, *opts, num_images=100, num_crowd_regions=0, weights=None):
    cfg = load_config(config, opts)
    weights = cfg.MODEL.WEIGHTS or cfg.MODEL.TIMM.WEIGHTS if weights is None else weights
    return [
        *model_warnings(cfg, weights),
        *training_warnings(cfg, weights, num_images, num_crowd_regions),
    ]


@pytest.mark.parametrize(
    "file",
    [path for path in Path("configs").glob("*.yaml") if path.stem != "base_coco"],
    ids=lambda p: p.stem,
)
def test_the_projects_configs_fit_also_when_saved(file, tmp_path):
    num_images = 118287 if "retinanet" in file.stem else 100
    assert warnings_of(str(file), num_images=num_images) == []
    cfg = load_config(str(file))
    (tmp_path / "config.yaml").write_text(cfg.dump())
    assert warnings_of(str(tmp_path / "config.yaml"), num_images=num_images) == []


WARNINGS = {
    "the rate for 16 images with 2": (
        R50,
        ["SOLVER.IMS_PER_BATCH", "2"],
        ["BASE_LR 0.01 is 8 times", "IMS_PER_BATCH 2, 0.00125", "REFERENCE_BATCH"],
    ),
    "all anchors as the normaliser": (
        R18,
        ["MODEL.RETINANET.LOSS_NORMALIZER", "selected"],
        ["LOSS_NORMALIZER selected with SELECTION.NAME all", "nearly all of them background"],
    ),
    "a rate that is too low": (
        R50,
        ["SOLVER.BASE_LR", "0.001"],
        ["BASE_LR 0.001 is 1/10 of", "IMS_PER_BATCH 16, 0.01", "slow"],
    ),
    "no learning": (R50, ["SOLVER.BASE_LR", "0"], ["SOLVER.BASE_LR 0 ", "nothing is learned"]),
    "classes of another architecture": (
        R50,
        ["MODEL.ROI_HEADS.NUM_CLASSES", "3"],
        ["MODEL.ROI_HEADS.NUM_CLASSES 3 has no effect", "MODEL.RETINANET.NUM_CLASSES 80 is what"],
    ),
    "a renamed key": (
        R50,
        ["MODEL.RPN.PRE_NMS_TOPK_TEST", "100"],
        ["MODEL.RETINANET.TOPK_CANDIDATES_TEST 1000 is what counts"],
    ),
    "another architecture's key that has no likeness": (
        R50,
        ["MODEL.MASK_ON", "True"],
        ["MODEL.MASK_ON True has no effect: RetinaNetExt does not read it"],
    ),
    "MSRA weights with a standard deviation": (
        R50,
        ["MODEL.PIXEL_STD", BGR_STD],
        ["MODEL.PIXEL_STD [57.375, 57.12, 58.395] does not fit", "trained with", "[1.0, 1.0, 1.0]"],
    ),
    "FAIR's weights without a standard deviation": (
        R50,
        ["MODEL.WEIGHTS", FAIR],
        ["MODEL.PIXEL_STD [1.0, 1.0, 1.0] does not fit", FAIR, "[57.375, 57.12, 58.395]"],
    ),
    "torchvision's weights in BGR": (
        R50,
        ["MODEL.WEIGHTS", TORCHVISION],
        ["INPUT.FORMAT BGR, MODEL.PIXEL_MEAN", "trained with INPUT.FORMAT RGB"],
    ),
    "torchvision's RetinaNet in another config": (
        R50,
        [*RGB, "MODEL.WEIGHTS", "https://host/retinanet_resnet50_fpn_v2_coco-5905b1c5.pth"],
        [
            "ANCHOR_GENERATOR.NAME OctaveAnchorGenerator, MODEL.ANCHOR_GENERATOR.OFFSET 0.5 does",
            "trained with MODEL.ANCHOR_GENERATOR.NAME TorchvisionAnchorGenerator",
        ],
    ),
    "torchvision's ImageNet weights in another config": (
        R50,
        ["MODEL.WEIGHTS", "resnet50-11ad3fa6.pth"],
        ["INPUT.FORMAT BGR, MODEL.PIXEL_MEAN", "trained with INPUT.FORMAT RGB"],
    ),
    "MMDetection's weights in another config": (
        R50,
        [*RGB, "MODEL.WEIGHTS", "retinanet_r50_fpn_1x_coco_20200130-c2398f9e.pth"],
        ["OFFSET 0.5 does not fit", "trained with MODEL.ANCHOR_GENERATOR.OFFSET 0.0: boxes"],
    ),
    "MMDetection's weights of the style caffe": (
        "configs/mmdet_retinanet_R50_FPN.yaml",
        [
            *("MODEL.WEIGHTS", "retinanet_r50_caffe_fpn_1x_coco_20200531-f11027c5.pth"),
            *("INPUT.FORMAT", "BGR", "MODEL.PIXEL_MEAN", "[103.53, 116.28, 123.675]"),
            *("MODEL.PIXEL_STD", "[1.0, 1.0, 1.0]"),
        ],
        ["STRIDE_IN_1X1 False does not fit", "STRIDE_IN_1X1 True"],
    ),
    "a mean in the other order": (
        R18,
        ["INPUT.FORMAT", "RGB"],
        ["PIXEL_MEAN [103.53, 116.28, 123.675] is in the order BGR, but INPUT.FORMAT is RGB"],
    ),
    "raw pixels into random weights": (
        R18,
        ["MODEL.PIXEL_STD", "[1.0, 1.0, 1.0]", "MODEL.PIXEL_MEAN", "[0.0, 0.0, 0.0]"],
        ["PIXEL_STD [1.0, 1.0, 1.0]", "random weights", "57.375"],
    ),
    "frozen random layers": (R18, ["MODEL.BACKBONE.FREEZE_AT", "2"], ["FREEZE_AT 2", "random"]),
    "frozen statistics of random layers on the CPU": (
        R18,
        ["MODEL.RESNETS.NORM", "FrozenBN", "MODEL.DEVICE", "cpu"],
        ["FrozenBN normalises nothing", "BN, naiveSyncBN or GN"],
    ),
    "timm's weights in BGR": (
        MOBILENET,
        ["INPUT.FORMAT", "BGR", "MODEL.PIXEL_MEAN", "[103.53, 116.28, 123.675]"],
        [
            "INPUT.FORMAT BGR, MODEL.PIXEL_MEAN [103.53, 116.28, 123.675] does not fit",
            "trained with INPUT.FORMAT RGB, MODEL.PIXEL_MEAN [123.675, 116.28, 103.53]",
        ],
    ),
    "timm's weights of another mean": (
        MOBILENET,
        ["MODEL.TIMM.NAME", "resnetv2_50"],
        ["MODEL.PIXEL_STD [58.395, 57.12, 57.375]", "[127.5, 127.5, 127.5]"],
    ),
    "frozen statistics of random timm layers": (
        MOBILENET,
        ["MODEL.TIMM.WEIGHTS", ""],
        ["MODEL.TIMM.NORM EvalBN normalises nothing", "set BN, or name weights"],
    ),
    "a key of Detectron2's ResNet beside timm's backbone": (
        MOBILENET,
        ["MODEL.RESNETS.NORM", "BN"],
        ["MODEL.RESNETS.NORM BN has no effect with MODEL.BACKBONE.NAME build_retinanet_timm_fpn"],
    ),
    "timm's weights beside those of the whole model": (
        MOBILENET,
        ["MODEL.WEIGHTS", "mine.pth"],
        ["MODEL.TIMM.WEIGHTS pretrained is not read, because MODEL.WEIGHTS mine.pth"],
    ),
    "a warm-up without an end": (
        R18,
        ["SOLVER.WARMUP_ITERS", "451"],
        ["WARMUP_ITERS 451 is longer than SOLVER.MAX_ITER 450"],
    ),
    "a warm-up longer than the flat part": (
        MOBILENET,
        ["SOLVER.WARMUP_ITERS", "151"],
        ["WARMUP_ITERS 151 is longer than the schedule's flat part, 150", "never reaches"],
    ),
    "steps after the end": (R50, ["SOLVER.MAX_ITER", "70000"], ["STEPS [80000] lie beyond"]),
    "nothing saved": (
        R18,
        ["SOLVER.CHECKPOINT_PERIOD", "451"],
        ["CHECKPOINT_PERIOD 451", "nothing is saved before the end"],
    ),
    "nothing evaluated": (R18, ["TEST.EVAL_PERIOD", "451"], ["EVAL_PERIOD 451"]),
}


@pytest.mark.parametrize(("config", "opts", "expected"), WARNINGS.values(), ids=WARNINGS)
def test_one_line_names_key_value_and_remedy(config, opts, expected):
    (line,) = warnings_of(config, *opts)
    assert "\n" not in line
    assert [text for text in expected if text not in line] == []


QUIET = {
    "twice the usual rate": (R50, ["SOLVER.BASE_LR", "0.02"]),
    "a rate that is scaled": (
        R50,
        ["SOLVER.IMS_PER_BATCH", "2", "SOLVER.REFERENCE_BATCH", "2"],
    ),
    "another architecture that reads its keys": (
        R18,
        ["MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "MODEL.ROI_HEADS.NUM_CLASSES", "3"],
    ),
    "torchvision's weights with their mean": (R50, ["MODEL.WEIGHTS", TORCHVISION, *RGB]),
    "a mean that is rounded": (R50, ["MODEL.PIXEL_MEAN", "[104, 116, 124]"]),
    "unknown weights with raw pixels": (R50, ["MODEL.WEIGHTS", "mine.pth"]),
}


@pytest.mark.parametrize(("config", "opts"), QUIET.values(), ids=QUIET)
def test_no_word_where_it_fits(config, opts):
    assert warnings_of(config, *opts) == []


CLS = "MODEL.RETINANET.CLS_LOSS."
OHEM = "MODEL.RETINANET.SELECTION."
WITHOUT_EFFECT = [
    ([CLS + "NAME", "focal_star", "MODEL.RETINANET.FOCAL_LOSS_GAMMA", "5.0"], CLS + "NAME focal"),
    ([OHEM + "OHEM.BATCH_SIZE", "512"], OHEM + "NAME ohem"),
    (["MODEL.META_ARCHITECTURE", "RetinaNet", CLS + "NAME", "hinge"], "RetinaNetExt"),
    (["MODEL.META_ARCHITECTURE", "RetinaNet", OHEM + "OHEM.BATCH_SIZE", "64"], "RetinaNetExt"),
    (
        [
            *("MODEL.ANCHOR_GENERATOR.NAME", "DefaultAnchorGenerator"),
            *("MODEL.ANCHOR_GENERATOR.BASE_SCALE", "2.0"),
        ],
        "MODEL.ANCHOR_GENERATOR.NAME OctaveAnchorGenerator",
    ),
    (["MODEL.TIMM.NORM", "BN"], "MODEL.BACKBONE.NAME build_retinanet_timm_fpn_backbone"),
    (["SOLVER.AMP.PRECISION", "bfloat16"], "SOLVER.AMP.ENABLED True"),
    (["SOLVER.NON_FINITE.MAX_SKIPPED", "9"], "SOLVER.NON_FINITE.POLICY skip"),
    (["SOLVER.STEPS", "(100,)"], "SOLVER.LR_SCHEDULER_NAME WarmupMultiStepLR"),
    (
        [
            *("MODEL.RETINANET.BBOX_REG_LOSS_TYPE", "giou"),
            *("MODEL.RETINANET.SMOOTH_L1_LOSS_BETA", "0.2"),
        ],
        "MODEL.RETINANET.BBOX_REG_LOSS_TYPE smooth_l1",
    ),
    (["DATASETS.SAMPLE.NUM_TRAIN", "9"], "DATASETS.TRAIN retinanet_ext_sample_train"),
    (["DATALOADER.REPEAT_THRESHOLD", "0.5"], "DATALOADER.SAMPLER_TRAIN RepeatFactor"),
    (["DATASETS.CUSTOM.BOX_FORMAT", "xyxy"], "DATASETS.CUSTOM.TRAIN_JSON set"),
    (
        ["SOLVER.WARMUP_ITERS", "0", "SOLVER.WARMUP_FACTOR", "0.5"],
        "SOLVER.WARMUP_ITERS set",
    ),
    (
        ["TEST.DETECTION_GRID.NUM_IMAGES", "0", "TEST.DETECTION_GRID.SCORE_THRESH", "0.5"],
        "TEST.DETECTION_GRID.NUM_IMAGES set",
    ),
]


@pytest.mark.parametrize(("opts", "counts_with"), WITHOUT_EFFECT)
def test_a_key_that_has_no_effect_is_named_with_the_one_that_would_make_it_count(opts, counts_with):
    key, value = opts[-2:]
    (line,) = model_warnings(load_config(R18, opts), "mine.pth")
    assert line.startswith(f"{key} {value} has no effect with ") and counts_with in line


def test_conditions_name_keys_that_exist():
    cfg = load_config(R18)
    for start, (other, _) in COUNTS_ONLY_IF.items():
        assert other in all_keys(cfg)
        assert any(key == start or key.startswith(start) for key in all_keys(cfg)), start


def test_keys_of_training_are_not_missed_in_an_evaluation():
    cfg = load_config(R18, ["SOLVER.AMP.PRECISION", "bfloat16"])
    assert ineffective_keys(cfg) and not ineffective_keys(cfg, eval_only=True)


def test_published_weights_have_anchors_at_the_corner():
    weights = "detectron2://COCO-Detection/retinanet_R_50_FPN_3x/190397829/model_final_5bd44e.pkl"
    cfg = load_config(R50)
    (line,) = model_warnings(cfg, weights)
    assert "MODEL.ANCHOR_GENERATOR.OFFSET 0.5 does not fit" in line
    cfg = load_config(R50, ["MODEL.ANCHOR_GENERATOR.OFFSET", "0.0"])
    assert model_warnings(cfg, weights) == []


def test_weights_that_are_resumed_are_not_random():
    assert warnings_of(R18, "MODEL.BACKBONE.FREEZE_AT", "2", weights="output/model_final.pth") == []


def test_images_that_are_not_seen():
    (line,) = warnings_of(R18, "SOLVER.MAX_ITER", "200", num_images=1601)
    assert "SOLVER.MAX_ITER 200 batches of 8 are 1600 images" in line and "1601" in line
    assert warnings_of(R18, "SOLVER.MAX_ITER", "200", num_images=1600) == []


def test_crowd_regions_as_background():
    off = ["MODEL.RETINANET.IGNORE_IOA_THRESH", "0.0"]
    (line,) = warnings_of(R50, *off, num_crowd_regions=7)
    assert line.startswith("7 crowd") and "MODEL.RETINANET.IGNORE_IOA_THRESH 0.5" in line
    assert warnings_of(R50, *off) == []
    assert warnings_of(R50, "MODEL.RETINANET.IGNORE_IOA_THRESH", "0.5", num_crowd_regions=7) == []
    stock = ["MODEL.META_ARCHITECTURE", "RetinaNet"]
    (line,) = warnings_of(R18, *stock, num_crowd_regions=7)
    assert "META_ARCHITECTURE RetinaNetExt" in line


@pytest.mark.parametrize(
    ("limit", "eval_only", "expected"),
    [
        (12, False, []),
        (7, True, ["custom_test: images with more objects than TEST.DETECTIONS_PER_IMAGE 7: 2, "]),
        (
            10,
            False,
            [
                "custom_train: images with more objects than TEST.DETECTIONS_PER_IMAGE 10: 3, the "
                "fullest with 12: trained on in full, but no more than 10 are found per image",
            ],
        ),
    ],
)
def test_images_with_more_objects_than_are_returned(limit, eval_only, expected):
    cfg = load_config(
        "tests/engine/tiny.yaml", ["TEST.DETECTIONS_PER_IMAGE", str(limit), "MODEL.DEVICE", "cpu"]
    )
    prepare_datasets(cfg, eval_only=eval_only)
    lines = config_warnings(cfg, "", eval_only=eval_only)
    found = [line for line in lines if "DETECTIONS_PER_IMAGE" in line]
    assert len(found) == len(expected)
    assert all(line.startswith(start) for line, start in zip(found, expected, strict=True))
    assert all("bounds recall and AP" in line for line in found)


def test_the_launching_process_warns_once(tmp_path, restore_logging, capfd):
    """Two processes train; the lines come from the one that started them."""
    flags = ["--config-file", "tests/engine/tiny.yaml", "--num-gpus", "2"]
    opts = ["OUTPUT_DIR", str(tmp_path), "SOLVER.MAX_ITER", "1", "MODEL.RPN.NMS_THRESH", "0.6"]
    opts += ["SOLVER.REFERENCE_BATCH", "4", "MODEL.DEVICE", "cpu"]
    assert run_train_net(*flags, *opts) == 0
    output = capfd.readouterr().out
    assert output.count("MODEL.RPN.NMS_THRESH 0.6 has no effect") == 1
    assert output.count("SOLVER.BASE_LR: 0.02 -> 0.01") == 1
    assert "REFERENCE_BATCH: 2" in (tmp_path / "config.yaml").read_text()
    assert "MAX_ITER: 2\n" in (tmp_path / "config.yaml").read_text()


def test_a_cpu_that_others_use_is_warned_of_unless_waiting_is_chosen(monkeypatch):
    cfg = load_config(R18, ["MODEL.DEVICE", "cpu"])
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr("torch.get_num_threads", lambda: 4)
    for name in WAIT_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.getloadavg", lambda: (1.9, 0, 0))
    assert shared_cpu_warnings(cfg) == []
    monkeypatch.setattr("os.getloadavg", lambda: (2.1, 0, 0))
    (line,) = shared_cpu_warnings(cfg)
    assert "load 2.1 on 4 cores" in line and "OMP_WAIT_POLICY=passive" in line
    monkeypatch.setenv("GOMP_SPINCOUNT", "1000")
    assert shared_cpu_warnings(cfg) == []
