"""Kinds of findings about COCO-format data, the policy for each kind, and the result of a check.

Detectron2's own loader answers a fault in the data with an assertion, a traceback out of the
training loop, a box that is silently left out, or a ``KeyError`` of pycocotools after training.
Here a fault is a :class:`Finding`. The policy of its kind says whether the data are refused, used
without what the finding names, or used with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from retinanet_ext.data.coco_json import is_ignore_region, join_some
from retinanet_ext.errors import InputError

SAME_IOU = 0.9
"""Two boxes of a class with a higher IoU are one object that was labelled twice."""

_MAX_EXAMPLES = 3  # findings of a kind that an error message quotes


@dataclass(frozen=True)
class FindingKind:
    """A kind of finding.

    Attributes:
        name: name in reports; in capitals, the key in ``DATASETS.CHECK``.
        what: plural noun phrase for findings of this kind.
        policies: allowed policies, the default first: "refuse" the data, "drop" what the finding
            names, "keep" it, repair it ("mend", "merge"), or treat a crowd region as an "object".
            A kind with one policy has no key.
        is_fault: False if the finding is worth knowing although nothing is wrong.
        remedy: policy that a refusal names, and what that policy does. Empty: "drop", if allowed.
    """

    name: str
    what: str
    policies: tuple[str, ...]
    is_fault: bool = True
    remedy: str = ""

    @property
    def key(self) -> str:
        """Config key of the policy."""
        return f"DATASETS.CHECK.{self.name.upper()}"


_FATAL = ("refuse", "drop")  # training cannot go on with it
_ANY = ("keep", "drop", "refuse")

KINDS = {
    kind.name: kind
    for kind in (
        FindingKind("unreadable_label", "labels that cannot be read", ("refuse",)),
        FindingKind("other_box_format", "boxes of another format", ("refuse", "keep")),
        FindingKind("crowd_object", "crowd regions that look like objects", ("keep",)),
        FindingKind(
            "parent_class", "classes that are a parent or the background", ("keep", "refuse")
        ),
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
            "crowd regions, ignored unless taken as objects",
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
"""Policy -> what was done with the findings."""

DEFAULT_POLICY = {name: kind.policies[0] for name, kind in KINDS.items()}


@dataclass(frozen=True)
class Finding:
    """One finding in one place.

    Attributes:
        kind: name in :data:`KINDS`.
        message: one sentence that names the place.
        image_id, annotation_id: None if the finding has none.
        remedy: how to fix this finding, if it differs from the remedy of its kind.
    """

    kind: str
    message: str
    image_id: int | str | None = None
    annotation_id: int | str | None = None
    remedy: str = ""


@dataclass(frozen=True)
class ValidationResult:
    """The result of a check of one annotation file, or of several that are merged into one.

    Attributes:
        json_file: path of the annotation file; several are joined by commas.
        policy: kind of finding -> "refuse", "drop", "keep" or another policy of the kind.
        findings: all findings.
        content: the json as training uses it, with boxes [x, y, width, height] in pixels. Entries
            that the policy drops or refuses are left out.
        image_root: folder that ``file_name`` entries are relative to.
        notes: one sentence for each thing that was filled in, left out or united without a policy.
        is_labelled: False if the json has no list of annotations.
        original: the json as it was read; None if several were merged.
    """

    json_file: str
    policy: Mapping[str, str]
    findings: list[Finding] = field(default_factory=list)
    content: dict[str, Any] = field(default_factory=dict)
    image_root: str = ""
    notes: list[str] = field(default_factory=list)
    is_labelled: bool = True
    original: Mapping[str, Any] | None = None

    @property
    def is_refused(self) -> bool:
        """Whether the policy refuses one of the findings."""
        return any(self.policy[finding.kind] == "refuse" for finding in self.findings)

    @property
    def objects(self) -> list[dict[str, Any]]:
        """Annotations that are learned and counted; the others are regions to ignore."""
        return [a for a in self.content["annotations"] if not is_ignore_region(a)]

    def add(self, kind: str, message: str, **fields: Any) -> bool:
        """Add a finding; return whether what it names is still used."""
        self.findings.append(Finding(kind, message, **fields))
        return self.policy[kind] not in ("refuse", "drop")

    def by_kind(self) -> dict[str, list[Finding]]:
        """Return the findings grouped by kind, in the order of :data:`KINDS`."""
        groups: dict[str, list[Finding]] = {name: [] for name in KINDS}
        for finding in self.findings:
            groups[finding.kind].append(finding)
        return {name: findings for name, findings in groups.items() if findings}

    def find_lack_of_objects(self) -> str | None:
        """Return a sentence that no object is left, with a remedy if there is one, or None."""
        if self.objects:
            return None
        message = (
            f"{self.json_file}: has no box that is no crowd and has an area inside its image, so "
            "there is nothing to learn or to evaluate"
        )
        hints = [finding.message for finding in self.by_kind().get("crowd_object", [])]
        return "; ".join([message, *hints])

    def raise_refused(self) -> None:
        """Raise an error that names the findings that the policy refuses.

        Raises:
            InputError: the policy refuses at least one finding.
        """
        refused = {k: f for k, f in self.by_kind().items() if self.policy[k] == "refuse"}
        if not refused:
            return
        first, *others = refused
        findings = refused[first]
        head = "" if len(findings) == 1 else f"{len(findings)} {KINDS[first].what}: "
        examples = join_some((f.message for f in findings), _MAX_EXAMPLES, separator="; ")
        remedy = find_remedy(findings)
        remedy = f" ({remedy})" if remedy else ""
        more = "".join(f"; {KINDS[name].what}: {len(refused[name])}" for name in others)
        if head or more:
            more += "; retinanet-ext check-data lists all"
        raise InputError(f"{self.json_file}: {head}{examples}{remedy}{more}")


def find_remedy(findings: Sequence[Finding]) -> str:
    """Return how training accepts data with these findings of one kind; empty if it cannot."""
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
        InputError: a value is not allowed for its kind.
    """
    policy = DEFAULT_POLICY | {key.lower(): value for key, value in node.items()}
    for name, value in policy.items():
        if value not in KINDS[name].policies:
            raise InputError(
                f"{KINDS[name].key} must be {' or '.join(KINDS[name].policies)}, got {value!r}"
            )
    return policy
