"""A choice of the classes of COCO jsons, and several of them as one."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from itertools import count
from typing import Any

from retinanet_ext.data.check import CheckedData, Finding, find_unused_classes, id_of
from retinanet_ext.data.coco_json import class_names, join_some, printable
from retinanet_ext.data.image_files import find_same_files, merge_images
from retinanet_ext.errors import InputError

CLASSES_KEY = "DATASETS.CUSTOM.CLASSES"


def check_chosen(chosen: Sequence[str], contents: Mapping[str, dict[str, Any]]) -> None:
    """Refuse a choice of classes that are not all in some json.

    Args:
        chosen: names of classes, ``DATASETS.CUSTOM.CLASSES``.
        contents: name of a json file -> its content, unchecked.

    Raises:
        InputError: a name that is unknown or given twice
    """
    known = dict.fromkeys(
        category["name"]
        for content in contents.values()
        for category in content["categories"]
        if isinstance(category, dict) and isinstance(category.get("name"), str)
    )
    for name in chosen:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            raise InputError(
                f"{CLASSES_KEY} names {name!r}, which is no class of {join_some(contents)}"
                + (f"; did you mean {close[0]!r}?" if close else "")
                + f" (classes: {join_some(map(printable, known))})"
            )
        if chosen.count(name) > 1:
            raise InputError(f"{CLASSES_KEY} names {name!r} twice")


def choose_classes(
    content: dict[str, Any], chosen: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """Return an unchecked json without the classes that are not chosen, and what was left out."""
    if not chosen:
        return content, []
    left_out = {
        id_of(category): category["name"]
        for category in content["categories"]
        if isinstance(category, dict)
        and id_of(category) is not None
        and isinstance(category.get("name"), str)
        and category["name"] not in chosen
    }
    counts: Counter[int | None] = Counter()
    annotations = []
    for annotation in content["annotations"]:
        category_id = id_of(annotation, "category_id")
        if category_id in left_out:
            counts[category_id] += 1
        else:
            annotations.append(annotation)
    categories = [c for c in content["categories"] if id_of(c) not in left_out]
    content = {**content, "categories": categories, "annotations": annotations}
    if not left_out:
        return content, []
    boxes = join_some(f"{printable(name)} {counts[key]}" for key, name in left_out.items())
    return content, [
        f"{CLASSES_KEY} leaves out the boxes of other classes, which become background: {boxes}"
    ]


def order_classes(content: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return a checked json whose classes 0..K-1 are ``names``, itself if they are."""
    if class_names(content) == list(names):
        return content
    new_ids = {name: number for number, name in enumerate(names, start=1)}
    by_id = {category["id"]: new_ids[category["name"]] for category in content["categories"]}
    return {
        **content,
        "categories": [
            {**category, "id": by_id[category["id"]]} for category in content["categories"]
        ],
        "annotations": [
            {**annotation, "category_id": by_id[annotation["category_id"]]}
            for annotation in content["annotations"]
        ],
    }


def merge(parts: Sequence[CheckedData], chosen: Sequence[str]) -> CheckedData:
    """Return several checked jsons as one, their classes united by name and their ids anew.

    Args:
        parts: each from one file.
        chosen: the classes in their order; empty: all, in the order of their first appearance.

    Raises:
        InputError: some have annotations and others do not
    """
    labelled = [part.json_file for part in parts if part.is_labelled]
    if labelled and len(labelled) < len(parts):
        other = next(part.json_file for part in parts if not part.is_labelled)
        raise InputError(f"{other} has no list of annotations, but {labelled[0]} has one")
    names = list(chosen or dict.fromkeys(n for part in parts for n in class_names(part.content)))
    labels = {name: number for number, name in enumerate(names, start=1)}
    categories: dict[str, dict[str, Any]] = {}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    origins: dict[int, tuple[str, Any]] = {}  # new image id -> file and id there
    numbers = count(1)
    for part in parts:
        category_ids = {c["id"]: labels[c["name"]] for c in part.content["categories"]}
        for category in part.content["categories"]:
            new = {**category, "id": labels[category["name"]]}
            categories.setdefault(category["name"], new)
        image_ids = {}
        for image in sorted(part.content["images"], key=lambda image: image["id"]):
            image_ids[image["id"]] = new_id = len(images) + 1
            path = os.path.join(part.image_root, image["file_name"])
            images.append({**image, "id": new_id, "file_name": path})
            origins[new_id] = part.json_file, image["id"]
        annotations += [
            {
                **annotation,
                "id": next(numbers),
                "image_id": image_ids[annotation["image_id"]],
                "category_id": category_ids[annotation["category_id"]],
            }
            for annotation in part.content["annotations"]
        ]
    content = {
        **parts[0].content,
        "images": images,
        "categories": [categories[name] for name in names if name in categories],
        "annotations": annotations,
    }
    return _check_merged(parts, content, origins)


def _check_merged(
    parts: Sequence[CheckedData],
    content: dict[str, Any],
    origins: Mapping[int, tuple[str, Any]],
) -> CheckedData:
    """Return what was found in all parts and between them."""
    policy = parts[0].policy
    same = [
        entries
        for entries in find_same_files(content["images"], "")
        if len({origins[entry["id"]][0] for entry in entries}) > 1
    ]
    findings = [
        Finding(
            "duplicate_file",
            f"{printable(entries[0]['file_name'])} is listed in "
            + join_some(f"{file} (image id {key})" for file, key in _origins(entries, origins)),
        )
        for entries in same
    ]
    if policy["duplicate_file"] == "merge":
        content = merge_images(content, same)
    for part in parts:
        findings += [
            replace(finding, message=f"{part.json_file}: {finding.message}")
            for finding in part.findings
            if finding.kind != "unused_class"
        ]
    findings += find_unused_classes(content)
    names = class_names(content)
    notes = [f"{part.json_file}: {note}" for part in parts for note in part.notes]
    if any(set(class_names(part.content)) != set(names) for part in parts):
        notes.append(
            f"the classes of {len(parts)} files are united ({join_some(map(printable, names))}); "
            "what a file does not list is background in its images"
        )
    return CheckedData(
        ", ".join(part.json_file for part in parts),
        policy,
        findings,
        content,
        notes=notes,
        is_labelled=parts[0].is_labelled,
    )


def _origins(
    entries: Iterable[Mapping[str, Any]], origins: Mapping[int, tuple[str, Any]]
) -> list[tuple[str, Any]]:
    return [origins[entry["id"]] for entry in entries]
