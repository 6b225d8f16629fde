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
    """

    name: str
    what: str
    policies: tuple[str, ...]

    @property
    def key(self) -> str:
        """Config key of the policy."""
        return f"DATASETS.CHECK.{self.name.upper()}"

    @property
    def is_fault(self) -> bool:
        """Whether something is wrong; otherwise it is only worth knowing."""
        return self.name not in ("derived_box", "empty_image", "crowd", "ignore")

    @property
    def remedy(self) -> str:
        """Policy that a refusal names, and what that policy does. Empty: "drop", if allowed."""
        return _REMEDIES.get(self.name, "")


_REMEDIES = {
    "file_outside": "keep takes such files",
    "duplicate_file": "merge makes one image of a file's entries, with the boxes of all",
    "misnamed_file": "mend takes the files that are there",
}

KINDS = {
    name: FindingKind(name, what, tuple(policies.split()))
    for name, policies, what in (
        ("unreadable_label", "refuse", "labels that cannot be read"),
        ("other_box_format", "refuse keep", "boxes of another format"),
        ("crowd_object", "keep", "crowd regions that look like objects"),
        ("parent_class", "keep refuse", "classes that are a parent or the background"),
        ("malformed_category", "refuse", "categories that cannot be read"),
        ("duplicate_category", "refuse", "category ids or names used twice"),
        ("file_outside", "refuse drop keep", "file names that leave the image folder"),
        ("malformed_image", "refuse drop", "images without a usable id, file name or size"),
        ("duplicate_image_id", "refuse drop", "image ids used twice"),
        ("duplicate_file", "refuse merge keep", "image files under several image ids"),
        ("misnamed_file", "refuse mend drop", "image files that are there under another name"),
        ("missing_image", "refuse drop", "missing image files"),
        ("unreadable_image", "refuse drop", "image files that cannot be read"),
        ("image_size", "refuse drop", "images of another size than the json says"),
        (
            "several_frames",
            "keep drop refuse",
            "files of several pages or frames, of which one is used",
        ),
        ("constant_image", "keep drop refuse", "images of one value everywhere, or nearly so"),
        ("malformed_annotation", "refuse drop", "annotations with an unusable field"),
        ("duplicate_annotation_id", "refuse drop keep", "annotation ids used twice"),
        ("unknown_image", "refuse drop", "annotations of images that are not listed"),
        ("unknown_class", "refuse drop", "annotations of classes that are not listed"),
        ("malformed_box", "refuse drop", "boxes that are not four finite numbers"),
        ("derived_box", "keep drop refuse", "boxes missing, taken from the polygon or mask"),
        ("inverted_box", "refuse drop", "boxes of negative width or height"),
        ("zero_area_box", "drop refuse", "boxes without area"),
        ("outside_box", "drop refuse", "boxes wholly outside their image"),
        (
            "clipped_box",
            "keep drop refuse",
            "boxes that reach outside their image, and are clipped",
        ),
        (
            "duplicate_box",
            "keep drop refuse",
            f"boxes of one object (same class, IoU above {SAME_IOU})",
        ),
        ("unused_class", "keep refuse", "classes without a box"),
        ("empty_image", "keep drop refuse", "images without boxes"),
        ("crowd", "keep object drop refuse", "crowd regions, ignored unless taken as objects"),
        ("ignore", "keep drop refuse", "boxes marked ignore, which are ignored"),
    )
}
"""In the order of reports; a refusal quotes the first kind that is refused."""

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
        (first, findings), *others = refused.items()
        head = "" if len(findings) == 1 else f"{len(findings)} {KINDS[first].what}: "
        examples = join_some((f.message for f in findings), _MAX_EXAMPLES, separator="; ")
        remedy = find_remedy(findings)
        remedy = f" ({remedy})" if remedy else ""
        more = "".join(f"; {KINDS[name].what}: {len(group)}" for name, group in others)
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
        kind = KINDS[name]
        if value not in kind.policies:
            raise InputError(f"{kind.key} must be {' or '.join(kind.policies)}, got {value!r}")
    return policy
