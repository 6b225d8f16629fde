"""A config that cannot be used is answered with one line that says what to change."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest

from retinanet_ext.engine.config_check import (
    check_config,
    config_errors,
    resolve_precision,
    training_precision,
    use_cpu_without_cuda,
)
from retinanet_ext.engine.config_load import load_config
from retinanet_ext.engine.config_warnings import ineffective_keys
from retinanet_ext.errors import InputError

FOCAL = "MODEL.RETINANET.FOCAL_LOSS_GAMMA"
WEIGHT = "MODEL.RETINANET.CLS_LOSS.WEIGHT"

BAD_FILES = {
    "python tag": (
        "MODEL:\n  WEIGHTS: !!python/object/apply:os.system ['touch executed']",
        ["config.yaml, line 2", "python/object/apply:os.system"],
    ),
    "syntax": ("MODEL: [1\nSOLVER: 2", ["config.yaml, line 2", "not valid YAML"]),
    "not UTF-8": (b"MODEL: \xff\xfe", ["config.yaml", "not valid YAML"]),
    "empty": ("", ["config.yaml", "must hold"]),
    "a list": ("- MODEL", ["config.yaml", "must hold"]),
    "missing base": ("_BASE_: none.yaml", ["none.yaml", "_BASE_", "No such file"]),
    "base is the file": ("_BASE_: config.yaml", ["config.yaml", "its own base"]),
    "old version": ("VERSION: 1", ["config.yaml", "VERSION 2"]),
    "unknown key": (
        "MODEL:\n  RETINANET:\n    FOCAL_LOSS_GAMA: 2.0",
        ["config.yaml", "MODEL.RETINANET.FOCAL_LOSS_GAMA", f"did you mean {FOCAL}"],
    ),
    "renamed key": (
        "SOLVER:\n  ACCUMULATE: 2",
        ["config.yaml", "SOLVER.ACCUMULATE was renamed to SOLVER.GRAD_ACCUM_STEPS"],
    ),
    "key of a group": ("SOLVER: 3", ["config.yaml", "SOLVER is a group of keys"]),
    "group in place of a value": ("SOLVER:\n  MAX_ITER: {A: 1}", ["SOLVER.MAX_ITER", "int"]),
    "no value": ("SOLVER:\n  MAX_ITER:", ["config.yaml", "SOLVER.MAX_ITER has no value"]),
    "number in place of text": ("OUTPUT_DIR: 2024", ["OUTPUT_DIR", "type str"]),
    "text in place of a number": ("SOLVER:\n  BASE_LR: fast", ["SOLVER.BASE_LR", "float"]),
    "fraction in place of an integer": ("SOLVER:\n  MAX_ITER: 2.5", ["SOLVER.MAX_ITER", "got 2.5"]),
}

BAD_OPTS = {
    "unknown key": (["MODEL.RETINANET.GAMMA", "2"], ["unknown key MODEL.RETINANET.GAMMA", FOCAL]),
    "part of a key": (["NUM_CONVS", "2"], ["did you mean MODEL.RETINANET.NUM_CONVS?"]),
    "below a value": (["SOLVER.MAX_ITER.X", "2"], ["SOLVER.MAX_ITER"]),
    "equals sign": (["A.B=2", "C.D=3"], ["A.B=2", "with a space"]),
    "no value": (["SOLVER.MAX_ITER"], ["SOLVER.MAX_ITER", "pairs KEY VALUE"]),
    "flag at the end": (["OUTPUT_DIR", "x", "--eval-only"], ["--eval-only", "before"]),
    "flag between": (["OUTPUT_DIR", "x", "--num-gpus", "2"], ["--num-gpus", "before"]),
    "text": ([FOCAL, "two"], [FOCAL, "float", "two"]),
    "a misspelt auto": ([WEIGHT, "Auto"], [WEIGHT, "float, such as 1.0, or auto; got Auto"]),
    "None": ([FOCAL, "None"], [FOCAL, "no value"]),
    "another architecture's key": (["MODEL.NUM_CLASSES", "3"], ["MODEL.RETINANET.NUM_CLASSES?"]),
}


@pytest.mark.parametrize(("content", "expected"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_file(content, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "config.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as raised:
        load_config(str(file))
    message = str(raised.value)
    assert [text for text in [*expected] if text not in message] == [] and "\n" not in message
    assert list(tmp_path.iterdir()) == [file], "code in the config ran"


@pytest.mark.parametrize("path", ["none.yaml", "."])
def test_missing_file(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="config file"):
        load_config(path)


@pytest.mark.parametrize(("opts", "expected"), BAD_OPTS.values(), ids=BAD_OPTS)
def test_bad_opts(opts, expected):
    with pytest.raises(InputError) as raised:
        load_config("tests/engine/tiny.yaml", opts)
    message = str(raised.value)
    assert [text for text in expected if text not in message] == [] and "\n" not in message


def test_values_reach_their_keys(tmp_path):
    (tmp_path / "base.yaml").write_text("SOLVER: {BASE_LR: 1, STEPS: [5, 6]}\nINPUT: {FORMAT: RGB}")
    file = tmp_path / "config.yaml"
    file.write_text(
        f"_BASE_: base.yaml\nOUTPUT_DIR: {tmp_path}\n"
        "MODEL: {RETINANET: {FOCAL_LOSS_GAMMA: 3}}\n"
        "DATASETS: {CUSTOM: {TRAIN_JSON: [a.json, b.json]}}"
    )
    class_alpha = "MODEL.RETINANET.CLS_LOSS.CLASS_ALPHA"
    opts = [FOCAL, "0", "SOLVER.GAMMA", "1e-1", "DATASETS.CUSTOM.TRAIN_IMAGES", "2024"]
    opts += [class_alpha, "{Platelets: 0.75}", "MODEL.WEIGHTS", "None"]
    opts += ["MODEL.PIXEL_STD", "[5e1, 57.0, 58]", "DATASETS.CUSTOM.TEST_JSON", "[c.json]"]
    cfg = load_config(file, opts)
    gamma = cfg.MODEL.RETINANET.FOCAL_LOSS_GAMMA
    assert gamma == 0 and isinstance(gamma, float)
    assert cfg.SOLVER.BASE_LR == 1 and isinstance(cfg.SOLVER.BASE_LR, float)
    assert cfg.SOLVER.STEPS == (5, 6)
    assert cfg.SOLVER.GAMMA == 0.1
    assert cfg.INPUT.FORMAT == "RGB"
    assert Path(cfg.OUTPUT_DIR) == tmp_path
    assert cfg.DATASETS.CUSTOM.TRAIN_JSON == ["a.json", "b.json"]
    assert cfg.DATASETS.CUSTOM.TEST_JSON == ["c.json"]
    assert cfg.DATASETS.CUSTOM.TRAIN_IMAGES == "2024"
    assert cfg.MODEL.RETINANET.CLS_LOSS.CLASS_ALPHA == [["Platelets", 0.75]]
    assert cfg.MODEL.PIXEL_STD == [50.0, 57.0, 58]
    assert cfg.MODEL.WEIGHTS == "None"  # a file of that name
    saved = tmp_path / "saved.yaml"
    saved.write_text(cfg.dump())
    assert json.dumps(load_config(saved)) == json.dumps(cfg)  # lists are read as tuples
    text = load_config(saved, ["DATASETS.CUSTOM.TRAIN_JSON", "one.json"])
    assert text.DATASETS.CUSTOM.TRAIN_JSON == "one.json"


@pytest.mark.parametrize(("value", "expected"), [("2", 2.0), ("0.5", 0.5), ("auto", "auto")])
def test_a_number_overrides_the_auto_of_a_file(value, expected, tmp_path):
    (tmp_path / "config.yaml").write_text("MODEL: {RETINANET: {CLS_LOSS: {WEIGHT: auto}}}")
    cfg = load_config(tmp_path / "config.yaml", ["MODEL.RETINANET.CLS_LOSS.WEIGHT", value])
    found = cfg.MODEL.RETINANET.CLS_LOSS.WEIGHT
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    ("opts", "num_processes", "expected"),
    [
        (["SOLVER.IMS_PER_BATCH", "3"], 2, "IMS_PER_BATCH 3 must be a multiple"),
        (["SOLVER.REFERENCE_WORLD_SIZE", "4"], 2, "REFERENCE_WORLD_SIZE, 4"),
        (["SOLVER.GRAD_ACCUM_STEPS", "2"], 2, "processes, 2 times SOLVER"),
        (["SOLVER.GRAD_ACCUM_STEPS", "0"], 1, "SOLVER.GRAD_ACCUM_STEPS must be a number"),
        (["SOLVER.REFERENCE_BATCH", "-1"], 1, "SOLVER.REFERENCE_BATCH must be a number"),
        (["SOLVER.NON_FINITE.POLICY", "go"], 1, "POLICY 'go' is unknown; known: 'raise', 'skip'"),
        (["DATALOADER.ASPECT_RATIO_STREAMS", "3"], 1, "2 images .* of .*ASPECT_RATIO_STREAMS 3"),
        (["DATALOADER.RANDOM_SUBSET_RATIO", "0"], 1, r"RATIO must be a number in \(0, 1\], got 0"),
        (["INPUT.MIN_SIZE_TRAIN", "(-5,)"], 1, "INPUT.MIN_SIZE_TRAIN must be a number"),
        (["MODEL.PIXEL_STD", "[1.0]"], 1, "PIXEL_STD needs 3 numbers"),
        (["INPUT.FORMAT", "BRG"], 1, "INPUT.FORMAT 'BRG' is unknown"),
        (["MODEL.ANCHOR_GENERATOR.SIZES", "[[1e999]]"], 1, "SIZES must be finite"),
        (["OUTPUT_DIR", "x" * 300], 1, "OUTPUT_DIR 'xxx.*File name too long"),
        (["OUTPUT_DIR", ""], 1, "OUTPUT_DIR is empty"),
        (["SOLVER.MAX_ITER", "0"], 1, "SOLVER.MAX_ITER"),
        (["SOLVER.CHECKPOINT_PERIOD", "0"], 1, "SOLVER.CHECKPOINT_PERIOD"),
        (["SOLVER.BASE_LR", "1e999"], 1, "SOLVER.BASE_LR must be finite, got inf"),
        (["SOLVER.AMP.ENABLED", "True"], 1, "SOLVER.AMP.PRECISION float16 trains on CUDA"),
        (["MODEL.FPN.NORM", "SyncBN"], 2, "MODEL.FPN.NORM SyncBN trains on CUDA.*naiveSyncBN"),
        (["TEST.DETECTION_GRID.NUM_IMAGES", "-1"], 1, r"NUM_IMAGES must be a number in \[0, 10000"),
        (["MODEL.LOAD_PROPOSALS", "True"], 1, "MODEL.LOAD_PROPOSALS must be False"),
        (["MODEL.DEVICE", "gpu"], 1, "MODEL.DEVICE 'gpu' is not a device"),
        (["MODEL.DEVICE", "cuda:99"], 1, "MODEL.DEVICE 'cuda:99': this machine has"),
    ],
)
def test_values_out_of_range(opts, num_processes, expected):
    cfg = load_config("tests/engine/tiny.yaml", ["MODEL.DEVICE", "cpu", *opts])
    with pytest.raises(InputError, match=expected):
        check_config(cfg, num_processes=num_processes, eval_only=False)


def test_evaluation_does_not_ask_for_a_batch_that_is_divisible():
    cfg = load_config(
        "tests/engine/tiny.yaml", ["MODEL.DEVICE", "cpu", "SOLVER.IMS_PER_BATCH", "3"]
    )
    check_config(cfg, num_processes=2, eval_only=True)


def test_an_error_in_code_of_ones_own_keeps_its_traceback():
    with pytest.raises(KeyError), config_errors():
        {}["mine"]


def test_cpu_in_place_of_cuda(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    cfg = load_config("tests/engine/tiny.yaml")
    assert cfg.MODEL.DEVICE == "cuda"
    use_cpu_without_cuda(cfg, num_threads=2)
    assert cfg.MODEL.DEVICE == "cpu"


def test_cuda_graphs_and_micro_batches(monkeypatch):
    opts = ["MODEL.DEVICE", "cuda", "MODEL.COMPILE", "True", "MODEL.CUDA_GRAPHS", "True"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    cfg = load_config("configs/small_R18_FPN.yaml", [*opts, "SOLVER.GRAD_ACCUM_STEPS", "2"])
    with pytest.raises(InputError, match=r"MODEL\.CUDA_GRAPHS takes SOLVER\.GRAD_ACCUM_STEPS 1"):
        check_config(cfg, num_processes=1, eval_only=False)
    cfg.SOLVER.GRAD_ACCUM_STEPS = 1
    check_config(cfg, num_processes=1, eval_only=False)


AUTO = ("SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.PRECISION", "auto")


def resolved(*opts, earlier=None):
    """Return the config with the precision that "auto" stands for, which must not be warned of."""
    cfg = load_config("tests/engine/tiny.yaml", [*AUTO, *opts])
    expected = training_precision(cfg)
    resolve_precision(cfg, earlier)
    assert ineffective_keys(cfg) == []
    assert earlier or training_precision(cfg) == expected
    return training_precision(cfg)


@pytest.mark.parametrize(
    ("instructions", "precision"),
    [
        ({"avx512_f": True, "avx512_bf16": True}, "bfloat16"),
        ({"amx_bf16": True}, "bfloat16"),
        ({"avx512_f": True, "avx512_bf16": False}, "float32"),
    ],
)
def test_auto_precision_of_a_cpu(monkeypatch, instructions, precision):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: instructions, raising=False)
    assert resolved("MODEL.DEVICE", "cpu") == precision


def test_a_torch_that_does_not_tell_what_the_cpu_has(monkeypatch, caplog):
    monkeypatch.delattr("torch.cpu.get_capabilities", raising=False)
    assert resolved("MODEL.DEVICE", "cpu") == "float32"
    assert "does not tell whether this CPU has bfloat16" in caplog.text


@pytest.mark.parametrize(("native", "precision"), [(True, "bfloat16"), (False, "float16")])
def test_auto_precision_of_a_gpu(monkeypatch, native, precision):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device", lambda device: nullcontext())
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: native)
    assert resolved("MODEL.DEVICE", "cuda") == precision


def test_a_resumed_run_keeps_its_precision(monkeypatch):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    earlier = load_config("tests/engine/tiny.yaml", ["SOLVER.AMP.ENABLED", "False"])
    assert resolved("MODEL.DEVICE", "cpu", earlier=earlier) == "float32"
    earlier.SOLVER.AMP.ENABLED = True  # in Detectron2's float16
    with pytest.raises(InputError, match="float16 trains on CUDA devices alone"):
        resolved("MODEL.DEVICE", "cpu", earlier=earlier)
