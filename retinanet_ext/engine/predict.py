"""Detections of images that belong to no data set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from os import PathLike
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.detection_utils import read_image
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.modeling import build_model
from detectron2.structures import Instances
from torch import nn

from retinanet_ext.engine.checkpoint import Checkpointer
from retinanet_ext.engine.class_matching import saved_class_names
from retinanet_ext.engine.failures import first_line
from retinanet_ext.errors import InputError
from retinanet_ext.losses import Interval

Image = str | PathLike[str] | np.ndarray


class Predictor:
    """Detectron2's ``DefaultPredictor`` for many images at a time.

    Images share a batch while they come one after the other and are padded to the same size, so
    that none has other detections than it would have alone. ::

        for path, instances in zip(paths, Predictor(cfg)(paths)):
            ...
    """

    def __init__(self, cfg: CfgNode, model: nn.Module | None = None) -> None:
        """
        Args:
            cfg: the model and how test images are resized
            model: a detector of that config; by default it is built, with ``MODEL.WEIGHTS``

        Attributes:
            class_names: of classes 0..K-1, where the weights' file names them; else empty
        """
        self.class_names: list[str] = []
        if model is None:
            model = build_model(cfg)
            content = Checkpointer(model, complete=True).load(cfg.MODEL.WEIGHTS)
            self.class_names = saved_class_names(content)
        self.model = model.eval()
        self.resize = ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST)
        self.input_format = cfg.INPUT.FORMAT

    def __call__(self, images: Iterable[Image], batch_size: int = 8) -> Iterator[Instances]:
        """Yield the detections of each image, in its own pixels and in order.

        Args:
            images: files, or (H, W, 3) uint8 arrays in the order BGR; read as they are needed
            batch_size: images at a time, at most

        Raises:
            InputError: an image cannot be read, or is no such array
        """
        Interval("[1, inf)").check("batch_size", batch_size)
        batch: list[dict[str, Any]] = []
        for position, image in enumerate(images):
            inputs = self._prepare(image, position)
            full = len(batch) == batch_size
            if batch and (full or self._padded_size(inputs) != self._padded_size(batch[0])):
                yield from self._detect(batch)
                batch = []
            batch.append(inputs)
        if batch:
            yield from self._detect(batch)

    def _prepare(self, image: Image, position: int) -> dict[str, Any]:
        array = image if isinstance(image, np.ndarray) else _read(image)
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
            raise InputError(
                f"image {position} is an array of {array.dtype} and shape {array.shape}; "
                "uint8 and (height, width, 3) in the order BGR are needed"
            )
        height, width = array.shape[:2]
        if self.input_format == "RGB":
            array = array[:, :, ::-1]
        array = self.resize.get_transform(array).apply_image(array)
        tensor = torch.as_tensor(array.astype("float32").transpose(2, 0, 1))
        return {"image": tensor, "height": height, "width": width}

    def _padded_size(self, inputs: dict[str, Any]) -> tuple[int, ...]:
        multiple = max(self.model.backbone.size_divisibility, 1)
        return tuple(-(-side // multiple) for side in inputs["image"].shape[1:])

    def _detect(self, batch: list[dict[str, Any]]) -> list[Instances]:
        with torch.no_grad():
            return [output["instances"] for output in self.model(batch)]


def _read(path: str | PathLike[str]) -> np.ndarray:
    try:
        return read_image(path, format="BGR")
    except Exception as error:  # a damaged file raises what its format's decoder happens to
        raise InputError(f"image {path} cannot be read: {first_line(error)}") from error
