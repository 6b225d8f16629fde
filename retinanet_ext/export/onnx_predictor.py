"""Detections of an exported ONNX file with numpy, Pillow and onnxruntime alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from retinanet_ext.errors import InputError, first_line
from retinanet_ext.export.metadata import KEY, ExportMetadata
from retinanet_ext.open_image import open_image

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
"""EXIF's orientations, and what turns an image upright. It is done as in Detectron2, because
Pillow's ``exif_transpose`` also rewrites the EXIF data and raises where it cannot."""


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
            images: read as they are needed. Each is a file, a PIL image, or a uint8 array:
                (H, W, 3) in the order BGR, whatever the model's channels; (H, W) or (H, W, 1) of
                grey levels; or (H, W, C) in the channels of a model that has C others than these.
                Consecutive images that are resized to the same size share a batch.
            batch_size: images at a time, at most

        Raises:
            InputError: an image cannot be read, or is none of these
        """
        check_call(images, batch_size)
        return self._run(images, batch_size)

    def _run(self, images: Iterable[AnyImage], batch_size: int) -> Iterator[ImageDetections]:
        batch: list[tuple[np.ndarray, tuple[int, int]]] = []
        for position, image in enumerate(images):
            prepared, size = self.prepare(image, position)
            if batch and (len(batch) == batch_size or prepared.shape != batch[0][0].shape):
                yield from self._detect(batch)
                batch = []
            batch.append((prepared, size))
        if batch:
            yield from self._detect(batch)

    def prepare(self, image: AnyImage, position: int = 0) -> tuple[np.ndarray, tuple[int, int]]:
        """Return an image as the program takes it, uint8 (C, H, W), and its own (height, width).

        Args:
            image: as for a call
            position: what to call the image in messages, if it is no file

        Raises:
            InputError: it cannot be read
        """
        try:
            return self._prepare(image)
        except Exception as error:  # Pillow's decoders raise many types
            name = fspath(image) if isinstance(image, str | PathLike) else position
            raise InputError(f"image {name} cannot be used: {_explain(error)}") from error

    def _prepare(self, image: AnyImage) -> tuple[np.ndarray, tuple[int, int]]:
        pixels = self._read(image)
        size = pixels.shape[0], pixels.shape[1]
        height, width = self.metadata.resized(*size)
        is_grey = pixels.shape[2] == 1
        resized = Image.fromarray(pixels[:, :, 0] if is_grey else pixels)
        resized = resized.resize((width, height), Image.Resampling.BILINEAR)
        pixels = np.asarray(resized).reshape(height, width, -1)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1)), size

    def _read(self, image: AnyImage) -> np.ndarray:
        """Return an upright image as uint8 (H, W, C) in the model's channels."""
        input_format, channels = self.metadata.input_format, len(self.metadata.pixel_mean)
        if isinstance(image, Image.Image):
            return _convert(image, input_format)
        if not isinstance(image, np.ndarray):
            with (
                open(image, "rb") as file,
                open_image(file, self.metadata.max_pixels, channels) as opened,
            ):
                return _convert(opened, input_format)
        shape = image.shape[2:]
        is_image = image.dtype == np.uint8 and image.ndim > 1 and 0 not in image.shape
        if not is_image or shape not in ((), (1,), (3,), (channels,)):
            own = f", or (height, width, {channels}), as the model takes them,"
            raise InputError(
                f"it is an array of {image.dtype} and shape {image.shape}; an array of uint8, "
                "(height, width, 3) in the order BGR or (height, width) of grey levels"
                f"{'' if channels in (1, 3) else own} is needed"
            )
        if shape == (3,):
            return _convert(Image.fromarray(image[:, :, ::-1]), input_format)
        if shape in ((), (1,)):
            return _convert(Image.fromarray(image.reshape(image.shape[:2])), input_format)
        return image

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


def check_call(images: Any, batch_size: int) -> None:
    """Check what a predictor was called with.

    Raises:
        InputError: ``images`` is one image instead of a list, or ``batch_size`` is below 1
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1; got {batch_size}")
    is_array = getattr(images, "ndim", None) in (2, 3)
    if is_array or isinstance(images, str | bytes | PathLike | Image.Image):
        raise InputError(
            f"a predictor takes a list of images, and got one {type(images).__name__}; write "
            "predictor([image])"
        )


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


def _convert(image: Image.Image, input_format: str) -> np.ndarray:
    """Return a Pillow image upright as uint8 (H, W, C) in the model's channels."""
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


def _explain(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # whose message names an object of Python
        return "not an image, or of a format that cannot be read"
    return first_line(error)
