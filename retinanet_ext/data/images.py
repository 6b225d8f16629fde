"""Reading images: one way for training, the data check, evaluation, ``Predictor`` and pictures.

An image of 8 bits a channel is read as Detectron2's ``read_image`` reads it, bit for bit. Pillow
clips deeper grey levels to 255; here a range of them becomes 0 to 255, in 8 bits as well, so that
the resize and all that follows is the same for every depth.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data.detection_utils import _apply_exif_orientation, convert_PIL_to_numpy
from detectron2.utils.file_io import PathManager
from PIL import Image, UnidentifiedImageError

from retinanet_ext.errors import InputError

RANGE_KEY = "INPUT.PIXEL_RANGE"
AUTO, PERCENTILES = "auto", "percentiles"

MAX_PIXELS = 178_956_970
"""Above which Pillow refuses an image by itself."""

LOW_AND_HIGH = 0.1, 99.9
"""The percentiles of ``INPUT.PIXEL_RANGE percentiles``."""

FEW_LEVELS = 17
"""Of 256: what is left of 12 bits in a file of 16. So few are a finding."""

_SAMPLED_IMAGES = 200
_SAMPLED_PIXELS = 10_000  # of each

_BYTES = 5  # of a pixel and channel while an image is read and resized, measured

_BITS_PER_SAMPLE = 258  # a TIFF tag
_HUGE = threading.Lock()  # one huge image in memory at a time, however many threads read

Range = tuple[float, float]


@dataclass(frozen=True)
class ImageReader:
    """Reads images as the model takes them.

    Attributes:
        image_format: ``INPUT.FORMAT``, one of Detectron2's
        pixel_range: grey levels that become 0 and 255, of images of more than 8 bits; None: by the
            bit depth of each file
        max_pixels: of an image; larger ones are refused
    """

    image_format: str = "BGR"
    pixel_range: Range | None = None
    max_pixels: int = MAX_PIXELS

    @classmethod
    def from_config(cls, cfg: CfgNode) -> ImageReader:
        """Return the reader that a config describes.

        Raises:
            InputError: a range that is not one, or percentiles that are not measured yet
        """
        num_channels(cfg.INPUT.FORMAT)  # refuses a format that is unknown
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
        """Return an image, upright, as (H, W, C) in ``image_format``.

        Raises:
            Exception: whatever Pillow's decoders raise; :func:`explain_unreadable` puts it in words
        """
        with self.open(path) as image:
            return self.convert(image)

    @contextmanager
    def open(self, path: str | os.PathLike[str]) -> Iterator[Image.Image]:
        """Open an image file, not yet decoded; it is closed again at the end of the block."""
        with PathManager.open(os.fspath(path), "rb") as file, ExitStack() as stack:
            try:
                image = Image.open(file)
            except Image.DecompressionBombError:
                stack.enter_context(_HUGE)
                image = _open_without_limit(file)
            pixels = image.width * image.height
            if pixels > self.max_pixels:
                memory = _BYTES * pixels * num_channels(self.image_format) / 1e6
                raise InputError(
                    f"it has {image.width} x {image.height} = {pixels:,} pixels, which take "
                    f"{memory:,.0f} MB of memory, and INPUT.MAX_PIXELS allows {self.max_pixels:,}"
                )
            yield image

    def convert(self, image: Image.Image) -> np.ndarray:
        """Return Pillow's image, upright, as (H, W, C) in ``image_format``."""
        return convert_PIL_to_numpy(self.to_8_bits(image), self.image_format)

    def to_8_bits(self, image: Image.Image) -> Image.Image:
        """Return Pillow's image, upright, with 8 bits a channel."""
        pixel_range = self.range_of(image)
        image.load()  # by which Pillow turns a TIFF, and takes its orientation away
        image = _apply_exif_orientation(image)  # Pillow's own raises where EXIF is malformed
        if pixel_range is None:
            return image
        values = np.asarray(image)
        if values.dtype.itemsize == 2:  # each level once, not each pixel
            return Image.fromarray(_scale(np.arange(2**16), *pixel_range)[values])
        return Image.fromarray(_scale(values, *pixel_range))

    def range_of(self, image: Image.Image) -> Range | None:
        """Return the levels of an image that become 0 and 255, None where they are of 8 bits.

        Of an opened file the header alone is read.

        Raises:
            InputError: there is no such range
        """
        depth = bit_depth(image)
        if not _is_deep_grey(image):
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
        low, high = _extrema(image)
        kind = "floats" if image.mode == "F" else "integers"
        raise InputError(
            f"its pixels are {kind}, here {low:g} to {high:g}, of which no bit depth says what "
            f"black and white are: set {RANGE_KEY} to [black, white], or to percentiles"
        )


def _scale(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Return 0 for low and less, 255 for high and more, and 0 for what is no number."""
    scaled = np.rint((values.astype(np.float64) - low) * (255 / (high - low)))
    return np.nan_to_num(scaled.clip(0, 255)).astype(np.uint8)


def _open_without_limit(file: Any) -> Image.Image:
    """Open an image that Pillow refuses for its size; the caller holds ``_HUGE``."""
    file.seek(0)
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        return Image.open(file)
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _extrema(image: Image.Image) -> Range:
    values = np.asarray(image)  # Pillow's own refuses some modes
    return float(np.nanmin(values)), float(np.nanmax(values))


def _is_deep_grey(image: Image.Image) -> bool:
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def bit_depth(image: Image.Image) -> int | None:
    """Return the bits of a channel as the file has them, None where that says no range.

    Such are floats and integers that are signed or of 32 bits: their white is never the largest
    number.
    """
    bits = max(getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (8,)))
    if not _is_deep_grey(image):
        # Of 16-bit colours in a PNG Pillow tells by the decoder's mode alone, before it decodes.
        is_deep_png = image.format == "PNG" and any(";16" in str(tile[3]) for tile in image.tile)
        return 16 if is_deep_png else max(bits, 8)
    if image.mode.startswith("I;16"):
        return bits if bits > 8 else 16
    # Pillow scales PGM to 16 bits; before version 11 it had PNG of 16 bits in this mode.
    return 16 if image.mode == "I" and image.format in ("PPM", "PNG") else None


def num_channels(image_format: str) -> int:
    """Return the channels of an ``INPUT.FORMAT``.

    Raises:
        InputError: it is unknown, or none that Detectron2 can make an array of channels of
    """
    try:
        # Not Pillow's: Detectron2 makes these of RGB.
        ours = image_format in ("BGR", "YUV-BT.601")
        channels = 3 if ours else Image.getmodebands(image_format)
    except KeyError:
        channels = 0
    if channels > 1 or image_format == "L":
        return channels
    raise InputError(
        f"INPUT.FORMAT {image_format!r} is unknown; known: BGR, RGB, L, YUV-BT.601 and Pillow's "
        "other modes of several channels"
    )


def parse_pixel_range(value: Any) -> str | Range:
    """Return what ``INPUT.PIXEL_RANGE`` says: "auto", "percentiles", or two numbers.

    Raises:
        InputError: it says something else
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
    """Return the value of ``INPUT.PIXEL_RANGE`` that percentiles stand for in these images.

    They are of the grey levels of all images of more than 8 bits in an even sample; where there
    are none it is ["auto"]. Files that cannot be read are passed over: the data check names them.

    Raises:
        InputError: no file is there, or all pixels are equal
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
            if not _is_deep_grey(image):
                return []
            values = np.asarray(image).ravel()
    except Exception:  # Pillow's decoders raise many types
        return []
    values = values[:: max(1, len(values) // _SAMPLED_PIXELS)].astype(np.float64)
    values = values[np.isfinite(values)]
    return [values] if len(values) else []


def explain_unreadable(error: Exception) -> str:
    """Return in one line why an image cannot be read."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or of a format that cannot be read"
    return " ".join(str(error).split()) or type(error).__name__


def find_size_fault(record: dict[str, Any], image: np.ndarray) -> str | None:
    """Return where an image has not the width and height of its record, if so."""
    height, width = image.shape[:2]
    expected = record.get("width", width), record.get("height", height)
    if (width, height) == expected:
        return None
    return f"it has {width} x {height} pixels when upright, not {expected[0]} x {expected[1]}"


def has_several_frames(image: Image.Image) -> bool:
    """Tell whether a file has pages or frames beside the first; a photo's preview is none."""
    return getattr(image, "is_animated", False) and image.format != "MPO"


def find_image_fault(record: dict[str, Any], reader: ImageReader) -> tuple[str, str] | None:
    """Read an image as training does, and return what is wrong with it, the first, if so.

    Args:
        record: with the file_name as a path, and the width and height that the image must have
            after its EXIF orientation is applied.
        reader: of the config.

    Returns:
        a kind of :data:`retinanet_ext.data.validation.KINDS` and one line
    """
    try:
        with reader.open(record["file_name"]) as image:
            upright = reader.to_8_bits(image)
            array = convert_PIL_to_numpy(upright, reader.image_format)
            extrema = _extrema(image) if _is_deep_grey(image) else None
            frames = image.n_frames if has_several_frames(image) else 1
    except Exception as error:  # Pillow's decoders raise many types, bare RuntimeError among them
        return "unreadable_image", explain_unreadable(error)
    if fault := find_size_fault(record, array):
        return "image_size", fault
    if frames > 1:
        return "several_frames", f"it has {frames} pages or frames, and the first is read"
    first = array[0, 0]
    if (array[0] == first).all() and (array == first).all():
        levels = "" if extrema is None else f", of {extrema[0]:g} to {extrema[1]:g} in the file"
        return "constant_image", f"every pixel is {first.tolist()}{levels}"
    if extrema and (levels := 1 + int(np.ptp(upright.getextrema()))) <= FEW_LEVELS:
        return "constant_image", (
            f"its values, {extrema[0]:g} to {extrema[1]:g}, become at most {levels} of 256 levels; "
            f"{RANGE_KEY} says which become black and white"
        )
    return None
