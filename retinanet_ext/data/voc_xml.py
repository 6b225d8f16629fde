"""Reader of Pascal VOC XML: a folder of annotations as the content of a COCO json."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from retinanet_ext.data.coco_json import join_some
from retinanet_ext.errors import InputError

LISTS = {"TRAIN": ("train", "trainval"), "TEST": ("val", "test")}
"""Split -> its lists in ``ImageSets/Main``; the first that is there counts."""

_IMAGE_FOLDERS = ("JPEGImages", "images")


@dataclass(frozen=True)
class VocFolder:
    """Where the parts of a Pascal VOC data set are.

    Attributes:
        xml: folder of the annotations.
        images: folder of the images.
        lists: folder with the lists of image names, which need not exist.
    """

    xml: Path
    images: Path
    lists: Path

    @classmethod
    def find(cls, path: str) -> VocFolder:
        """Return the parts of a folder.

        The folder has ``Annotations/``, or one folder in it has, as in ``VOCdevkit``, or it holds
        the XML files itself. ``Annotations`` with the images beside it means the folder above.

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
        images = [*_image_folders(root), root][0]
        return cls(xml, images, root / "ImageSets" / "Main")


def _image_folders(root: Path) -> list[Path]:
    return [root / name for name in _IMAGE_FOLDERS if (root / name).is_dir()]


def read_voc(
    path: str, image_root: str, split: str, *, related: Iterable[str] = ()
) -> dict[str, Any]:
    """Return a split of a Pascal VOC data set as the content of a COCO json.

    Corners count pixels from 1 and belong to the box, as in Pascal VOC: ``xmin`` 1 and ``xmax`` 10
    are the left 10 pixels, x 0 and width 10. ``difficult`` objects are regions to ignore. The
    split is that of the lists in ``ImageSets/Main`` if there are any, and otherwise all files.

    Args:
        path: the folder, see :meth:`VocFolder.find`.
        image_root: folder of the images.
        split: "TRAIN" or "TEST".
        related: other such folders, whose classes are listed too. The annotations do not list
            classes, and training and test data must have the same.

    Returns:
        the lists of a COCO json, with the classes in alphabetical order. An annotation's id is its
        file and the number of the object in it.

    Raises:
        InputError: the layout is unknown, or a file cannot be read.
    """
    folder = VocFolder.find(path)
    trees = {file: _read_xml(file) for file in sorted(folder.xml.glob("*.xml"))}
    names = {_class_name(file, o) for file, tree in trees.items() for o in tree.iter("object")}
    for other in {os.path.abspath(o) for o in related} - {os.path.abspath(path)}:
        for file in VocFolder.find(other).xml.glob("*.xml"):
            names |= {_class_name(file, o) for o in _read_xml(file).iter("object")}
    labels = {name: number for number, name in enumerate(sorted(names), start=1)}
    files_by_stem: dict[str, list[str]] = {}
    for name in sorted(os.listdir(image_root)):
        if not name.endswith(".xml"):
            files_by_stem.setdefault(os.path.splitext(name)[0], []).append(name)
    images, annotations = [], []
    for number, file in enumerate(_listed(folder, split) or trees, start=1):
        tree = trees.get(file)
        if tree is None:
            raise InputError(f"{file}, which {folder.lists} lists, does not exist")
        images.append({"id": number, **_image(tree, file.stem, files_by_stem)})
        for index, item in enumerate(tree.iter("object"), start=1):
            annotations.append(
                {
                    "id": f"{file.name}:{index}",
                    "image_id": number,
                    "category_id": labels[_class_name(file, item)],
                    "bbox": _box(file, index, item),
                    "iscrowd": 0,
                    "ignore": int(item.findtext("difficult", "0").strip() == "1"),
                }
            )
    categories = [{"id": label, "name": name} for name, label in labels.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def _listed(folder: VocFolder, split: str) -> list[Path]:
    """Return the annotation files that the split's list names; empty: there are no lists."""
    if next(folder.lists.glob("*.txt"), None) is None:
        return []
    lists = [folder.lists / f"{name}.txt" for name in LISTS[split]]
    found = next(filter(Path.is_file, lists), None)
    if found is None:
        raise InputError(f"{folder.lists} has no {' or '.join(place.name for place in lists)}")
    names = filter(None, map(str.strip, found.read_text(encoding="utf-8-sig").splitlines()))
    files = [folder.xml / f"{name}.xml" for name in names]
    if not files:
        raise InputError(f"{found} is empty")
    return files


def _read_xml(file: Path) -> ElementTree.Element:
    try:
        return ElementTree.parse(file).getroot()
    except (ElementTree.ParseError, UnicodeError, LookupError, ValueError) as error:
        raise InputError(f"{file}: is not valid XML: {error}") from None
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from error


def _class_name(file: Path, item: ElementTree.Element) -> str:
    name = item.findtext("name", "").strip()
    if not name:
        raise InputError(f"{file}: an object has no name")
    return name


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


def _box(file: Path, index: int, item: ElementTree.Element) -> list[float]:
    """Return an object's box as x, y, width and height in pixels from 0."""
    texts = [item.findtext(f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")]
    try:
        left, top, right, bottom = (float(text or "") for text in texts)
    except ValueError:
        left = math.nan
    if not math.isfinite(left):
        raise InputError(
            f"{file}: object {index} has xmin, ymin, xmax and ymax {join_some(texts)}, which must "
            "be numbers"
        )
    return [left - 1, top - 1, right - left + 1, bottom - top + 1]
