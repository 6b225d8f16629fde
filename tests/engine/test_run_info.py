"""run_info.json beside a run's results."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from retinanet_ext.data import prepare_datasets
from retinanet_ext.engine.config_load import load_config
from retinanet_ext.engine.run_info import write_run_info
from retinanet_ext.errors import InputError

TEST_JSON = Path("tests/fixtures/bccd_mini/instances_val.json")


@pytest.fixture
def write(tmp_path):
    """Write a start of an evaluation and return all starts in the file."""

    def run(*opts, command=("train_net.py",), weights=""):
        cfg = load_config("tests/engine/tiny.yaml", ["OUTPUT_DIR", str(tmp_path), *opts])
        prepare_datasets(cfg, eval_only=True)
        write_run_info(cfg, command=command, weights=weights, resumed=False, eval_only=True)
        return json.loads(Path(cfg.OUTPUT_DIR, "run_info.json").read_text())

    return run


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def test_content_of_a_start(write, tmp_path):
    weights = tmp_path / "weights.pth"
    torch.save({"model": {}}, weights)
    (start,) = write("SEED", "5", weights=str(weights))
    assert start["data"]["custom_test"] == {
        "json": str(TEST_JSON),
        "sha256": [sha256(TEST_JSON.read_bytes())],
        "images": len(json.loads(TEST_JSON.read_text())["images"]),
    }
    assert start["weights"] == {"file": str(weights), "sha256": sha256(weights.read_bytes())}
    assert start["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert (start["seed"], start["processes"], start["resumed"]) == (5, 1, False)
    assert "PyTorch" in start["environment"]


def test_starts_are_appended_and_a_config_is_written_only_where_it_changes(write):
    write()
    write()
    write("SOLVER.MAX_ITER", "4")
    starts = write()
    assert [bool(start["config"]["text"]) for start in starts] == [True, False, True, True]
    first, second, other, _ = [start["config"]["sha256"] for start in starts]
    assert first == second != other
    assert first == sha256(starts[0]["config"]["text"].encode())


def test_nothing_personal_is_written(write, monkeypatch, tmp_path):
    home = tmp_path / "Zoë Somebody"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("API_TOKEN", "hush")
    weights = "https://zoe:password@example.com/weights.pth"
    command = ["train_net.py", f"{home}/own.yaml", f"{home}-other/x", weights]
    starts = write("MODEL.WEIGHTS", weights, "DATASETS.TRAIN", f"('{home}',)", command=command)
    own, other, url = starts[0]["command"][1:]
    assert (own, other) == ("~/own.yaml", f"{home}-other/x")
    assert url == "https://example.com/weights.pth"
    text = json.dumps(starts, ensure_ascii=False).replace(f"{home}-other", "")
    assert [
        secret for secret in ("Zo", "Somebody", "zoe", "password", "hush") if secret in text
    ] == []


def test_a_folder_whose_name_is_not_utf8(tmp_path, write):
    folder = tmp_path / "M\udce4use"  # Latin-1, as old file systems have
    folder.mkdir()
    (start,) = write("OUTPUT_DIR", str(folder), command=[str(folder)])
    assert start["command"] == [str(folder)]


@pytest.mark.parametrize("text", ["", "{}", '[{"name": "app"}]'])
def test_another_file_of_that_name_is_left_alone(text, tmp_path, write):
    (tmp_path / "run_info.json").write_text(text)
    with pytest.raises(InputError, match=r"run_info\.json is not a list of starts"):
        write()
    assert (tmp_path / "run_info.json").read_text() == text
