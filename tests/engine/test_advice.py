"""What is allowed and rarely meant is said before a run; the project's own configs say nothing."""

import pytest

from retinanet_ext.engine import main
from retinanet_ext.engine.advice import advise_on_model, advise_on_training
from retinanet_ext.engine.config import load_config

R50 = "configs/retinanet_R50_FPN.yaml"
R18 = "configs/small_R18_FPN.yaml"
BGR_STD = "[57.375, 57.120, 58.395]"
FAIR = "detectron2://ImageNetPretrained/FAIR/X-101-32x8d.pkl"
TORCHVISION = "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
RGB = [
    *("INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", "[123.675, 116.28, 103.53]"),
    *("MODEL.PIXEL_STD", "[58.395, 57.12, 57.375]"),
]


def advise(config, *opts, num_images=100, num_crowd_regions=0, weights=None):
    cfg, _ = load_config(config, opts)
    weights = cfg.MODEL.WEIGHTS if weights is None else weights
    return [
        *advise_on_model(cfg, weights),
        *advise_on_training(cfg, weights, num_images, num_crowd_regions),
    ]


@pytest.mark.parametrize("name", ["R50_FPN", "R101_FPN", "X101_FPN"])
def test_the_papers_configs_fit(name):
    assert advise(f"configs/retinanet_{name}.yaml", num_images=118287) == []


@pytest.mark.parametrize("name", ["quickstart", "small_R18_FPN"])
def test_the_small_configs_fit(name):
    assert advise(f"configs/{name}.yaml") == []


def test_a_config_that_was_saved_fits(tmp_path):
    cfg, _ = load_config(R50)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    assert advise(str(tmp_path / "config.yaml")) == []


ADVICE = {
    "the rate for 16 images with 2": (
        R50,
        ["SOLVER.IMS_PER_BATCH", "2"],
        ["BASE_LR 0.01 is 8 times", "IMS_PER_BATCH 2, 0.00125", "REFERENCE_BATCH"],
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
    "threshold of another architecture": (
        R50,
        ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.5"],
        ["RetinaNetExt does not read it", "MODEL.RETINANET.SCORE_THRESH_TEST 0.05 is what counts"],
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
    "MSRA weights in RGB": (R50, ["INPUT.FORMAT", "RGB"], ["INPUT.FORMAT RGB does not fit", "BGR"]),
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
    "frozen statistics of random layers": (
        R18,
        ["MODEL.RESNETS.NORM", "FrozenBN"],
        ["FrozenBN normalises nothing", "BN, SyncBN or GN"],
    ),
    "frozen statistics of random layers on the CPU": (
        R18,
        ["MODEL.RESNETS.NORM", "FrozenBN", "MODEL.DEVICE", "cpu"],
        ["FrozenBN normalises nothing", "BN, naiveSyncBN or GN"],
    ),
    "a warm-up without an end": (
        R18,
        ["SOLVER.WARMUP_ITERS", "451"],
        ["WARMUP_ITERS 451 is longer than SOLVER.MAX_ITER 450"],
    ),
    "steps after the end": (R50, ["SOLVER.MAX_ITER", "70000"], ["STEPS [80000] lie beyond"]),
    "nothing saved": (
        R18,
        ["SOLVER.CHECKPOINT_PERIOD", "451"],
        ["CHECKPOINT_PERIOD 451", "nothing is saved before the end"],
    ),
    "nothing evaluated": (R18, ["TEST.EVAL_PERIOD", "451"], ["EVAL_PERIOD 451"]),
}


@pytest.mark.parametrize(("config", "opts", "expected"), ADVICE.values(), ids=ADVICE)
def test_one_line_names_key_value_and_remedy(config, opts, expected):
    (line,) = advise(config, *opts)
    assert "\n" not in line
    assert [text for text in expected if text not in line] == []


QUIET = {
    "twice the usual rate": (R50, ["SOLVER.BASE_LR", "0.02"]),
    "half of it": (R50, ["SOLVER.BASE_LR", "0.005"]),
    "a rate that is scaled": (
        R50,
        ["SOLVER.IMS_PER_BATCH", "2", "SOLVER.REFERENCE_BATCH", "2"],
    ),
    "another architecture that reads its keys": (
        R50,
        ["MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "MODEL.ROI_HEADS.NUM_CLASSES", "3"],
    ),
    "torchvision's weights with their mean": (R50, ["MODEL.WEIGHTS", TORCHVISION, *RGB]),
    "a mean that is rounded": (R50, ["MODEL.PIXEL_MEAN", "[104, 116, 124]"]),
    "unknown weights with raw pixels": (R50, ["MODEL.WEIGHTS", "mine.pth"]),
    "steps after the end of a schedule without them": (R18, ["SOLVER.STEPS", "(1000,)"]),
}


@pytest.mark.parametrize(("config", "opts"), QUIET.values(), ids=QUIET)
def test_no_word_where_it_fits(config, opts):
    assert advise(config, *opts) == []


def test_weights_that_are_resumed_are_not_random():
    assert advise(R18, "MODEL.BACKBONE.FREEZE_AT", "2", weights="output/model_final.pth") == []


def test_images_that_are_not_seen():
    (line,) = advise(R18, "SOLVER.MAX_ITER", "200", num_images=1601)
    assert "SOLVER.MAX_ITER 200 batches of 8 are 1600 images" in line and "1601" in line
    assert advise(R18, "SOLVER.MAX_ITER", "200", num_images=1600) == []


def test_crowd_regions_as_background():
    off = ["MODEL.RETINANET.IGNORE_OVERLAP", "0.0"]
    (line,) = advise(R50, *off, num_crowd_regions=7)
    assert line.startswith("7 crowd") and "MODEL.RETINANET.IGNORE_OVERLAP 0.5" in line
    assert advise(R50, *off) == []
    assert advise(R50, "MODEL.RETINANET.IGNORE_OVERLAP", "0.5", num_crowd_regions=7) == []
    stock = ["MODEL.META_ARCHITECTURE", "RetinaNet"]
    (line,) = advise(R50, *stock, num_crowd_regions=7)
    assert "META_ARCHITECTURE RetinaNetExt" in line


def test_the_launching_process_warns_once(tmp_path, restore_logging, capfd):
    """Two processes train; the lines come from the one that started them."""
    flags = ["--config-file", "tests/engine/tiny.yaml", "--num-gpus", "2"]
    opts = ["OUTPUT_DIR", str(tmp_path), "SOLVER.MAX_ITER", "1", "MODEL.RPN.NMS_THRESH", "0.6"]
    opts += ["SOLVER.REFERENCE_BATCH", "4", "MODEL.DEVICE", "cpu"]
    assert main([*flags, *opts]) == 0
    output = capfd.readouterr().out
    assert output.count("MODEL.RPN.NMS_THRESH 0.6 has no effect") == 1
    assert output.count("SOLVER.BASE_LR: 0.02 -> 0.01") == 1
    assert "REFERENCE_BATCH: 2" in (tmp_path / "config.yaml").read_text()
    assert "MAX_ITER: 2\n" in (tmp_path / "config.yaml").read_text()
