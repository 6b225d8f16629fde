"""What is wrong with COCO-format data: all of it, by kind, and what is done about each kind.

Detectron2's own loader answers a fault in the data with an assertion, with a traceback out of the
training loop, with a box left out in silence, or with a ``KeyError`` of pycocotools once training
is over. Here a fault is a :class:`Finding`, and a policy says for its kind whether the data are
refused, used without it, or used with it.
"""

from __future__ import annotations

import reprlib
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from retinanet_ext.data.box_format import BOX_FORMATS, find_format_fault, is_box, is_number
from retinanet_ext.data.coco_json import (
    id_order,
    is_region_to_ignore,
    join_some,
    printable,
)
from retinanet_ext.data.duplicates import SAME_IOU, check_duplicate_boxes
from retinanet_ext.data.normalize import (
    Normalized,
    explain_unused_classes,
    find_crowd_objects,
    normalize_annotations,
    unify_ids,
)
from retinanet_ext.errors import InputError

MIN_SIDE = 0.01
"""Pixels; what is narrower inside its image has no area once it is resized in float32."""

_EXAMPLES = 3


@dataclass(frozen=True)
class FindingKind:
    """A kind of finding.

    Attributes:
        name: as in reports; in capitals the key in ``DATASETS.CHECK``.
        what: how several of them are called.
        policies: what may be done about them, the default first: "refuse" the data, "drop" what
            the finding names, "keep" it, mend it ("mend", "merge"), or take a crowd region as an
            "object". Where there is no choice there is no key.
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
        FindingKind("other_box_format", "boxes of another format", ("refuse", "keep")),
        FindingKind("crowd_object", "crowd regions that look like objects", ("keep",)),
        FindingKind(
            "parent_class", "classes that are a parent or the background", ("keep", "refuse")
        ),
        FindingKind("text_id", "ids that are text", ("keep",), is_fault=False),
        FindingKind("filled_field", "fields of annotations, filled in", ("keep",), is_fault=False),
        FindingKind("malformed_category", "categories that cannot be read", ("refuse",)),
        FindingKind("duplicate_category", "category ids or names used twice", ("refuse",)),
        FindingKind(
            "file_outside",
            "file names that leave the image folder",
            ("refuse", "drop", "keep"),
            remedy="keep takes such files",
        ),
        FindingKind("malformed_image", "images without a usable id, file name or size", _FATAL),
        FindingKind("duplicate_image_id", "image ids used twice", _FATAL),
        FindingKind(
            "duplicate_file",
            "image files under several image ids",
            ("refuse", "merge", "keep"),
            remedy="merge makes one image of a file's entries, with the boxes of all",
        ),
        FindingKind(
            "misnamed_file",
            "image files that are there under another name",
            ("refuse", "mend", "drop"),
            remedy="mend takes the files that are there",
        ),
        FindingKind("missing_image", "missing image files", _FATAL),
        FindingKind("unreadable_image", "image files that cannot be read", _FATAL),
        FindingKind("image_size", "images of another size than the json says", _FATAL),
        FindingKind(
            "several_frames", "files of several pages or frames, of which one is used", _ANY
        ),
        FindingKind("constant_image", "images of one value everywhere, or nearly so", _ANY),
        FindingKind("malformed_annotation", "annotations with an unusable field", _FATAL),
        FindingKind(
            "duplicate_annotation_id", "annotation ids used twice", ("refuse", "drop", "keep")
        ),
        FindingKind("unknown_image", "annotations of images that are not listed", _FATAL),
        FindingKind("unknown_class", "annotations of classes that are not listed", _FATAL),
        FindingKind("malformed_box", "boxes that are not four finite numbers", _FATAL),
        FindingKind(
            "derived_box", "boxes missing, taken from the polygon or mask", _ANY, is_fault=False
        ),
        FindingKind("inverted_box", "boxes of negative width or height", _FATAL),
        FindingKind("zero_area_box", "boxes without area", ("drop", "refuse")),
        FindingKind("outside_box", "boxes wholly outside their image", ("drop", "refuse")),
        FindingKind("clipped_box", "boxes that reach outside their image, and are clipped", _ANY),
        FindingKind(
            "duplicate_box", f"boxes of one object (same class, IoU above {SAME_IOU})", _ANY
        ),
        FindingKind("unused_class", "classes without a box", ("keep", "refuse")),
        FindingKind("empty_image", "images without boxes", _ANY, is_fault=False),
        FindingKind(
            "crowd",
            "crowd regions, which are ignored",
            ("keep", "object", "drop", "refuse"),
            is_fault=False,
        ),
        FindingKind("ignore", "boxes marked ignore, which are ignored", _ANY, is_fault=False),
    )
}
DONE = {
    "refuse": "REFUSED",
    "drop": "left out",
    "merge": "merged",
    "mend": "mended",
    "object": "taken",
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
        image_id, annotation_id: None where there is none, or none that can be one.
        remedy: what mends it, where it is not what its kind says.
    """

    kind: str
    message: str
    image_id: int | str | None = None
    annotation_id: int | str | None = None
    remedy: str = ""


@dataclass(frozen=True)
class CheckedData:
    """A COCO json after its check, or several as one.

    Attributes:
        json_file: where it is from.
        policy: kind -> what is done about it.
        findings: all of them.
        content: the json as it is used, boxes [x, y, width, height] in pixels.
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

    def describe(self, kind: str) -> str:
        """Return how several findings of a kind are called."""
        as_objects = self.policy[kind] == "object"
        return "crowd regions, taken as objects" if as_objects else KINDS[kind].what

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
            more += "; retinanet-ext check-data lists all"
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


def suggest_objects(policy: Mapping[str, str], num_crowd: int) -> str:
    """Return how crowd regions become objects, for data without any; empty if none are kept."""
    if not num_crowd or policy["crowd"] != "keep":
        return ""
    return f"; {num_crowd} have iscrowd 1, and {KINDS['crowd'].key} object takes them as objects"


def _is_integer(value: Any) -> bool:
    return is_number(value) and value % 1 == 0


def _is_id(value: Any) -> bool:
    if type(value) is int and abs(value) < 2**63:  # the fast way
        return True
    return _is_integer(value) or (isinstance(value, str) and value != "")


def _is_class_name(value: Any) -> bool:
    """Tell whether it is a text that can be written: not with half of a surrogate pair."""
    try:
        return isinstance(value, str) and value.encode() != b""
    except UnicodeEncodeError:
        return False


_Rule = tuple[str, Callable[[Any], bool]]
_ID: _Rule = ("an integer or a text", _is_id)
_TEXT: _Rule = ("a text that is not empty", lambda value: isinstance(value, str) and value != "")
# File names need not be Unicode; TensorBoard would refuse such a class once training is over.
_CLASS_NAME: _Rule = ("a text of valid Unicode that is not empty", _is_class_name)
_SIZE: _Rule = ("an integer above 0", lambda value: _is_integer(value) and value > 0)
_FLAG: _Rule = ("0 or 1", lambda value: value in (0, 1))
_AREA: _Rule = ("a finite number >= 0", lambda value: is_number(value) and value >= 0)

_REQUIRED: dict[str, dict[str, _Rule]] = {
    "images": {"id": _ID, "file_name": _TEXT, "width": _SIZE, "height": _SIZE},
    "categories": {"id": _ID, "name": _CLASS_NAME},
    "annotations": {"image_id": _ID, "category_id": _ID},
}
_OPTIONAL = {"id": _ID, "iscrowd": _FLAG, "area": _AREA, "ignore": _FLAG}


def check_coco(
    json_file: str,
    content: dict[str, Any],
    policy: Mapping[str, str] = DEFAULT_POLICY,
    image_faults: Iterable[Finding] = (),
    box_format: str = "xywh",
    id_notes: Sequence[str] = (),
) -> CheckedData:
    """Check every entry of a COCO json; nothing is raised and ``content`` is left as it is.

    Args:
        json_file: named in the result.
        content: as :func:`retinanet_ext.data.coco_json.read_coco_json` returns it.
        policy: kind -> what is done about it.
        image_faults: what :func:`retinanet_ext.data.image_files.check_images` has found.
        box_format: of the json, a name in :data:`BOX_FORMATS`.
        id_notes: of :func:`unify_ids`, where it has changed ``content`` before.
    """
    findings: list[Finding] = []
    hidden: set[str] = set()

    def found(kind: str, message: str, **ids: Any) -> bool:
        """Note a finding, and tell whether what it names is still used."""
        if kind not in hidden:
            findings.append(Finding(kind, message, **ids))
        return policy[kind] in ("keep", "merge", "mend", "object")

    original = content
    content, notes = unify_ids(content)
    for note in id_notes or notes:
        found("text_id", printable(note))
    categories = _check_categories(content["categories"], found)
    lost = {fault.image_id for fault in image_faults if not found(**vars(fault))}
    images, listed_ids = _check_images(content["images"], lost, found)
    normalized = normalize_annotations(content["annotations"], images, box_format)
    for note in normalized.notes:
        found("filled_field", note)
    if not _check_box_format(normalized, images, box_format, found):
        hidden.update(_OF_ITS_BOXES)
    annotations = _check_annotations(
        normalized, images, listed_ids, {c["id"] for c in categories}, box_format, found
    )
    if policy["crowd"] == "object":
        annotations = [{**a, "iscrowd": 0} if a.get("iscrowd") else a for a in annotations]
    elif policy["crowd"] == "keep" and (
        what := find_crowd_objects(annotations, images, categories)
    ):
        found("crowd_object", what)
    images = {image_id: image for image_id, image in images.items() if image_id not in lost}
    annotations = [a for a in annotations if a["image_id"] in images]
    annotations = check_duplicate_boxes(annotations, images, found)

    counts = Counter(a["image_id"] for a in annotations if not is_region_to_ignore(a))
    for image in list(images.values()):
        if not counts[image["id"]]:
            name = f"image {printable(image['id'])} ({printable(image['file_name'])})"
            if not found("empty_image", f"{name} has no box", image_id=image["id"]):
                del images[image["id"]]
    annotations = [a for a in annotations if a["image_id"] in images]
    left = {"images": list(images.values()), "categories": categories, "annotations": annotations}
    for finding in find_unused_classes(left):
        found(**vars(finding))
    return CheckedData(json_file, policy, findings, {**content, **left}, original=original)


def find_unused_classes(content: dict[str, Any]) -> list[Finding]:
    """Return the classes of a checked json without a box."""
    used = {a["category_id"] for a in content["annotations"] if not is_region_to_ignore(a)}
    unused = [category for category in content["categories"] if category["id"] not in used]
    parents = explain_unused_classes(unused, content["categories"])
    return [
        Finding("parent_class", parents[category["id"]])
        if category["id"] in parents
        else Finding(
            "unused_class",
            f"class {printable(category['name'])} (category {printable(category['id'])}) "
            "has no box",
        )
        for category in unused
    ]


_Found = Callable[..., bool]
_Items = list[dict[str, Any]]
_Images = dict[int | str, dict[str, Any]]

# What nothing can be said of before the format of the boxes is known.
_OF_ITS_BOXES = (
    *("inverted_box", "zero_area_box", "outside_box", "clipped_box", "duplicate_box"),
    *("empty_image", "unused_class"),
)


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
    images: list[Any], lost: Collection[int | str | None], found: _Found
) -> tuple[_Images, set[int | str]]:
    """Return the usable images by id, and the ids of all; of those lost, the size is unknown."""
    usable: dict[int | str, _Items] = defaultdict(list)
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
            what = f"image id {printable(image_id)} is used by {names}"
            found("duplicate_image_id", what, image_id=image_id)
            del usable[image_id]
    return {image_id: image for image_id, (image,) in usable.items()}, listed_ids


def _check_box_format(
    normalized: Normalized, images: _Images, box_format: str, found: _Found
) -> bool:
    """Tell whether boxes are used as of a format: they may show that they have another."""

    def name(index: int) -> str:
        return _annotation_name(index, normalized.annotations[index], images)

    fault = find_format_fault(normalized.boxes, box_format, name)
    return fault is None or found("other_box_format", fault)


def _check_annotations(
    normalized: Normalized,
    images: _Images,
    listed_ids: set[int | str],
    category_ids: set[int | str],
    box_format: str,
    found: _Found,
) -> _Items:
    """Return the annotations of usable images that the policy keeps."""
    kept: _Items = []
    seen: set[int | str] = set()
    known = join_some(map(printable, sorted(category_ids, key=id_order)))
    box_rule: _Rule = (f"4 finite numbers {BOX_FORMATS[box_format]}", is_box)
    valid = set(normalized.boxes.indices)
    origin = "" if box_format == "xywh" else f", converted from {box_format},"
    for index, annotation in enumerate(normalized.annotations):
        faults: list[tuple[str, str]] = []  # kind and what follows the name of the annotation
        if fault := field_fault("annotations", annotation):
            faults.append(("malformed_annotation", fault))
        else:
            own_id = annotation.get("id")
            if own_id in seen:
                faults.append(("duplicate_annotation_id", "the id is used before"))
            if own_id is not None:
                seen.add(own_id)
            if annotation["image_id"] not in listed_ids:
                fault = f"image_id {printable(annotation['image_id'])} is not among the images"
                faults.append(("unknown_image", fault))
            if annotation["category_id"] not in category_ids:
                fault = f"category_id {printable(annotation['category_id'])} is not a category"
                faults.append(("unknown_class", f"{fault} ({known})"))
            if index not in valid and (fault := _rule_fault(annotation, "bbox", box_rule)):
                if not annotation.get("bbox"):
                    fault += ", or a polygon or mask must be there to take it from"
                faults.append(("malformed_box", fault))
            else:
                if source := normalized.derived.get(index):
                    faults.append(("derived_box", f"bbox is missing and taken from its {source}"))
                image = images.get(annotation["image_id"])
                faults += _box_fault(annotation["bbox"], image, origin)
            for flag, kind in (("iscrowd", "crowd"), ("ignore", "ignore")):
                if annotation.get(flag):
                    faults.append((kind, f"{flag} is 1"))
        ok = True
        if faults:
            name = _annotation_name(index, annotation, images)
            ids = {"image_id": id_of(annotation, "image_id"), "annotation_id": id_of(annotation)}
            for kind, fault in faults:
                ok &= found(kind, f"{name}: {fault}", **ids)
        if ok and annotation["image_id"] in images:
            kept.append(annotation)
    return kept


def _box_fault(
    box: list[float], image: Mapping[str, Any] | None, origin: str
) -> list[tuple[str, str]]:
    """Return in a list what is wrong with four finite numbers as the box of an image, if so."""
    x, y, w, h = box
    if w < 0 or h < 0:
        return [("inverted_box", f"bbox {box}{origin} must have width and height >= 0")]
    if w < MIN_SIDE or h < MIN_SIDE:
        return [("zero_area_box", f"bbox {box}{origin} has no area")]
    if image is None:
        return []
    width, height = image["width"], image["height"]
    size = f"of {width} x {height}"
    if min(x + w, width) - max(x, 0) < MIN_SIDE or min(y + h, height) - max(y, 0) < MIN_SIDE:
        return [("outside_box", f"bbox {box}{origin} is outside its image {size}")]
    if min(x, y) < -1 or x + w > width + 1 or y + h > height + 1:  # not for rounding
        return [("clipped_box", f"bbox {box}{origin} reaches outside its image {size}")]
    return []


def leaves_folder(file_name: str) -> bool:
    """Tell whether a file name leads upwards; an absolute path is where its writer wants it."""
    return ".." in PurePath(file_name).parts


def field_fault(key: str, item: Any) -> str | None:
    """Return which field of an entry cannot be used, the first, if one."""
    if not isinstance(item, dict):
        return "it is not an object"
    for field, rule in _REQUIRED[key].items():
        if field not in item or not rule[1](item[field]):
            return _rule_fault(item, field, rule)
    if key == "annotations":
        for field, rule in _OPTIONAL.items():
            if field in item and not rule[1](item[field]):
                return _rule_fault(item, field, rule)
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
    values = [item[field] for field in fields]
    texts = [f"{v}" if type(v) is int and abs(v) < 2**63 else reprlib.repr(v) for v in values]
    ids = ", ".join(f"{field} {text}" for field, text in zip(fields, texts, strict=True))
    return f"{key}[{index}]" + (f" ({ids})" if ids else "")


def _annotation_name(index: int, annotation: Any, images: _Images) -> str:
    """Return how an annotation is called, with its file where the image is known."""
    own_id, image_id = id_of(annotation), id_of(annotation, "image_id")
    if image_id is None or image_id not in images:
        return _name("annotations", index, annotation)
    name = f"annotations[{index}]" if own_id is None else f"annotation {printable(own_id)}"
    file_name = printable(images[image_id]["file_name"])
    return f"{name} of image {printable(image_id)} ({file_name})"


def id_of(item: Any, field: str = "id") -> int | str | None:
    """Return an id of an entry, None if there is none that can be one."""
    value: Any = item.get(field) if isinstance(item, dict) else None
    if not _is_id(value):
        return None
    return value if isinstance(value, str) else int(value)
