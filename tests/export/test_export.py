"""Exported files give the detector's detections, in their own runtimes and without Detectron2."""

import json
import logging
import os
import re
import shutil
import struct
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image
from torchvision.ops import nms

from detectors import assert_same_detections
from retinanet_ext.cli import main
from retinanet_ext.engine import Predictor
from retinanet_ext.engine.run_folder import load_run, register_test_data
from retinanet_ext.errors import InputError, UnexpectedResultsError
from retinanet_ext.evaluation.thresholds import THRESHOLDS, Thresholds
from retinanet_ext.export import formats, quantization
from retinanet_ext.export.exporter import export_run
from retinanet_ext.export.forms import suppress_by_class
from retinanet_ext.export.metadata import KEY, ExportMetadata
from retinanet_ext.export.onnx_predictor import OnnxPredictor
from retinanet_ext.export.verification import largest_differences
from retinanet_ext.files import sha256_of
from retinanet_ext.modeling.inference import Candidates
from runs import CLASS_NAMES, FIXTURE, make_run

PATHS = sorted(Path("tests/fixtures/bccd_mini/images").glob("*.jpg"))
TINY = [
    *("MODEL.BACKBONE.NAME", "build_tiny_backbone", "MODEL.RETINANET.NUM_CONVS", 1),
    *("MODEL.RETINANET.IN_FEATURES", ["p3"], "INPUT.MIN_SIZE_TEST", 144),
    *("INPUT.MAX_SIZE_TEST", 180, "INPUT.FORMAT", "RGB"),
    *("MODEL.RETINANET.TOPK_CANDIDATES_TEST", 200),
]
"""One level and one convolution per subnet, because the exporter's time grows with both."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with thresholds, above which a plain image has no detection."""
    run = make_run(tmp_path_factory.mktemp("export") / "run", *TINY)
    scores = dict(zip(CLASS_NAMES, (0.15, 0.17, 0.155), strict=True))
    weights = run / "model_0000009.pth"
    Thresholds(scores, "best F1", sha256_of(weights)).write(run / THRESHOLDS)
    return run


@pytest.fixture(scope="module")
def exported(run):
    return export_run(run)


def test_file_says_what_it_needs(exported, run):
    metadata = OnnxPredictor(exported.path).metadata
    assert exported.path == run / "export/detections.onnx"
    assert metadata.class_names == CLASS_NAMES
    assert np.allclose(metadata.thresholds, (0.15, 0.17, 0.155))
    assert (metadata.input_format, metadata.size_divisibility, metadata.strides) == ("RGB", 32, [8])
    assert metadata.weights_sha256 == sha256_of(run / "model_0000009.pth")
    report = json.loads((run / "export/detections.onnx.json").read_text())
    assert report["metadata"]["form"] == "detections"
    counts = {row["case"].partition(" (")[0]: row["detections"] for row in report["comparisons"]}
    assert counts["landscape"] > 0 and counts["plain"] == 0 and "thumbnail" in counts
    model = onnx.load(exported.path)
    free = [d.dim_param for d in model.graph.input[0].type.tensor_type.shape.dim]
    assert free == ["batch", "", "height", "width"]


@pytest.mark.parametrize(
    ("file_format", "form"),
    [
        ("pt2", "detections"),  # of ONNX they are the fixture's
        ("torchscript", "boxes"),
        ("torchscript", "raw"),
    ],
)
def test_every_form_and_format_equals_the_model(file_format, form, run, tmp_path):
    exported = export_run(run, file_format=file_format, form=form, output=tmp_path / "new/file")
    assert {path.name for path in exported.path.parent.iterdir()} == {"file", "file.json"}
    assert max(row.values for row in exported.comparisons) < 1e-4
    assert max(row.pixels for row in exported.comparisons) < 1e-2
    if file_format == "torchscript":
        extra = {KEY: ""}
        torch.jit.load(exported.path, _extra_files=extra)
        assert ExportMetadata.from_json(extra[KEY], "file").form == form


def images(tmp_path):
    """Files, arrays and PIL images, upright and lying, turned by EXIF, and grey."""
    turned = tmp_path / "turned.jpg"
    # Orientation 6, and a compression above 16 bits, which Pillow's exif_transpose raises on.
    entries = struct.pack("<H2HI2H 2H2I", 2, 0x112, 3, 1, 6, 0, 0x103, 4, 1, 70_000)
    exif = b"Exif\0\0II*\0" + struct.pack("<I", 8) + entries + bytes(4)
    Image.open(PATHS[0]).resize((333, 250)).save(turned, exif=exif)
    array = np.asarray(Image.open(PATHS[1]).convert("RGB"))[:, :, ::-1]
    grey = np.asarray(Image.open(PATHS[2]).convert("L"))
    arrays = [array, array.transpose(1, 0, 2), grey, grey[:, :, None]]
    return [*PATHS[:3], str(turned), *arrays, Image.open(PATHS[3])]


def to_instances(found):
    arrays = (torch.from_numpy(each) for each in (found.boxes, found.scores, found.classes))
    boxes, scores, classes = arrays
    return Instances(found.image_size, pred_boxes=Boxes(boxes), scores=scores, pred_classes=classes)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_onnx_predictor_gives_the_predictors_detections(batch_size, exported, run, tmp_path):
    given = images(tmp_path)
    expected = list(Predictor(load_run(run))(given))
    found = list(Predictor.from_onnx(exported.path)(given, batch_size))
    assert sum(map(len, expected)) > len(given)
    for f, e in zip(found, expected, strict=True):
        assert f.image_size == e.image_size
        assert f.names == [CLASS_NAMES[index] for index in f.classes]
        same = {"rtol": 1e-4, "atol": 1e-5, "box_rtol": 1e-4, "box_atol": 1e-2}
        assert_same_detections(to_instances(f), e, **same)
    assert found[3].image_size == (333, 250)


def test_pixels_are_limited_by_the_config_and_not_by_pillow(exported, monkeypatch):
    predictor = OnnxPredictor(exported.path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    assert len(next(predictor(PATHS[:1]))) > 0
    monkeypatch.setattr(predictor, "metadata", replace(predictor.metadata, max_pixels=307_199))
    with pytest.raises(InputError, match=r"= 307,200 pixels.* INPUT\.MAX_PIXELS allows 307,199"):
        list(predictor(PATHS[:1]))


def test_onnx_predictor_needs_neither_detectron2_nor_torch(exported):
    program = """
import sys
for name in ("torch", "detectron2", "torchvision", "cv2", "pycocotools", "fvcore"):
    sys.modules[name] = None
from retinanet_ext.export.onnx_predictor import OnnxPredictor
for found in OnnxPredictor(sys.argv[1])(sys.argv[2:]):
    print(found.image_size, len(found), sorted(set(found.names)))
"""
    command = [sys.executable, "-c", program, str(exported.path), *map(str, PATHS[:2])]
    shown = subprocess.run(command, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    expected = OnnxPredictor(exported.path)(PATHS[:2])
    lines = [f"{e.image_size} {len(e)} {sorted(set(e.names))}" for e in expected]
    assert shown.stdout.splitlines() == lines


def test_examples_of_the_page_run(exported, tmp_path):
    text = Path("docs/export.md").read_text()
    ours, plain = re.findall(r"```python\n(.*?)```", text, re.S)
    folder = tmp_path / "output/mine/export"
    folder.mkdir(parents=True)
    (folder / "detections.onnx").symlink_to(exported.path)
    for name, path in zip("ab", PATHS, strict=False):
        shutil.copy(path, tmp_path / f"{name}.jpg")
    for code in (ours, plain):
        env = {**os.environ, "PYTHONPATH": str(Path.cwd())}
        shown = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert shown.returncode == 0, shown.stderr
        assert any(name in shown.stdout for name in CLASS_NAMES)


def test_file_that_differs_is_removed_and_an_earlier_one_stays(run, tmp_path, monkeypatch, capsys):
    written = formats.FORMATS["torchscript"]

    def write(program, metadata, file):
        program.thresholds.sub_(0.2)
        written.write(program, metadata, file)

    monkeypatch.setitem(formats.FORMATS, "torchscript", replace(written, write=write))
    output = tmp_path / "file.torchscript"
    output.write_bytes(b"earlier")
    command = ["export", str(run), "--format", "torchscript", "--output", str(output)]
    assert main([*command, "--overwrite"]) == 1
    assert "the exported file differs from the model on landscape" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [output.name]
    assert output.read_bytes() == b"earlier"
    assert main(command) == 2
    assert "file.torchscript exists; name another --output" in capsys.readouterr().err


def test_files_are_compared_without_thresholds_if_nothing_is_detected(run, tmp_path, monkeypatch):
    """As of a model that is hardly trained; otherwise any two programs would be equal."""
    written = formats.FORMATS["torchscript"]
    options = {"file_format": "torchscript", "output": tmp_path / "file", "score": 0.99}
    exported = export_run(run, **options)
    counts = [row.detections for row in exported.comparisons]
    assert sum(counts[:7]) == 0 < min(counts[7:]) and "landscape without" in str(exported)

    def write(program, metadata, file):
        program = deepcopy(program)
        program.model.head.cls_score.weight.data *= 0.9
        written.write(program, metadata, file)

    monkeypatch.setitem(formats.FORMATS, "torchscript", replace(written, write=write))
    with pytest.raises(UnexpectedResultsError, match="differs from the model on landscape without"):
        export_run(run, overwrite=True, **options)


def test_thresholds_of_other_weights_are_replaced_by_a_score_or_a_file(run, tmp_path, capsys):
    other = ["MODEL.WEIGHTS", str(shutil.copy(run / "model_0000009.pth", tmp_path / "other.pth"))]
    content = torch.load(other[1])
    torch.save({**content, "iteration": 99}, other[1])
    output = tmp_path / "file"
    command = ["export", str(run), "--format", "torchscript", "--output", str(output)]
    assert main([*command, *other]) == 2
    assert "was chosen for other weights" in (said := capsys.readouterr().err)
    assert "export with `--score 0.4`" in said and not output.exists()
    file = ["--thresholds", str(run / THRESHOLDS)]
    for options, expected in ((["--score", "0.16"], [0.16] * 3), (file, [0.15, 0.17, 0.155])):
        assert main([*command, "--overwrite", *options, *other]) == 0
        report = json.loads((tmp_path / "file.json").read_text())
        assert np.allclose(report["metadata"]["thresholds"], expected)


def test_average_precision_is_that_without_the_files_thresholds(run, exported, tmp_path):
    cfg = load_run(run)
    register_test_data(cfg)
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.1
    strict = formats.write_with_threshold(exported.path, tmp_path / "strict.onnx", 1.0)
    assert not any(len(found) for found in OnnxPredictor(strict)(PATHS[:2]))
    expected = quantization.average_precision(exported.path, cfg)
    assert quantization.average_precision(strict, cfg) == expected and expected[0] > 0


def test_int8_keeps_the_last_convolutions_in_float(run, exported, tmp_path, monkeypatch, capsys):
    source, target = exported.path, tmp_path / "int8.onnx"
    cfg = load_run(run)
    register_test_data(cfg)
    metadata = replace(exported.metadata, precision="int8")
    results = iter([(50.0, 4), (48.0, 4), (50.0, 4), (40.0, 4), (0.0, 4)])
    monkeypatch.setattr(quantization, "average_precision", lambda *_: next(results))
    result = quantization.quantize(source, target, metadata, cfg, 2)
    assert result == quantization.Quantization(50.0, 48.0, 4, 2)
    graph = onnx.load(target).graph
    kinds = {value.name: value.data_type for value in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}
    in_int8 = {
        node.name: node.input[1] in producers and kinds[producers[node.input[1]].input[0]] == 3
        for node in graph.node
        if node.op_type == "Conv"
    }
    assert sum(in_int8.values()) == 3 and len(in_int8) == 5
    assert OnnxPredictor(target).metadata.precision == "int8"

    with pytest.raises(UnexpectedResultsError, match=r"falls from 50\.00 to 40\.00"):
        quantization.quantize(source, target, metadata, cfg, 1)
    with pytest.raises(UnexpectedResultsError, match=r"the AP in float32 is 0\.00"):
        quantization.quantize(source, target, metadata, cfg, 1)
    torn = tmp_path / "torn.jpg"
    torn.write_bytes(PATHS[0].read_bytes()[:3000])
    with pytest.raises(InputError, match=r"image .*torn\.jpg cannot be used: .*truncated"):
        quantization.CalibrationImages(OnnxPredictor(source), [str(torn)]).get_next()


def test_suppression_of_many_classes_and_images_rounds_nothing():
    """Against torchvision's NMS of each image and class alone, in float64."""
    rng = torch.Generator().manual_seed(0)
    N, C, K = 8, 400, 80
    corner = torch.rand(N, C, 2, generator=rng) * 1300
    boxes = torch.cat([corner, corner + 5 + 300 * torch.rand(N, C, 2, generator=rng)], 2)
    boxes[:, 200:] = boxes[:, :200] + torch.rand(N, 200, 4, generator=rng)
    classes = torch.randint(0, K, (N, C), generator=rng)
    classes[:, 200:] = classes[:, :200]
    scores = torch.rand(N, C, generator=rng) * (torch.rand(N, C, generator=rng) > 0.2)
    expected = torch.zeros_like(scores)
    for n in range(N):
        for k in range(K):
            index = ((classes[n] == k) & (scores[n] > 0)).nonzero().squeeze(1)
            index = index[nms(boxes[n, index].double(), scores[n, index].double(), 0.97)]
            expected[n, index] = scores[n, index]
    assert 0 < (expected > 0).sum() < (scores > 0).sum()
    assert torch.equal(suppress_by_class(boxes, scores, classes, K, 0.97), expected)
    assert suppress_by_class(boxes, scores * 0, classes, K, 0.5).sum() == 0


def detections(*rows):
    values = np.array(rows, np.float32).reshape(-1, 6)
    return Candidates(values[:, :4], values[:, 4], values[:, 5].astype(np.int64))


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([(0, 0, 9, 9, 0.9, 0), (5, 5, 8, 8, 0.6, 1)], (0, 0)),
        ([(5, 5, 8, 8, 0.6, 1), (0, 0, 9, 9.05, 0.9, 0)], (0, 0.05)),
        ([(0, 0, 9, 9, 0.9, 0)], (0.6, np.inf)),
        ([(0, 0, 9, 9, 0.9, 0), (5, 5, 8, 8, 0.6, 2)], (0.6, np.inf)),
        ([(np.nan, 0, 9, 9, 0.9, 0), (5, 5, 8, 8, 0.6, 1)], (0, np.inf)),
    ],
)
def test_differences_are_of_sets(rows, expected):
    """Equal, in another order and moved, one missing, one of another class, and one of NaN."""
    wanted = detections((0, 0, 9, 9, 0.9, 0), (5, 5, 8, 8, 0.6, 1), (1, 1, 2, 2, 0.3005, 0))
    found = largest_differences(wanted, detections(*rows), np.full(3, 0.3))
    assert np.allclose(found, expected)


class TestBadInput:
    def test_format_that_is_not_installed(self, run, monkeypatch, capsys):
        monkeypatch.setattr(formats, "find_spec", lambda name: None)
        assert main(["export", str(run)]) == 2
        said = capsys.readouterr().err
        assert "--format onnx needs onnx and onnxscript and onnxruntime, not installed: " in said
        assert "pip install 'retinanet-ext[export]'" in said

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--format", "tflite"], "the format 'tflite' is unknown; known: onnx, pt2, torchscr"),
            (["--form", "masks"], "the form 'masks' is unknown; known: raw, boxes, detections"),
            (["--int8", "--form", "raw"], "--int8 needs --format onnx and --form detections"),
            (["--int8", "--calibration-images", "0"], "--calibration-images must be a number"),
        ],
    )
    def test_options(self, options, message, run, tmp_path, capsys):
        output = tmp_path / "out" / "file"
        assert main(["export", str(run), *options, "--output", str(output)]) == 2
        assert message in capsys.readouterr().err
        assert not output.parent.exists()

    def test_int8_without_annotations(self, run, tmp_path, capsys):
        content = json.loads((FIXTURE / "instances_val.json").read_text())
        del content["annotations"]
        (tmp_path / "images.json").write_text(json.dumps(content))
        data = ["DATASETS.CUSTOM.TEST_JSON", str(tmp_path / "images.json")]
        command = ["export", str(run), "--int8", "--output", str(tmp_path / "file")]
        assert main([*command, *data]) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert "--int8 measures the AP on the run's test data, which have no annotations" in last
        assert not (tmp_path / "file").exists()

    def test_folders_that_are_no_run(self, run, tmp_path, capsys):
        assert main(["export", str(tmp_path)]) == 2
        (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
        assert main(["export", str(tmp_path)]) == 2
        no_run, no_checkpoint = capsys.readouterr().err.splitlines()[-2:]
        assert "holds no config.yaml" in no_run and "holds no checkpoint yet" in no_checkpoint

    def test_files_that_a_predictor_does_not_take(self, exported, tmp_path):
        model = onnx.load(exported.path)
        text = model.metadata_props[0].value
        for value, message in [
            (text.replace('"format_version": 1', '"format_version": 9'), "in version 9 of its fo"),
            (text.replace('"detections"', '"raw"'), "holds the form raw, and a predictor needs"),
            ("{}", "was not written by `retinanet-ext export`"),
        ]:
            model.metadata_props[0].value = value
            onnx.save(model, tmp_path / "other.onnx")
            with pytest.raises(InputError, match=message):
                OnnxPredictor(tmp_path / "other.onnx")
        (tmp_path / "half.onnx").write_bytes(exported.path.read_bytes()[:1000])
        with pytest.raises(InputError, match="is not a whole ONNX file"):
            OnnxPredictor(tmp_path / "half.onnx")
        with pytest.raises(InputError, match="is not a file"):
            OnnxPredictor(tmp_path / "none.onnx")

    def test_images_that_cannot_be_read(self, exported, tmp_path):
        predictor = OnnxPredictor(exported.path)
        deep = Image.fromarray(np.zeros((9, 9), np.uint16))
        for image, message in [
            (tmp_path / "none.jpg", "image .*none.jpg cannot be used: .*No such file"),
            (np.zeros((0, 9, 3), np.uint8), r"image 0 cannot be used: it is an array of uint8 and"),
            (Path("setup.py"), r"setup\.py cannot be used: not an image, or of a format"),
            (np.zeros((9, 9, 4), np.uint8), r"image 0 cannot be used: it is an array of uint8 and"),
            (deep, "its pixels have more than 8 bits"),
        ]:
            with pytest.raises(InputError, match=message):
                list(predictor([image]))
        grey = np.zeros((9, 9), np.uint8)
        for one in (PATHS[0], str(PATHS[0]), grey, Image.open(PATHS[0])):
            with pytest.raises(InputError, match="a list of images, and got one "):
                predictor(one)
        with pytest.raises(InputError, match="batch_size must be at least 1; got 0"):
            predictor(PATHS, batch_size=0)

    def test_run_without_its_data_is_compared_on_drawn_images(self, run, tmp_path, caplog):
        data = ["DATASETS.CUSTOM.TEST_JSON", str(tmp_path / "none.json")]
        with caplog.at_level(logging.WARNING):
            found = export_run(run, file_format="torchscript", output=tmp_path / "file", opts=data)
        assert "drawn images" in found.images and "none.json" in caplog.text
