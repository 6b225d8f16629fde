"""Evaluate a run's detections of its test data, or any detector's, and choose its thresholds."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from tabulate import tabulate

from retinanet_ext.data.coco_json import printable, read_coco_json
from retinanet_ext.data.images import ImageReader
from retinanet_ext.engine.run_folder import (
    EVALUATION,
    detect_test_data,
    load_run,
    read_ground_truth,
)
from retinanet_ext.errors import InputError
from retinanet_ext.evaluation.box_data import BoxData
from retinanet_ext.evaluation.detection_metrics import COCO_MAX_DETECTIONS
from retinanet_ext.evaluation.evaluation_page import Source, write_evaluation
from retinanet_ext.evaluation.threshold_choice import Criterion
from retinanet_ext.evaluation.thresholds import THRESHOLDS, Thresholds
from retinanet_ext.files import make_folder, sha256_of

Reports = dict[Path, dict[str, Any]]


def evaluate_run(
    folder: str | Path,
    opts: Sequence[str] = (),
    *,
    criterion: str = "f1",
    save_thresholds: bool = False,
    out: Path | None = None,
) -> Reports:
    """Write a page and a JSON per test set of a run.

    Args:
        folder: OUTPUT_DIR of a training
        opts: alternating keys and values that replace the run's
        criterion: ``f1``, ``precision=P`` or ``recall=R``
        save_thresholds: write ``thresholds.json`` into the run; it has one test set then
        out: folder of the files, by default ``evaluation`` in the run's

    Returns:
        path of each page -> content of its JSON

    Raises:
        InputError: there is no such run, its test data cannot be used, or nothing is detected
    """
    wanted = Criterion.parse(criterion)
    cfg = load_run(folder, opts)
    contents = read_ground_truth(cfg)
    names = list(contents)
    if save_thresholds and len(names) > 1:
        raise InputError(
            f"thresholds are chosen on one data set, and DATASETS.TEST has {len(names)}; choose "
            f"one by DATASETS.TEST \"('{names[0]}',)\""
        )
    out = out or Path(folder, EVALUATION)
    make_folder(out)  # now, because the inference may take hours
    reports = {}
    for name, content in contents.items():
        dt_file = detect_test_data(cfg, name)
        data = _box_data(content, MetadataCatalog.get(name).json_file, dt_file)
        source = Source(
            title=f"Evaluation of {printable(Path(folder).resolve().name)} on {printable(name)}",
            facts={"run": str(folder), "weights": Path(cfg.MODEL.WEIGHTS).name, "data": name},
            file_names=_file_names(content),
            images={each["image_id"]: each["file_name"] for each in DatasetCatalog.get(name)},
            reader=ImageReader.from_config(cfg),
            max_detections=max(COCO_MAX_DETECTIONS, cfg.TEST.DETECTIONS_PER_IMAGE),
        )
        checksum = dt_file.stem.removeprefix("detections_")
        stem = _stem(out, checksum, wanted)
        reports[Path(f"{stem}.html")] = report = write_evaluation(data, source, wanted, stem)
        if save_thresholds:
            scores = {each["name"]: each["threshold"]["threshold"] for each in report["classes"]}
            weights = sha256_of(cfg.MODEL.WEIGHTS)
            Thresholds(scores, str(wanted), weights).write(Path(folder, THRESHOLDS))
    return reports


def evaluate_files(
    gt_file: Path,
    dt_file: Path,
    *,
    images: Path | None = None,
    criterion: str = "f1",
    out: Path = Path("output/evaluation"),
) -> Reports:
    """Write a page and a JSON of any detector's detections.

    Args:
        gt_file: ground truth in COCO's instances format
        dt_file: detections in COCO's results format
        images: folder of the images; by default there are no pictures
        criterion: as for :func:`evaluate_run`
        out: folder of the files

    Returns:
        path of the page -> content of its JSON

    Raises:
        InputError: a file cannot be read or does not fit the other, or an image is missing
    """
    wanted = Criterion.parse(criterion)
    content = read_coco_json(str(gt_file))
    data = _box_data(content, gt_file, dt_file)
    names = _file_names(content)
    if images:
        _require_images(names, images)
    source = Source(
        title=f"Evaluation of {printable(dt_file.name)}",
        facts={"ground truth": str(gt_file), "detections file": str(dt_file)},
        file_names=names,
        images={image_id: str(images / name) for image_id, name in names.items()} if images else {},
        reader=ImageReader(),
    )
    checksum = hashlib.sha256(f"{sha256_of(gt_file)} {sha256_of(dt_file)}".encode()).hexdigest()
    stem = _stem(out, f"{dt_file.stem}_{checksum[:12]}", wanted)
    return {Path(f"{stem}.html"): write_evaluation(data, source, wanted, stem)}


def _box_data(content: Mapping[str, Any], gt_file: str | Path, dt_file: Path) -> BoxData:
    data = BoxData.read(content, gt_file, dt_file)
    if not len(data.scores):
        raise InputError(f"{dt_file} holds no detections, so that AP is 0 and nothing can be shown")
    return data


def _file_names(content: Mapping[str, Any]) -> dict[Any, str]:
    """Return image id -> file name; empty where an image has none."""
    return {image["id"]: str(image.get("file_name", "")) for image in content["images"]}


def _require_images(names: Mapping[Any, str], folder: Path) -> None:
    """Raise an InputError if an image is not in the folder."""
    missing = [
        name or f"the image of id {image_id!r}, which has no file_name"
        for image_id, name in names.items()
        if not (folder / name).is_file()
    ]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(names)} images are missing in {folder}, the first of them: "
            f"{printable(missing[0])}"
        )


def _stem(folder: Path, what: str, criterion: Criterion) -> Path:
    """Return the path of the files without suffix: the same for the same inputs alone."""
    suffix = "" if criterion.what == "f1" else f"_{criterion.what}{criterion.wanted:g}"
    return folder / f"evaluation_{what}{suffix}"


def summarize(reports: Reports) -> str:
    """Return AP, the thresholds and the paths of the pages, as lines."""
    lines = []
    for path, report in reports.items():
        metrics, measure = report["metrics"], report["measure"]
        lines.append("  ".join(f"{name} {metrics[name]:.1f}" for name in ("AP", "AP50", "AP75")))
        rows = []
        for each in report["classes"]:
            chosen = each["threshold"]
            other = [chosen[half][measure] for half in ("other_half", "other_half_at_0.5")]
            rows.append([printable(each["name"]), chosen["threshold"], *other, chosen["note"]])
        head = ["class", f"threshold for {report['criterion']}"]
        head += [f"{measure} on other images", f"{measure} at 0.5", "note"]
        lines.append(tabulate(rows, head, floatfmt=".3f", disable_numparse=[0, 4]))
        lines.append(f"Wrote {path} and .json")
    return "\n".join(lines)
