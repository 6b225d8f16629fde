"""Images of any size, opened by Pillow."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import IO

from PIL import Image

from retinanet_ext.errors import InputError

MAX_PIXELS = 178_956_970
"""Most pixels of an image that Pillow opens by default."""

_BYTES = 5  # per pixel and channel while an image is read and resized (measured)

_HUGE = threading.Lock()  # one huge image in memory at a time, however many threads read


@contextmanager
def open_image(file: IO[bytes], max_pixels: int, num_channels: int) -> Iterator[Image.Image]:
    """Open an image without decoding it, also one that Pillow refuses because of its size.

    Args:
        file: an open file
        max_pixels: ``INPUT.MAX_PIXELS``
        num_channels: of the array that the image is converted to, for the message

    Raises:
        InputError: the image has more pixels
    """
    with ExitStack() as stack:
        try:
            image = Image.open(file)
        except Image.DecompressionBombError:
            stack.enter_context(_HUGE)
            image = _open_without_limit(file)
        pixels = image.width * image.height
        if pixels > max_pixels:
            memory = _BYTES * pixels * num_channels / 1e6
            raise InputError(
                f"it has {image.width} x {image.height} = {pixels:,} pixels, which take "
                f"{memory:,.0f} MB of memory, and INPUT.MAX_PIXELS allows {max_pixels:,}"
            )
        yield image


def _open_without_limit(file: IO[bytes]) -> Image.Image:
    """Open an image that Pillow refuses because of its size; the caller holds ``_HUGE``."""
    file.seek(0)
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        return Image.open(file)
    finally:
        Image.MAX_IMAGE_PIXELS = limit
