"""Reader of Pascal VOC XML: a folder of annotations as the content of a COCO json."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from retinanet_ext.data.coco_json import AnnotationFile, join_some
from retinanet_ext.errors import InputError

_IMAGE_FOLDERS = ("JPEGImages", "images")


class VocFolder(NamedTuple):
    """Where the parts of a Pascal VOC data set are; the folder of lists need not exist."""

    xml: Path
    images: Path
    lists: Path


def find_voc_folder(path: str) -> VocFolder:
    """Return the parts of a folder.

    The folder has ``Annotations/``, or one folder in it has, as in ``VOCdevkit``, or it holds the
    XML files itself. ``Annotations`` with the images beside it means the folder above.

    Raises:
        InputError: there are no annotations, or several folders in it have some.
    """
    folder = Path(path)
    has_own = (folder / "Annotations").is_dir()
    found = [] if has_own else sorted(folder.glob("*/Annotations"))
    if len(found) > 1:
        names = join_some(place.parent for place in found)
        raise InputError(f"{path} holds several data sets: {names}; name one, or give a list")
    root = found[0].parent if found else folder
    if root.name == "Annotations" and _image_folders(root.parent):
        root = root.parent
    xml = root / "Annotations" if (root / "Annotations").is_dir() else root
    if next(xml.glob("*.xml"), None) is None:
        raise InputError(
            f"{xml} is a folder without Pascal VOC annotations (*.xml); for YOLO labels give "
            "their data.yaml"
        )
    return VocFolder(xml, [*_image_folders(root), root][0], root / "ImageSets" / "Main")


def _image_folders(root: Path) -> list[Path]:
    return [root / name for name in _IMAGE_FOLDERS if (root / name).is_dir()]


def read_voc(
    path: str, image_root: str, split: str, *, related: Iterable[str] = ()
) -> AnnotationFile:
    """Return a split of a Pascal VOC data set in the form of a COCO json.

    Corners count pixels from 1 and belong to the box, as in Pascal VOC: ``xmin`` 1 and ``xmax`` 10
    are the left 10 pixels, x 0 and width 10. ``difficult`` objects are regions to ignore. The
    split is that of the lists in ``ImageSets/Main`` if there are any, and otherwise all files.
    Classes are in alphabetical order. An annotation's id is its file and the number of the object.

    Args:
        path: the folder, see :func:`find_voc_folder`.
        image_root: folder of the images.
        split: "TRAIN" or "TEST".
        related: other such folders. Their classes are listed too, because training and test data
            must have the same, and the annotations do not list them.

    Raises:
        InputError: the layout is unknown, or the image folder does not exist.
    """
    if not os.path.isdir(image_root):
        raise InputError(f"the image folder {image_root} does not exist")
    folder = find_voc_folder(path)
    trees: dict[Path, ElementTree.Element | None] = {}
    names: set[str] = set()
    faults: list[str] = []
    others = sorted({os.path.abspath(o) for o in related} - {os.path.abspath(path)})
    for place in (folder, *map(find_voc_folder, others)):
        for file in sorted(place.xml.glob("*.xml")):
            tree = _read_xml(file, faults if place is folder else [])  # which has them itself
            objects = () if tree is None else tree.iter("object")
            names.update(filter(None, map(_class_name, objects)))
            if place is folder:
                trees[file] = tree
    labels = {name: number for number, name in enumerate(sorted(names), start=1)}
    files_by_stem: dict[str, list[str]] = defaultdict(list)
    for name in sorted(os.listdir(image_root)):
        if not name.endswith(".xml"):
            files_by_stem[os.path.splitext(name)[0]].append(name)
    images, annotations = [], []
    for number, file in enumerate(_listed(folder, split) or trees, start=1):
        if file not in trees:
            faults.append(f"{file}, which {folder.lists} lists, does not exist")
        tree = trees.get(file)
        if tree is None:
            continue
        images.append({"id": number, **_image(tree, file.stem, files_by_stem)})
        for index, item in enumerate(tree.iter("object"), start=1):
            try:
                found = _read_object(item, labels)
            except ValueError as error:
                faults.append(f"{file}: object {index} {error}")
            else:
                annotations.append({"id": f"{file.name}:{index}", "image_id": number, **found})
    categories = [{"id": label, "name": name} for name, label in labels.items()]
    content = {"images": images, "annotations": annotations, "categories": categories}
    return AnnotationFile(path, image_root, content, faults=faults)


def _listed(folder: VocFolder, split: str) -> list[Path]:
    """Return the annotation files that the split's list names; empty: there are no lists."""
    if next(folder.lists.glob("*.txt"), None) is None:
        return []
    names = {"TRAIN": ("train.txt", "trainval.txt"), "TEST": ("val.txt", "test.txt")}[split]
    found = next(filter(Path.is_file, map(folder.lists.joinpath, names)), None)
    if found is None:
        raise InputError(f"{folder.lists} has no {' or '.join(names)}")
    stems = filter(None, map(str.strip, found.read_text(encoding="utf-8-sig").splitlines()))
    files = [folder.xml / f"{stem}.xml" for stem in stems]
    if not files:
        raise InputError(f"{found} is empty")
    return files


def _read_xml(file: Path, faults: list[str]) -> ElementTree.Element | None:
    """Return the root of a file; None, and a sentence in ``faults``, if it cannot be read."""
    try:
        return ElementTree.parse(file).getroot()
    except (ElementTree.ParseError, UnicodeError, LookupError, ValueError) as error:
        faults.append(f"{file}: is not valid XML: {error}")
    except OSError as error:
        faults.append(f"{file}: cannot be read: {error.strerror}")
    return None


def _class_name(item: ElementTree.Element) -> str:
    """Return the class of an object; empty if it has none."""
    return item.findtext("name", "").strip()


def _image(
    tree: ElementTree.Element, stem: str, files_by_stem: dict[str, list[str]]
) -> dict[str, Any]:
    """Return the entry of an image: its file has the name of the annotation file.

    A size that is missing, or 0 as some tools write, is left to the image file.
    """
    named = os.path.basename(tree.findtext("filename", "").strip().replace("\\", "/"))
    candidates = files_by_stem.get(stem) or [named or f"{stem}.jpg"]
    entry: dict[str, Any] = {"file_name": named if named in candidates else candidates[0]}
    for side in ("width", "height"):
        text = tree.findtext(f"size/{side}", "").strip()
        if text.isdecimal() and int(text):
            entry[side] = int(text)
    return entry


def _read_object(item: ElementTree.Element, labels: Mapping[str, int]) -> dict[str, Any]:
    """Return the class and the box of an object, x, y, width and height in pixels from 0.

    A ValueError says that it has no class, or which corner is no finite number.
    """
    name = _class_name(item)
    if not name:
        raise ValueError("has no name")
    texts = [item.findtext(f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")]
    try:
        left, top, right, bottom = corners = [float(text or "") for text in texts]
    except ValueError:
        corners = [math.nan]
    if not all(map(math.isfinite, corners)):
        raise ValueError(
            f"has xmin, ymin, xmax and ymax {join_some(texts)}, which must be finite numbers"
        )
    return {
        "category_id": labels[name],
        "bbox": [left - 1, top - 1, right - left + 1, bottom - top + 1],
        "iscrowd": 0,
        "ignore": int(item.findtext("difficult", "0").strip() == "1"),
    }
