"""What is wrong with COCO-format data: all of it, by kind, and what is done about each kind.

Detectron2's own loader answers a fault in the data with an assertion, with a traceback out of the
training loop, with a box left out in silence, or with a ``KeyError`` of pycocotools once training
is over. Here a fault is a :class:`Finding`, and a policy says for its kind whether the data are
refused, used without it, or used with it.
"""

from __future__ import annotations

import reprlib
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import PurePath
from typing import Any

from retinanet_ext.data.coco_json import (
    is_region_to_ignore,
    join_some,
    printable,
)
from retinanet_ext.errors import InputError

MIN_SIDE = 0.01
"""Pixels; what is narrower inside its image has no area once it is resized in float32."""

SAME_IOU = 0.9
"""Two boxes of a class that overlap more are one object, labelled twice."""

_EXAMPLES = 3


@dataclass(frozen=True)
class Kind:
    """A kind of finding.

    Attributes:
        name: as in reports; in capitals the key in ``DATASETS.CHECK``.
        what: how several of them are called.
        policies: what may be done about them, the default first: "refuse" the data, "drop" what
            the finding names, "keep" it, or mend it ("mend", "merge"). Where there is no choice
            there is no key.
        is_fault: False for what is worth knowing and no fault.
        remedy: the policy that a refusal names, and what it does; empty: "drop", if there is.
    """

    name: str
    what: str
    policies: tuple[str, ...]
    is_fault: bool = True
    remedy: str = ""

    @property
    def key(self) -> str:
        return f"DATASETS.CHECK.{self.name.upper()}"


_FATAL = ("refuse", "drop")  # training cannot go on with it
_ANY = ("keep", "drop", "refuse")

KINDS = {
    kind.name: kind
    for kind in (
        Kind("malformed_category", "categories that cannot be read", ("refuse",)),
        Kind("duplicate_category", "category ids or names used twice", ("refuse",)),
        Kind(
            "file_outside",
            "file names that leave the image folder",
            ("refuse", "drop", "keep"),
            remedy="keep takes such files",
        ),
        Kind("malformed_image", "images without a usable id, file name or size", _FATAL),
        Kind("duplicate_image_id", "image ids used twice", _FATAL),
        Kind(
            "duplicate_file",
            "image files under several image ids",
            ("refuse", "merge", "keep"),
            remedy="merge makes one image of a file's entries, with the boxes of all",
        ),
        Kind(
            "misnamed_file",
            "image files that are there under another name",
            ("refuse", "mend", "drop"),
            remedy="mend takes the files that are there",
        ),
        Kind("missing_image", "missing image files", _FATAL),
        Kind("unreadable_image", "image files that cannot be read", _FATAL),
        Kind("image_size", "images of another size than the json says", _FATAL),
        Kind("several_frames", "files of several pages or frames, of which one is used", _ANY),
        Kind("constant_image", "images of one value everywhere, or nearly so", _ANY),
        Kind("malformed_annotation", "annotations with an unusable field", _FATAL),
        Kind("duplicate_annotation_id", "annotation ids used twice", ("refuse", "drop", "keep")),
        Kind("unknown_image", "annotations of images that are not listed", _FATAL),
        Kind("unknown_class", "annotations of classes that are not listed", _FATAL),
        Kind("malformed_box", "boxes that are not four finite numbers", _FATAL),
        Kind("inverted_box", "boxes of negative width or height", _FATAL),
        Kind("zero_area_box", "boxes without area", ("drop", "refuse")),
        Kind("outside_box", "boxes wholly outside their image", ("drop", "refuse")),
        Kind("clipped_box", "boxes that reach outside their image, and are clipped", _ANY),
        Kind("duplicate_box", f"boxes of one object (same class, IoU above {SAME_IOU})", _ANY),
        Kind("unused_class", "classes without a box", ("keep", "refuse")),
        Kind("empty_image", "images without boxes", _ANY, is_fault=False),
        Kind("crowd", "crowd regions, which are ignored", _ANY, is_fault=False),
        Kind("ignore", "boxes marked ignore, which are ignored", _ANY, is_fault=False),
    )
}
DONE = {
    "refuse": "REFUSED",
    "drop": "left out",
    "merge": "merged",
    "mend": "mended",
    "keep": "kept",
}
"""Policy -> what became of findings."""

DEFAULT_POLICY = {name: kind.policies[0] for name, kind in KINDS.items()}


@dataclass(frozen=True)
class Finding:
    """One thing found in one place.

    Attributes:
        kind: a name in :data:`KINDS`.
        message: one sentence that names the place.
        image_id, annotation_id: None where there is none, or none that is an integer.
        remedy: what mends it, where it is not what its kind says.
    """

    kind: str
    message: str
    image_id: int | None = None
    annotation_id: int | None = None
    remedy: str = ""


@dataclass(frozen=True)
class CheckedData:
    """A COCO json after its check, or several as one.

    Attributes:
        json_file: where it is from.
        policy: kind -> what is done about it.
        findings: all of them.
        content: the json without what the policy does not keep.
        image_root: the folder that its file names are relative to.
        notes: a sentence for each thing that was done without being asked.
        is_labelled: False for test data without a list of annotations.
        original: the json as it was read, where it is one.
    """

    json_file: str
    policy: Mapping[str, str]
    findings: Sequence[Finding]
    content: dict[str, Any]
    image_root: str = ""
    notes: Sequence[str] = ()
    is_labelled: bool = True
    original: Mapping[str, Any] | None = None

    def by_kind(self) -> dict[str, list[Finding]]:
        """Return the findings of each kind that has any, in the order of :data:`KINDS`."""
        found: dict[str, list[Finding]] = {name: [] for name in KINDS}
        for finding in self.findings:
            found[finding.kind].append(finding)
        return {name: findings for name, findings in found.items() if findings}

    def raise_refused(self) -> None:
        """Raise an :class:`InputError` if there is a finding that the policy refuses."""
        refused = {k: f for k, f in self.by_kind().items() if self.policy[k] == "refuse"}
        if not refused:
            return
        first, *others = refused
        findings = refused[first]
        head = "" if len(findings) == 1 else f"{len(findings)} {KINDS[first].what}: "
        examples = join_some((f.message for f in findings), _EXAMPLES, separator="; ")
        remedy = find_remedy(findings)
        remedy = f" ({remedy})" if remedy else ""
        more = "".join(f"; {KINDS[name].what}: {len(refused[name])}" for name in others)
        if head or more:
            more += "; tools/check_data.py lists all"
        raise InputError(f"{self.json_file}: {head}{examples}{remedy}{more}")


def find_remedy(findings: Sequence[Finding]) -> str:
    """Return what makes training take data with these findings of one kind, empty if nothing."""
    kind = KINDS[findings[0].kind]
    own = {finding.remedy for finding in findings}
    if len(own) == 1 and "" not in own:
        return own.pop()
    if kind.remedy:
        return f"{kind.key} {kind.remedy}"
    if "drop" in kind.policies:
        return f"{kind.key} drop leaves {'it' if len(findings) == 1 else 'them'} out"
    return ""


def config_defaults() -> dict[str, str]:
    """Return the keys of ``DATASETS.CHECK`` with their defaults."""
    kinds = (kind for kind in KINDS.values() if len(kind.policies) > 1)
    return {kind.name.upper(): kind.policies[0] for kind in kinds}


def read_policy(node: Mapping[str, str]) -> dict[str, str]:
    """Return the policy that ``DATASETS.CHECK`` describes.

    Raises:
        InputError: a value that is not allowed for its kind
    """
    policy = DEFAULT_POLICY | {key.lower(): value for key, value in node.items()}
    for name, value in policy.items():
        if value not in KINDS[name].policies:
            raise InputError(
                f"{KINDS[name].key} must be {' or '.join(KINDS[name].policies)}, got {value!r}"
            )
    return policy


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _is_integer(value: Any) -> bool:
    return _is_number(value) and value % 1 == 0


def _is_box(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(_is_number, value))


def _is_class_name(value: Any) -> bool:
    """Tell whether it is a text that can be written: not with half of a surrogate pair."""
    try:
        return isinstance(value, str) and value.encode() != b""
    except UnicodeEncodeError:
        return False


_Rule = tuple[str, Callable[[Any], bool]]
_INTEGER: _Rule = ("an integer", _is_integer)
_TEXT: _Rule = ("a text that is not empty", lambda value: isinstance(value, str) and value != "")
# File names need not be Unicode; TensorBoard would refuse such a class once training is over.
_CLASS_NAME: _Rule = ("a text of valid Unicode that is not empty", _is_class_name)
_SIZE: _Rule = ("an integer above 0", lambda value: _is_integer(value) and value > 0)
_FLAG: _Rule = ("0 or 1", lambda value: value in (0, 1))
_BOX: _Rule = ("4 finite numbers [x, y, width, height]", _is_box)
_AREA: _Rule = ("a finite number >= 0", lambda value: _is_number(value) and value >= 0)

_REQUIRED: dict[str, dict[str, _Rule]] = {
    "images": {"id": _INTEGER, "file_name": _TEXT, "width": _SIZE, "height": _SIZE},
    "categories": {"id": _INTEGER, "name": _CLASS_NAME},
    "annotations": {"id": _INTEGER, "image_id": _INTEGER, "category_id": _INTEGER},
}
_OPTIONAL = {"iscrowd": _FLAG, "area": _AREA, "ignore": _FLAG}


def check_coco(
    json_file: str,
    content: dict[str, Any],
    policy: Mapping[str, str] = DEFAULT_POLICY,
    image_faults: Iterable[Finding] = (),
) -> CheckedData:
    """Check every entry of a COCO json; nothing is raised and ``content`` is left as it is.

    Args:
        json_file: named in the result.
        content: as :func:`retinanet_ext.data.coco_json.read_coco_json` returns it.
        policy: kind -> what is done about it.
        image_faults: what :func:`retinanet_ext.data.image_files.check_images` has found.
    """
    findings: list[Finding] = []

    def found(kind: str, message: str, **ids: Any) -> bool:
        """Note a finding, and tell whether what it names is still used."""
        findings.append(Finding(kind, message, **ids))
        return policy[kind] in ("keep", "merge", "mend")

    categories = _check_categories(content["categories"], found)
    lost = {fault.image_id for fault in image_faults if not found(**vars(fault))}
    images, listed_ids = _check_images(content["images"], lost, found)
    annotations = _check_annotations(
        content["annotations"],
        images,
        listed_ids,
        {category["id"] for category in categories},
        found,
    )
    images = {image_id: image for image_id, image in images.items() if image_id not in lost}
    annotations = [a for a in annotations if a["image_id"] in images]
    annotations = _check_duplicate_boxes(annotations, images, found)

    counts = Counter(a["image_id"] for a in annotations if not is_region_to_ignore(a))
    for image in list(images.values()):
        if not counts[image["id"]]:
            what = f"image {image['id']} ({printable(image['file_name'])}) has no box"
            if not found("empty_image", what, image_id=image["id"]):
                del images[image["id"]]
    annotations = [a for a in annotations if a["image_id"] in images]
    left = {"images": list(images.values()), "categories": categories, "annotations": annotations}
    findings += find_unused_classes(left)
    return CheckedData(json_file, policy, findings, {**content, **left})


def find_unused_classes(content: dict[str, Any]) -> list[Finding]:
    """Return the classes of a checked json without a box."""
    used = {a["category_id"] for a in content["annotations"] if not is_region_to_ignore(a)}
    return [
        Finding("unused_class", f"class {printable(c['name'])} (category {c['id']}) has no box")
        for c in content["categories"]
        if c["id"] not in used
    ]


_Found = Callable[..., bool]
_Items = list[dict[str, Any]]


def _check_categories(categories: list[Any], found: _Found) -> _Items:
    usable: _Items = []
    for index, category in enumerate(categories):
        if fault := field_fault("categories", category):
            found("malformed_category", f"{_name('categories', index, category)}: {fault}")
        else:
            usable.append(category)
    for field in ("id", "name"):
        for value, count in Counter(category[field] for category in usable).items():
            if count > 1:
                what = f"category {field} {printable(value)} is used {count} times"
                found("duplicate_category", what)
    return usable


def _check_images(
    images: list[Any], lost: Collection[int | None], found: _Found
) -> tuple[dict[int, dict[str, Any]], set[int]]:
    """Return the usable images by id, and the ids of all; of those lost, the size is unknown."""
    usable: dict[int, _Items] = defaultdict(list)
    listed_ids = set()
    for index, image in enumerate(images):
        name, image_id = _name("images", index, image), id_of(image)
        if image_id is not None:
            listed_ids.add(image_id)
        if fault := field_fault("images", image):
            if image_id is None or image_id not in lost:
                found("malformed_image", f"{name}: {fault}", image_id=image_id)
            continue
        if leaves_folder(image["file_name"]):
            what = f"{name}: file_name {image['file_name']!r} leaves the image folder by '..'"
            if not found("file_outside", what, image_id=image_id):
                continue
        usable[image["id"]].append(image)
    for image_id, same in list(usable.items()):
        if len(same) > 1:
            names = join_some((printable(image["file_name"]) for image in same), _EXAMPLES)
            # Which of them the boxes are of cannot be known.
            found(
                "duplicate_image_id", f"image id {image_id} is used by {names}", image_id=image_id
            )
            del usable[image_id]
    return {image_id: image for image_id, (image,) in usable.items()}, listed_ids


def _check_annotations(
    annotations: list[Any],
    images: Mapping[int, dict[str, Any]],
    listed_ids: set[int],
    category_ids: set[int],
    found: _Found,
) -> _Items:
    """Return the annotations of usable images that the policy keeps."""
    kept: _Items = []
    seen: set[int] = set()
    known = join_some(sorted(category_ids))
    for index, annotation in enumerate(annotations):
        faults: list[tuple[str, str]] = []  # kind and what follows the name of the annotation
        if fault := field_fault("annotations", annotation):
            faults.append(("malformed_annotation", fault))
        else:
            if annotation["id"] in seen:
                faults.append(("duplicate_annotation_id", "the id is used before"))
            seen.add(annotation["id"])
            if annotation["image_id"] not in listed_ids:
                fault = f"image_id {annotation['image_id']} is not among the images"
                faults.append(("unknown_image", fault))
            if annotation["category_id"] not in category_ids:
                fault = f"category_id {annotation['category_id']} is not a category ({known})"
                faults.append(("unknown_class", fault))
            if fault := _rule_fault(annotation, "bbox", _BOX):
                faults.append(("malformed_box", fault))
            else:
                faults += _box_fault(annotation["bbox"], images.get(annotation["image_id"]))
            for flag, kind in (("iscrowd", "crowd"), ("ignore", "ignore")):
                if annotation.get(flag):
                    faults.append((kind, f"{flag} is 1"))
        ok = True
        if faults:
            name = _name("annotations", index, annotation)
            own_id, image_id = id_of(annotation), id_of(annotation, "image_id")
            if own_id is not None and image_id is not None and image_id in images:
                file_name = printable(images[image_id]["file_name"])
                name = f"annotation {own_id} of image {image_id} ({file_name})"
            for kind, fault in faults:
                ok &= found(kind, f"{name}: {fault}", image_id=image_id, annotation_id=own_id)
        if ok and annotation["image_id"] in images:
            kept.append(annotation)
    return kept


def _box_fault(box: list[float], image: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Return in a list what is wrong with four finite numbers as the box of an image, if so."""
    x, y, w, h = box
    if w < 0 or h < 0:
        return [("inverted_box", f"bbox {box} must have width and height >= 0")]
    if w < MIN_SIDE or h < MIN_SIDE:
        return [("zero_area_box", f"bbox {box} has no area")]
    if image is None:
        return []
    width, height = image["width"], image["height"]
    size = f"of {width} x {height}"
    if min(x + w, width) - max(x, 0) < MIN_SIDE or min(y + h, height) - max(y, 0) < MIN_SIDE:
        return [("outside_box", f"bbox {box} is outside its image {size}")]
    if min(x, y) < -1 or x + w > width + 1 or y + h > height + 1:  # not for rounding
        return [("clipped_box", f"bbox {box} reaches outside its image {size}")]
    return []


def _check_duplicate_boxes(
    annotations: _Items, images: Mapping[int, dict[str, Any]], found: _Found
) -> _Items:
    """Return the annotations without those that repeat an earlier one, where they are not kept.

    Along x the boxes are in order, so only near ones are compared.
    """
    groups: dict[tuple[int, int], _Items] = defaultdict(list)
    for annotation in annotations:
        if not is_region_to_ignore(annotation):
            groups[annotation["image_id"], annotation["category_id"]].append(annotation)
    dropped = set()
    for group in groups.values():
        order = sorted(range(len(group)), key=lambda k: group[k]["bbox"][0])
        again: set[int] = set()
        for position, left in enumerate(order):
            x, _, width, _ = group[left]["bbox"]
            for right in islice(order, position + 1, None):
                # Boxes that overlap so much begin this close.
                if left in again or group[right]["bbox"][0] > x + (1 - SAME_IOU) * width:
                    break
                if right in again or _iou(group[left], group[right]) <= SAME_IOU:
                    continue
                again.add(max(left, right))
                earlier, later = group[min(left, right)], group[max(left, right)]
                image_id = later["image_id"]
                what = (
                    f"annotations {earlier['id']} and {later['id']} of image {image_id} "
                    f"({printable(images[image_id]['file_name'])}): bbox {earlier['bbox']} and "
                    f"{later['bbox']}, IoU {_iou(earlier, later):.2f}"
                )
                if not found("duplicate_box", what, image_id=image_id, annotation_id=later["id"]):
                    dropped.add(id(later))
    return [annotation for annotation in annotations if id(annotation) not in dropped]


def _iou(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Return the IoU of the boxes of two annotations."""
    a, b = one["bbox"], other["bbox"]
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    common = max(width, 0) * max(height, 0)
    return common / (a[2] * a[3] + b[2] * b[3] - common)


def leaves_folder(file_name: str) -> bool:
    """Tell whether a file name leads upwards; an absolute path is where its writer wants it."""
    return ".." in PurePath(file_name).parts


def field_fault(key: str, item: Any) -> str | None:
    """Return which field of an entry cannot be used, the first, if one."""
    if not isinstance(item, dict):
        return "it is not an object"
    for field, rule in _REQUIRED[key].items():
        if fault := _rule_fault(item, field, rule):
            return fault
    if key == "annotations":
        for field, rule in _OPTIONAL.items():
            if field in item and (fault := _rule_fault(item, field, rule)):
                return fault
    return None


def _rule_fault(item: dict[str, Any], field: str, rule: _Rule) -> str | None:
    allowed, is_valid = rule
    if field not in item:
        return f"{field} is missing; it must be {allowed}"
    if not is_valid(item[field]):
        return f"{field} is {reprlib.repr(item[field])}; it must be {allowed}"
    return None


def _name(key: str, index: int, item: Any) -> str:
    """Return how an entry is called, e.g. ``annotations[4] (id 17, image_id 3)``."""
    fields = [field for field in ("id", "image_id") if isinstance(item, dict) and field in item]
    ids = ", ".join(f"{field} {reprlib.repr(item[field])}" for field in fields)
    return f"{key}[{index}]" + (f" ({ids})" if ids else "")


def id_of(item: Any, field: str = "id") -> int | None:
    """Return an id of an entry, None if there is none that is an integer."""
    value: Any = item.get(field) if isinstance(item, dict) else None
    return int(value) if _is_integer(value) else None
