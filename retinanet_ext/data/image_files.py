"""The image files of an annotation file: where they are, what they hold, which are the same."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import PIL
from detectron2.data.detection_utils import convert_PIL_to_numpy

from retinanet_ext.data.coco_json import printable
from retinanet_ext.data.entries import id_of
from retinanet_ext.data.file_cache import FileCache
from retinanet_ext.data.file_names import MisnamedFiles, Replacement
from retinanet_ext.data.findings import ValidationResult
from retinanet_ext.data.images import (
    RANGE_KEY,
    ImageReader,
    explain_unreadable,
    extrema,
    find_size_fault,
    has_several_frames,
    is_deep_grey,
)
from retinanet_ext.errors import InputError

MAX_DECODED_IMAGES = 1000
"""Data sets up to this size are decoded, at about 10 ms per image. Only the headers of larger ones
are read, so that a fault behind the header ends the training when the image is loaded."""

FEW_LEVELS = 17
"""Number of 256 grey levels that remain of 12 bits in a 16-bit file. So few are a finding."""

_EXIF_ORIENTATION = 274

_CHUNK = 128  # files per task of a thread

Image = dict[str, Any]
Images = dict[int | str, Image]
"""Image id -> entry of the json."""


def check_images(
    images: Images,
    image_root: str,
    reader: ImageReader,
    result: ValidationResult,
    *,
    folder_key: str = "",
    decode_all: bool = False,
) -> tuple[Images, set[int | str], list[list[Image]]]:
    """Find and inspect the image files of an annotation file.

    Args:
        images: usable entries of the json, whose width and height may be missing; not modified.
        image_root, folder_key: the image folder, and the config key that a message may suggest
            another value of.
        reader: reads the images as training does.
        result: gets the findings and notes.
        decode_all: decode data sets of more than :data:`MAX_DECODED_IMAGES` images too.

    Returns:
        the entries, with the sizes that were missing and the file names that the policy mends; the
        ids of images that cannot be used; groups of images that have the same file.

    Raises:
        InputError: the folder does not exist.
    """
    if not os.path.isdir(image_root):
        raise InputError(f"the image folder {image_root} does not exist")
    images = dict(images)
    decode = decode_all or len(images) <= MAX_DECODED_IMAGES
    facts = _inspect(images, image_root, reader, decode=decode)
    missing = {image_id: image for image_id, image in images.items() if image_id not in facts}
    mended = _report_missing(missing, image_root, folder_key, len(images), result)
    if mended:
        images.update(mended)
        facts.update(_inspect(mended, image_root, reader, decode=decode))
    lost = missing.keys() - mended.keys()
    existing = {image_id: image for image_id, image in images.items() if image_id in facts}
    for image_id, image in existing.items():
        size, kind, message = facts[image_id]
        if kind != "unreadable_image" and (fault := find_size_fault(image, size)):
            kind, message = "image_size", fault
        if kind:
            path = printable(os.path.join(image_root, image["file_name"]))
            message = f"{path} (image id {printable(image_id)}): {printable(message)}"
            if not result.add(kind, message, image_id=image_id):
                lost.add(image_id)
    images.update(_fill_sizes(existing, facts, result))
    return images, lost, find_same_files(existing.values(), image_root)


def _fill_sizes(
    images: Images, facts: Mapping[int | str, ImageFacts], result: ValidationResult
) -> Images:
    """Return the entries that lack a width or height with those of their files."""
    filled = {
        image_id: {**image, "width": size[0], "height": size[1]}
        for image_id, image in images.items()
        if None in (image.get("width"), image.get("height")) and (size := facts[image_id].size)
    }
    if first := next(iter(filled.values()), None):
        result.notes.append(
            f"images without width and height, which are taken from their files: {len(filled)}, "
            f"such as {printable(first['file_name'])} (image id {first['id']}) of "
            f"{first['width']} x {first['height']}"
        )
    return filled


def _inspect(
    images: Images, image_root: str, reader: ImageReader, *, decode: bool
) -> dict[int | str, ImageFacts]:
    """Inspect the files that exist, in threads; files that have not changed come from the cache."""
    seen = FileCache("images", os.path.abspath(image_root), reader, PIL.__version__)
    key = "decoded" if decode else "header"

    def inspect(image: Image) -> ImageFacts | None:
        path = os.path.join(image_root, image["file_name"])
        if not os.path.isfile(path):
            return None
        look = partial(inspect_image, path, reader, decode=decode)
        # An unreadable file is read again: it may become readable, for example by permissions.
        return ImageFacts(
            *seen.get(path, key, look, lambda facts: facts.kind != "unreadable_image")
        )

    entries = list(images.values())
    chunks = [entries[start : start + _CHUNK] for start in range(0, len(entries), _CHUNK)]
    with ThreadPoolExecutor() as pool:
        found = chain.from_iterable(pool.map(lambda chunk: list(map(inspect, chunk)), chunks))
        facts = {image_id: fact for image_id, fact in zip(images, found, strict=True) if fact}
    seen.save()
    return facts


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
    """Look at an existing image file as training reads it.

    Unless ``decode``, the pixels are decoded only if the header shows a fault.
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


def _report_missing(
    missing: Images, image_root: str, folder_key: str, num_images: int, result: ValidationResult
) -> Images:
    """Report missing files; return the entries that the policy mends, with their new names."""
    if not missing:
        return {}
    files = MisnamedFiles(image_root)
    found = {image_id: files.find(image["file_name"]) for image_id, image in missing.items()}
    matches = [match for match in found.values() if match and match.path]
    remedy, folders = "", {match.folder for match in matches}
    if folder_key and len(matches) == num_images and len(folders) == 1 and "" not in folders:
        remedy = f"{folder_key} {printable(*folders)} finds them"

    mended = {}
    for image_id, image in missing.items():
        path = os.path.join(image_root, image["file_name"])
        match = found[image_id] or Replacement(_explain_missing(path))
        message = f"{printable(path)} (image id {image_id}) is missing"
        message += f": {match.text}" if match.text else ""
        if not match.path:
            result.add("missing_image", message, image_id=image_id)
        elif result.add("misnamed_file", message, image_id=image_id, remedy=remedy):
            mended[image_id] = {**image, "file_name": match.path}
    return mended


def _explain_missing(path: str) -> str:
    if "://" in path:
        return "it is a URL, and images are read from files alone"
    try:
        return f"it is a symbolic link to {printable(os.readlink(path))}, which is missing"
    except (OSError, ValueError):  # it is no link
        return ""


def find_same_files(images: Iterable[Image], image_root: str) -> list[list[Image]]:
    """Group the images that have the same file; symbolic links are followed."""
    groups: dict[str, list[Image]] = defaultdict(list)
    real_path = cached_real_path()
    for image in images:
        groups[real_path(os.path.join(image_root, image["file_name"]))].append(image)
    return [group for group in groups.values() if len(group) > 1]


def merge_images(content: dict[str, Any], same: Iterable[Sequence[Image]]) -> dict[str, Any]:
    """Keep the first image of each group of the same file, with the annotations of all."""
    first_ids = {image["id"]: first["id"] for first, *others in same for image in others}
    if not first_ids:
        return content
    annotations = [
        {**annotation, "image_id": first_ids[image_id]}
        if (image_id := id_of(annotation, "image_id")) in first_ids
        else annotation
        for annotation in content["annotations"]
    ]
    images = [image for image in content["images"] if image["id"] not in first_ids]
    return {**content, "images": images, "annotations": annotations}


def cached_real_path() -> Callable[[str], str]:
    """Return ``os.path.realpath`` that resolves each folder once."""
    real_folder = cache(os.path.realpath)

    def real_path(path: str) -> str:
        if os.path.islink(path):
            return os.path.realpath(path)
        folder, name = os.path.split(path)
        return os.path.join(real_folder(folder), name)

    return real_path
