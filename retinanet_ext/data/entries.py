"""Rules for single entries of a COCO json: which fields they need, and how messages call them."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from retinanet_ext.data.box_format import is_number
from retinanet_ext.data.coco_json import printable

Rule = tuple[str, Callable[[Any], bool]]
"""What a field must be, in words and as a predicate."""


def _is_integer(value: Any) -> bool:
    return is_number(value) and value % 1 == 0


def _is_id(value: Any) -> bool:
    if type(value) is int and abs(value) < 2**63:  # the usual case, decided fast
        return True
    return _is_integer(value) or (isinstance(value, str) and value != "")


def _is_class_name(value: Any) -> bool:
    try:
        return isinstance(value, str) and value.encode() != b""
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


_ID: Rule = ("an integer or a text", _is_id)
_TEXT: Rule = ("a text that is not empty", lambda value: isinstance(value, str) and value != "")
# A file name need not be Unicode. A class name must be, because TensorBoard refuses any other one.
_CLASS_NAME: Rule = ("a text of valid Unicode that is not empty", _is_class_name)
_SIZE: Rule = ("an integer above 0", lambda value: _is_integer(value) and value > 0)
_FLAG: Rule = ("0 or 1", lambda value: value in (0, 1))
_AREA: Rule = ("a finite number >= 0", lambda value: is_number(value) and value >= 0)

_REQUIRED: dict[str, dict[str, Rule]] = {
    "images": {"id": _ID, "file_name": _TEXT, "width": _SIZE, "height": _SIZE},
    "categories": {"id": _ID, "name": _CLASS_NAME},
    "annotations": {"image_id": _ID, "category_id": _ID},
}
_OPTIONAL: dict[str, dict[str, Rule]] = {
    "annotations": {"id": _ID, "iscrowd": _FLAG, "area": _AREA, "ignore": _FLAG}
}


def field_fault(key: str, item: Any) -> str | None:
    """Return what is wrong with the first unusable field of an entry, or None.

    Args:
        key: the entry's list: "images", "categories" or "annotations".
        item: the entry, any JSON value.
    """
    if not isinstance(item, dict):
        return "it is not an object"
    optional = {f: rule for f, rule in _OPTIONAL.get(key, {}).items() if f in item}
    faults = (rule_fault(item, f, rule) for f, rule in {**_REQUIRED[key], **optional}.items())
    return next(filter(None, faults), None)


def field_faults(key: str, items: Sequence[Any]) -> dict[int, str]:
    """Return index -> :func:`field_fault` for all entries that have one.

    Columns are checked first, because entries of a large file are rarely at fault.
    """
    if all(isinstance(item, dict) for item in items):
        columns = [(rule, [item.get(f) for item in items]) for f, rule in _REQUIRED[key].items()]
        columns += [
            (rule, [item[f] for item in items if f in item])
            for f, rule in _OPTIONAL.get(key, {}).items()
        ]
        if all(all(map(is_valid, values)) for (_, is_valid), values in columns):
            return {}
    return {i: fault for i, item in enumerate(items) if (fault := field_fault(key, item))}


def rule_fault(item: Mapping[str, Any], field: str, rule: Rule) -> str | None:
    """Return what is wrong with one field of an entry, or None."""
    allowed, is_valid = rule
    if field not in item:
        return f"{field} is missing; it must be {allowed}"
    if not is_valid(item[field]):
        return f"{field} is {reprlib.repr(item[field])}; it must be {allowed}"
    return None


def id_of(item: Any, field: str = "id") -> int | str | None:
    """Return an id of an entry, or None if the field is missing or cannot be an id."""
    value: Any = item.get(field) if isinstance(item, dict) else None
    if not _is_id(value):
        return None
    return value if isinstance(value, str) else int(value)


def entry_name(key: str, index: int, item: Any) -> str:
    """Return a name for any entry, for example ``annotations[4] (id 17, image_id 3)``."""
    fields = [field for field in ("id", "image_id") if isinstance(item, dict) and field in item]
    ids = ", ".join(f"{field} {reprlib.repr(item[field])}" for field in fields)
    return f"{key}[{index}]" + (f" ({ids})" if ids else "")


def annotation_name(index: int, annotation: Any, images: Mapping[Any, Mapping[str, Any]]) -> str:
    """Return a name for an annotation, which includes the image file if the image is known."""
    own_id, image_id = id_of(annotation), id_of(annotation, "image_id")
    if image_id is None or image_id not in images:
        return entry_name("annotations", index, annotation)
    name = f"annotations[{index}]" if own_id is None else f"annotation {printable(own_id)}"
    return f"{name} of {image_name(images[image_id])}"


def image_name(image: Mapping[str, Any]) -> str:
    """Return a name for a usable image, for example ``image 3 (a.jpg)``."""
    return f"image {printable(image['id'])} ({printable(image['file_name'])})"


def leaves_folder(file_name: str) -> bool:
    """Return whether a file name contains ``..``; absolute paths are used as they are."""
    return ".." in file_name and ".." in PurePath(file_name).parts
