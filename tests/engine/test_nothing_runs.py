"""Files that a person was sent run no code, read nothing outside their folder and call nobody."""

import json
import pickle
import shutil
import socket
import struct
import zlib
from pathlib import Path

import pytest
import torch

from training import run_train_net

CONFIG = "tests/engine/tiny.yaml"
DATA = Path("tests/fixtures/bccd_mini")

pytestmark = pytest.mark.usefixtures("restore_logging")


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "code-was-run"


@pytest.fixture
def refused(capsys, tmp_path, marker):
    """Run train_net.py, which must refuse in one line and run nothing, and return the line."""

    def run(config, *opts):
        output = ["OUTPUT_DIR", str(tmp_path / "run")]
        assert run_train_net("--config-file", str(config), *output, *opts) == 2
        *_, last = capsys.readouterr().err.splitlines()
        assert not marker.exists()
        assert not list(tmp_path.glob("run/*"))
        return last.partition(": error: ")[2]

    return run


@pytest.fixture
def no_network(monkeypatch):
    """Fail when a name is resolved or a connection is opened."""

    def refuse(*args, **kwargs):
        raise AssertionError(f"the network was used: {args}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)


@pytest.fixture
def data(tmp_path):
    """The annotations, to be changed, and where they and their images lie."""
    shutil.copytree(DATA / "images", tmp_path / "data/images")
    content = json.loads((DATA / "instances_train_raw.json").read_text())

    def opts():
        (tmp_path / "data/train.json").write_text(json.dumps(content))
        return (
            *("DATASETS.CUSTOM.TRAIN_JSON", str(tmp_path / "data/train.json")),
            *("DATASETS.CUSTOM.TRAIN_IMAGES", str(tmp_path / "data/images")),
        )

    return content, opts, tmp_path / "data"


TAGS = {
    "apply": "!!python/object/apply:builtins.open [{marker}, w]",
    "new": "!!python/object/new:type {{args: [x, [], {{}}], state: !!python/name:os.system }}",
    "name": "!!python/name:os.system",
    "module": "!!python/module:antigravity",
}


@pytest.mark.parametrize("tag", TAGS.values(), ids=TAGS)
@pytest.mark.parametrize("through_base", [False, True])
def test_python_tag_in_a_config(tag, through_base, refused, marker, tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text(f"SEED: {tag.format(marker=marker)}\n")
    config = bad
    if through_base:
        config = tmp_path / "config.yaml"
        config.write_text("_BASE_: bad.yaml\n")
    line = refused(config)
    assert str(bad) in line and "could not determine a constructor for the tag" in line


def test_python_file_as_a_config(refused, marker, tmp_path):
    (tmp_path / "config.py").write_text(f"open({str(marker)!r}, 'w')\n")
    assert "config.py" in refused(tmp_path / "config.py")


@pytest.mark.parametrize("key", ["SEED", "MODEL.PIXEL_MEAN", "OUTPUT_DIR"])
@pytest.mark.parametrize("value", ["{tag}", "open({marker!r}, 'w')", "__import__('os')"])
def test_code_on_the_command_line_is_text(key, value, capsys, marker):
    text = value.format(tag=TAGS["apply"].format(marker=marker), marker=str(marker))
    opts = ["OUTPUT_DIR", "/dev/null/no", key, text, "SOLVER.MAX_ITER", "0"]
    assert run_train_net("--config-file", CONFIG, *opts) == 2
    assert not marker.exists()
    assert "error: " in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", ["weights.pkl", "weights.PKL", "weights.pth", "weights.pyth"])
@pytest.mark.parametrize("inside", ["model", "beside the model"])
def test_payload_in_weights(name, inside, refused, marker, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # as other libraries ask for
    payload = Payload(marker)
    content = {
        "model": {"model": {"a": payload}},
        "beside the model": {"model": {}, "model_state": {}, "optimizer": payload},
    }[inside]
    if name.endswith("pth"):
        torch.save(content, tmp_path / name)
    else:
        (tmp_path / name).write_bytes(pickle.dumps(content))
    assert name in refused(CONFIG, "MODEL.WEIGHTS", str(tmp_path / name))


def test_payload_in_the_checkpoint_of_a_run(marker, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"model": {}, "trainer": Payload(marker)}, tmp_path / "model_0000001.pth")
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    argv = ["--config-file", CONFIG, "--resume", "OUTPUT_DIR", str(tmp_path)]
    assert run_train_net(*argv) == 2
    assert "model_0000001.pth" in capsys.readouterr().err.splitlines()[-1]
    assert not marker.exists()


@pytest.mark.parametrize("split", ["TRAIN", "TEST"])
def test_proposals_which_detectron2_unpickles_are_not_read(split, refused, marker, tmp_path):
    proposals = tmp_path / "proposals.pkl"
    proposals.write_bytes(pickle.dumps(Payload(marker)))
    opts = [f"DATASETS.PROPOSAL_FILES_{split}", f"('{proposals}',)"]
    assert "MODEL.LOAD_PROPOSALS" in refused(CONFIG, "MODEL.LOAD_PROPOSALS", "True", *opts)


@pytest.mark.parametrize(
    "file_name",
    [
        "../secret.jpg",
        "sub/../../secret.jpg",
        "http://example.com/image.jpg",
        "detectron2://image.jpg",
        "file:///etc/passwd",
        "\0",
    ],
)
def test_image_outside_of_its_folder(file_name, refused, data, no_network):
    content, opts, folder = data
    shutil.copy(next((folder / "images").iterdir()), folder / "secret.jpg")
    image = content["images"][0]
    image["file_name"] = file_name
    assert "train.json" in refused(CONFIG, *opts())


def test_linked_images_are_used(data, tmp_path, no_network):
    """Links are made by who owns the folder, as collections of images often are; no json can."""
    _, opts, folder = data
    for image in (folder / "images").iterdir():
        shutil.move(image, folder / image.name)
        image.symlink_to(folder / image.name)
    size = ["SOLVER.MAX_ITER", "1", "TEST.DETECTION_GRID.NUM_IMAGES", "0"]
    argv = ["--config-file", CONFIG, "OUTPUT_DIR", str(tmp_path / "run"), *opts(), *size]
    assert run_train_net(*argv) == 0  # a whole run without a URL, and so without the network


def png_that_says(width, height):
    """Return a PNG of a few bytes whose header promises that many pixels."""

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1 << 20))
    signature = b"\x89PNG\r\n\x1a\n"
    return signature + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("honest", [True, False])
def test_image_of_huge_size(honest, refused, data):
    content, opts, folder = data
    image = content["images"][0]
    (folder / "images" / image["file_name"]).write_bytes(png_that_says(100_000, 100_000))
    if honest:
        image["width"] = image["height"] = 100_000
    assert image["file_name"] in refused(CONFIG, *opts())


@pytest.mark.parametrize("size", [10**9, 1e308])
def test_json_that_says_a_huge_size(size, refused, data):
    content, opts, _ = data
    content["images"][0]["width"] = size
    assert content["images"][0]["file_name"] in refused(CONFIG, *opts())


@pytest.mark.parametrize("text", ["[" * 100_000, '{"images":' * 100_000, "9" * 5000, "NaN"])
def test_json_that_is_no_data(text, refused, data):
    _, opts, folder = data
    opts = opts()
    (folder / "train.json").write_text(text)
    assert "train.json" in refused(CONFIG, *opts)
