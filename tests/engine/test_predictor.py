"""Detections of loose images are Detectron2's, whatever shares their batch."""

import json
import os
import subprocess
import sys
from itertools import repeat
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data.detection_utils import read_image
from detectron2.engine import DefaultPredictor
from PIL import Image
from torch.testing import assert_close

from detectors import assert_same_detections, make_cfg, make_model
from retinanet_ext.data import CheckedDatasetMapper
from retinanet_ext.engine.checkpoint import Checkpointer
from retinanet_ext.engine.predictor import Predictor
from retinanet_ext.errors import InputError
from retinanet_ext.evaluation.thresholds import THRESHOLDS, Thresholds
from retinanet_ext.files import sha256_of

PATHS = sorted(Path("tests/fixtures/bccd_mini/images").glob("*.jpg"))
SIZES = ["INPUT.MIN_SIZE_TEST", 96, "INPUT.MAX_SIZE_TEST", 160]


@pytest.fixture
def weights(tmp_path):
    """A detector that finds something."""
    model = make_model()
    with torch.no_grad():
        model.head.cls_score.weight.mul_(20)
        model.head.cls_score.bias.fill_(-2)
    DetectionCheckpointer(model, str(tmp_path)).save("weights")
    return str(tmp_path / "weights.pth")


@pytest.mark.parametrize("input_format", ["BGR", "RGB"])
def test_same_detections_as_one_by_one(weights, input_format):
    """Files and arrays, upright and lying, one batch and a part of one."""
    cfg = make_cfg("MODEL.WEIGHTS", weights, "INPUT.FORMAT", input_format, *SIZES)
    arrays = [read_image(path, format="BGR") for path in PATHS]
    arrays[3:3] = [np.ascontiguousarray(arrays[0].transpose(1, 0, 2))]
    images = [*PATHS[:3], arrays[3], *(str(path) for path in PATHS[3:])]
    one_by_one = DefaultPredictor(cfg)
    expected = [one_by_one(array)["instances"] for array in arrays]
    assert min(len(instances) for instances in expected) > 5
    predictor = Predictor(cfg)
    for batch_size in (1, 2, 8):
        found = list(predictor(images, batch_size))
        assert len(found) == len(images)
        for f, e in zip(found, expected, strict=True):
            assert f.image_size == e.image_size
            assert_same_detections(f, e, rtol=1e-5, box_rtol=1e-5, box_atol=1e-3)


def test_images_are_batched_and_read_as_they_are_needed(monkeypatch):
    model = make_model()
    predictor = Predictor(make_cfg(*SIZES), model)
    sizes, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda batch: sizes.append(len(batch)) or forward(batch))
    square, wide = np.zeros((64, 64, 3), np.uint8), np.zeros((64, 128, 3), np.uint8)
    assert len(list(predictor([square] * 5 + [wide] * 2, batch_size=2))) == 7
    assert sizes == [2, 2, 1, 2]
    assert list(predictor([])) == []
    endless = predictor(repeat(square), batch_size=2)
    assert len(next(endless)) == 0 and len(sizes) == 5


CHANNELS = {"BGR": 3, "RGB": 3, "L": 1, "YUV-BT.601": 3, "HSV": 3, "YCbCr": 3, "RGBA": 4, "LA": 2}


@pytest.mark.parametrize("input_format", CHANNELS)
def test_every_format_is_that_of_training(input_format, monkeypatch):
    """Files, PIL images and arrays become what the mapper of evaluation makes of the files."""
    values = {"MODEL.PIXEL_MEAN": 100.0, "MODEL.PIXEL_STD": 50.0}
    pixels = [x for key, v in values.items() for x in (key, [v] * CHANNELS[input_format])]
    opts = ("INPUT.FORMAT", input_format, *pixels, *SIZES)
    mapper = CheckedDatasetMapper(make_cfg(*opts), is_train=False)
    expected = [mapper({"file_name": str(path)})["image"] for path in PATHS[:2]]
    predictor = Predictor(make_cfg(*opts), make_model(*opts))
    seen = []
    forward = predictor.model.forward
    monkeypatch.setattr(
        predictor.model, "forward", lambda batch: seen.extend(batch) or forward(batch)
    )
    opened = [Image.open(path) for path in PATHS[:2]]
    bgr = [np.asarray(image)[:, :, ::-1] for image in opened]
    for images in (PATHS[:2], map(str, PATHS[:2]), opened, bgr, np.stack(bgr)):
        list(predictor(images))
        for inputs, image in zip(seen, expected, strict=True):
            assert torch.equal(inputs["image"], image.float())
            assert (inputs["height"], inputs["width"]) == (480, 640)
        seen.clear()


def test_arrays_of_grey_levels_and_of_the_models_own_channels():
    opts = ("INPUT.FORMAT", "RGBA", "MODEL.PIXEL_MEAN", [9.0] * 4, "MODEL.PIXEL_STD", [9.0] * 4)
    predictor = Predictor(make_cfg(*opts, *SIZES), make_model(*opts))
    own = np.asarray(Image.open(PATHS[0]).convert("RGBA"))
    grey = np.asarray(Image.open(PATHS[0]).convert("L"))

    def prepare(image):
        return predictor._prepare(image, 0)["image"]

    assert torch.equal(prepare(own), prepare(PATHS[0]))
    expected = prepare(Image.fromarray(grey))
    for same in (grey, grey[:, :, None], grey.astype(np.uint16) * 257):
        assert torch.equal(prepare(same), expected)


def test_files_of_several_pages_are_told(tmp_path, caplog):
    page = Image.open(PATHS[0])
    page.save(tmp_path / "pages.tif", save_all=True, append_images=[page, page])
    list(Predictor(make_cfg(*SIZES), make_model())([tmp_path / "pages.tif"]))
    assert "pages.tif has several pages or frames; the first is used" in caplog.text


def save_run(folder, *opts):
    """The config and the checkpoints that a run leaves, the last of them one that finds boxes."""
    cfg = make_cfg("OUTPUT_DIR", str(folder), *SIZES, *opts)
    model = make_model()
    folder.mkdir(exist_ok=True)
    checkpointer = Checkpointer(model, str(folder))
    checkpointer.save("model_0000009")
    with torch.no_grad():
        model.head.cls_score.weight.mul_(20)
        model.head.cls_score.bias.fill_(-2)
    checkpointer.save("model_final", iteration=19)
    (folder / "config.yaml").write_text(cfg.dump())
    return Predictor(cfg, model)


def test_thresholds_of_classes_without_names_are_in_their_order(tmp_path):
    save_run(tmp_path)
    cfg = make_cfg("OUTPUT_DIR", str(tmp_path), "MODEL.WEIGHTS", "", *SIZES)
    scores = {"d": 0.4, "a": 0.1, "c": 0.3, "b": 0.2}
    weights = sha256_of(tmp_path / "model_final.pth")
    Thresholds(scores, "best F1", weights).write(tmp_path / THRESHOLDS)
    assert_close(Predictor(cfg).thresholds, torch.tensor([0.4, 0.1, 0.3, 0.2]))
    with pytest.raises(InputError, match="are of 1 classes, and the model has 4, without names"):
        Predictor(cfg, thresholds=Thresholds({"a": 0.5}))


DETECT = """
import sys
from retinanet_ext.engine import Predictor, load_config
cfg = load_config(sys.argv[1])
before = cfg.clone()
for found in Predictor(cfg)(sys.argv[2:]):
    print(len(found), found.scores.tolist())
assert cfg == before
"""


def test_a_runs_own_config_finds_its_last_checkpoint_in_a_fresh_process(tmp_path):
    """Where the run had CUDA, too. ``MODEL.WEIGHTS`` is empty, as of a training from nothing."""
    predictor = save_run(tmp_path, "MODEL.DEVICE", "cuda", "MODEL.WEIGHTS", "")
    process = subprocess.run(
        [sys.executable, "-c", DETECT, tmp_path / "config.yaml", *PATHS[:2]],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = process.stdout.splitlines()
    for line, expected in zip(lines, predictor(PATHS[:2], batch_size=1), strict=True):
        number, _, scores = line.partition(" ")
        assert int(number) == len(expected) > 5
        found = torch.tensor(json.loads(scores)).sort().values
        assert_close(found, expected.scores.cpu().sort().values, rtol=1e-4, atol=0)
    assert f"the last checkpoint is used, {tmp_path}/model_final.pth" in process.stderr
    assert "No CUDA device: running on the CPU" in process.stderr


def test_weights_of_a_backbone_are_refused_and_the_runs_last_checkpoint_is_named(tmp_path):
    """As with the config of a run that began with such."""
    save_run(tmp_path / "run")
    model, weights = make_model(), tmp_path / "backbone.pth"
    state = {f"backbone.{name}": value for name, value in model.backbone.state_dict().items()}
    torch.save({"model": state}, weights)
    cfg = make_cfg("MODEL.WEIGHTS", str(weights), "OUTPUT_DIR", str(tmp_path / "run"))
    with pytest.raises(InputError, match=r"backbone\.pth lack .*; OUTPUT_DIR has .*/model_final"):
        Predictor(cfg)


def test_without_weights_nothing_is_detected(tmp_path):
    cfg = make_cfg("MODEL.WEIGHTS", "", "OUTPUT_DIR", str(tmp_path))
    with pytest.raises(InputError, match=r"MODEL\.WEIGHTS is empty, and OUTPUT_DIR .* set MODEL"):
        Predictor(cfg)


def test_an_unusable_image_is_named(tmp_path):
    predictor = Predictor(make_cfg(*SIZES), make_model())
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(PATHS[0].read_bytes()[:3000])
    for path in (cut, tmp_path / "missing.png"):
        with pytest.raises(InputError, match=path.name):
            list(predictor([PATHS[0], path]))
    with pytest.raises(InputError, match=r"image 1 .*float64.*uint8"):
        list(predictor([PATHS[0], np.zeros((8, 8, 3))]))
    Image.new("RGB", (4000, 1)).save(tmp_path / "line.png")
    with pytest.raises(InputError, match=r"line\.png cannot be used: height and width must be > 0"):
        list(predictor([tmp_path / "line.png"]))
    grey = np.zeros((8, 8), np.uint8)
    unusable = {
        r"type ndarray, uint8 and shape \(8, 8, 4\)": np.zeros((8, 8, 4), np.uint8),
        r"type ndarray, uint8 and shape \(0, 8, 3\)": np.zeros((0, 8, 3), np.uint8),
        r"type Tensor, torch.uint8 and shape \(3, 8, 8\)": torch.zeros(3, 8, 8, dtype=torch.uint8),
        "type list;": [str(PATHS[0])],
        "type NoneType;": None,
        "floats, here 0 to 0, .*INPUT.PIXEL_RANGE": grey.astype(np.float32),
    }
    for what, image in unusable.items():
        with pytest.raises(InputError, match=f"^image 1 cannot be used: .*{what}"):
            list(predictor([PATHS[0], image]))
    for one in (PATHS[0], str(PATHS[0]), grey, torch.zeros(3, 8, 8), Image.open(PATHS[0])):
        with pytest.raises(InputError, match="a list of images, and got one "):
            predictor(one)
    with pytest.raises(InputError, match="batch_size"):
        list(predictor(PATHS, batch_size=0))
