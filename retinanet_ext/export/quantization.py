"""An exported ONNX file in int8, by onnxruntime's static quantization, and the AP that it costs."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, Instances

from retinanet_ext.data import prepare_datasets
from retinanet_ext.errors import InputError, UnexpectedResultsError
from retinanet_ext.evaluation import BoxEvaluator
from retinanet_ext.export.formats import write_with_threshold
from retinanet_ext.export.metadata import KEY, ExportMetadata
from retinanet_ext.export.onnx_predictor import ImageDetections, OnnxPredictor

logger = logging.getLogger(__name__)

LARGEST_LOSS = 0.1
"""Of AP, as a fraction of the AP in float32."""

QUANTIZED = ("Conv",)
"""Operators in int8. With ``Relu``, ``Clip`` and ``Add`` too, a MobileNetV2 lost 4.2 of 55.9 AP."""


@dataclass(frozen=True)
class Quantization:
    """The AP of a quantized file on the run's test data, as training evaluates it.

    Attributes:
        ap_float32, ap_int8: AP in percent
        num_images: test images
        calibration_images: images that the ranges of activations were measured on
    """

    ap_float32: float
    ap_int8: float
    num_images: int
    calibration_images: int

    def __str__(self) -> str:
        return (
            f"AP on {self.num_images} test images: {self.ap_float32:.2f} in float32, "
            f"{self.ap_int8:.2f} in int8 ({self.calibration_images} images for calibration)"
        )


def quantize(
    source: Path, target: Path, metadata: ExportMetadata, cfg: CfgNode, calibration_images: int
) -> Quantization:
    """Write a quantized file of the form ``detections``, and measure the AP of both files.

    The AP is that of all detections above ``SCORE_THRESH_TEST``, whatever the files' thresholds.
    Activations have one scale per tensor, weights one per output channel. The last convolution of
    each subnet stays in float32.

    Args:
        source: verified ONNX file in float32
        target: file to write
        metadata: of ``target``
        cfg: from ``load_run``, completed by ``register_test_data``
        calibration_images: number of images to measure the ranges of activations on

    Raises:
        InputError: an image for calibration cannot be read
        UnexpectedResultsError: int8 loses more than a tenth of the AP, or there is no AP to lose
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    before, num_images = average_precision(source, cfg)
    if not before > 0:
        raise UnexpectedResultsError(
            f"the AP in float32 is {before:.2f} on the run's test data, so that the loss by int8 "
            "cannot be measured; no file is left"
        )
    files = _calibration_files(cfg, calibration_images)
    quantize_static(
        source,
        target,
        CalibrationImages(OnnxPredictor(source), files),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod.MinMax,
        op_types_to_quantize=list(QUANTIZED),
        nodes_to_exclude=last_convolutions(onnx.load(source)),
    )
    model = onnx.load(target)
    del model.metadata_props[:]
    model.metadata_props.add(key=KEY, value=metadata.to_json())
    onnx.save(model, target)
    after, _ = average_precision(target, cfg)
    if after < (1 - LARGEST_LOSS) * before:
        raise UnexpectedResultsError(
            f"in int8 the AP falls from {before:.2f} to {after:.2f}, by more than a tenth; more "
            "--calibration-images may help; no file is left"
        )
    return Quantization(before, after, num_images, len(files))


class CalibrationImages:
    """Images as onnxruntime's calibration reads them, one at a time."""

    def __init__(self, predictor: OnnxPredictor, files: Sequence[str]) -> None:
        self.inputs = ({"images": predictor.prepare(file)[0][None]} for file in files)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Return the input of the next image, None after the last."""
        return next(self.inputs, None)


def _calibration_files(cfg: CfgNode, number: int) -> list[str]:
    """Return training images, evenly spaced; test images if the training data are not at hand."""
    cfg = cfg.clone()
    try:
        prepare_datasets(cfg, eval_only=False)
        names = cfg.DATASETS.TRAIN
    except InputError as error:
        logger.warning("Calibration uses test images, because of the training data: %s", error)
        names = cfg.DATASETS.TEST
    files = [record["file_name"] for record in DatasetCatalog.get(names[0])]
    chosen = np.linspace(0, len(files) - 1, min(number, len(files))).round().astype(int)
    return [files[index] for index in chosen]


def last_convolutions(model: Any) -> list[str]:
    """Return the names of the nodes of an ONNX model that compute logits and deltas."""
    layers = ("head.cls_score.weight", "head.bbox_pred.weight")
    return [
        node.name
        for node in model.graph.node
        if node.op_type == "Conv" and node.input[1].endswith(layers)
    ]


def average_precision(file: Path, cfg: CfgNode) -> tuple[float, int]:
    """Return the AP of a file on the first test set, in percent, and its number of images.

    The file's thresholds are replaced by the config's ``SCORE_THRESH_TEST``.
    """
    (name, *_) = cfg.DATASETS.TEST
    records = DatasetCatalog.get(name)
    with tempfile.TemporaryDirectory() as scratch:
        score = cfg.MODEL.RETINANET.SCORE_THRESH_TEST
        predictor = OnnxPredictor(write_with_threshold(file, Path(scratch, "file.onnx"), score))
        evaluator = BoxEvaluator(
            name, max_detections=cfg.TEST.DETECTIONS_PER_IMAGE, output_dir=scratch
        )
        evaluator.reset()
        files = (record["file_name"] for record in records)
        for record, found in zip(records, predictor(files), strict=True):
            evaluator.process([record], [{"instances": _to_instances(found)}])
        return float(evaluator.evaluate()["bbox"]["AP"]), len(records)


def _to_instances(found: ImageDetections) -> Instances:
    return Instances(
        found.image_size,
        pred_boxes=Boxes(torch.from_numpy(found.boxes)),
        scores=torch.from_numpy(found.scores),
        pred_classes=torch.from_numpy(found.classes),
    )
