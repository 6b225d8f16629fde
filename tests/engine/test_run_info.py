"""The manifest beside a run's results."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from retinanet_ext.data import prepare_datasets
from retinanet_ext.engine.config_check import load_config
from retinanet_ext.engine.run_info import read_manifest, write_manifest
from retinanet_ext.errors import InputError

TEST_JSON = Path("tests/fixtures/bccd_mini/instances_val.json")


@pytest.fixture
def write(tmp_path):
    """Write a start of an evaluation and return the manifest as its file says."""

    def run(*opts, command=("train_net.py",), weights=""):
        cfg, _ = load_config("tests/engine/tiny.yaml", ["OUTPUT_DIR", str(tmp_path), *opts])
        prepare_datasets(cfg, num_classes_is_set=False, eval_only=True)
        write_manifest(
            cfg, command=command, weights=weights, resumed=False, eval_only=True, jobs=["slurm 7"]
        )
        return json.loads(Path(cfg.OUTPUT_DIR, "manifest.json").read_text())

    return run


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def test_what_a_start_says(write, tmp_path):
    torch.save({"model": {}}, tmp_path / "weights.pth")
    weights = str(tmp_path / "weights.pth")
    (start,) = write("SEED", "5", weights=weights)["starts"]
    images = list(Path("tests/fixtures/bccd_mini/images").iterdir())
    listed = {image["file_name"] for image in json.loads(TEST_JSON.read_text())["images"]}
    assert start["data"]["custom_test"] == {
        "json": str(TEST_JSON),
        "sha256": sha256(TEST_JSON.read_bytes()),
        "images": len(listed),
        "bytes": sum(path.stat().st_size for path in images if path.name in listed),
    }
    assert start["weights"] == {"file": weights, "sha256": sha256(Path(weights).read_bytes())}
    assert start["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert (start["seed"], start["processes"], start["jobs"]) == (5, 1, ["slurm 7"])


def test_starts_are_added_and_a_config_is_kept_once(write):
    first = write()
    again = write("SOLVER.MAX_ITER", "4")
    last = write()
    assert last["starts"][:2] == again["starts"] and again["starts"][:1] == first["starts"]
    assert [start["config"] for start in last["starts"]].count(first["starts"][0]["config"]) == 2
    assert len(last["configs"]) == 2
    for key, text in last["configs"].items():
        assert key == sha256(text.encode())


def test_nothing_of_the_person(write, monkeypatch, tmp_path):
    home = tmp_path / "Zoë Somebody"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("API_TOKEN", "hush")
    weights = "https://zoe:password@example.com/weights.pth"
    command = ["train_net.py", f"{home}/own.yaml", f"{home}-other/x", "MODEL.WEIGHTS", weights]
    content = write("MODEL.WEIGHTS", weights, "DATASETS.TRAIN", f"('{home}',)", command=command)
    assert content["starts"][0]["command"] == [
        "train_net.py",
        "~/own.yaml",
        f"{home}-other/x",
        "MODEL.WEIGHTS",
        "https://example.com/weights.pth",
    ]
    text = json.dumps(content, ensure_ascii=False).replace(f"{home}-other", "")
    for secret in ("Zo", "Somebody", "zoe", "password", "hush"):
        assert secret not in text
    for key, config in content["configs"].items():
        assert key == sha256(config.encode())


def test_a_folder_whose_name_is_not_utf8(tmp_path, write):
    folder = tmp_path / "M\udce4use"  # Latin-1, as old file systems have
    folder.mkdir()
    (start,) = write("OUTPUT_DIR", str(folder), command=[str(folder)])["starts"]
    assert start["command"] == [str(folder)]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": 2, "configs": {}, "starts": []}', '{"name": "app"}']
)
def test_a_file_of_that_name_that_is_another(text, tmp_path):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(InputError, match=r"manifest\.json is no manifest"):
        read_manifest(str(tmp_path))
