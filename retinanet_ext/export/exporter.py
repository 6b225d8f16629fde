"""``retinanet-ext export``: write a run's detector as a file, and let only a verified one stay."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from copy import copy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from retinanet_ext import __version__
from retinanet_ext.engine import Predictor
from retinanet_ext.engine.run_folder import load_run, register_test_data
from retinanet_ext.errors import InputError, UnexpectedResultsError
from retinanet_ext.evaluation.thresholds import choose_thresholds
from retinanet_ext.export.formats import Format, get_format
from retinanet_ext.export.forms import FORMS, Program
from retinanet_ext.export.metadata import ExportMetadata
from retinanet_ext.export.quantization import Quantization, quantize
from retinanet_ext.export.verification import Case, Comparison, make_cases, verify
from retinanet_ext.files import make_folder, sha256_of, to_json, write_file
from retinanet_ext.losses import Interval
from retinanet_ext.modeling import RetinaNetExt

FOLDER = "export"
"""Folder within a run's folder for the exported files."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Exported:
    """An exported file.

    Attributes:
        path: the file
        metadata: what it says of itself
        comparisons: with the model, in float32
        images: what was compared: the run's test images, or drawn ones
        quantization: AP before and after; None in float32
    """

    path: Path
    metadata: ExportMetadata
    comparisons: list[Comparison]
    images: str
    quantization: Quantization | None = field(default=None)

    def __str__(self) -> str:
        lines = [f"Compared with the model on {self.images}:"]
        lines += [f"  {comparison}" for comparison in self.comparisons]
        lines += [str(self.quantization)] if self.quantization else []
        return "\n".join([*lines, f"Wrote {self.path}"])


def export_run(
    run: str | Path,
    *,
    file_format: str = "onnx",
    form: str = "detections",
    output: str | Path | None = None,
    overwrite: bool = False,
    score: float | None = None,
    thresholds: str | Path | None = None,
    int8: bool = False,
    calibration_images: int = 64,
    opts: Sequence[str] = (),
) -> Exported:
    """Write a run's detector as a file that was compared with it, and a report beside the file.

    The program computes in float32, whatever ``TEST.PRECISION``. Without the run's test data, drawn
    images are compared. Images without any detection are compared without thresholds, too.

    Args:
        run: OUTPUT_DIR of a training
        file_format: onnx, pt2 or torchscript
        form: raw, boxes or detections
        output: file to write; by default ``export/<form>.<suffix>`` in the run's folder
        overwrite: replace an earlier file
        score: lowest score of a detection, in place of the run's thresholds
        thresholds: file of thresholds per class, in place of the run's
        int8: quantize the network to 8 bits; needs onnx, detections and the run's data
        calibration_images: number of images that the ranges of activations are measured on
        opts: alternating keys and values that replace the run's

    Raises:
        InputError: the run, the format or the output cannot be used
        UnexpectedResultsError: the file, which is removed, differs too much from the model
    """
    writer = _check_options(file_format, form, int8, calibration_images)
    name = f"{form}_int8" if int8 else form
    path = Path(output) if output else Path(run, FOLDER, f"{name}{writer.suffix}")
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists; name another --output, or replace it by --overwrite")
    cfg = _config(run, opts)
    predictor = _load(cfg, score, thresholds)
    metadata = describe(predictor, cfg, form, writer)
    has_data = _has_test_data(cfg, needed=int8)
    photos = test_images(cfg, predictor) if has_data else _drawn_images(metadata)
    cases = make_cases(photos, predictor.model, metadata.thresholds, writer.min_side)
    make_folder(path.parent)
    logger.info("Writing the form %s as %s; onnx and pt2 take about a minute", form, file_format)
    with tempfile.TemporaryDirectory() as scratch:
        written = Path(scratch, f"float32{writer.suffix}")  # torch.export.load wants the suffix
        comparisons = _write_verified(writer, predictor, metadata, cases, written)
        quantization = None
        if int8:
            source, written = written, Path(scratch, "int8.onnx")
            metadata = replace(metadata, precision="int8")
            quantization = quantize(source, written, metadata, cfg, calibration_images)
        write_file(path, written.read_bytes())
    images = "the run's test images" if has_data else "drawn images, without usable test data"
    exported = Exported(path, metadata, comparisons, images, quantization)
    _write_report(exported)
    return exported


def _write_report(exported: Exported) -> None:
    """Write what was exported and compared beside the file, under its name and ``.json``."""
    path = exported.path.with_name(f"{exported.path.name}.json")
    write_file(path, to_json(asdict(exported), indent=1, default=str) + "\n")


def _check_options(file_format: str, form: str, int8: bool, calibration_images: int) -> Format:
    """Return the format, unless it or another option cannot be used."""
    writer = get_format(file_format)
    if form not in FORMS:
        raise InputError(f"the form {form!r} is unknown; known: {', '.join(FORMS)}")
    if int8 and (file_format, form) != ("onnx", "detections"):
        raise InputError("--int8 needs --format onnx and --form detections")
    Interval("[1, inf)").check("--calibration-images", calibration_images)
    return writer


def _load(cfg: CfgNode, score: float | None, thresholds: str | Path | None) -> Predictor:
    """Return a run's predictor, with the thresholds that are asked for."""
    predictor = Predictor(cfg, thresholds=choose_thresholds(score, thresholds))
    if score is not None:  # but not in the config, whose threshold is that of the AP
        predictor.model.test_score_thresh = score
    return predictor


def _write_verified(
    writer: Format,
    predictor: Predictor,
    metadata: ExportMetadata,
    cases: Sequence[Case],
    path: Path,
) -> list[Comparison]:
    model, form, thresholds = predictor.model, metadata.form, metadata.thresholds
    program = Program(model, form, thresholds).eval()
    with open(path, "wb") as file:
        writer.write(program, metadata, file)
    comparisons = verify(writer.load(path), model, form, thresholds, cases)
    if form == "raw" or any(each.detections for each in comparisons):
        return comparisons
    # Two programs that detect nothing are equal, whatever they compute.
    model = copy(model)
    model.test_score_thresh = 0.0
    cases = [replace(case, name=f"{case.name} without thresholds") for case in cases]
    compared = verify(writer.load(path, 0.0), model, form, [0.0] * len(thresholds), cases)
    if not any(each.detections for each in compared):
        raise UnexpectedResultsError(
            "the model detects nothing, even without thresholds, so that the exported file cannot "
            "be compared with it; its weights may be damaged; no file is left"
        )
    return comparisons + compared


def _config(run: str | Path, opts: Sequence[str]) -> CfgNode:
    cfg = load_run(run, opts)
    cfg.MODEL.DEVICE, cfg.TEST.PRECISION = "cpu", "float32"
    cfg.MODEL.COMPILE = cfg.MODEL.CHANNELS_LAST = False
    if RetinaNetExt.__name__ != cfg.MODEL.META_ARCHITECTURE:
        raise InputError(
            f"{run} is a run of MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE}; "
            f"{RetinaNetExt.__name__} can be exported"
        )
    return cfg


def describe(predictor: Predictor, cfg: CfgNode, form: str, writer: Format) -> ExportMetadata:
    """Return the metadata of a predictor's program."""
    model = predictor.model
    K = model.num_classes
    lowest = [model.test_score_thresh] * K
    if predictor.thresholds is not None:
        lowest = np.maximum(lowest, predictor.thresholds.numpy()).tolist()
    return ExportMetadata(
        form=form,
        class_names=predictor.class_names or [str(index) for index in range(K)],
        thresholds=lowest,
        nms_threshold=model.test_nms_thresh,
        max_detections=model.max_detections_per_image,
        input_format=cfg.INPUT.FORMAT,
        pixel_mean=list(cfg.MODEL.PIXEL_MEAN),
        pixel_std=list(cfg.MODEL.PIXEL_STD),
        resize_shortest=cfg.INPUT.MIN_SIZE_TEST,
        resize_longest=cfg.INPUT.MAX_SIZE_TEST,
        size_divisibility=max(model.backbone.size_divisibility, 1),
        strides=list(model.anchor_generator.strides),
        min_side=writer.min_side,
        precision="float32",
        weights_sha256=sha256_of(cfg.MODEL.WEIGHTS),
        package_version=__version__,
        max_pixels=cfg.INPUT.MAX_PIXELS,
    )


def _has_test_data(cfg: CfgNode, *, needed: bool) -> bool:
    """Register the run's test data, and return whether that was possible.

    Raises:
        InputError: they are needed, to measure the AP, and are missing or have no annotations
    """
    try:
        register_test_data(cfg)
    except InputError as error:
        if needed:
            raise
        logger.warning("The run's test data cannot be used: %s", error)
        return False
    names = cfg.DATASETS.TEST
    if needed and not (names and MetadataCatalog.get(names[0]).get("is_labelled", True)):
        raise InputError(
            "--int8 measures the AP on the run's test data, which have no annotations; set "
            "DATASETS.CUSTOM.TEST_JSON and TEST_IMAGES to data that have"
        )
    return bool(names)


def test_images(cfg: CfgNode, predictor: Predictor) -> list[np.ndarray]:
    """Return the first two test images as the program takes them."""
    images = []
    for record in DatasetCatalog.get(cfg.DATASETS.TEST[0])[:2]:
        inputs = predictor.to_inputs(predictor.read(record["file_name"]))
        images.append(inputs["image"].numpy().astype(np.uint8))
    return images


def _drawn_images(metadata: ExportMetadata) -> list[np.ndarray]:
    """Return two images of coloured squares, of the size of a resized 3 x 4 image."""
    rng = np.random.default_rng(0)
    height, width = metadata.resized(300, 400)
    shape = len(metadata.pixel_mean), -(-height // 16), -(-width // 16)
    squares = [rng.integers(0, 256, shape, dtype=np.uint8) for _ in range(2)]
    return [each.repeat(16, axis=1).repeat(16, axis=2)[:, :height, :width] for each in squares]
