"""What a look at an image file shows: its size, its depth, and whether it can be trained on."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from detectron2.data.detection_utils import convert_PIL_to_numpy
from PIL import Image

from retinanet_ext.data.images import (
    RANGE_KEY,
    ImageReader,
    NoPixelRangeError,
    bit_depth,
    explain_unreadable,
    extrema,
    has_several_frames,
    is_deep_grey,
)

FEW_LEVELS = 17
"""Of 256 grey levels: what remains of 12 bits in a 16-bit file. So few are a finding."""

_EXIF_ORIENTATION = 274


class ImageFacts(NamedTuple):
    """What is known about an image file.

    Attributes:
        size: (width, height) in pixels of the upright image; None if unknown.
        kind: kind of finding, or "" if nothing was found.
        message: what was found.
        depth: bits per channel; 0 if they do not define a range.
        other_format: the file's format, if its name says another one.
        is_transparent: whether it has an alpha channel or a transparent colour.
        remedy: how to use the file, if it differs from the remedy of the kind.
    """

    size: tuple[int, int] | None = None
    kind: str = ""
    message: str = ""
    depth: int = 0
    other_format: str = ""
    is_transparent: bool = False
    remedy: str = ""


def inspect_image(path: str, reader: ImageReader, *, decode: bool) -> ImageFacts:
    """Look at an image file as training reads it.

    Args:
        path: path of an existing file.
        reader: the reader of the training.
        decode: also decode the pixels. Otherwise they are decoded only if the header shows a fault.
    """
    facts, is_plain = _read_header(path, reader)
    if is_plain and not decode:
        return facts
    return _decode(path, reader, facts)


def _read_header(path: str, reader: ImageReader) -> tuple[ImageFacts, bool]:
    """Return what the header shows, and whether it shows no fault."""
    try:
        with reader.open(path) as image:
            named = Image.registered_extensions().get(Path(path).suffix.lower(), image.format)
            facts = ImageFacts(
                depth=bit_depth(image) or 0,
                other_format=image.format or "" if named != image.format else "",
                is_transparent="transparency" in image.info or image.mode in ("RGBA", "LA", "PA"),
            )
            # Look at `info` first, because getexif() decodes a PNG that has no EXIF block.
            has_exif = "exif" in image.info or image.format == "TIFF"
            is_turned = has_exif and image.getexif().get(_EXIF_ORIENTATION, 1) > 4
            if is_turned and image.format == "TIFF":
                image.load()  # which turns a TIFF upright
                is_turned = False
            size = image.size[::-1] if is_turned else image.size
            reader.range_of(image)
            return facts._replace(size=size), not has_several_frames(image)
    except Exception:  # decoding tells more; Detectron2 reads images with malformed EXIF data
        return ImageFacts(), False


def _decode(path: str, reader: ImageReader, facts: ImageFacts) -> ImageFacts:
    """Decode an image and add the first thing that is found."""
    try:
        with reader.open(path) as image:
            upright = reader.to_8_bits(image)
            array = convert_PIL_to_numpy(upright, reader.image_format)
            levels = extrema(image) if is_deep_grey(image) else None
            num_frames = image.n_frames if has_several_frames(image) else 1
    except Exception as error:  # Pillow's decoders raise many types, even bare RuntimeError
        remedy = error.remedy if isinstance(error, NoPixelRangeError) else ""
        message = explain_unreadable(error)
        return facts._replace(kind="unreadable_image", message=message, remedy=remedy)
    facts = facts._replace(size=(array.shape[1], array.shape[0]))
    if num_frames > 1:
        message = f"it has {num_frames} pages or frames, and the first is read"
        return facts._replace(kind="several_frames", message=message)
    first = array[0, 0]
    if (array[0] == first).all() and (array == first).all():
        in_file = f", of {levels[0]:g} to {levels[1]:g} in the file" if levels else ""
        message = f"every pixel is {first.tolist()}{in_file}"
        return facts._replace(kind="constant_image", message=message)
    if levels and (num_levels := 1 + int(np.ptp(upright.getextrema()))) <= FEW_LEVELS:
        message = (
            f"its values, {levels[0]:g} to {levels[1]:g}, become at most {num_levels} of 256 "
            f"levels; {RANGE_KEY} says which values become black and white"
        )
        return facts._replace(kind="constant_image", message=message)
    return facts
