"""Classes by name: which of them are used, in which order, and which stand for no objects."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from retinanet_ext.data.coco_json import AnnotationFile, class_names, join_some, printable
from retinanet_ext.data.entries import id_of
from retinanet_ext.errors import InputError

CLASSES_KEY = "DATASETS.CUSTOM.CLASSES"
BACKGROUND_NAMES = ("background", "__background__", "_background_", "bg")

_MAX_NAMES = 20  # of classes in a line to paste


def check_chosen(classes: Sequence[str], files: Sequence[AnnotationFile]) -> None:
    """Refuse names that are in no annotation file or given twice, by an InputError."""
    names = (_name_of(category) for file in files for category in file.content["categories"])
    known = [name for name in dict.fromkeys(names) if name is not None]
    for name in classes:
        if name not in known:
            same = [other for other in known if other.casefold() == name.casefold()]
            close = same or get_close_matches(name, known, n=1)
            raise InputError(
                f"{CLASSES_KEY} names {name!r}, which is no class of "
                + join_some(dict.fromkeys(file.path for file in files))
                + (f"; did you mean {close[0]!r}?" if close else "")
                + f" (classes: {join_some(map(printable, known))})"
            )
        if classes.count(name) > 1:
            raise InputError(f"{CLASSES_KEY} names {name!r} twice")


def choose_classes(
    content: dict[str, Any], classes: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """Leave out the classes that are not chosen, and note how many boxes go with them.

    The content is unchecked and not modified. No ``classes`` means all.
    """
    left_out = {
        id_of(category): name
        for category in content["categories"]
        if (name := _name_of(category)) is not None and name not in classes
    }
    left_out.pop(None, None)
    if not classes or not left_out:
        return content, []
    counts = Counter(id_of(annotation, "category_id") for annotation in content["annotations"])
    boxes = join_some(f"{printable(name)} {counts[key]}" for key, name in left_out.items())
    note = "leaves out the boxes of other classes, which become background"
    kept = {
        "categories": [c for c in content["categories"] if id_of(c) not in left_out],
        "annotations": [
            a for a in content["annotations"] if id_of(a, "category_id") not in left_out
        ],
    }
    return {**content, **kept}, [f"{CLASSES_KEY} {note}: {boxes}"]


def _name_of(category: Any) -> str | None:
    name = category.get("name") if isinstance(category, dict) else None
    return name if isinstance(name, str) else None


def order_classes(content: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return a checked json whose classes 0..K-1 are ``names``."""
    if class_names(content) == list(names):
        return content
    new_ids = {name: number for number, name in enumerate(names, start=1)}
    by_id = {category["id"]: new_ids[category["name"]] for category in content["categories"]}
    return {
        **content,
        "categories": [{**c, "id": by_id[c["id"]]} for c in content["categories"]],
        "annotations": [
            {**a, "category_id": by_id[a["category_id"]]} for a in content["annotations"]
        ],
    }


def explain_unused_classes(
    unused: Sequence[Mapping[str, Any]], categories: Sequence[Mapping[str, Any]]
) -> dict[int | str, str]:
    """Return category id -> what a class without a box is, if it stands for no objects.

    It is the background or a parent of other classes, which Roboflow exports as category 0.
    """
    reasons: dict[int | str, str] = {}
    for category in unused:
        name = category["name"]
        others = [other for other in categories if other is not category]
        children = [printable(o["name"]) for o in others if o.get("supercategory") == name]
        if children:
            reasons[category["id"]] = f"is the supercategory of {join_some(children, 3)}"
        elif name.lower() in BACKGROUND_NAMES:
            reasons[category["id"]] = "is the background, which needs no class"
    objects = [category["name"] for category in categories if category["id"] not in reasons]
    names = printable(shlex.quote(json.dumps(objects, ensure_ascii=False)))
    if len(objects) > _MAX_NAMES:
        names = f"the names of the other {len(objects)}"
    remedy = f"it is learned as a class all the same, {CLASSES_KEY} {names} leaves it out"
    return {category_id: f"{reason}; {remedy}" for category_id, reason in reasons.items()}
