"""Detections of images that belong to no data set."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.modeling import build_model
from detectron2.structures import Instances
from PIL import Image
from torch import nn

from retinanet_ext.data.images import (
    ImageReader,
    explain_unreadable,
    has_several_frames,
    num_channels,
)
from retinanet_ext.engine.checkpoint import Checkpointer
from retinanet_ext.engine.class_matching import saved_class_names
from retinanet_ext.engine.config_check import use_cpu_without_cuda
from retinanet_ext.engine.find_checkpoint import last_checkpoint
from retinanet_ext.errors import InputError
from retinanet_ext.evaluation.thresholds import THRESHOLDS, Thresholds
from retinanet_ext.export.onnx_predictor import AnyImage, OnnxPredictor, check_call
from retinanet_ext.files import sha256_of

logger = logging.getLogger(__name__)


class Predictor:
    """Detectron2's ``DefaultPredictor`` for batches of images of any ``INPUT.FORMAT``.

    Consecutive images share a batch if they are padded to the same size. An image then has the
    detections that it has alone, to rounding (about 1e-6 of scores and corners), which may decide
    ties at the score threshold, in NMS or at the last of ``TEST.DETECTIONS_PER_IMAGE``.

    ``Predictor(cfg)(paths)`` loads the run's weights. Here the model has random ones:

        >>> from detectron2.modeling import build_model
        >>> from retinanet_ext.engine import load_config
        >>> cfg = load_config("configs/small_R18_FPN.yaml", ["MODEL.DEVICE", "cpu"])
        >>> predictor = Predictor(cfg, build_model(cfg))
        >>> for instances in predictor([np.zeros((120, 160, 3), np.uint8)], batch_size=8):
        ...     print(instances.image_size, instances.pred_boxes.tensor.shape[1])
        (120, 160) 4

    Attributes:
        class_names: names of classes 0..K-1 from the weights' file, empty if it has none
        thresholds: lowest score of a detection per class, (K,) on the CPU; None: the model's own
            ``SCORE_THRESH_TEST`` alone
    """

    def __init__(
        self,
        cfg: CfgNode,
        model: nn.Module | None = None,
        *,
        thresholds: Thresholds | Literal["run"] | None = "run",
    ) -> None:
        """
        Args:
            cfg: config of the model and of test images; not changed. Without CUDA the model is
                built on the CPU
            model: detector of that config. By default it is built and given ``MODEL.WEIGHTS``, or
                if that is empty the last checkpoint in ``OUTPUT_DIR``
            thresholds: lowest scores per class. By default those that ``retinanet-ext evaluate
                --save-thresholds`` has saved in ``OUTPUT_DIR``, where there are some and the
                weights are loaded here; None for none

        Raises:
            InputError: there are no weights, or they do not fit the model; the thresholds are
                damaged, or were chosen for other weights or classes
        """
        self.class_names: list[str] = []
        if model is None:
            cfg = cfg.clone()
            cfg.defrost()
            use_cpu_without_cuda(cfg, num_threads=torch.get_num_threads())
            model = build_model(cfg)
            self.class_names, file = _load_weights(model, cfg)
            if thresholds == "run":
                thresholds = _saved_thresholds(cfg.OUTPUT_DIR, file)
        self.thresholds = None
        if isinstance(thresholds, Thresholds):
            by_class = thresholds.by_class(self.class_names, cfg.MODEL.RETINANET.NUM_CLASSES)
            self.thresholds = torch.tensor(by_class)
        self.model = model.eval()
        self.resize = ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
        self.reader = ImageReader.from_config(cfg)

    @classmethod
    def from_onnx(cls, file: str | PathLike[str]) -> OnnxPredictor:
        """Return the predictor of a file that ``retinanet-ext export`` has written.

        It gives the same detections, as arrays. It lives in
        :mod:`retinanet_ext.export.onnx_predictor`, which works without Detectron2 and torch.
        """
        return OnnxPredictor(file)

    def __call__(self, images: Iterable[AnyImage], batch_size: int = 8) -> Iterator[Instances]:
        """Return an iterator over the detections of each image, in its own pixels and in order.

        Args:
            images: read as they are needed. Each is a file, a PIL image, or an array:
                uint8 (H, W, 3) in the order BGR, whatever the model's ``INPUT.FORMAT``;
                (H, W) or (H, W, 1) of grey levels, of the same depths as in files; or
                uint8 (H, W, C) in the channels of a model that has C others than these
            batch_size: images at a time, at most

        Raises:
            InputError: an image cannot be read, or is none of these
        """
        check_call(images, batch_size)
        return self._run(images, batch_size)

    def _run(self, images: Iterable[AnyImage], batch_size: int) -> Iterator[Instances]:
        batch: list[dict[str, Any]] = []
        for position, image in enumerate(images):
            inputs = self._prepare(image, position)
            full = len(batch) == batch_size
            if batch and (full or self.padded_size(inputs) != self.padded_size(batch[0])):
                yield from self.detect(batch)
                batch = []
            batch.append(inputs)
        if batch:
            yield from self.detect(batch)

    def _prepare(self, image: AnyImage, position: int) -> dict[str, Any]:
        try:
            return self.to_inputs(self.read(image))
        except Exception as error:  # Pillow's decoders raise many types
            name = os.fspath(image) if isinstance(image, str | PathLike) else position
            raise InputError(f"image {name} cannot be used: {explain_unreadable(error)}") from error

    def read(self, image: AnyImage) -> np.ndarray:
        """Return an image in the format of the model, (H, W, C).

        Raises:
            Exception: any error of Pillow's decoders; see
                :func:`~retinanet_ext.data.images.explain_unreadable`
        """
        if not isinstance(image, str | PathLike):
            return self._convert(image)
        with self.reader.open(image) as opened:
            if has_several_frames(opened):
                logger.warning("image %s has several pages or frames; the first is used", image)
            return self.reader.convert(opened)

    def to_inputs(self, array: np.ndarray) -> dict[str, Any]:
        """Return what the model takes for an image, resized as in tests.

        Args:
            array: (H, W, C) as :meth:`read` returns it
        """
        height, width = array.shape[:2]
        array = self.resize.get_transform(array).apply_image(array)
        tensor = torch.as_tensor(array.astype("float32").transpose(2, 0, 1))
        return {"image": tensor, "height": height, "width": width}

    def _convert(self, image: Image.Image | np.ndarray) -> np.ndarray:
        """Return an image in memory in the format of the model."""
        if isinstance(image, Image.Image):
            return self.reader.convert(image)
        channels = num_channels(self.reader.image_format)
        if isinstance(image, np.ndarray) and 0 not in image.shape:
            grey = image[:, :, 0] if image.ndim == 3 and image.shape[2] == 1 else image
            if grey.ndim == 2 and grey.dtype in (np.uint8, np.uint16, np.int32, np.float32):
                return self.reader.convert(Image.fromarray(grey))
            if image.dtype == np.uint8 and image.ndim == 3:
                if image.shape[2] == 3:
                    return self.reader.convert(Image.fromarray(image[:, :, ::-1]))
                if image.shape[2] == channels:
                    return image
        what = f"of type {type(image).__name__}"
        if hasattr(image, "shape"):
            what += f", {image.dtype} and shape {tuple(image.shape)}"
        own = f"; or (height, width, {channels}), as the model takes them"
        raise InputError(
            f"it is {what}; a file name, a PIL image or an array is needed, of uint8 (height, "
            "width, 3) in the order BGR, or (height, width) of grey levels in uint8, uint16, int32 "
            "or float32" + ("" if channels in (1, 3) else own)
        )

    def padded_size(self, inputs: dict[str, Any]) -> tuple[int, ...]:
        """Return the size that an image is padded to alone, in steps of the model."""
        multiple = max(self.model.backbone.size_divisibility, 1)
        return tuple(-(-side // multiple) for side in inputs["image"].shape[1:])

    def detect(self, batch: list[dict[str, Any]]) -> list[Instances]:
        """Return the detections of images of one :meth:`padded_size`, from :meth:`to_inputs`."""
        with torch.no_grad():
            found = [output["instances"] for output in self.model(batch)]
        if self.thresholds is None:
            return found
        thresholds = self.thresholds.to(self.model.device)
        return [each[each.scores >= thresholds[each.pred_classes]] for each in found]


def _load_weights(model: nn.Module, cfg: CfgNode) -> tuple[list[str], str]:
    """Load ``MODEL.WEIGHTS``, or where it is empty the run's last checkpoint, and say so.

    Returns:
        the class names in the file, empty where it has none; and the file
    """
    if cfg.MODEL.WEIGHTS:
        try:
            content = Checkpointer(model, complete=True).load(cfg.MODEL.WEIGHTS)
            return saved_class_names(content), cfg.MODEL.WEIGHTS
        except InputError as error:  # a run's config names what it began with, such as a backbone
            last = last_checkpoint(cfg.OUTPUT_DIR)
            has = f"; OUTPUT_DIR has {last}" if last else ""
            raise InputError(f"{error}{has}") from error
    last = last_checkpoint(cfg.OUTPUT_DIR)
    if not last:
        raise InputError(
            f"MODEL.WEIGHTS is empty, and OUTPUT_DIR {cfg.OUTPUT_DIR} holds no checkpoint; set "
            "MODEL.WEIGHTS to the weights of the model"
        )
    logger.warning("MODEL.WEIGHTS is empty: the last checkpoint is used, %s", last)
    content = Checkpointer(model, cfg.OUTPUT_DIR, complete=True).load(last)
    return saved_class_names(content), last


def _saved_thresholds(folder: str, weights: str) -> Thresholds | None:
    """Return the thresholds in a run's folder, None where there are none."""
    path = Path(folder, THRESHOLDS)
    if not path.is_file():
        return None
    thresholds = Thresholds.read(path)
    if not Path(weights).is_file() or thresholds.weights_sha256 != sha256_of(weights):
        raise InputError(
            f"{path} was chosen for other weights than {weights}; write it anew by "
            f"`retinanet-ext evaluate {folder} --save-thresholds`, delete it, or go without it: "
            "predict and export with `--score 0.4`, or Predictor(cfg, thresholds=None)"
        )
    logger.info("Detections below the thresholds in %s are left out", path)
    return thresholds
