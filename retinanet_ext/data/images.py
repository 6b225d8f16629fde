"""Image reading, the same for training, the data check, evaluation, ``Predictor`` and pictures.

Images of 8 bits per channel equal those of Detectron2's ``read_image`` bit for bit. Pillow clips
deeper grey levels to 255. Here a range of levels is scaled to 0..255 in 8 bits instead, so that the
resize and all later steps are the same for every depth.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data.detection_utils import _apply_exif_orientation, convert_PIL_to_numpy
from detectron2.utils.file_io import PathManager
from PIL import Image, UnidentifiedImageError

from retinanet_ext.errors import InputError
from retinanet_ext.open_image import MAX_PIXELS, open_image

RANGE_KEY = "INPUT.PIXEL_RANGE"
AUTO, PERCENTILES = "auto", "percentiles"

LOW_AND_HIGH = 0.1, 99.9
"""The percentiles of ``INPUT.PIXEL_RANGE percentiles``."""

_SAMPLED_IMAGES = 200
_SAMPLED_PIXELS = 10_000  # of each

_BITS_PER_SAMPLE = 258  # a TIFF tag

Range = tuple[float, float]


@dataclass(frozen=True)
class ImageReader:
    """Reads images in the format that the model takes.

    Attributes:
        image_format: ``INPUT.FORMAT``, one of Detectron2's.
        pixel_range: grey levels that become 0 and 255 in images of more than 8 bits. None: 0 and
            the largest number of each file's bit depth.
        max_pixels: most pixels of an image; larger images are refused.
    """

    image_format: str = "BGR"
    pixel_range: Range | None = None
    max_pixels: int = MAX_PIXELS

    @classmethod
    def from_config(cls, cfg: CfgNode) -> ImageReader:
        """Return the reader that a config describes.

        Raises:
            InputError: ``INPUT.PIXEL_RANGE`` is no range, or its percentiles are not measured yet.
        """
        num_channels(cfg.INPUT.FORMAT)  # refuses an unknown format
        pixel_range = parse_pixel_range(cfg.INPUT.PIXEL_RANGE)
        if pixel_range == PERCENTILES:
            raise InputError(
                f"{RANGE_KEY} percentiles is measured on the data that a run is trained on; use "
                "the config.yaml of that run, which has the two numbers"
            )
        return cls(
            cfg.INPUT.FORMAT, None if pixel_range == AUTO else pixel_range, cfg.INPUT.MAX_PIXELS
        )

    def __call__(self, path: str | os.PathLike[str]) -> np.ndarray:
        """Return the upright image as (H, W, C) in ``image_format``.

        Raises:
            Exception: any error of Pillow's decoders; see :func:`explain_unreadable`.
        """
        with self.open(path) as image:
            return self.convert(image)

    @contextmanager
    def open(self, path: str | os.PathLike[str]) -> Iterator[Image.Image]:
        """Open an image file without decoding it; the file is closed at the end of the block."""
        channels = num_channels(self.image_format)
        with (
            PathManager.open(os.fspath(path), "rb") as file,
            open_image(file, self.max_pixels, channels) as image,
        ):
            yield image

    def convert(self, image: Image.Image) -> np.ndarray:
        """Return Pillow's image upright as (H, W, C) in ``image_format``."""
        return convert_PIL_to_numpy(self.to_8_bits(image), self.image_format)

    def to_8_bits(self, image: Image.Image) -> Image.Image:
        """Return Pillow's image upright with 8 bits per channel."""
        pixel_range = self.range_of(image)
        image.load()  # which turns a TIFF upright and removes its orientation
        image = _apply_exif_orientation(image)  # Pillow's own raises where EXIF is malformed
        if pixel_range is None:
            return image
        values = np.asarray(image)
        if values.dtype.itemsize == 2:  # scale each level once instead of each pixel
            return Image.fromarray(_scale(np.arange(2**16), *pixel_range)[values])
        return Image.fromarray(_scale(values, *pixel_range))

    def range_of(self, image: Image.Image) -> Range | None:
        """Return the grey levels that become 0 and 255, or None for an image of 8 bits.

        For an opened file, this reads only the header.

        Raises:
            InputError: the range is set, but the image has deep colours; or neither the config nor
                the bit depth gives a range.
        """
        depth = bit_depth(image)
        if not is_deep_grey(image):
            if depth == 8 or not self.pixel_range:
                return None
            raise InputError(
                f"it has {depth} bits in each of several channels, of which the upper 8 alone can "
                f"be read: {RANGE_KEY} auto takes those, and a range is of grey images alone"
            )
        if self.pixel_range:
            return self.pixel_range
        if depth:
            return 0, 2**depth - 1
        low, high = extrema(image)
        kind = "floats" if image.mode == "F" else "integers"
        raise InputError(
            f"its pixels are {kind}, here {low:g} to {high:g}, of which no bit depth says what "
            f"black and white are: set {RANGE_KEY} to [black, white], or to percentiles, which "
            "measures both on the training data"
        )


def _scale(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Scale [low, high] to [0, 255]; values beyond are clipped, and NaN becomes 0."""
    return np.nan_to_num(np.rint(np.interp(values, (low, high), (0, 255)))).astype(np.uint8)


def extrema(image: Image.Image) -> Range:
    """Return the smallest and the largest grey level in the file."""
    values = np.asarray(image)  # Pillow's own refuses some modes
    return float(np.nanmin(values)), float(np.nanmax(values))


def is_deep_grey(image: Image.Image) -> bool:
    """Return whether an image has one channel of more than 8 bits."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def bit_depth(image: Image.Image) -> int | None:
    """Return the bits per channel in the file, or None if they do not define a range.

    The largest number is not white in images of floats, signed integers or 32-bit integers.
    """
    bits = max(getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (8,)))
    if not is_deep_grey(image):
        # Before a PNG is decoded, only the decoder's mode shows 16-bit colours.
        is_deep_png = image.format == "PNG" and any(";16" in str(tile[3]) for tile in image.tile)
        return 16 if is_deep_png else max(bits, 8)
    if image.mode.startswith("I;16"):
        return bits if bits > 8 else 16
    # Pillow scales PGM to 16 bits, and before version 11 it read 16-bit PNG in this mode.
    return 16 if image.mode == "I" and image.format in ("PPM", "PNG") else None


def num_channels(image_format: str) -> int:
    """Return the number of channels of an ``INPUT.FORMAT``.

    Raises:
        InputError: the format is unknown, or Detectron2 cannot convert it to an array.
    """
    if image_format in ("BGR", "YUV-BT.601"):  # Detectron2 computes these from RGB
        return 3
    try:
        channels = Image.getmodebands(image_format)
    except KeyError:
        channels = 0
    if channels > 1 or image_format == "L":
        return channels
    raise InputError(
        f"INPUT.FORMAT {image_format!r} is unknown; known: BGR, RGB, L, YUV-BT.601 and Pillow's "
        "other modes of several channels"
    )


def parse_pixel_range(value: Any) -> str | Range:
    """Return the value of ``INPUT.PIXEL_RANGE``: "auto", "percentiles", or two numbers.

    Raises:
        InputError: the value is something else.
    """
    items = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if items in ([AUTO], [PERCENTILES]):
        return items[0]
    if len(items) == 2 and all(type(item) in (int, float) for item in items):
        low, high = items
        if np.isfinite(items).all() and low < high:
            return low, high
    raise InputError(
        f"{RANGE_KEY} must be auto, percentiles, or two numbers [black, white] that rise, such as "
        f"[0, 4095]; got {value!r}"
    )


def measure_pixel_range(files: Sequence[str], max_pixels: int) -> list[str] | list[float]:
    """Return the two numbers that ``INPUT.PIXEL_RANGE percentiles`` stands for.

    The percentiles are taken over the images of more than 8 bits in an even sample of the files;
    ["auto"] is returned if there are none. Files that cannot be read are passed over, because the
    data check names them.

    Raises:
        InputError: no file exists, or all pixels are equal.
    """
    reader = ImageReader(max_pixels=max_pixels)
    chosen = np.linspace(0, len(files) - 1, min(len(files), _SAMPLED_IMAGES)).round().astype(int)
    samples = [values for index in chosen for values in _sample_levels(reader, files[index])]
    if not samples and not any(map(os.path.isfile, files)):
        raise InputError(
            f"{RANGE_KEY} percentiles: none of the {len(files)} training images is there, such as "
            f"{next(iter(files), 'none')}; set two numbers, or mend the file names"
        )
    if not samples:
        return [AUTO]
    values = np.concatenate(samples)
    low, high = (float(f"{value:.6g}") for value in np.percentile(values, LOW_AND_HIGH))
    if low >= high:
        raise InputError(
            f"{RANGE_KEY} percentiles: the grey levels of {len(samples)} training images are all "
            f"{low:g}; set two numbers"
        )
    return [low, high]


def _sample_levels(reader: ImageReader, file: str) -> Iterable[np.ndarray]:
    try:
        with reader.open(file) as image:
            if not is_deep_grey(image):
                return []
            values = np.asarray(image).ravel()
    except Exception:  # Pillow's decoders raise many types
        return []
    values = values[:: max(1, len(values) // _SAMPLED_PIXELS)].astype(np.float64)
    values = values[np.isfinite(values)]
    return [values] if len(values) else []


def explain_unreadable(error: Exception) -> str:
    """Return one line that says why an image cannot be read."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or of a format that cannot be read"
    return " ".join(str(error).split()) or type(error).__name__


def find_size_fault(record: Mapping[str, Any], size: Sequence[int] | None) -> str | None:
    """Return how the (width, height) of an upright image differs from those of its record."""
    if size is None:
        return None
    width, height = (record.get(key) for key in ("width", "height"))
    expected = size[0] if width is None else width, size[1] if height is None else height
    if tuple(size) == expected:
        return None
    return f"it has {size[0]} x {size[1]} pixels when upright, not {expected[0]} x {expected[1]}"


def has_several_frames(image: Image.Image) -> bool:
    """Return whether a file has several pages or frames; the preview in a photo does not count."""
    return getattr(image, "is_animated", False) and image.format != "MPO"
