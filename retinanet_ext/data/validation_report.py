"""Report on the check of a config's data: JSON for programs, text for people, an exit code."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from tabulate import tabulate

import retinanet_ext
from retinanet_ext.config_keys import resolve_class_alpha
from retinanet_ext.data.anchor_coverage import (
    SIZES,
    build_grid,
    describe_shapes,
    measure_coverage,
    suggest_anchors,
    training_boxes,
)
from retinanet_ext.data.coco_json import (
    class_names,
    count,
    id_order,
    join_some,
    printable,
    to_dataset_dicts,
)
from retinanet_ext.data.duplicate_images import (
    describe_near_duplicates,
    describe_shared_files,
    find_near_duplicates,
)
from retinanet_ext.data.findings import DONE, KINDS, ValidationResult, find_remedy
from retinanet_ext.data.images import ImageReader
from retinanet_ext.data.register import compare_classes, resolve_pixel_range, set_num_classes
from retinanet_ext.data.sources import Source, check_source, find_sources
from retinanet_ext.errors import InputError
from retinanet_ext.files import make_folder, to_json, write_file

FORMAT = 1
SHOWN = 10  # findings of a kind in the text; the JSON has all


@dataclass(frozen=True)
class Report:
    """A report on data.

    Attributes:
        content: content of the JSON file, described in ``docs/check_data.md``.
        text: the same as text.
        exit_code: 1 if training would refuse the data, otherwise 0.
        records: name of each data set -> Detectron2's dataset dicts of the used images.
        reader: reads the images as training does.
    """

    content: dict[str, Any]
    text: str
    exit_code: int
    records: dict[str, list[dict[str, Any]]]
    reader: ImageReader

    def write(self, path: Path) -> None:
        """Write the JSON file.

        Raises:
            InputError: the file exists or cannot be written.
        """
        prepare_output(path)
        write_file(path, to_json(self.content, indent=1) + "\n")


def prepare_output(path: Path, option: str = "--output") -> None:
    """Refuse to overwrite an earlier report, and make the folder of a new one.

    Raises:
        InputError: the file exists, or its folder cannot be made.
    """
    if path.exists():
        raise InputError(f"{path} exists; {option} takes the name of a new file")
    make_folder(path.parent)


def check_data(cfg: CfgNode, *, search_anchors: bool = False) -> Report:
    """Check the training and test data that a config names, and decode all images.

    Args:
        cfg: the whole config; not modified.
        search_anchors: also search for anchors that cover the training boxes better.

    Raises:
        InputError: the data cannot be checked: none are named, a file is no COCO json, a folder is
            missing, or a policy is not allowed.
    """
    sources = _named_sources(cfg)
    cfg = cfg.clone()
    cfg.defrost()
    resolve_pixel_range(cfg, sources)
    contents, texts, faults = [], [], []
    classes: dict[str, list[str]] = {}
    records: dict[str, list[dict[str, Any]]] = {}
    for source in sources:
        checked = check_source(cfg, source, decode_all=True)
        classes[source.name] = class_names(checked.content)
        records[source.name] = to_dataset_dicts(checked.content, checked.image_root)
        place = {key: getattr(source, key) for key in ("name", "split", "json_file", "image_root")}
        content = place | _describe(checked)
        text = [_format_data(content)]
        if source.split == "TRAIN":
            lack = checked.find_lack_of_objects()
            if lack and not checked.is_refused:
                faults.append(lack)
            if not lack:
                names = classes[source.name]
                found = _measure_anchors(cfg, records[source.name], names, search_anchors)
                content |= found
                text += [_FORMATS[key](value) for key, value in found.items()]
        contents.append(content)
        texts.append("\n\n".join(text))

    reader = ImageReader.from_config(cfg)
    alike, shared = _compare_images(sources, records, reader)
    if fault := compare_classes(classes) or _find_fault_of_keys(cfg, classes):
        faults.append(fault)
    conclusion, refused = _conclude(contents, faults)
    report = {
        "format": FORMAT,
        "version": retinanet_ext.__version__,
        "refused": refused,
        "conclusion": conclusion,
        "shared_images": shared,
        "near_duplicates": alike,
        "data_sets": contents,
    }
    text_of_all = "\n\n\n".join([*texts, *shared, conclusion])
    return Report(report, text_of_all, int(refused), records, reader)


def _named_sources(cfg: CfgNode) -> list[Source]:
    sources = list(dict.fromkeys(find_sources(cfg, ["TRAIN", "TEST"])))
    if not sources:
        raise InputError(
            "no data are named; set DATASETS.CUSTOM.TRAIN_JSON and DATASETS.CUSTOM.TRAIN_IMAGES, "
            "or DATASETS.TRAIN"
        )
    for source in sources:
        if not source.is_ours and MetadataCatalog.get(source.name).get("evaluator_type") != "coco":
            raise InputError(
                f"data set {source.name} is not in COCO's format, which is all that is read"
            )
    return sources


def _compare_images(
    sources: Sequence[Source], records: Mapping[str, list[dict[str, Any]]], reader: ImageReader
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return images that look alike, and sentences about them and about shared files."""
    train: list[str] = []
    tests: dict[str, list[str]] = {}
    for source in sources:
        group = train if source.split == "TRAIN" else tests.setdefault(source.name, [])
        group += [record["file_name"] for record in records[source.name]]
    alike = find_near_duplicates(train, tests, reader)
    num_images = {name: len(paths) for name, paths in {"train": train, **tests}.items()}
    shared = describe_shared_files(train, tests)
    return alike, [*shared, *describe_near_duplicates(alike, num_images)]


def _measure_anchors(
    cfg: CfgNode, records: list[dict[str, Any]], names: list[str], search_anchors: bool
) -> dict[str, Any]:
    """Return the anchor coverage of training data and, on request, better anchors."""
    backbone, grid = build_grid(cfg)
    data = training_boxes(cfg, records, backbone)
    found = {"coverage": measure_coverage(cfg, data, grid, names) | describe_shapes(data, grid)}
    if search_anchors:
        found["suggestion"] = suggest_anchors(cfg, data, grid)
    return found


def _find_fault_of_keys(cfg: CfgNode, classes: Mapping[str, Sequence[str]]) -> str | None:
    """Return why training would refuse the keys that depend on the classes, or None."""
    try:
        set_num_classes(cfg, classes)
        resolve_class_alpha(cfg, next(iter(classes.values())))
    except InputError as error:
        return str(error)
    return None


def _describe(checked: ValidationResult) -> dict[str, Any]:
    """Return the facts about the used data, the notes, and the findings by kind."""
    content = checked.content
    objects = checked.objects
    counts = Counter(a["image_id"] for a in objects)
    per_image = [counts[image["id"]] for image in content["images"]]
    sizes = Counter(f"{image['width']} x {image['height']}" for image in content["images"])
    return {
        "facts": {
            "images": len(per_image),
            "empty_images": per_image.count(0),
            "boxes": len(objects),
            "regions_to_ignore": len(content["annotations"]) - len(objects),
            "boxes_an_image": {
                "mean": sum(per_image) / max(len(per_image), 1),
                "min": min(per_image, default=0),
                "max": max(per_image, default=0),
            },
            "image_sizes": dict(sizes.most_common()),
            "classes": _describe_classes(content, objects),
        },
        "notes": list(checked.notes),
        "findings": [
            {
                "kind": kind,
                "what": KINDS[kind].what,
                "policy": checked.policy[kind],
                "count": len(findings),
                "remedy": find_remedy(findings) if checked.policy[kind] == "refuse" else "",
                "items": [
                    {key: getattr(finding, key) for key in ("message", "image_id", "annotation_id")}
                    for finding in findings
                ],
            }
            for kind, findings in checked.by_kind().items()
        ],
    }


def _describe_classes(
    content: dict[str, Any], objects: Sequence[dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return class name -> its id, and its numbers of boxes and images."""
    images = Counter(k for _, k in {(a["image_id"], a["category_id"]) for a in objects})
    sizes: dict[Any, Counter[str]] = defaultdict(Counter)
    for annotation in objects:
        area = annotation["bbox"][2] * annotation["bbox"][3]
        size = next(name for name, limit in SIZES.items() if area < limit)
        sizes[annotation["category_id"]][size] += 1
    return {
        category["name"]: {
            "category_id": category["id"],
            "boxes": sizes[category["id"]].total(),
            "images": images[category["id"]],
            **{size: sizes[category["id"]][size] for size in SIZES},
        }
        for category in sorted(content["categories"], key=lambda c: id_order(c["id"]))
    }


def _format_data(content: dict[str, Any]) -> str:
    facts = content["facts"]
    an_image = facts["boxes_an_image"]
    columns = ["boxes", "images", *SIZES]
    rows = ([name, *map(row.get, columns)] for name, row in facts["classes"].items())
    lines = [
        f"{content['name']}: {content['json_file']}, images in {content['image_root']}",
        "",
        f"{count(facts['images'], 'image')} ({join_some(facts['image_sizes'], 3)}), "
        f"{facts['empty_images']} without boxes; {count(facts['boxes'], 'box', 'boxes')}, "
        f"{an_image['min']} to {an_image['max']} an image, {an_image['mean']:.1f} on average; "
        f"{count(facts['regions_to_ignore'], 'region')} to ignore",
        f"{', '.join(SIZES)}: COCO's sizes of the boxes in the images as stored",
        "",
        _table(["class", *columns], rows),
        "",
    ]
    lines += [f"{'note':>8}  {note}" for note in content["notes"]]
    if not content["findings"]:
        lines.append("Nothing is wrong with them.")
    for found in content["findings"]:
        lines.append(f"{DONE[found['policy']]:>8}  {found['what']}: {found['count']}")
        messages = [item["message"] for item in found["items"]]
        lines += [f"{'':10}{line}" for line in messages[:SHOWN]]
        if len(messages) > SHOWN:
            lines.append(f"{'':10}and {len(messages) - SHOWN} more")
    return "\n".join(lines)


def _format_coverage(coverage: dict[str, Any]) -> str:
    low, high = coverage["thresholds"]
    everything = coverage["all"]
    rows = (
        [
            name,
            row["boxes"],
            f"{row['mean_best_iou']:.2f}",
            *(f"{100 * row[share]:.1f} %" for share in ("below", "between", "reached")),
            f"{row['positives_mean']:.1f}",
            row["positives_min"],
        ]
        for group in (coverage["by_class"], coverage["by_size"], {"all": everything})
        for name, row in group.items()
    )
    ranges = [f"< {low}", f"{low} to {high}", f">= {high}"]
    text = (
        f"Anchors at the training resize (short side {join_some(coverage['short_sides'])}, long "
        f"side at most {coverage['max_size']}): {coverage['anchors_an_image']:.0f} an image, "
        f"{coverage['foreground_an_image']:.0f} of them foreground\n"
        f"{', '.join(SIZES)}: COCO's sizes of the boxes after this resize\n\n"
    )
    text += _table(["", "boxes", "best IoU", *ranges, "anchors a box", "least"], rows)
    unreached = everything["boxes"] - round(everything["reached"] * everything["boxes"])
    if unreached:
        are, their = ("is", "its") if unreached == 1 else ("are", "their")
        matches = coverage["low_quality_matches"]
        kept = {
            "all": f"learned by {their} best anchor alone",
            "ignored_band": f"learned by {their} best anchor alone, and below {low} not at all",
            "none": "not learned",
        }[matches]
        text += (
            f"\n\n{count(unreached, 'box', 'boxes')} that no anchor reaches at {high} {are} {kept} "
            f"(MODEL.RETINANET.LOW_QUALITY_MATCHES {matches})."
        )
    return text


def _format_suggestion(suggestion: dict[str, Any]) -> str:
    before, after = (f"{100 * share:.1f} %" for share in suggestion["reached"])
    if not suggestion["is_better"]:
        return (
            f"The search found no anchors that reach more boxes: {before} now, {after} at best "
            f"with up to {max(suggestion['anchors_a_cell'])} a cell."
        )
    changes = {
        "boxes reached": (before, after),
        "mean best IoU": [f"{iou:.2f}" for iou in suggestion["mean_best_iou"]],
        "anchors a cell": suggestion["anchors_a_cell"],
        **suggestion["keys"],
    }
    rows = [[name, old, "->", new] for name, (old, new) in changes.items()]
    pairs = " ".join(
        f"{key} '{new}'" if isinstance(new, list) else f"{key} {new}"
        for key, (_, new) in suggestion["keys"].items()
    )
    lines = ["Better anchors:", "", tabulate(rows, tablefmt="plain", disable_numparse=True), ""]
    cell_before, cell_after = suggestion["anchors_a_cell"]
    if cell_before != cell_after:
        lines.append(
            f"Weights with {cell_before} anchors a cell then need "
            "MODEL.RETINANET.REINIT_MISMATCHED True."
        )
    lines += ["To use them, add to the command:", "", pairs]
    return "\n".join(lines)


_FORMATS = {"coverage": _format_coverage, "suggestion": _format_suggestion}


def _conclude(contents: list[dict[str, Any]], faults: list[str]) -> tuple[str, bool]:
    """Return the last line of the report, and whether training refuses the data.

    ``faults`` say why training would refuse data whose findings the policy accepts.
    """
    findings = [found for content in contents for found in content["findings"]]
    counts = Counter(found["policy"] for found in findings for _ in found["items"])
    if counts["refuse"] or faults:
        reasons = [f"faults that are refused: {counts['refuse']}"] if counts["refuse"] else []
        remedies = dict.fromkeys(found["remedy"] for found in findings if found["remedy"])
        return f"Training refuses these data: {'; '.join([*reasons, *faults, *remedies])}.", True
    done = [
        f"{DONE[policy]}: {counts[policy]}"
        for policy in ("drop", "keep", "merge", "mend", "object")
        if counts[policy] or policy in ("drop", "keep")
    ]
    return f"Training takes these data; {', '.join(done)}.", False


def _table(headers: list[str], rows: Iterable[list[Any]]) -> str:
    align = ["left", *["right"] * (len(headers) - 1)]
    cells = (map(printable, row) for row in rows)
    return tabulate(cells, headers, tablefmt="simple", colalign=align, disable_numparse=True)
