"""A config that cannot be used is answered with one line that says what to change."""

from itertools import pairwise
from pathlib import Path

import pytest

from retinanet_ext.engine.config_check import check_config, load_config, use_cpu_without_cuda
from retinanet_ext.errors import InputError

FOCAL = "MODEL.RETINANET.FOCAL_LOSS_GAMMA"

ALIASES = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{of}'] * 10)}]\n" for of, name in pairwise("abcdefgh")
)
MERGES = "a: &a {k: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join([f'*{of}'] * 10)}]}}\n"
    for of, name in pairwise("abcdefghi")
)
BOMB = [".yaml: more than 100,000 values"]

BAD_FILES = {
    "aliases of aliases": (f"{ALIASES}SOLVER: {{STEPS: [{'*h, ' * 10}]}}", BOMB),
    "merges of merges": (MERGES, BOMB),
    "an alias in what it stands for": ("SOLVER: {STEPS: &a [1, *a]}", BOMB),
    "a group in itself": ("MODEL: &a {RETINANET: *a}", BOMB),
    "python tag": (
        "MODEL:\n  WEIGHTS: !!python/object/apply:os.system ['touch executed']",
        ["config.yaml, line 2", "python tag", "--allow-unsafe-config"],
    ),
    "another tag": ("MODEL: !model {}", ["config.yaml, line 1", "!model"]),
    "syntax": ("MODEL: [1\nSOLVER: 2", ["config.yaml, line 2", "not valid YAML"]),
    "control character": ("MODEL: \x01", ["config.yaml", "not valid YAML"]),
    "not UTF-8": (b"MODEL: \xff\xfe", ["config.yaml", "not valid YAML"]),
    "empty": ("", ["config.yaml", "must hold"]),
    "a list": ("- MODEL", ["config.yaml", "must hold"]),
    "base of another type": ("_BASE_: 3", ["config.yaml", "_BASE_"]),
    "missing base": ("_BASE_: none.yaml", ["none.yaml", "_BASE_", "No such file"]),
    "base is the file": ("_BASE_: config.yaml", ["config.yaml", "leads back"]),
    "old version": ("VERSION: 1", ["config.yaml", "VERSION 2"]),
    "unknown key": (
        "MODEL:\n  RETINANET:\n    FOCAL_LOSS_GAMA: 2.0",
        ["config.yaml", "MODEL.RETINANET.FOCAL_LOSS_GAMA", f"did you mean {FOCAL}"],
    ),
    "key of a group": ("SOLVER: 3", ["config.yaml", "SOLVER is a group of keys"]),
    "group in place of a value": ("SOLVER:\n  MAX_ITER: {A: 1}", ["SOLVER.MAX_ITER", "int"]),
    "nothing in place of a value": ("SOLVER:\n  MAX_ITER:", ["SOLVER.MAX_ITER", "got None"]),
    "number in place of text": ("OUTPUT_DIR: 2024", ["OUTPUT_DIR", 'write "2024"']),
    "text in place of a number": ("SOLVER:\n  BASE_LR: fast", ["SOLVER.BASE_LR", "float"]),
    "fraction in place of an integer": ("SOLVER:\n  MAX_ITER: 2.5", ["SOLVER.MAX_ITER", "got 2.5"]),
}

BAD_OPTS = {
    "unknown key": (["MODEL.RETINANET.GAMMA", "2"], ["unknown key MODEL.RETINANET.GAMMA", FOCAL]),
    "part of a key": (["NUM_CONVS", "2"], ["did you mean MODEL.RETINANET.NUM_CONVS?"]),
    "below a value": (["SOLVER.MAX_ITER.X", "2"], ["SOLVER.MAX_ITER.X"]),
    "equals sign": (["SOLVER.MAX_ITER=2"], ["SOLVER.MAX_ITER=2", "with a space"]),
    "equals signs": (["A.B=2", "C.D=3"], ["A.B=2", "with a space"]),
    "no value": (["SOLVER.MAX_ITER"], ["SOLVER.MAX_ITER", "pairs KEY VALUE"]),
    "flag at the end": (["OUTPUT_DIR", "x", "--eval-only"], ["--eval-only", "before"]),
    "flag between": (["OUTPUT_DIR", "x", "--num-gpus", "2"], ["--num-gpus", "before"]),
    "whole number with an exponent": (["SOLVER.MAX_ITER", "9e4"], ["write 90000"]),
    "text": ([FOCAL, "two"], [FOCAL, "float", "'two'"]),
    "None for a number": ([FOCAL, "None"], [FOCAL, "got None"]),
    "endless nesting": ([FOCAL, "[" * 5000], [FOCAL]),
    "unhashable key": ([FOCAL, "{[]: 1}"], [FOCAL]),
}


def one_line(raised):
    message = str(raised.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(("content", "expected"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_file(content, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "config.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as raised:
        load_config(str(file))
    message = one_line(raised)
    assert [text for text in expected if text not in message] == []
    assert list(tmp_path.iterdir()) == [file], "code in the config ran"


@pytest.mark.parametrize("path", ["none.yaml", "."])
def test_missing_file(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="config file"):
        load_config(path)


def test_base_of_endless_values_is_refused(tmp_path):
    (tmp_path / "base.yaml").write_text("SOLVER: {STEPS: &a [1, *a]}")
    (tmp_path / "config.yaml").write_text("_BASE_: base.yaml")
    with pytest.raises(InputError, match=r"/base\.yaml: more than 100,000 values"):
        load_config(str(tmp_path / "config.yaml"))


def test_aliases_of_few_values_are_used(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("DATASETS: {TRAIN: &names [a, b], TEST: *names}")
    assert load_config(str(file))[0].DATASETS.TEST == ("a", "b")


def test_base_is_held_to_the_same_rule(tmp_path):
    (tmp_path / "base.yaml").write_text("INPUT:\n  FORMAT: !!python/name:os.sep")
    (tmp_path / "config.yaml").write_text("_BASE_: base.yaml")
    with pytest.raises(InputError, match=r"base\.yaml, line 2.*--allow-unsafe-config"):
        load_config(str(tmp_path / "config.yaml"))
    cfg, _ = load_config(str(tmp_path / "config.yaml"), allow_unsafe=True)
    assert cfg.INPUT.FORMAT == "/"


@pytest.mark.parametrize(("opts", "expected"), BAD_OPTS.values(), ids=BAD_OPTS)
def test_bad_opts(opts, expected):
    with pytest.raises(InputError) as raised:
        load_config("tests/engine/tiny.yaml", opts)
    message = one_line(raised)
    assert [text for text in expected if text not in message] == []


def test_values_reach_their_keys(tmp_path):
    (tmp_path / "base.yaml").write_text("SOLVER: {BASE_LR: 1, STEPS: [5, 6]}\nINPUT: {FORMAT: RGB}")
    file = tmp_path / "config.yaml"
    file.write_text(
        f"_BASE_: base.yaml\nMODEL: {{RETINANET: {{FOCAL_LOSS_GAMMA: 3}}}}\nOUTPUT_DIR: {tmp_path}"
    )
    class_alpha = "MODEL.RETINANET.CLS_LOSS.CLASS_ALPHA"
    opts = [FOCAL, "0", "SOLVER.GAMMA", "1e-1", "DATASETS.CUSTOM.TRAIN_IMAGES", "2024"]
    opts += [class_alpha, "{'Platelets': 0.75}", "MODEL.WEIGHTS", "None"]
    cfg, num_classes_is_set = load_config(str(file), opts)
    assert not num_classes_is_set
    gamma = cfg.MODEL.RETINANET.FOCAL_LOSS_GAMMA
    assert gamma == 0 and isinstance(gamma, float)
    assert cfg.SOLVER.BASE_LR == 1 and isinstance(cfg.SOLVER.BASE_LR, float)
    assert cfg.SOLVER.STEPS == (5, 6)
    assert cfg.SOLVER.GAMMA == 0.1
    assert cfg.INPUT.FORMAT == "RGB"
    assert Path(cfg.OUTPUT_DIR) == tmp_path
    assert cfg.DATASETS.CUSTOM.TRAIN_IMAGES == "2024"
    assert cfg.MODEL.RETINANET.CLS_LOSS.CLASS_ALPHA == [["Platelets", 0.75]]
    assert cfg.MODEL.WEIGHTS == "None"  # a file of that name


def test_whether_num_classes_is_set(tmp_path):
    (tmp_path / "base.yaml").write_text("MODEL: {RETINANET: {NUM_CLASSES: 80}}")
    (tmp_path / "config.yaml").write_text("_BASE_: base.yaml")
    assert load_config(str(tmp_path / "config.yaml"))[1]
    assert load_config("tests/engine/tiny.yaml", ["MODEL.RETINANET.NUM_CLASSES", "3"])[1]
    assert not load_config("tests/engine/tiny.yaml")[1]


@pytest.mark.parametrize(
    ("opts", "num_processes", "expected"),
    [
        (["SOLVER.IMS_PER_BATCH", "3"], 2, "IMS_PER_BATCH 3 must be a multiple"),
        (
            ["SOLVER.IMS_PER_BATCH", "0"],
            1,
            "SOLVER.IMS_PER_BATCH must be a number in .1, 65536., got 0",
        ),
        (["SOLVER.REFERENCE_WORLD_SIZE", "4"], 2, "REFERENCE_WORLD_SIZE, 4"),
        (
            ["SOLVER.IMS_PER_BATCH", "2", "SOLVER.GRAD_ACCUM_STEPS", "2"],
            2,
            "processes, 2 times SOLVER",
        ),
        (["SOLVER.GRAD_ACCUM_STEPS", "0"], 1, "SOLVER.GRAD_ACCUM_STEPS must be a number"),
        (["SOLVER.REFERENCE_BATCH", "-1"], 1, "SOLVER.REFERENCE_BATCH must be a number"),
        (["SOLVER.NON_FINITE.POLICY", "go"], 1, "POLICY 'go' is unknown; known: 'raise', 'skip'"),
        (["SOLVER.WEIGHT_DECAY_BIAS", "none"], 1, "WEIGHT_DECAY_BIAS must be a number"),
        (["SOLVER.MAX_ITER", "1" + "0" * 400], 1, "MAX_ITER must be a number"),
        (["SOLVER.STEPS", "(5, 5)"], 1, "SOLVER.STEPS must rise strictly"),
        (["DATALOADER.SAMPLER_TRAIN", "Random"], 1, "'Random' is unknown; known: 'TrainingSam"),
        (["DATALOADER.ASPECT_RATIO_STREAMS", "3"], 1, "2 images .* of .*ASPECT_RATIO_STREAMS 3"),
        (["DATALOADER.RANDOM_SUBSET_RATIO", "0"], 1, r"RATIO must be a number in \(0, 1\], got 0"),
        (["DATASETS.TRAIN_REPEAT_FACTOR", "[['a']]"], 1, "list of .data set, factor., such as"),
        (["DATASETS.TRAIN_REPEAT_FACTOR", "{'a': 0}"], 1, r"FACTOR a must be a number in \[0.001"),
        (["INPUT.MIN_SIZE_TRAIN", "(-5,)"], 1, "INPUT.MIN_SIZE_TRAIN must be a number"),
        (["INPUT.CROP.ENABLED", "True", "INPUT.CROP.SIZE", "[2.0, 0.5]"], 1, "two shares of the"),
        (["MODEL.PIXEL_STD", "[1.0]"], 1, "PIXEL_STD needs 3 numbers"),
        (["INPUT.FORMAT", "BRG"], 1, "INPUT.FORMAT 'BRG' is unknown"),
        (["MODEL.ANCHOR_GENERATOR.SIZES", "[[1e999]]"], 1, "SIZES must be finite"),
        (["OUTPUT_DIR", "x" * 300], 1, "OUTPUT_DIR 'xxx.*File name too long"),
        (["MODEL.RETINANET.BBOX_REG_WEIGHTS", "[1.0]"], 1, "BBOX_REG_WEIGHTS must be 4 numbers"),
        (["TEST.EXPECTED_RESULTS", "[['bbox', 'AP', 40]]"], 1, "list of .'bbox', metric, value"),
        (["OUTPUT_DIR", ""], 1, "OUTPUT_DIR is empty"),
        (["SOLVER.MAX_ITER", "0"], 1, "SOLVER.MAX_ITER"),
        (["SOLVER.CHECKPOINT_PERIOD", "0"], 1, "SOLVER.CHECKPOINT_PERIOD"),
        (["SOLVER.BASE_LR", "float('nan')"], 1, "SOLVER.BASE_LR"),
        (["SOLVER.BASE_LR", "1e999"], 1, "SOLVER.BASE_LR must be finite, got inf"),
        (["SOLVER.AMP.ENABLED", "True"], 1, "SOLVER.AMP.ENABLED in float16 needs a CUDA device"),
        (["DATALOADER.NUM_WORKERS", "-1"], 1, "DATALOADER.NUM_WORKERS"),
        (["TEST.EVAL_PERIOD", "-1"], 1, "TEST.EVAL_PERIOD"),
        (
            ["TEST.DETECTION_GRID.NUM_IMAGES", "-1"],
            1,
            r"NUM_IMAGES must be a number in \[0, 10000\], got -1",
        ),
        (["MODEL.META_ARCHITECTURE", "Retina"], 1, "'Retina' is unknown; known: .*RetinaNetExt"),
        (["MODEL.DEVICE", "gpu"], 1, "MODEL.DEVICE 'gpu' is not a device"),
        (["MODEL.DEVICE", "cuda:99"], 1, "MODEL.DEVICE 'cuda:99': this machine has"),
    ],
)
def test_values_out_of_range(opts, num_processes, expected):
    with pytest.raises(InputError, match=expected):
        cfg, _ = load_config("tests/engine/tiny.yaml", ["MODEL.DEVICE", "cpu", *opts])
        check_config(cfg, num_processes=num_processes, eval_only=False)


def test_evaluation_does_not_ask_for_a_batch_that_is_divisible():
    cfg, _ = load_config(
        "tests/engine/tiny.yaml", ["MODEL.DEVICE", "cpu", "SOLVER.IMS_PER_BATCH", "3"]
    )
    check_config(cfg, num_processes=2, eval_only=True)


def test_cpu_in_place_of_cuda(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    cfg, _ = load_config("tests/engine/tiny.yaml")
    assert cfg.MODEL.DEVICE == "cuda"
    use_cpu_without_cuda(cfg, num_threads=2)
    assert cfg.MODEL.DEVICE == "cpu"


def test_hints_name_no_key_of_another_architecture():
    with pytest.raises(InputError) as raised:
        load_config("tests/engine/tiny.yaml", ["MODEL.NUM_CLASSES", "3"])
    assert "did you mean MODEL.RETINANET.NUM_CLASSES" in str(raised.value)
    assert "ROI_HEADS" not in str(raised.value)
