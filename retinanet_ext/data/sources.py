"""The COCO jsons of one name: checked, with a choice of their classes, and as one."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import count
from typing import Any

from detectron2.config import CfgNode

from retinanet_ext.data.coco_json import (
    class_names,
    id_order,
    is_region_to_ignore,
    join_some,
    printable,
    read_coco_json,
)
from retinanet_ext.data.duplicates import check_duplicate_boxes
from retinanet_ext.data.image_files import check_images, find_same_files, merge_images
from retinanet_ext.data.images import ImageReader
from retinanet_ext.data.normalize import unify_ids
from retinanet_ext.data.validation import (
    CheckedData,
    Finding,
    check_coco,
    find_unused_classes,
    id_of,
    read_policy,
)
from retinanet_ext.errors import InputError

CLASSES_KEY = "DATASETS.CUSTOM.CLASSES"

_OF_LABELLED = (
    "empty_image",
    "unused_class",
    "parent_class",
)  # no findings where there is no list of annotations


@dataclass(frozen=True)
class Source:
    """Where the data of one name are.

    Attributes:
        name: in Detectron2's catalogs.
        split: "TRAIN" or "TEST".
        json_files, image_roots: one for each other; empty where other code has registered data of
            another format.
        is_ours: whether it is registered here, and not by other code.
        classes: names of those that are used, in their order; empty: all.
        box_format: of the boxes, a name in :data:`~retinanet_ext.data.box_format.BOX_FORMATS`.
    """

    name: str
    split: str
    json_files: tuple[str, ...]
    image_roots: tuple[str, ...]
    is_ours: bool
    classes: tuple[str, ...] = ()
    box_format: str = "xywh"

    @property
    def json_file(self) -> str:
        """All of them as text."""
        return ", ".join(self.json_files)

    @property
    def image_root(self) -> str:
        """All of them as text."""
        return ", ".join(dict.fromkeys(self.image_roots))


def read_texts(cfg: CfgNode, key: str) -> tuple[str, ...]:
    """Return the texts of a key that holds one, empty for none, or a list of them.

    Raises:
        InputError: a list with something else
    """
    value = cfg.DATASETS.CUSTOM[key.rpartition(".")[2]]
    texts = ((value,) if value else ()) if isinstance(value, str) else tuple(value)
    for text in texts:
        if not isinstance(text, str) or not text:
            raise InputError(f"{key} takes texts that are not empty, in quotes; got {text!r}")
    return texts


def check_source(cfg: CfgNode, source: Source, *, decode_all: bool = False) -> CheckedData:
    """Return the data of one name after their check.

    Args:
        cfg: the whole config.
        source: of COCO-format data.
        decode_all: all images, however many.

    Raises:
        InputError: what cannot be checked: a json or a folder that cannot be read, classes that
            are not in it, a policy that is not allowed
    """
    policy = read_policy(cfg.DATASETS.CHECK)
    contents = [
        read_coco_json(json_file, needs_annotations=source.split == "TRAIN")
        for json_file in source.json_files
    ]
    check_chosen(source.classes, dict(zip(source.json_files, contents, strict=True)))
    # An image that is empty in one file may have boxes in another.
    of_parts = {**policy, "empty_image": "keep"} if len(contents) > 1 else policy
    parts = [
        _check_file(cfg, source, place, content, of_parts, decode_all=decode_all)
        for place, content in enumerate(contents)
    ]
    if len(parts) > 1:
        return merge(parts, source.classes, policy)
    (checked,) = parts
    if source.classes:
        checked = replace(checked, content=order_classes(checked.content, source.classes))
    return checked


def _check_file(
    cfg: CfgNode,
    source: Source,
    place: int,
    original: dict[str, Any],
    policy: Mapping[str, str],
    *,
    decode_all: bool,
) -> CheckedData:
    json_file, image_root = source.json_files[place], source.image_roots[place]
    content, id_notes = unify_ids({"annotations": [], **original})
    content, notes = choose_classes(content, source.classes)
    is_labelled = "annotations" in original
    if not is_labelled:
        policy = {**policy, **dict.fromkeys(_OF_LABELLED, "keep")}
        notes.append("there is no list of annotations: detections are written, AP is not computed")
    is_key = source.name.startswith("custom_") and len(source.json_files) == 1
    images = check_images(
        content,
        image_root,
        ImageReader.from_config(cfg),
        policy,
        folder_key=f"DATASETS.CUSTOM.{source.split}_IMAGES" if is_key else "",
        decode_all=decode_all,
    )
    checked = check_coco(
        json_file, images.content, policy, images.findings, source.box_format, id_notes
    )
    return replace(
        checked,
        findings=[f for f in checked.findings if is_labelled or f.kind not in _OF_LABELLED],
        image_root=image_root,
        notes=[*notes, *images.notes],
        is_labelled=is_labelled,
        original=original,
    )


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
            same = [other for other in known if other.casefold() == name.casefold()]
            close = same or get_close_matches(name, known, n=1)
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
    counts: Counter[int | str | None] = Counter()
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


def merge(
    parts: Sequence[CheckedData], chosen: Sequence[str], policy: Mapping[str, str]
) -> CheckedData:
    """Return several checked jsons as one, their classes united by name and their ids anew.

    Args:
        parts: each from one file.
        chosen: the classes in their order; empty: all, in the order of their first appearance.
        policy: kind -> what is done about it.

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
    origins: dict[int, tuple[int, Any]] = {}  # new image id -> number of the part, id there
    numbers = count(1)
    for place, part in enumerate(parts):
        category_ids = {c["id"]: labels[c["name"]] for c in part.content["categories"]}
        for category in part.content["categories"]:
            new = {**category, "id": labels[category["name"]]}
            categories.setdefault(category["name"], new)
        image_ids = {}
        for image in sorted(part.content["images"], key=lambda image: id_order(image["id"])):
            image_ids[image["id"]] = new_id = len(images) + 1
            path = os.path.join(part.image_root, image["file_name"])
            images.append({**image, "id": new_id, "file_name": path})
            origins[new_id] = place, image["id"]
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
    return _check_merged(parts, content, origins, policy)


def _merge_same_images(
    content: dict[str, Any],
    same: Sequence[Sequence[dict[str, Any]]],
    policy: Mapping[str, str],
    findings: list[Finding],
    is_labelled: bool,
) -> dict[str, Any]:
    """Return the content with one image for each file, and add what is found of it then."""

    def found(kind: str, message: str, **ids: Any) -> bool:
        findings.append(Finding(kind, message, **ids))
        return policy[kind] == "keep"

    content = merge_images(content, same)
    firsts = {entries[0]["id"]: entries[0] for entries in same}
    of_them = [a for a in content["annotations"] if a["image_id"] in firsts]
    kept = {id(a) for a in check_duplicate_boxes(of_them, firsts, found)}
    annotations = [
        a for a in content["annotations"] if a["image_id"] not in firsts or id(a) in kept
    ]
    filled = {a["image_id"] for a in annotations if not is_region_to_ignore(a)}
    images = [
        image
        for image in content["images"]
        if not is_labelled
        or image["id"] in filled
        or found("empty_image", f"image {printable(image['file_name'])} has no box")
    ]
    used = {image["id"] for image in images}
    annotations = [a for a in annotations if a["image_id"] in used]
    return {**content, "images": images, "annotations": annotations}


def _check_merged(
    parts: Sequence[CheckedData],
    content: dict[str, Any],
    origins: Mapping[int, tuple[int, Any]],
    policy: Mapping[str, str],
) -> CheckedData:
    """Return what was found in all parts and between them."""

    def describe(image: Mapping[str, Any]) -> str:
        place, image_id = origins[image["id"]]
        return f"{parts[place].json_file} (image id {image_id})"

    same = [
        entries
        for entries in find_same_files(content["images"], "")
        if len({origins[entry["id"]][0] for entry in entries}) > 1
    ]
    findings = [
        Finding(
            "duplicate_file",
            f"{printable(entries[0]['file_name'])} is listed in "
            f"{join_some(map(describe, entries))}",
        )
        for entries in same
    ]
    for part in parts:
        findings += [
            replace(finding, message=f"{part.json_file}: {finding.message}")
            for finding in part.findings
            if finding.kind not in _OF_LABELLED
        ]
    if policy["duplicate_file"] != "merge":
        same = []
    content = _merge_same_images(content, same, policy, findings, parts[0].is_labelled)
    if parts[0].is_labelled:
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
