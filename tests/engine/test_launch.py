"""What is refused before a run starts: one line, exit code 2, nothing written."""

import pytest
import torch

from detectors import make_model
from training import run_train_net

CONFIG = ["--config-file", "tests/engine/tiny.yaml"]

pytestmark = pytest.mark.usefixtures("restore_logging")


@pytest.fixture
def refuse(capsys, tmp_path):
    """Run train_net.py, which must refuse without writing, and return its last line."""

    def run(*argv):
        before = contents(tmp_path)
        assert run_train_net(*argv) == 2
        assert contents(tmp_path) == before
        message = capsys.readouterr().err
        assert "Traceback" not in message
        program, _, line = message.splitlines()[-1].partition(": error: ")
        assert program and line
        return line

    return run


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], "--config-file is needed"),
        ([*CONFIG, "--num-gpus", "0"], "--num-gpus must be at least 1"),
        ([*CONFIG, "--num-machines", "2"], "needs --dist-url tcp://"),
        (
            [*CONFIG, "--num-machines", "2", "--dist-url", "tcp://host"],
            "needs --dist-url tcp://HOST:PORT",
        ),
        ([*CONFIG, "--num-machines", "2", "--machine-rank", "2"], "--machine-rank must be from 0"),
        ([*CONFIG, "--eval-only"], "--eval-only needs weights"),
        ([*CONFIG, "--eval-only", "--resume"], "which holds none"),
    ],
)
def test_flags(flags, expected, refuse, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    opts = ["OUTPUT_DIR", str(tmp_path / "run"), "SOLVER.IMS_PER_BATCH", "3"]
    assert expected in refuse(*flags, *opts)


def test_more_processes_than_devices(refuse, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert "--num-gpus 4: this machine has 1 CUDA" in refuse(*CONFIG, "--num-gpus", "4")


@pytest.mark.parametrize(
    ("local_world_size", "flags", "expected"),
    [
        ("4", ["--num-gpus", "8"], "--num-gpus 8: torchrun has started 4 processes per machine"),
        ("", [], "LOCAL_WORLD_SIZE"),
        ("4", [], "the processes of torchrun did not meet: "),
    ],
)
def test_torchruns_variables(local_world_size, flags, expected, refuse, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local_world_size)
    assert expected in refuse(*CONFIG, *flags)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("MODEL.RETINANET.CLS_LOSS.NAME", "focale", "focal_star"),
        ("MODEL.RETINANET.SELECTION.NAME", "hard", "ohem"),
        ("MODEL.RETINANET.FOCAL_LOSS_GAMMA", "-1", "FOCAL_LOSS_GAMMA"),
        ("MODEL.RETINANET.NUM_CLASSES", "81", "NUM_CLASSES is 81"),
        (
            "MODEL.BACKBONE.NAME",
            "resnet",
            "no model, optimizer or loader can be built from this config: KeyError",
        ),
        (
            "MODEL.RESNETS.DEPTH",
            "19",
            "no model, optimizer or loader can be built from this config: KeyError: 19",
        ),
        ("SOLVER.LR_SCHEDULER_NAME", "Cosine", "Cosine"),
        ("DATASETS.CUSTOM.TRAIN_JSON", "none.json", "none.json"),
        ("DATASETS.CUSTOM.TEST_IMAGES", "none", "none"),
        ("MODEL.WEIGHTS", "none.pth?matching_heuristics=True", "MODEL.WEIGHTS is none.pth"),
        ("MODEL.WEIGHTS", "README.md", "README.md"),
    ],
)
def test_values(key, value, expected, refuse, tmp_path):
    assert expected in refuse(*CONFIG, "OUTPUT_DIR", str(tmp_path / "run"), key, value)


def test_weights_of_other_classes(refuse, tmp_path):
    torch.save(make_model(num_classes=4).state_dict(), tmp_path / "four.pth")
    opts = ["MODEL.FPN.OUT_CHANNELS", "32", "MODEL.RETINANET.NORM", "", "MODEL.FPN.NORM", ""]
    weights = ["MODEL.WEIGHTS", str(tmp_path / "four.pth"), "MODEL.RETINANET.NUM_CONVS", "4"]
    line = refuse(*CONFIG, "OUTPUT_DIR", str(tmp_path / "run"), *opts, *weights)
    assert "head.cls_score.weight is (36, 32, 3, 3), the model's (27, 32, 3, 3)" in line


@pytest.mark.parametrize("name", ["metrics.json", "last_checkpoint", "model_1.pth"])
def test_earlier_run_is_left_alone(name, refuse, tmp_path):
    (tmp_path / name).write_text("earlier")
    line = refuse(*CONFIG, "OUTPUT_DIR", str(tmp_path))
    assert name in line and "--resume" in line


@pytest.mark.parametrize("last", ["model_9.pth", ""])
def test_resuming_from_a_checkpoint_that_is_gone(last, refuse, tmp_path):
    (tmp_path / "last_checkpoint").write_text(last)
    assert "last_checkpoint names" in refuse(*CONFIG, "--resume", "OUTPUT_DIR", str(tmp_path))


def test_resuming_without_the_name_of_a_checkpoint(refuse, tmp_path):
    (tmp_path / "model_0000007.pth").write_text("earlier")
    line = refuse(*CONFIG, "--resume", "OUTPUT_DIR", str(tmp_path))
    assert "last_checkpoint is missing" in line and "model_0000007.pth" in line


def test_output_dir_that_is_a_file(refuse, tmp_path):
    (tmp_path / "run").write_text("")
    assert "OUTPUT_DIR" in refuse(*CONFIG, "OUTPUT_DIR", str(tmp_path / "run"))
