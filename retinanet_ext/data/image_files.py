"""The image files of an annotation file: where they are, their sizes, and which are the same."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import chain
from typing import Any

import PIL

from retinanet_ext.data.coco_json import printable
from retinanet_ext.data.entries import id_of
from retinanet_ext.data.file_cache import FileCache
from retinanet_ext.data.file_names import MisnamedFiles, Replacement
from retinanet_ext.data.findings import ValidationResult
from retinanet_ext.data.image_facts import ImageFacts, inspect_image
from retinanet_ext.data.images import ImageReader, find_size_fault
from retinanet_ext.errors import InputError

MAX_DECODED_IMAGES = 1000
"""Data sets up to this size are decoded, at about 10 ms per image. Only the headers of larger ones
are read, so that a fault behind the header ends the training when the image is loaded."""

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
        image_root: folder that ``file_name`` entries are relative to.
        reader: reads the images as training does.
        result: gets the findings and notes.
        folder_key: config key of ``image_root``; a message may suggest another value.
        decode_all: decode data sets of more than :data:`MAX_DECODED_IMAGES` images too.

    Returns:
        - the entries, with the sizes that were missing and the file names that the policy mends,
        - the ids of images that cannot be used,
        - groups of images that have the same file.

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
    existing = [image_id for image_id in images if image_id in facts]
    for image_id in existing:
        if not _report_fault(images[image_id], facts[image_id], image_root, result):
            lost.add(image_id)
    images.update(_fill_sizes(images, facts, result))
    return images, lost, find_same_files([images[i] for i in existing], image_root)


def _report_fault(
    image: Image, facts: ImageFacts, image_root: str, result: ValidationResult
) -> bool:
    """Report what is wrong with a file, if anything; return whether the image is still used."""
    kind, message = facts.kind, facts.message
    if kind != "unreadable_image" and (fault := find_size_fault(image, facts.size)):
        kind, message = "image_size", fault
    if not kind:
        return True
    path = printable(os.path.join(image_root, image["file_name"]))
    message = f"{path} (image id {printable(image['id'])}): {printable(message)}"
    return result.add(kind, message, image_id=image["id"])


def _fill_sizes(
    images: Images, facts: Mapping[int | str, ImageFacts], result: ValidationResult
) -> Images:
    """Return the entries that lack a width or height with those of their files."""
    filled = {
        image_id: {**image, "width": size[0], "height": size[1]}
        for image_id, image in images.items()
        if None in (image.get("width"), image.get("height"))
        and image_id in facts
        and (size := facts[image_id].size)
    }
    for first in list(filled.values())[:1]:
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

    def is_readable(facts: ImageFacts) -> bool:
        # An unreadable file is read again: it may become readable, for example by permissions.
        return facts.kind != "unreadable_image"

    def inspect_chunk(ids: Sequence[int | str]) -> Iterator[tuple[int | str, ImageFacts]]:
        for image_id in ids:
            path = os.path.join(image_root, images[image_id]["file_name"])
            if os.path.isfile(path):
                look = partial(inspect_image, path, reader, decode=decode)
                yield image_id, ImageFacts(*seen.get(path, key, look, is_readable))

    ids = list(images)
    chunks = [ids[start : start + _CHUNK] for start in range(0, len(ids), _CHUNK)]
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda chunk: list(inspect_chunk(chunk)), chunks)
        facts = dict(chain.from_iterable(found))
    seen.save()
    return facts


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
