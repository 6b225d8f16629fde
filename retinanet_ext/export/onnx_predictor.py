"""Detections of an exported ONNX file with numpy, Pillow and onnxruntime alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from retinanet_ext.errors import InputError, first_line
from retinanet_ext.export.metadata import KEY, ExportMetadata

AnyImage = str | PathLike[str] | Image.Image | np.ndarray


ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF's orientations, and what turns an image upright."""


@dataclass(frozen=True)
class ImageDetections:
    """Detections of one image, M of them, best first.

    Attributes:
        image_size: (height, width) of the image
        boxes: XYXY in pixels of the image, (M, 4), float32
        scores: (M,), float32
        classes: (M,), int64
        names: names of the classes, M strings
    """

    image_size: tuple[int, int]
    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    names: list[str]

    def __len__(self) -> int:
        return len(self.scores)


class OnnxPredictor:
    """Detections of any images by a file of ``retinanet-ext export --form detections``.

    They are those of :class:`retinanet_ext.engine.Predictor`, with the thresholds in the file.
    Needs neither Detectron2 nor torch nor the run's config.

    Example::

        predictor = OnnxPredictor("output/mine/export/detections.onnx")
        for found in predictor(["a.jpg", "b.jpg"]):
            print(found.names, found.scores, found.boxes)

    Attributes:
        metadata: what the file says of itself
    """

    def __init__(self, file: str | PathLike[str], *, num_threads: int = 0) -> None:
        """
        Args:
            file: the ``.onnx`` file
            num_threads: threads of onnxruntime; 0: one per core

        Raises:
            InputError: onnxruntime is not installed; or the file cannot be read, was exported by
                another version, or holds another form
        """
        self.session = open_session(file, num_threads)
        properties = self.session.get_modelmeta().custom_metadata_map
        self.metadata = ExportMetadata.from_json(properties.get(KEY), fspath(file))
        if self.metadata.form != "detections":
            raise InputError(
                f"{fspath(file)} holds the form {self.metadata.form}, and a predictor needs "
                "detections; export the run with --form detections"
            )

    def __call__(
        self, images: Iterable[AnyImage], batch_size: int = 8
    ) -> Iterator[ImageDetections]:
        """Return an iterator over the detections of each image, in its own pixels and in order.

        Args:
            images: read as they are needed. Each is a file, a PIL image, or a uint8 array (H, W, 3)
                in the order BGR, whatever the model's channels, or (H, W) of grey levels.
                Consecutive images that are resized to the same size share a batch.
            batch_size: images at a time, at most

        Raises:
            InputError: an image cannot be read, or is none of these
        """
        batch: list[tuple[np.ndarray, tuple[int, int]]] = []
        for position, image in enumerate(images):
            prepared, size = self._prepare(image, position)
            if batch and (len(batch) >= batch_size or prepared.shape != batch[0][0].shape):
                yield from self._detect(batch)
                batch = []
            batch.append((prepared, size))
        if batch:
            yield from self._detect(batch)

    def prepare(self, image: AnyImage) -> tuple[np.ndarray, tuple[int, int]]:
        """Return an image as the program takes it, uint8 (C, H, W), and its own (height, width)."""
        pixels = _read(image, self.metadata.input_format)
        size = pixels.shape[0], pixels.shape[1]
        height, width = self.metadata.resized(*size)
        is_grey = pixels.shape[2] == 1
        resized = Image.fromarray(pixels[:, :, 0] if is_grey else pixels)
        resized = resized.resize((width, height), Image.Resampling.BILINEAR)
        pixels = np.asarray(resized).reshape(height, width, -1)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1)), size

    def _prepare(self, image: AnyImage, position: int) -> tuple[np.ndarray, tuple[int, int]]:
        try:
            return self.prepare(image)
        except Exception as error:  # Pillow's decoders raise many types
            name = fspath(image) if isinstance(image, str | PathLike) else position
            raise InputError(f"image {name} cannot be used: {first_line(error)}") from error

    def _detect(self, batch: list[tuple[np.ndarray, tuple[int, int]]]) -> list[ImageDetections]:
        images = np.stack([image for image, _ in batch])
        outputs = self.session.run(None, {"images": images})
        sizes = [size for _, size in batch]
        return [
            self._in_pixels_of_the_image(*found, images.shape[2:], size)
            for *found, size in zip(*outputs, sizes, strict=True)
        ]

    def _in_pixels_of_the_image(
        self, boxes: Any, scores: Any, classes: Any, resized: Any, size: tuple[int, int]
    ) -> ImageDetections:
        (height, width), (resized_height, resized_width) = size, resized
        scale = np.array([width / resized_width, height / resized_height] * 2, np.float32)
        limits = np.array([width, height] * 2, np.float32)
        boxes = (boxes * scale).clip(0, limits)
        found = (scores > 0) & (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
        classes = classes[found]
        names = [self.metadata.class_names[index] for index in classes]
        return ImageDetections(size, boxes[found], scores[found], classes, names)


def open_session(file: str | PathLike[str], num_threads: int = 0) -> Any:
    """Return onnxruntime's session of a file, on the CPU.

    Raises:
        InputError: onnxruntime is not installed, or the file cannot be read
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise InputError(
            "onnxruntime is not installed: pip install 'retinanet-ext[export]'"
        ) from error
    if not Path(file).is_file():
        raise InputError(f"{fspath(file)} is not a file")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.log_severity_level = 3  # errors
    try:
        return onnxruntime.InferenceSession(
            fspath(file), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # onnxruntime's own types, which share no public base
        raise InputError(f"{fspath(file)} is not a whole ONNX file: {first_line(error)}") from error


def _read(image: AnyImage, input_format: str) -> np.ndarray:
    """Return an upright image as uint8 (H, W, C) in the model's channels."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim < 2 or image.shape[2:] not in ((), (3,)):
            raise InputError(
                f"it is an array of {image.dtype} and shape {image.shape}; an array of uint8, "
                "(height, width, 3) in the order BGR or (height, width) of grey levels, is needed"
            )
        image = Image.fromarray(image[:, :, ::-1] if image.ndim == 3 else image)
    if not isinstance(image, Image.Image):
        with Image.open(image) as opened:
            return _read_image(opened, input_format)
    return _read_image(image, input_format)


def _read_image(image: Image.Image, input_format: str) -> np.ndarray:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        raise InputError(
            f"its pixels have more than 8 bits (mode {image.mode}); scale them to 0..255 first, as "
            "INPUT.PIXEL_RANGE did in training"
        )
    image.load()
    turn = ORIENTATIONS.get(_orientation(image))
    upright = image if turn is None else image.transpose(turn)
    if input_format == "BGR":
        return np.asarray(upright.convert("RGB"))[:, :, ::-1]
    pixels = np.asarray(upright.convert(input_format))
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(0x0112)
    except Exception:  # malformed EXIF raises many types; the image is then taken as upright
        return None
