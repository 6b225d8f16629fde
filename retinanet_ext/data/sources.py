"""The data that a config names: which files they are in, and their check as one data set."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import chain
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from retinanet_ext.data.annotation_files import find_image_root, is_json, read_annotations
from retinanet_ext.data.box_format import check_box_format_name
from retinanet_ext.data.class_choice import CLASSES_KEY, check_chosen, order_classes
from retinanet_ext.data.coco_json import (
    AnnotationFile,
    class_names,
    id_order,
    join_some,
    printable,
)
from retinanet_ext.data.findings import Finding, ValidationResult, read_policy
from retinanet_ext.data.image_files import find_same_files, merge_images
from retinanet_ext.data.images import ImageReader
from retinanet_ext.data.sample_set import SampleSet, make_sample_set
from retinanet_ext.data.validation import check_data_set, check_file
from retinanet_ext.errors import InputError
from retinanet_ext.files import sha256_of

SAMPLE_SPLITS = {"retinanet_ext_sample_train": "train", "retinanet_ext_sample_val": "val"}
"""Name in ``DATASETS.TRAIN`` or ``DATASETS.TEST`` -> part of the sample set."""


@dataclass(frozen=True)
class Source:
    """One data set of a config, unchecked.

    Attributes:
        name: name in Detectron2's catalogs.
        split: "TRAIN" or "TEST".
        json_files, image_roots: annotation files (or a ``data.yaml`` or a folder of Pascal VOC XML)
            and the image folder of each. Empty if other code has registered data of another format.
        is_ours: whether the plugin registers it.
        classes: names of the classes to use, in their order; empty: all.
        box_format: a name in :data:`~retinanet_ext.data.box_format.BOX_FORMATS`, of COCO jsons.
        related: the annotation files of both splits.
    """

    name: str
    split: str
    json_files: tuple[str, ...]
    image_roots: tuple[str, ...]
    is_ours: bool
    classes: tuple[str, ...] = ()
    box_format: str = "xywh"
    related: tuple[str, ...] = ()

    @property
    def is_converted(self) -> bool:
        """Whether any of the files is no COCO json."""
        return self.is_ours and not all(map(is_json, self.json_files))

    def read(self) -> list[AnnotationFile]:
        """Return the annotation files, unchecked; one that cannot be read is an InputError."""
        how = {"box_format": self.box_format, "related": self.related}
        pairs = zip(self.json_files, self.image_roots, strict=True)
        return [read_annotations(*pair, self.split, **how) for pair in pairs]

    def digests(self) -> dict[str, str]:
        """Return annotation file -> SHA-256 of a COCO json's bytes, or of other data's content."""
        digests = {}
        for file in self.read() if self.is_converted else ():
            digests[file.path] = hashlib.sha256(json.dumps(file.content).encode()).hexdigest()
        try:
            return digests | {path: sha256_of(path) for path in self.json_files if is_json(path)}
        except OSError as error:
            raise InputError(f"{error.filename} cannot be read: {error.strerror}") from None

    @property
    def json_file(self) -> str:
        """The annotation files, joined by commas."""
        return ", ".join(self.json_files)

    @property
    def image_root(self) -> str:
        """The image folders, joined by commas."""
        return ", ".join(dict.fromkeys(self.image_roots))


def read_texts(cfg: CfgNode, key: str) -> tuple[str, ...]:
    """Return the texts of a key of ``DATASETS.CUSTOM`` that holds a text or a list of texts.

    Raises:
        InputError: the list holds something else.
    """
    value = cfg.DATASETS.CUSTOM[key.rpartition(".")[2]]
    texts = ((value,) if value else ()) if isinstance(value, str) else tuple(value)
    for text in texts:
        if not isinstance(text, str) or not text:
            raise InputError(f"{key} takes texts that are not empty, in quotes; got {text!r}")
    return texts


def find_sources(cfg: CfgNode, splits: Sequence[str]) -> list[Source]:
    """Return the data sets that a config names for "TRAIN", "TEST" or both, unchecked.

    Raises:
        InputError: a name is not registered, half of a pair of ``DATASETS.CUSTOM`` is missing, or
            the box format is unknown.
    """
    sources = []
    for split in splits:
        custom = find_custom(cfg, split)
        names = [] if custom else cfg.DATASETS[split]
        sources += [custom] if custom else [_find_registered(cfg, split, name) for name in names]
    return sources


def find_custom(cfg: CfgNode, split: str) -> Source | None:
    """Return the data set of ``DATASETS.CUSTOM``, or None if none is named.

    Raises:
        InputError: as for :func:`find_sources`.
    """
    keys = [f"DATASETS.CUSTOM.{split}_{part}" for part in ("JSON", "IMAGES")]
    json_files, image_roots = (read_texts(cfg, key) for key in keys)
    if not json_files and not image_roots:
        return None
    if not json_files or (not image_roots and any(map(is_json, json_files))):
        given, missing = keys if json_files else reversed(keys)
        paths = join_some(json_files or image_roots)
        raise InputError(f"{given} is {paths!r}, but {missing} is empty; set both")
    if not image_roots:
        image_roots = tuple(map(find_image_root, json_files))
    elif len(image_roots) == 1:
        image_roots *= len(json_files)
    if len(image_roots) != len(json_files):
        raise InputError(
            f"{keys[0]} has {len(json_files)} entries and {keys[1]} {len(image_roots)}; give "
            "a folder for each file, or one for all"
        )
    box_format = cfg.DATASETS.CUSTOM.BOX_FORMAT
    check_box_format_name(box_format)
    classes = read_texts(cfg, CLASSES_KEY)
    name = f"custom_{split.lower()}"
    all_files = (read_texts(cfg, f"DATASETS.CUSTOM.{each}_JSON") for each in ("TRAIN", "TEST"))
    related = tuple(chain.from_iterable(all_files))
    return Source(name, split, json_files, image_roots, True, classes, box_format, related)


def _find_registered(cfg: CfgNode, split: str, name: str) -> Source:
    """Return the sample set, or a data set of Detectron2's catalog."""
    if name in SAMPLE_SPLITS:
        datasets = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
        parameters = SampleSet.from_config(cfg.DATASETS.SAMPLE)
        folder = make_sample_set(parameters, os.path.join(datasets, "retinanet_ext_sample"))
        part = str(folder / SAMPLE_SPLITS[name])
        return Source(name, split, (f"{part}.json",), (part,), is_ours=True)
    if name in DatasetCatalog:
        metadata = MetadataCatalog.get(name)
        values = [metadata.get(key) for key in ("json_file", "image_root")]
        json_files, image_roots = [(value,) if value else () for value in values]
        return Source(name, split, json_files, image_roots, is_ours=False)
    close = get_close_matches(name, DatasetCatalog.list(), n=1)
    raise InputError(
        f"DATASETS.{split} names {name!r}, which is not registered"
        + (f" (did you mean {close[0]!r}?)" if close else "")
        + f"; for COCO-format data set DATASETS.CUSTOM.{split}_JSON and "
        f"DATASETS.CUSTOM.{split}_IMAGES"
    )


def check_source(cfg: CfgNode, source: Source, *, decode_all: bool = False) -> ValidationResult:
    """Check a data set in COCO's format; several annotation files are merged.

    If ``decode_all``, the images of large data sets are decoded too.

    Raises:
        InputError: an annotation file or a folder cannot be read, a chosen class is in no file, or
            a policy is not allowed. No finding raises an error.
    """
    policy = read_policy(cfg.DATASETS.CHECK)
    reader = ImageReader.from_config(cfg)
    files = source.read()
    check_chosen(source.classes, files)
    has_key = source.name.startswith("custom_") and not source.is_converted and len(files) == 1
    parts = [
        check_file(
            file,
            policy,
            reader=reader,
            classes=source.classes,
            folder_key=f"DATASETS.CUSTOM.{source.split}_IMAGES" if has_key else "",
            decode_all=decode_all,
        )
        for file in files
    ]
    result = parts[0] if len(parts) == 1 else _merge(parts, source.classes)
    result = check_data_set(result)
    if source.is_converted:
        result = replace(result, original=None)  # there is no json that the evaluation could read
    if source.classes:
        result = replace(result, content=order_classes(result.content, source.classes))
    return result


def _merge(parts: Sequence[ValidationResult], classes: Sequence[str]) -> ValidationResult:
    """Merge annotation files: classes are united by name, images and annotations get new ids.

    Without ``classes``, all are used in the order of their first appearance. Files of which only
    some have annotations are refused.
    """
    labelled = [part.json_file for part in parts if part.is_labelled]
    if labelled and len(labelled) < len(parts):
        other = next(part.json_file for part in parts if not part.is_labelled)
        raise InputError(f"{other} has no list of annotations, but {labelled[0]} has one")
    names = list(classes or dict.fromkeys(n for part in parts for n in class_names(part.content)))
    content, origins = _join_lists(parts, names)
    notes = [f"{part.json_file}: {note}" for part in parts for note in part.notes]
    if any(set(class_names(part.content)) != set(names) for part in parts):
        notes.append(
            f"the classes of {len(parts)} files are united ({join_some(map(printable, names))}); "
            "what a file does not list is background in its images"
        )
    findings = [
        replace(finding, message=f"{part.json_file}: {finding.message}")
        for part in parts
        for finding in part.findings
    ]
    same = [
        group
        for group in find_same_files(content["images"], "")
        if len({origins[image["id"]][0] for image in group}) > 1
    ]
    for group in same:
        listed = join_some(origins[image["id"]][1] for image in group)
        message = f"{printable(group[0]['file_name'])} is listed in {listed}"
        findings.append(Finding("duplicate_file", message))
    policy = parts[0].policy
    if policy["duplicate_file"] == "merge":
        content = merge_images(content, same)
    files = ", ".join(part.json_file for part in parts)
    return ValidationResult(
        files, policy, findings, content, notes=notes, is_labelled=bool(labelled)
    )


def _join_lists(
    parts: Sequence[ValidationResult], names: Sequence[str]
) -> tuple[dict[str, Any], dict[int, tuple[int, str]]]:
    """Return all entries with new ids, and new image id -> index of its part, name there."""
    labels = {name: number for number, name in enumerate(names, start=1)}
    categories: dict[str, dict[str, Any]] = {}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    origins: dict[int, tuple[int, str]] = {}
    for place, part in enumerate(parts):
        category_ids = {c["id"]: labels[c["name"]] for c in part.content["categories"]}
        for category in part.content["categories"]:
            categories.setdefault(category["name"], {**category, "id": labels[category["name"]]})
        image_ids = {}
        for image in sorted(part.content["images"], key=lambda image: id_order(image["id"])):
            new_id = image_ids[image["id"]] = len(images) + 1
            origins[new_id] = place, f"{part.json_file} (image id {image['id']})"
            path = os.path.join(part.image_root, image["file_name"])
            images.append({**image, "id": new_id, "file_name": path})
        annotations += [
            {
                **annotation,
                "id": number,
                "image_id": image_ids[annotation["image_id"]],
                "category_id": category_ids[annotation["category_id"]],
            }
            for number, annotation in enumerate(part.content["annotations"], len(annotations) + 1)
        ]
    lists = {
        "images": images,
        "categories": [categories[name] for name in names if name in categories],
        "annotations": annotations,
    }
    return {**parts[0].content, **lists}, origins
