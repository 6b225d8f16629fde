"""Reader of YOLO labels: a ``data.yaml`` in Ultralytics' layout as the content of a COCO json."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from retinanet_ext.data.box_format import from_corners
from retinanet_ext.data.coco_json import AnnotationFile, join_some, printable
from retinanet_ext.errors import InputError, yaml_errors

BOX_FORMAT = "relative_cxcywh"

_LARGEST = 2  # of a fraction of the image; more is a number in pixels


def find_yolo_root(path: str) -> str:
    """Return the folder that the entries of a ``data.yaml`` start from: its ``path``, or its own.

    Raises:
        InputError: the file cannot be read, or the folder does not exist.
    """
    named = _read_yaml(path).get("path") or "."
    places = [os.path.join(os.path.dirname(path), str(named)), str(named)]
    for place in places:
        if os.path.isdir(place):
            return os.path.normpath(place)
    raise InputError(
        f"{path}: path is {str(named)!r}, which is no folder here; set TRAIN_IMAGES and "
        "TEST_IMAGES of DATASETS.CUSTOM to the folder that train and val start from"
    )


def read_yolo(path: str, root: str, split: str, *, box_format: str = BOX_FORMAT) -> AnnotationFile:
    """Return a split of a YOLO data set in the form of a COCO json.

    The label file of ``images/a.jpg`` is ``labels/a.txt``, or ``a.txt`` beside the image if no
    folder is called ``images``. A line is ``class cx cy w h``, or ``class x1 y1 x2 y2 x3 y3 ...``
    for a polygon, of which the box is taken. An image without label file has no objects.

    Images have no width and height, and boxes are fractions. An annotation's id is its file and
    line. There is no list of annotations if no image of a test set has a label file.

    Args:
        path: the ``data.yaml``.
        root: folder that its entries start from.
        split: "TRAIN" or "TEST".
        box_format: what the four numbers of a line are, as fractions.

    Raises:
        InputError: names or images are missing.
    """
    config = _read_yaml(path)
    names = _class_names(path, config)
    files = _find_images(path, config, root, split)
    labels = [_label_file(file) for file in files]
    is_labelled = list(map(os.path.isfile, labels))
    keypoints = math.prod(config.get("kpt_shape") or [0])
    images, annotations = [], []
    faults: list[str] = []
    entries = zip(files, labels, is_labelled, strict=True)
    for number, (file, label, has_label) in enumerate(entries, start=1):
        images.append({"id": number, "file_name": _short(file, root)})
        name = _short(label, root)
        lines = _read_labels(label, keypoints, box_format, faults) if has_label else ()
        annotations += [
            {"id": f"{name}:{line}", "image_id": number, "category_id": category_id, "bbox": box}
            for line, category_id, box in lines
        ]
    content: dict[str, Any] = {"images": images, "annotations": annotations}
    content["categories"] = [{"id": index, "name": name} for index, name in names.items()]
    if not any(is_labelled):
        if split == "TRAIN":
            raise InputError(
                f"{path}: none of the {len(files)} training images has a label file, such as "
                f"{labels[0]} for {files[0]}"
            )
        del content["annotations"]
    return AnnotationFile(path, root, content, box_format, faults, _describe_orphans(files, root))


def _describe_orphans(files: Iterable[str], root: str) -> list[str]:
    """Return a note about the files in ``labels`` folders that have no image, if there are any."""
    orphans = []
    for folder in sorted(set(map(os.path.dirname, files))):
        labels = os.path.dirname(_label_file(os.path.join(folder, "any")))
        if labels == folder or not os.path.isdir(folder) or not os.path.isdir(labels):
            continue
        stems = {os.path.splitext(name)[0] for name in os.listdir(folder)} | {"classes"}
        for name in sorted(os.listdir(labels)):
            stem, suffix = os.path.splitext(name)
            if suffix == ".txt" and stem not in stems:
                orphans.append(printable(_short(os.path.join(labels, name), root)))
    if not orphans:
        return []
    what = "1 label file has" if len(orphans) == 1 else f"{len(orphans)} label files have"
    return [f"{what} no image: {join_some(orphans, 3)}"]


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8-sig") as file, yaml_errors(path):
            content = yaml.safe_load(file)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: must hold the keys train, val and names")
    return content


def _class_names(path: str, config: Mapping[str, Any]) -> dict[int, Any]:
    """Return class index -> name."""
    names = config.get("names")
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not names:
        raise InputError(f"{path}: names must be the list of class names, got {names!r}")
    for index in names:
        if not str(index).isdecimal():
            raise InputError(f"{path}: names has {index!r}, which is no class index")
    if config.get("nc", len(names)) != len(names):
        raise InputError(f"{path}: nc is {config['nc']}, but there are {len(names)} names")
    # A bare number is a name. True is not, because it may have been written as yes or on.
    return {
        int(index): str(name) if type(name) in (int, float) else name
        for index, name in sorted(names.items(), key=lambda item: int(item[0]))
    }


def _find_images(path: str, config: Mapping[str, Any], root: str, split: str) -> list[str]:
    """Return the image files of a split: those of folders in the order of their names."""
    keys = {"TRAIN": ("train",), "TEST": ("val", "test")}[split]
    key = next(filter(config.get, keys), None)
    if key is None:
        raise InputError(f"{path}: there is no {' or '.join(keys)}")
    entries = config[key] if isinstance(config[key], list) else [config[key]]
    files = [file for entry in entries for file in _images_of(path, key, str(entry), root)]
    if not files:
        raise InputError(f"{path}: {key}: there is no image in {join_some(entries)} of {root}")
    return files


def _images_of(path: str, key: str, entry: str, root: str) -> Iterator[str]:
    """Yield the images of a folder with those below it, or of a file that lists them."""
    place = os.path.join(root, entry)
    if not os.path.exists(place):  # Roboflow writes ../train for train, as Ultralytics knows
        place = os.path.join(root, entry.removeprefix("../"))
    place = os.path.normpath(place)
    if os.path.isdir(place):
        Image.init()
        suffixes = {end for end, kind in Image.EXTENSION.items() if kind in Image.OPEN}
        for folder, folders, names in os.walk(place, followlinks=True):
            folders.sort()
            for name in sorted(names):
                if not name.startswith(".") and os.path.splitext(name)[1].lower() in suffixes:
                    yield os.path.join(folder, name)
    elif os.path.isfile(place) and place.endswith(".txt"):
        lines = Path(place).read_text(encoding="utf-8-sig").splitlines()
        for line in filter(None, map(str.strip, lines)):
            yield os.path.normpath(os.path.join(os.path.dirname(place), line))
    else:
        raise InputError(
            f"{path}: {key} is {entry!r}, and {place} is neither a folder nor a .txt file that "
            "lists images"
        )


def _label_file(image: str) -> str:
    """Return the label file of an image, by the rule of Ultralytics."""
    # With a slash before it, because a relative path may begin with the folder.
    before, images, after = f"/{os.path.splitext(image)[0]}".rpartition("/images/")
    return f"{before}/labels/{after}.txt"[1:] if images else f"{after}.txt"[1:]


def _read_labels(
    label: str, num_keypoint_values: int, box_format: str, faults: list[str]
) -> Iterator[tuple[int, int, list[float]]]:
    """Yield the number, the class and the box of each line; the lines without go to ``faults``."""
    try:
        lines = Path(label).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        faults.append(f"{label}: is not a text file")
        return
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield number, *_parse(line.split(), num_keypoint_values, box_format)
            except ValueError as error:
                faults.append(f"{label}, line {number}: {line.strip()!r}: {error}")


def _parse(fields: list[str], num_keypoint_values: int, box_format: str) -> tuple[int, list[float]]:
    """Return the class and the box of a line, or raise a ValueError that says what is wrong."""
    try:
        category_id, *numbers = map(float, fields)
    except ValueError:
        raise ValueError("every field must be a number") from None
    if not all(map(math.isfinite, (category_id, *numbers))) or category_id % 1:
        raise ValueError("the class must be a whole number, and all numbers finite")
    if len(numbers) == 4 + num_keypoint_values:
        numbers = numbers[:4]
    is_polygon = len(numbers) >= 6 and len(numbers) % 2 == 0
    if len(numbers) != 4 and not is_polygon:
        raise ValueError(
            "a line is 'class cx cy w h', or a class and the x and y of three or more points"
        )
    if max(map(abs, numbers)) > _LARGEST:
        raise ValueError("numbers must be fractions of the image's width and height, not pixels")
    if is_polygon:
        x, y = numbers[::2], numbers[1::2]
        numbers = from_corners([min(x), min(y), max(x), max(y)], box_format)
    return int(category_id), numbers


def _short(file: str, root: str) -> str:
    """Return a path relative to a folder if it is below it, and otherwise absolute."""
    file, root = os.path.abspath(file), os.path.abspath(root)
    return os.path.relpath(file, root) if file.startswith(os.path.join(root, "")) else file
