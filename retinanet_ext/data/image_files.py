"""The image files of an annotation file: where they are, their sizes, and which are the same."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import PIL

from retinanet_ext.data.coco_json import join_some, printable
from retinanet_ext.data.entries import field_fault, id_of, leaves_folder
from retinanet_ext.data.file_cache import FileCache
from retinanet_ext.data.file_names import MisnamedFiles, Replacement
from retinanet_ext.data.findings import KINDS, Finding, ValidationResult
from retinanet_ext.data.image_facts import ImageFacts, inspect_image
from retinanet_ext.data.images import ImageReader, find_size_fault
from retinanet_ext.errors import InputError

MAX_DECODED_IMAGES = 1000
"""Data sets up to this size are decoded, at about 10 ms per image. Of larger ones only the headers
are read, so that a fault behind the header ends the training when the image is loaded."""

_CHUNK = 128  # files per task of a thread
_BLOCK = 1 << 16  # bytes

_Image = dict[str, Any]


def check_images(
    content: dict[str, Any],
    image_root: str,
    reader: ImageReader,
    result: ValidationResult,
    *,
    folder_key: str = "",
    decode_all: bool = False,
) -> dict[str, Any]:
    """Find and inspect the image files of an annotation file.

    Args:
        content: of the json, unchecked; not modified. Malformed images are passed over.
        image_root: folder that ``file_name`` entries are relative to.
        reader: reads the images as training does.
        result: gets the findings and notes.
        folder_key: config key of ``image_root``; a message may suggest another value.
        decode_all: decode data sets of more than :data:`MAX_DECODED_IMAGES` images too.

    Returns:
        the json, with missing sizes filled in from the files, and with the file names and ids that
        the policy repairs.

    Raises:
        InputError: the folder does not exist.
    """
    policy = result.policy
    if not os.path.isdir(image_root):
        raise InputError(f"the image folder {image_root} does not exist")
    images = {i: image for i, image in enumerate(content["images"]) if _is_usable(image, policy)}
    decode = decode_all or len(images) <= MAX_DECODED_IMAGES
    facts = _inspect(images, image_root, reader, decode=decode)

    missing = {i: image for i, image in images.items() if i not in facts}
    replacements = _find_replacements(missing, image_root)
    described = _describe_missing(missing, replacements, image_root, folder_key, len(images))
    result.findings.extend(described)
    if policy["misnamed_file"] == "mend":
        mended = {i: {**images[i], "file_name": r.path} for i, r in replacements.items() if r.path}
        images.update(mended)
        facts.update(_inspect(mended, image_root, reader, decode=decode))
    facts = dict(sorted(facts.items()))

    filled = []
    for i, seen in facts.items():
        result.findings.extend(_describe_fault(images[i], seen, image_root))
        if seen.size and None in (images[i].get("width"), images[i].get("height")):
            images[i] = {**images[i], "width": seen.size[0], "height": seen.size[1]}
            filled.append(images[i])
    all_images = [images.get(i, image) for i, image in enumerate(content["images"])]
    content = {**content, "images": all_images}
    same = find_same_files([images[i] for i in facts], image_root)
    for entries in same:
        path = printable(os.path.join(image_root, entries[0]["file_name"]))
        ids = join_some(image["id"] for image in entries)
        result.add("duplicate_file", f"{path} is listed under {len(entries)} image ids: {ids}")
    if policy["duplicate_file"] == "merge":
        content = merge_images(content, same)
    result.notes.extend(_describe_filled(filled) + _describe_facts(images, facts, reader))
    return content


def _is_usable(image: Any, policy: Mapping[str, str]) -> bool:
    """Return whether an entry names a file, with a size that is valid or left out."""
    if isinstance(image, dict) and None in (image.get("width"), image.get("height")):
        given = {key: value for key, value in image.items() if value is not None}
        image = {"width": 1, "height": 1, **given}
    if field_fault("images", image):
        return False
    return policy["file_outside"] == "keep" or not leaves_folder(image["file_name"])


def _inspect(
    images: Mapping[int, _Image], image_root: str, reader: ImageReader, *, decode: bool
) -> dict[int, ImageFacts]:
    """Inspect the files that exist, in threads; files that have not changed come from the cache."""
    seen = FileCache("images", os.path.abspath(image_root), reader, PIL.__version__)
    key = "decoded" if decode else "header"

    def is_readable(facts: ImageFacts) -> bool:
        # An unreadable file is read again: it may become readable, for example by permissions.
        return facts.kind != "unreadable_image"

    def inspect(index: int) -> ImageFacts | None:
        path = os.path.join(image_root, images[index]["file_name"])
        if not os.path.isfile(path):
            return None
        facts = seen.get(
            path, key, lambda: inspect_image(path, reader, decode=decode), keep=is_readable
        )
        return ImageFacts(*facts)

    def inspect_chunk(chunk: Sequence[int]) -> list[tuple[int, ImageFacts]]:
        return [(index, facts) for index in chunk if (facts := inspect(index))]

    indices = list(images)
    chunks = [indices[start : start + _CHUNK] for start in range(0, len(indices), _CHUNK)]
    with ThreadPoolExecutor() as pool:
        facts = dict(chain.from_iterable(pool.map(inspect_chunk, chunks)))
    seen.save()
    return facts


def _describe_fault(image: _Image, facts: ImageFacts, image_root: str) -> list[Finding]:
    """Return the finding about a file, if any."""
    kind, message = facts.kind, facts.message
    if kind != "unreadable_image" and (fault := find_size_fault(image, facts.size)):
        kind, message = "image_size", fault
    if not kind:
        return []
    path = printable(os.path.join(image_root, image["file_name"]))
    where = f"{path} (image id {printable(image['id'])})"
    return [Finding(kind, f"{where}: {printable(message)}", image["id"], remedy=facts.remedy)]


def _describe_facts(
    images: Mapping[int, _Image], facts: Mapping[int, ImageFacts], reader: ImageReader
) -> list[str]:
    """Return one sentence for each property of files that has an obvious meaning."""

    def count(what: str, chosen: Sequence[int]) -> str:
        return f"{what}: {len(chosen)}, such as {printable(images[chosen[0]]['file_name'])}"

    notes = []
    if other := [i for i, seen in facts.items() if seen.other_format]:
        what = "files of another format than their names say, read as what they are"
        notes.append(f"{count(what, other)} ({facts[other[0]].other_format})")
    transparent = [i for i, seen in facts.items() if seen.is_transparent]
    if transparent and "A" not in reader.image_format:
        notes.append(count("images with transparency, which is left out", transparent))
    depths = {seen.depth: i for i, seen in facts.items() if seen.depth}
    if len(depths) > 1 and reader.pixel_range is None:
        mixed = ", ".join(
            f"{depth} bits ({printable(images[i]['file_name'])})"
            for depth, i in sorted(depths.items())
        )
        notes.append(f"images have several depths, each is scaled by its own: {mixed}")
    return notes


def _describe_filled(images: Sequence[_Image]) -> list[str]:
    return [
        f"images without width and height, which are taken from their files: {len(images)}, such "
        f"as {printable(first['file_name'])} (image id {first['id']}) of {first['width']} x "
        f"{first['height']}"
        for first in images[:1]
    ]


def _find_replacements(missing: Mapping[int, _Image], image_root: str) -> dict[int, Replacement]:
    if not missing:
        return {}
    files = MisnamedFiles(image_root)
    found = {i: files.find(image["file_name"]) for i, image in missing.items()}
    return {i: replacement for i, replacement in found.items() if replacement}


def _describe_missing(
    missing: Mapping[int, _Image],
    replacements: Mapping[int, Replacement],
    image_root: str,
    folder_key: str,
    num_images: int,
) -> list[Finding]:
    """Return the findings about missing files, with the remedy that all of them share."""
    misnamed = [replacement for replacement in replacements.values() if replacement.path]
    reasons = {replacement.reason for replacement in misnamed}
    folders = {replacement.folder for replacement in misnamed}
    remedy = f"{KINDS['misnamed_file'].key} {KINDS['misnamed_file'].remedy}"
    if folder_key and len(misnamed) == num_images and len(folders) == 1 and "" not in folders:
        remedy = f"{folder_key} {printable(*folders)} finds them"
    if len(misnamed) > 1 and len(reasons) == 1:
        remedy = f"the reason for all: {', '.join(reasons)}; {remedy}"

    findings = []
    for i, image in missing.items():
        path = os.path.join(image_root, image["file_name"])
        replacement = replacements.get(i, Replacement(_explain_missing(path)))
        message = f"{printable(path)} (image id {image['id']}) is missing"
        message += f": {replacement.text}" if replacement.text else ""
        if replacement.path:
            findings.append(Finding("misnamed_file", message, image["id"], remedy=remedy))
        else:
            findings.append(Finding("missing_image", message, image["id"]))
    return findings


def _explain_missing(path: str) -> str:
    if "://" in path:
        return "it is a URL, and images are read from files alone"
    try:
        return f"it is a symbolic link to {printable(os.readlink(path))}, which is missing"
    except (OSError, ValueError):  # it is no link
        return ""


def find_same_files(images: Iterable[_Image], image_root: str) -> list[list[_Image]]:
    """Group the images of different ids that have the same file; symbolic links are followed."""
    real_path = _cached_real_path()
    groups: dict[str, list[_Image]] = defaultdict(list)
    for image in images:
        groups[real_path(os.path.join(image_root, image["file_name"]))].append(image)
    by_id = ({i["id"]: i for i in group} for group in groups.values() if len(group) > 1)
    return [list(group.values()) for group in by_id if len(group) > 1]


def merge_images(content: dict[str, Any], same: Iterable[Sequence[_Image]]) -> dict[str, Any]:
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
    images = [image for image in content["images"] if id_of(image) not in first_ids]
    return {**content, "images": images, "annotations": annotations}


def describe_shared_files(train: Sequence[str], test: Sequence[str], name: str) -> str | None:
    """Return a sentence that counts the test images that are training images, or None.

    Args:
        train, test: paths of the images.
        name: name of the test data.
    """
    shared = _find_shared_files(train, test)
    if not shared:
        return None
    first = next(iter(shared))
    other = "" if shared[first] == first else f", which is {printable(shared[first])}"
    return (
        f"{name}: {len(shared)} of {len(test)} test images are training images too, such as "
        f"{printable(first)}{other}; AP on them says little about new images"
    )


def _find_shared_files(train: Sequence[str], test: Sequence[str]) -> dict[str, str]:
    """Map test images to the training image of the same path or the same content."""
    real_path = _cached_real_path()
    by_path = {real_path(path): path for path in train}
    shared = {path: by_path[real_path(path)] for path in test if real_path(path) in by_path}
    left = [path for path in test if path not in shared]
    seen = FileCache("digests", *sorted({os.path.dirname(os.path.abspath(p)) for p in left}))
    steps: tuple[Callable[[str], Any], ...] = (
        os.path.getsize,
        lambda path: seen.get(os.path.abspath(path), "block", lambda: _digest_block(path)),
        lambda path: seen.get(os.path.abspath(path), "digest", lambda: _digest(path)),
    )
    # A file is read only if another file on the other side has the same size, and it is read
    # whole only if a block in the middle is the same too.
    for step in steps:
        of_train: dict[Any, list[str]] = defaultdict(list)
        for path in train:
            of_train[step(path)].append(path)
        of_test = {path: step(path) for path in left}
        left = [path for path, value in of_test.items() if value in of_train]
        wanted = {of_test[path] for path in left}
        train = [path for value, paths in of_train.items() if value in wanted for path in paths]
    seen.save()
    return shared | {path: of_train[of_test[path]][0] for path in left}


def _digest_block(path: str) -> str:
    """Return a digest of the block in the middle of a file, because headers are often alike."""
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - _BLOCK) // 2)
        return hashlib.sha256(file.read(_BLOCK)).hexdigest()


def _digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _cached_real_path() -> Callable[[str], str]:
    """Return ``os.path.realpath`` that resolves each folder once."""
    real_folder = cache(os.path.realpath)

    def real_path(path: str) -> str:
        if os.path.islink(path):
            return os.path.realpath(path)
        folder, name = os.path.split(path)
        return os.path.join(real_folder(folder), name)

    return real_path
