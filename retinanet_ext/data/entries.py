"""Rules for single entries of a COCO json: which fields they need, and how messages call them."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from retinanet_ext.data.box_format import is_number
from retinanet_ext.data.coco_json import printable

_Rule = tuple[str, Callable[[Any], bool]]
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


_ID: _Rule = ("an integer or a text", _is_id)
_TEXT: _Rule = ("a text that is not empty", lambda value: isinstance(value, str) and value != "")
# A file name need not be Unicode. A class name must be, because TensorBoard refuses any other one.
_CLASS_NAME: _Rule = ("a text of valid Unicode that is not empty", _is_class_name)
_SIZE: _Rule = ("an integer above 0", lambda value: _is_integer(value) and value > 0)
_FLAG: _Rule = ("0 or 1", lambda value: value in (0, 1))
_AREA: _Rule = ("a finite number >= 0", lambda value: is_number(value) and value >= 0)

_REQUIRED: dict[str, dict[str, _Rule]] = {
    "images": {"id": _ID, "file_name": _TEXT},
    "categories": {"id": _ID, "name": _CLASS_NAME},
    "annotations": {"image_id": _ID, "category_id": _ID},
}
_OPTIONAL: dict[str, dict[str, _Rule]] = {
    "images": {"width": _SIZE, "height": _SIZE},
    "categories": {},
    "annotations": {"id": _ID, "iscrowd": _FLAG, "area": _AREA, "ignore": _FLAG},
}
"""Fields that may be missing or null, because they are filled in."""


def field_faults(key: str, items: Sequence[Any]) -> dict[int, str]:
    """Return index -> what is wrong with the first unusable field, of each entry that has one.

    Args:
        key: "images", "categories" or "annotations".
        items: the entries, any JSON values.
    """
    faults = {
        i: "it is not an object" for i, item in enumerate(items) if not isinstance(item, dict)
    }
    entries = [(i, item) for i, item in enumerate(items) if i not in faults]
    for field, (allowed, is_valid) in (_REQUIRED[key] | _OPTIONAL[key]).items():
        is_optional = field in _OPTIONAL[key]
        for i, item in entries:
            value = item.get(field)
            if not (is_valid(value) or (value is None and is_optional)):
                faults.setdefault(i, describe_fault(item, field, allowed))
    return dict(sorted(faults.items()))


def describe_fault(item: Mapping[str, Any], field: str, allowed: str) -> str:
    """Return what is wrong with an unusable field of an entry."""
    found = f"is {reprlib.repr(item[field])}" if field in item else "is missing"
    return f"{field} {found}; it must be {allowed}"


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
