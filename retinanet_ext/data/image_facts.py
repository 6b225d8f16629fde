"""Inspection of an image file: its size, and whether training can use it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from detectron2.data.detection_utils import convert_PIL_to_numpy

from retinanet_ext.data.images import (
    RANGE_KEY,
    ImageReader,
    explain_unreadable,
    extrema,
    has_several_frames,
    is_deep_grey,
)

FEW_LEVELS = 17
"""Number of 256 grey levels that remain of 12 bits in a 16-bit file. So few are a finding."""

_EXIF_ORIENTATION = 274


class ImageFacts(NamedTuple):
    """What is known about an image file.

    Attributes:
        size: (width, height) in pixels of the upright image; None if unknown.
        kind: kind of finding, or "" if nothing was found.
        message: what was found.
    """

    size: tuple[int, int] | None = None
    kind: str = ""
    message: str = ""


def inspect_image(path: str, reader: ImageReader, *, decode: bool) -> ImageFacts:
    """Look at an image file as training reads it.

    Args:
        path: path of an existing file.
        reader: the reader of the training.
        decode: decode the pixels. Otherwise they are decoded only if the header shows a fault.
    """
    size = None if decode else _read_size(path, reader)
    return ImageFacts(size) if size else _decode(path, reader)


def _read_size(path: str, reader: ImageReader) -> tuple[int, int] | None:
    """Return the size that the header gives, or None if the header shows a fault."""
    try:
        with reader.open(path) as image:
            # Look at `info` first, because getexif() decodes a PNG that has no EXIF block.
            has_exif = "exif" in image.info or image.format == "TIFF"
            is_turned = has_exif and image.getexif().get(_EXIF_ORIENTATION, 1) > 4
            if is_turned and image.format == "TIFF":
                image.load()  # which turns a TIFF upright
                is_turned = False
            reader.range_of(image)
            if has_several_frames(image):
                return None
            return image.size[::-1] if is_turned else image.size
    except Exception:  # decoding tells more; Detectron2 reads images with malformed EXIF data
        return None


def _decode(path: str, reader: ImageReader) -> ImageFacts:
    """Decode an image and return the first thing that is found."""
    try:
        with reader.open(path) as image:
            upright = reader.to_8_bits(image)
            array = convert_PIL_to_numpy(upright, reader.image_format)
            levels = extrema(image) if is_deep_grey(image) else None
            num_frames = image.n_frames if has_several_frames(image) else 1
    except Exception as error:  # Pillow's decoders raise many types, even bare RuntimeError
        return ImageFacts(None, "unreadable_image", explain_unreadable(error))
    size = (array.shape[1], array.shape[0])
    if num_frames > 1:
        message = f"it has {num_frames} pages or frames, and the first is read"
        return ImageFacts(size, "several_frames", message)
    first = array[0, 0]
    if (array[0] == first).all() and (array == first).all():
        in_file = f", of {levels[0]:g} to {levels[1]:g} in the file" if levels else ""
        return ImageFacts(size, "constant_image", f"every pixel is {first.tolist()}{in_file}")
    if levels and (num_levels := 1 + int(np.ptp(upright.getextrema()))) <= FEW_LEVELS:
        message = (
            f"its values, {levels[0]:g} to {levels[1]:g}, become at most {num_levels} of 256 "
            f"levels; {RANGE_KEY} says which values become black and white"
        )
        return ImageFacts(size, "constant_image", message)
    return ImageFacts(size)
