"""Detections of loose images are Detectron2's, whatever shares their batch."""

from itertools import repeat
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data.detection_utils import read_image
from detectron2.engine import DefaultPredictor

from detectors import assert_same_detections, make_cfg, make_model
from retinanet_ext.engine.predict import Predictor
from retinanet_ext.errors import InputError

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


def test_an_unusable_image_is_named(tmp_path):
    predictor = Predictor(make_cfg(*SIZES), make_model())
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(PATHS[0].read_bytes()[:3000])
    for path in (cut, tmp_path / "missing.png"):
        with pytest.raises(InputError, match=path.name):
            list(predictor([PATHS[0], path]))
    with pytest.raises(InputError, match=r"image 1 .*float64.*uint8"):
        list(predictor([PATHS[0], np.zeros((8, 8, 3))]))
    with pytest.raises(InputError, match=r"image 0 .*\(8, 8\)"):
        list(predictor([np.zeros((8, 8), np.uint8)]))
    with pytest.raises(InputError, match="batch_size"):
        list(predictor(PATHS, batch_size=0))
