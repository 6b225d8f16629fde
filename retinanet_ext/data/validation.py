"""The check of COCO-format data: every entry of an annotation file, and its images.

:func:`validate_coco` checks a file without a config. Training calls the two halves by themselves:
:func:`check_file` for each annotation file, and :func:`check_data_set` for the files merged.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import PurePath
from typing import Any

from retinanet_ext.data.annotations import check_annotations, find_duplicate_boxes
from retinanet_ext.data.box_format import check_box_format_name, format_box
from retinanet_ext.data.class_choice import choose_classes, explain_unused_classes
from retinanet_ext.data.coco_json import (
    AnnotationFile,
    is_ignore_region,
    join_some,
    printable,
    read_coco_json,
)
from retinanet_ext.data.entries import entry_name, field_faults, id_of, image_name
from retinanet_ext.data.findings import ValidationResult, read_policy
from retinanet_ext.data.image_files import Images, check_images, merge_images
from retinanet_ext.data.images import ImageReader
from retinanet_ext.data.normalize import find_crowd_objects, unify_ids

_Items = list[dict[str, Any]]


def validate_coco(
    json_file: str,
    image_root: str,
    *,
    policy: Mapping[str, str] | None = None,
    box_format: str = "xywh",
    reader: ImageReader | None = None,
    decode_all: bool = True,
) -> ValidationResult:
    """Check an annotation file in COCO's format and its images.

    Args:
        json_file: path of the annotation file. The list of annotations may be missing, as it is in
            COCO's image info files.
        image_root: folder that ``file_name`` entries are relative to.
        policy: what to do with findings, with the keys and values of ``DATASETS.CHECK``, for
            example ``{"MISSING_IMAGE": "drop"}``. A kind that is left out has its default.
        box_format: what the four numbers of a ``bbox`` are: "xywh", "xyxy", "cxcywh", or one of
            these after "relative\\_" for fractions of the image's size.
        reader: reads the images; by default as Detectron2 reads BGR images.
        decode_all: decode every image. Otherwise only the headers of large data sets are read.

    Returns:
        the findings, the entries that the policy keeps, and notes. No finding raises an error;
        :meth:`ValidationResult.raise_refused` does so on request.

    Raises:
        InputError: the annotation file or the folder cannot be read, or a policy or box format is
            not allowed.

    Example:
        >>> import json, tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> folder = Path(tempfile.mkdtemp())
        >>> Image.radial_gradient("L").save(folder / "a.png")
        >>> content = {
        ...     "images": [{"id": 1, "file_name": "a.png", "width": 256, "height": 256}],
        ...     "categories": [{"id": 1, "name": "disc"}],
        ...     "annotations": [
        ...         {"id": 1, "image_id": 1, "category_id": 1, "bbox": [8, 8, 240, 240]},
        ...         {"id": 2, "image_id": 1, "category_id": 1, "bbox": [300, 8, 20, 20]},
        ...     ],
        ... }
        >>> _ = (folder / "instances.json").write_text(json.dumps(content))
        >>> result = validate_coco(str(folder / "instances.json"), str(folder))
        >>> [(finding.kind, finding.annotation_id) for finding in result.findings]
        [('outside_box', 2)]
        >>> result.is_refused, len(result.content["annotations"])
        (False, 1)
    """
    content = read_coco_json(json_file, needs_annotations=False)
    file = AnnotationFile(json_file, image_root, content, box_format)
    how = {"reader": reader or ImageReader(), "decode_all": decode_all}
    return check_data_set(check_file(file, read_policy(policy or {}), **how))


def check_file(
    file: AnnotationFile,
    policy: Mapping[str, str],
    *,
    reader: ImageReader,
    classes: Sequence[str] = (),
    folder_key: str = "",
    decode_all: bool = False,
) -> ValidationResult:
    """Check every entry of an annotation file by itself; no finding raises an error.

    Args:
        file: what was read; its content is not modified.
        policy: kind of finding -> policy.
        classes: names of the classes to use; empty: all.
        reader, folder_key, decode_all: as for ``check_images``.

    Raises:
        InputError: the folder does not exist, or the box format is unknown.
    """
    check_box_format_name(file.box_format)
    content, image_root = file.content, file.image_root
    is_labelled = "annotations" in content
    result = ValidationResult(
        file.path, policy, image_root=image_root, is_labelled=is_labelled, original=content
    )
    for fault in file.faults:
        result.add("unreadable_label", fault)
    content, id_notes = unify_ids({"annotations": [], **content})
    content, left_out = choose_classes(content, classes)
    result.notes.extend([*id_notes, *left_out])
    if not is_labelled:
        note = "there is no list of annotations: detections are written, AP is not computed"
        result.notes.append(note)
    categories = _check_categories(content["categories"], result)
    images = _check_images(content["images"], result)
    images, lost, same = check_images(
        images, image_root, reader, result, folder_key=folder_key, decode_all=decode_all
    )
    listed_ids = {id_of(image) for image in content["images"]}
    content = {**content, "categories": categories, "images": list(images.values())}
    for first, *others in same:
        path = printable(os.path.join(image_root, first["file_name"]))
        ids = join_some(printable(image["id"]) for image in (first, *others))
        message = f"{path} is listed under {1 + len(others)} image ids: {ids}"
        result.add("duplicate_file", message)
    if policy["duplicate_file"] == "merge":
        content = merge_images(content, same)
    images = {image["id"]: image for image in content["images"]}
    annotations = check_annotations(content, images, listed_ids, file.box_format, result)
    result.notes.extend(file.notes)
    used = {
        "images": [image for image in content["images"] if image["id"] not in lost],
        "annotations": [a for a in annotations if a["image_id"] not in lost],
    }
    return replace(result, content={**content, **used})


def check_data_set(result: ValidationResult) -> ValidationResult:
    """Check what only shows in all entries together, after each has been checked by itself.

    These are boxes labelled twice, crowd regions that look like objects, images and classes
    without boxes. The findings of ``result``, of one file or of several merged, are extended.
    """
    content, policy = result.content, result.policy
    if any(f.kind == "other_box_format" and policy[f.kind] == "refuse" for f in result.findings):
        return result  # because the boxes mean something else
    images = {image["id"]: image for image in content["images"]}
    annotations = content["annotations"]
    if policy["crowd"] == "keep" and (crowd_objects := find_crowd_objects(content)):
        result.add("crowd_object", crowd_objects)
    again = find_duplicate_boxes(annotations)
    for later, (earlier, iou) in again.items():
        first, second = annotations[earlier], annotations[later]
        names = " and ".join(printable(a.get("id", "without id")) for a in (first, second))
        result.add(
            "duplicate_box",
            f"annotations {names} of {image_name(images[second['image_id']])}: bbox "
            f"{format_box(first['bbox'])} and {format_box(second['bbox'])}, IoU {iou:.2f}",
            image_id=second["image_id"],
            annotation_id=second.get("id"),
        )
    if policy["duplicate_box"] in ("drop", "refuse"):
        annotations = [a for index, a in enumerate(annotations) if index not in again]
    if result.is_labelled:
        with_boxes = {a["image_id"] for a in annotations if not is_ignore_region(a)}
        for image_id in [image_id for image_id in images if image_id not in with_boxes]:
            message = f"{image_name(images[image_id])} has no box"
            if not result.add("empty_image", message, image_id=image_id):
                del images[image_id]
        annotations = [a for a in annotations if a["image_id"] in images]
        _check_classes(content["categories"], annotations, result)
    content = {**content, "images": list(images.values()), "annotations": annotations}
    return replace(result, content=content)


def _check_classes(categories: _Items, annotations: _Items, result: ValidationResult) -> None:
    """Find classes without a box."""
    used = {a["category_id"] for a in annotations if not is_ignore_region(a)}
    unused = [category for category in categories if category["id"] not in used]
    parents = explain_unused_classes(unused, categories)
    for category in unused:
        name = f"class {printable(category['name'])} (category {printable(category['id'])})"
        if category["id"] in parents:
            result.add("parent_class", f"{name} has no box and {parents[category['id']]}")
        else:
            result.add("unused_class", f"{name} has no box")


def _check_categories(categories: list[Any], result: ValidationResult) -> _Items:
    """Return the usable categories."""
    malformed = field_faults("categories", categories)
    for index, fault in malformed.items():
        name = entry_name("categories", index, categories[index])
        result.add("malformed_category", f"{name}: {fault}")
    usable = [category for index, category in enumerate(categories) if index not in malformed]
    for field in ("id", "name"):
        for value, count in Counter(category[field] for category in usable).items():
            if count > 1:
                message = f"category {field} {printable(value)} is used {count} times"
                result.add("duplicate_category", message)
    return usable


def _check_images(images: list[Any], result: ValidationResult) -> Images:
    """Return the usable images by id; their width and height may be missing."""
    usable: dict[int | str, _Items] = defaultdict(list)
    malformed = field_faults("images", images)
    for index, image in enumerate(images):
        if index in malformed:
            message = f"{entry_name('images', index, image)}: {malformed[index]}"
            result.add("malformed_image", message, image_id=id_of(image))
            continue
        if ".." in (file_name := image["file_name"]) and ".." in PurePath(file_name).parts:
            name = entry_name("images", index, image)
            message = f"{name}: file_name {file_name!r} leaves the image folder by '..'"
            if not result.add("file_outside", message, image_id=image["id"]):
                continue
        usable[image["id"]].append(image)
    for image_id, same in list(usable.items()):
        if len(same) > 1:
            # Drop all of them, because it is unknown to which one the boxes belong.
            names = join_some((printable(image["file_name"]) for image in same), 3)
            message = f"image id {printable(image_id)} is used by {names}"
            result.add("duplicate_image_id", message, image_id=image_id)
            del usable[image_id]
    return {image_id: image for image_id, (image,) in usable.items()}
