"""The image files of a COCO json: where they are, their sizes, and which are the same file."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from PIL import Image

from retinanet_ext.data.coco_json import join_some, printable
from retinanet_ext.data.file_names import Found, MisnamedFiles
from retinanet_ext.data.images import (
    ImageReader,
    bit_depth,
    find_image_fault,
    has_several_frames,
)
from retinanet_ext.data.validation import (
    DEFAULT_POLICY,
    KINDS,
    Finding,
    field_fault,
    id_of,
    leaves_folder,
)
from retinanet_ext.errors import InputError

MAX_DECODED_IMAGES = 1000
"""Sets up to this size are decoded whole: at about 10 ms an image that is seconds. Of larger sets
only the headers are read, and a fault behind the header ends training when it is met."""

_EXIF_ORIENTATION = 274
_BLOCK = 1 << 16  # bytes

_Image = dict[str, Any]


@dataclass(frozen=True)
class CheckedImages:
    """A json after a look at its image files.

    Attributes:
        content: the json with the sizes of the files where it had none, and with the names and
            ids that the policy mends.
        findings: about the files.
        notes: a sentence for what was filled in.
    """

    content: dict[str, Any]
    findings: list[Finding]
    notes: list[str]


@dataclass(frozen=True)
class _Header:
    """What the header of an image file tells.

    Attributes:
        size: width and height of the upright image, None where it does not tell
        is_plain: whether it shows no fault
        depth: bits of a channel, None where that says no range
        other_format: what it is, where its name says another format
        is_transparent: whether it has an alpha channel or a transparent colour
    """

    size: tuple[int, int] | None = None
    is_plain: bool = False
    depth: int | None = None
    other_format: str = ""
    is_transparent: bool = False


@dataclass(frozen=True)
class _File:
    """A file that is there: its fault, its size if that is to be filled in, and its header."""

    fault: Finding | None
    size: tuple[int, int] | None
    header: _Header


def check_images(
    content: dict[str, Any],
    image_root: str,
    reader: ImageReader,
    policy: Mapping[str, str] = DEFAULT_POLICY,
    *,
    folder_key: str = "",
    decode_all: bool = False,
) -> CheckedImages:
    """Look for the image files of a json, read them, and complete the json from them.

    Args:
        content: of the json, unchecked and left as it is; images that are malformed are passed
            over.
        image_root: the folder that the json's ``file_name`` entries are relative to.
        reader: reads them as training will.
        policy: kind -> what is done about it.
        folder_key: the config key of ``image_root``, where a message may give a better folder.
        decode_all: not only the headers of a set above :data:`MAX_DECODED_IMAGES`.

    Raises:
        InputError: the folder does not exist
    """
    if not os.path.isdir(image_root):
        raise InputError(f"the image folder {image_root} does not exist")
    images = {i: image for i, image in enumerate(content["images"]) if _is_usable(image, policy)}
    headers_only = len(images) > MAX_DECODED_IMAGES and not decode_all
    read = partial(_read, image_root, reader, headers_only)

    with ThreadPoolExecutor() as pool:
        files = dict(zip(images, pool.map(read, images.values()), strict=True))
        missing = {i: images[i] for i, file in files.items() if file is None}
        found = _find_misnamed(missing, image_root)
        findings = _describe_missing(missing, found, image_root, folder_key, len(images))
        if policy["misnamed_file"] == "mend":
            mended = {i: {**images[i], "file_name": f.path} for i, f in found.items() if f.path}
            images.update(mended)
            files.update(zip(mended, pool.map(read, mended.values()), strict=True))

    there = {i: file for i, file in files.items() if file}
    findings += [file.fault for file in there.values() if file.fault]
    filled = {
        i: {**images[i], "width": file.size[0], "height": file.size[1]}
        for i, file in there.items()
        if file.size
    }
    images.update(filled)
    all_images = [images.get(i, image) for i, image in enumerate(content["images"])]
    content = {**content, "images": all_images}
    same = find_same_files([images[i] for i in there], image_root)
    findings += _describe_same(same, image_root)
    if policy["duplicate_file"] == "merge":
        content = merge_images(content, same)
    notes = _describe_filled(list(filled.values()))
    return CheckedImages(content, findings, [*notes, *_describe_headers(images, there, reader)])


def _is_usable(image: Any, policy: Mapping[str, str]) -> bool:
    """Tell whether an entry names a file, with a size that is right or left out."""
    if isinstance(image, dict) and None in (image.get("width"), image.get("height")):
        given = {key: value for key, value in image.items() if value is not None}
        image = {"width": 1, "height": 1, **given}
    if field_fault("images", image):
        return False
    return policy["file_outside"] == "keep" or not leaves_folder(image["file_name"])


def _read(image_root: str, reader: ImageReader, headers_only: bool, image: _Image) -> _File | None:
    """Read the file of an image, if it is there."""
    path = os.path.join(image_root, image["file_name"])
    if not os.path.isfile(path):
        return None
    given = {key: image[key] for key in ("width", "height") if image.get(key) is not None}
    header = _read_header(path, reader)
    file = _File(None, None if len(given) == 2 else header.size, header)
    if headers_only and header.is_plain and header.size:
        width, height = header.size
        if given.items() <= {"width": width, "height": height}.items():
            return file
    fault = find_image_fault({**given, "file_name": path}, reader)
    if not fault:
        return file
    kind, what = fault
    where = f"{printable(path)} (image id {printable(image['id'])})"
    return replace(file, fault=Finding(kind, f"{where}: {printable(what)}", image["id"]))


def _read_header(path: str, reader: ImageReader) -> _Header:
    """Return what the header of a file tells; nothing where it cannot be read."""
    try:
        with reader.open(path) as opened:
            named = Image.registered_extensions().get(Path(path).suffix.lower(), opened.format)
            header = _Header(
                depth=bit_depth(opened),
                other_format=opened.format or "" if named != opened.format else "",
                is_transparent="transparency" in opened.info or opened.mode in ("RGBA", "LA", "PA"),
            )
            # The first test comes first because getexif() decodes a PNG that has no EXIF block.
            has_exif = "exif" in opened.info or opened.format == "TIFF"
            turned = has_exif and opened.getexif().get(_EXIF_ORIENTATION, 1) > 4
            if turned and opened.format == "TIFF":
                opened.load()  # by which Pillow turns it
                turned = False
            size = opened.size[::-1] if turned else opened.size
            reader.range_of(opened)
            return replace(header, size=size, is_plain=not has_several_frames(opened))
    except Exception:  # decoding will tell; Detectron2 reads some images whose EXIF is malformed
        return _Header()


def _describe_headers(
    images: Mapping[int, _Image], files: Mapping[int, _File], reader: ImageReader
) -> list[str]:
    """Return a sentence for each thing about files that is read with an obvious meaning."""

    def tell(what: str, chosen: Sequence[int]) -> str:
        return f"{what}: {len(chosen)}, such as {printable(images[chosen[0]]['file_name'])}"

    notes = []
    other = [i for i, file in files.items() if file.header.other_format]
    if other:
        what = "files of another format than their names say, read as what they are"
        notes.append(f"{tell(what, other)} ({files[other[0]].header.other_format})")
    transparent = [i for i, file in files.items() if file.header.is_transparent]
    if transparent and "A" not in reader.image_format:
        notes.append(tell("images with transparency, which is left out", transparent))
    depths = {file.header.depth: i for i, file in files.items() if file.header.depth}
    if len(depths) > 1 and reader.pixel_range is None:
        mixed = ", ".join(
            f"{depth} bits ({printable(images[i]['file_name'])})"
            for depth, i in sorted(depths.items())
        )
        notes.append(f"images have several depths, each is scaled by its own: {mixed}")
    return notes


def _find_misnamed(missing: Mapping[int, _Image], image_root: str) -> dict[int, Found]:
    if not missing:
        return {}
    files = MisnamedFiles(image_root)
    found = {i: files.find(image["file_name"]) for i, image in missing.items()}
    return {i: match for i, match in found.items() if match}


def _describe_missing(
    missing: Mapping[int, _Image],
    found: Mapping[int, Found],
    image_root: str,
    folder_key: str,
    num_images: int,
) -> list[Finding]:
    """Return what is said of missing files, and of all that are there under another name."""
    misnamed = [match for match in found.values() if match.path]
    reasons = {match.reason for match in misnamed}
    folders = {match.folder for match in misnamed}
    remedy = f"{KINDS['misnamed_file'].key} {KINDS['misnamed_file'].remedy}"
    if folder_key and len(misnamed) == num_images and len(folders) == 1 and "" not in folders:
        remedy = f"{folder_key} {printable(*folders)} finds them"
    if len(misnamed) > 1 and len(reasons) == 1:
        remedy = f"the reason for all: {', '.join(reasons)}; {remedy}"

    findings = []
    for i, image in missing.items():
        path = os.path.join(image_root, image["file_name"])
        match = found.get(i, Found(_why_missing(path)))
        what = f"{printable(path)} (image id {image['id']}) is missing"
        what += f": {match.text}" if match.text else ""
        if match.path:
            findings.append(Finding("misnamed_file", what, image["id"], remedy=remedy))
        else:
            findings.append(Finding("missing_image", what, image["id"]))
    return findings


def _why_missing(path: str) -> str:
    if "://" in path:
        return "it is a URL, and images are read from files alone"
    try:
        return f"it is a symbolic link to {printable(os.readlink(path))}, which is missing"
    except (OSError, ValueError):  # no link
        return ""


def _describe_filled(images: Sequence[_Image]) -> list[str]:
    if not images:
        return []
    first = images[0]
    return [
        f"images without width and height, which are taken from their files: {len(images)}, such "
        f"as {printable(first['file_name'])} (image id {first['id']}) of {first['width']} x "
        f"{first['height']}"
    ]


def _describe_same(same: Iterable[Sequence[_Image]], image_root: str) -> list[Finding]:
    return [
        Finding(
            "duplicate_file",
            f"{printable(os.path.join(image_root, images[0]['file_name']))} is listed under "
            f"{len(images)} image ids: {join_some(image['id'] for image in images)}",
        )
        for images in same
    ]


def find_same_files(images: Iterable[_Image], image_root: str) -> list[list[_Image]]:
    """Return the images of different ids that have one file, directly or by a symbolic link."""
    real_path = _real_paths()
    groups: dict[str, list[_Image]] = {}
    for image in images:
        path = real_path(os.path.join(image_root, image["file_name"]))
        groups.setdefault(path, []).append(image)
    by_id = ({i["id"]: i for i in group} for group in groups.values() if len(group) > 1)
    return [list(group.values()) for group in by_id if len(group) > 1]


def merge_images(content: dict[str, Any], same: Iterable[Sequence[_Image]]) -> dict[str, Any]:
    """Return a json in which the first of the images of one file has the annotations of all."""
    first_ids = {image["id"]: first["id"] for first, *others in same for image in others}
    images, annotations = content["images"], content["annotations"]
    if first_ids:
        images = [image for image in images if id_of(image) not in first_ids]
        annotations = [
            {**annotation, "image_id": first_ids[image_id]}
            if (image_id := id_of(annotation, "image_id")) in first_ids
            else annotation
            for annotation in annotations
        ]
    return {**content, "images": images, "annotations": annotations}


def describe_shared_files(train: Sequence[str], test: Sequence[str], name: str) -> str | None:
    """Return in one sentence how many test images are training images, if any are.

    Args:
        train, test: the paths of the images.
        name: of the test data.
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
    real_path = _real_paths()
    by_path = {real_path(path): path for path in train}
    shared = {path: by_path[real_path(path)] for path in test if real_path(path) in by_path}
    left = [path for path in test if path not in shared]
    # Whole files are read only where their size and a block of them occur on the other side too.
    for key in (os.path.getsize, _digest_block, _digest):
        of_train: dict[Any, list[str]] = defaultdict(list)
        for path in train:
            of_train[key(path)].append(path)
        of_test = {path: key(path) for path in left}
        left = [path for path, value in of_test.items() if value in of_train]
        wanted = {of_test[path] for path in left}
        train = [path for value, paths in of_train.items() if value in wanted for path in paths]
    return shared | {path: of_train[of_test[path]][0] for path in left}


def _digest_block(path: str) -> bytes:
    """Return a digest of the block in the middle; headers are often alike."""
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - _BLOCK) // 2)
        return hashlib.sha256(file.read(_BLOCK)).digest()


def _digest(path: str) -> bytes:
    return hashlib.sha256(Path(path).read_bytes()).digest()


def _real_paths() -> Callable[[str], str]:
    """Return a function that resolves symbolic links, those of each folder once."""
    real_folder = cache(os.path.realpath)

    def real_path(path: str) -> str:
        if os.path.islink(path):
            return os.path.realpath(path)
        folder, name = os.path.split(path)
        return os.path.join(real_folder(folder), name)

    return real_path
