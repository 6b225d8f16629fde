"""``retinanet-ext compare``: runs, or files of detections, on the same test data."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from retinanet_ext.config_keys import all_keys, read_key
from retinanet_ext.data.coco_json import (
    class_names,
    contiguous_category_ids,
    id_order,
    is_ignore_region,
    join_some,
    printable,
    read_coco_json,
)
from retinanet_ext.data.images import ImageReader
from retinanet_ext.data.register import compare_classes
from retinanet_ext.engine.run_folder import (
    EVALUATION,
    detect_test_data,
    load_run,
    read_ground_truth,
    register_test_data,
)
from retinanet_ext.errors import InputError
from retinanet_ext.evaluation.box_data import BoxData, Records, read_detections
from retinanet_ext.evaluation.compare import Comparison, compare, compare_images
from retinanet_ext.evaluation.compare_report import (
    explain,
    extremes,
    render_markdown,
    render_text,
)
from retinanet_ext.evaluation.detection_metrics import COCO_MAX_DETECTIONS
from retinanet_ext.evaluation.pictures import draw_detection_grid
from retinanet_ext.evaluation.weighted_ap import Matchings
from retinanet_ext.files import make_folder, to_json, write_file
from retinanet_ext.page import render_page

NUM_PICTURES = 2
"""Number of images drawn of those that gained most, and of those that lost most."""

MIN_RESAMPLES = 100

TEST_KEYS = ("TEST.DETECTIONS_PER_IMAGE", "TEST.PRECISION")
"""Keys of the evaluation, which must be equal. Others may differ, such as the images' size."""

NOT_LISTED = ("OUTPUT_DIR", "MODEL.WEIGHTS", "MODEL.DEVICE", "SEED")
"""Keys that differ between any two runs."""

Content = dict[str, Any]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Run:
    """A run whose test data are registered: the config, the test set's name, its annotations."""

    folder: str
    cfg: CfgNode
    dataset: str
    ground_truth: Content

    @classmethod
    def open(cls, folder: str, opts: Sequence[str]) -> Run:
        """Check and register the test data of a run.

        Raises:
            InputError: the run or its test data cannot be used
        """
        cfg = load_run(folder, opts)
        contents = read_ground_truth(cfg)
        name, *others = contents
        if others:
            raise InputError(
                f"{folder} has several test sets ({', '.join(contents)}); choose one, such as "
                f"""DATASETS.TEST '("{name}",)'"""
            )
        return cls(folder, cfg, name, contents[name])

    def detect(self) -> Records:
        """Return the detections of the registered test data; computed at the first call."""
        logger.info("Detections of %s on its test data", self.folder)
        return read_detections(detect_test_data(self.cfg, self.dataset))


def compare_runs(
    a: Sequence[str],
    b: Sequence[str],
    *,
    opts: Sequence[str] = (),
    num_resamples: int,
    out: Path | None = None,
) -> tuple[str, Path]:
    """Compare runs, one or several seeds per side, on their test data.

    Args:
        a, b: folders of runs
        opts: alternating keys and values that replace those of all runs
        num_resamples: number of resamples of the images
        out: folder to make; by default in the folder ``evaluation`` of the first run of b

    Returns:
        the comparison as text, and the folder that holds it with its JSON and page

    Raises:
        InputError: a run cannot be used, the runs differ in test data, classes or settings of the
            evaluation, or the folder exists
    """
    _refuse_files([*a, *b])
    out = out or _new_folder(Path(b[0], EVALUATION, f"compare_{Path(a[0]).resolve().name}"))
    _check_arguments(num_resamples, out)
    folders = [folder for folder in dict.fromkeys([*a, *b]) if folder != b[0]]
    folders.append(b[0])  # the last to be registered, because its images are drawn
    runs = {folder: Run.open(folder, opts) for folder in folders}
    first, *others = runs.values()
    for other in others:
        refuse_difference(first, other)
    _require_two_images(first.ground_truth)
    make_folder(out.parent)  # now, because the inference may take hours
    registered, detections = runs[b[0]].cfg, {}
    for folder, run in runs.items():
        if run.cfg.DATASETS != registered.DATASETS:  # other images may have the same boxes
            register_test_data(run.cfg)
        registered, detections[folder] = run.cfg, run.detect()
    limit = max(first.cfg.TEST.DETECTIONS_PER_IMAGE, COCO_MAX_DETECTIONS)
    content = first.ground_truth
    data = {name: BoxData.from_coco(content, found) for name, found in detections.items()}
    comparison = _compare(a, b, content, data, num_resamples, limit)
    settings = _differing_keys(runs[a[0]].cfg, runs[b[0]].cfg)
    comparison = replace(comparison, settings=settings)
    drawn = {"a": detections[a[0]], "b": detections[b[0]]}
    return _write(comparison, out, runs[b[0]], drawn)


def compare_files(
    gt: str,
    a: Sequence[str],
    b: Sequence[str],
    *,
    num_resamples: int,
    out: Path | None = None,
) -> tuple[str, Path]:
    """Compare files of detections of any detectors, in COCO's results format.

    Args:
        gt: annotation file in COCO's format
        a, b: files of detections, one or several seeds per side
        num_resamples, out: as for :func:`compare_runs`; the default is beside the first file of b

    Raises:
        InputError: a file cannot be read, detections are of images or categories that the
            annotations do not have, or the folder exists
    """
    name = f"compare_{Path(a[0]).stem}_{Path(b[0]).stem}"
    out = out or _new_folder(Path(b[0]).with_name(name))
    _check_arguments(num_resamples, out)
    content = read_coco_json(gt)
    _require_two_images(content)
    data = {file: BoxData.read(content, gt, file) for file in dict.fromkeys([*a, *b])}
    comparison = _compare(a, b, content, data, num_resamples, COCO_MAX_DETECTIONS)
    return _write(comparison, out)


def refuse_difference(a: Run, b: Run) -> None:
    """Raise an InputError if runs differ in classes, test data or settings of the evaluation."""
    named = {run.folder: class_names(run.ground_truth) for run in (a, b)}
    if difference := compare_classes(named):
        raise InputError(difference)
    for what, of_a, of_b in (
        ("category ids", *(list(contiguous_category_ids(r.ground_truth)) for r in (a, b))),
        ("number of test images", *(len(run.ground_truth["images"]) for run in (a, b))),
        *((key, read_key(a.cfg, key), read_key(b.cfg, key)) for key in TEST_KEYS),
    ):
        if of_a != of_b:
            raise InputError(
                f"{b.folder} cannot be compared with {a.folder}, because they differ in {what}: "
                f"{of_b} and {of_a}"
            )
    boxes_a, boxes_b = _boxes_by_image(a.ground_truth), _boxes_by_image(b.ground_truth)
    differing = [i for i in {**boxes_a, **boxes_b} if boxes_a.get(i) != boxes_b.get(i)]
    if differing:
        some = join_some(map(printable, sorted(differing, key=id_order)), 3)
        raise InputError(
            f"{b.folder} cannot be compared with {a.folder}, because their test data differ: other "
            f"images or boxes under the image ids {some}"
        )


def _require_two_images(content: Content) -> None:
    if len(content["images"]) < 2:
        raise InputError("the test data have one image; an interval over images needs two")


def _boxes_by_image(content: Content) -> dict[int | str, list[tuple[Any, ...]]]:
    boxes: dict[int | str, list[tuple[Any, ...]]] = {image["id"]: [] for image in content["images"]}
    for a in content["annotations"]:
        box = (a["category_id"], *map(float, a["bbox"]), float(a["area"]), is_ignore_region(a))
        boxes[a["image_id"]].append(box)
    return {image_id: sorted(found) for image_id, found in boxes.items()}


def _compare(
    a: Sequence[str],
    b: Sequence[str],
    content: Content,
    data: Mapping[str, BoxData],
    num_resamples: int,
    max_detections: int,
) -> Comparison:
    data[a[0]].require_objects()
    matchings = {name: Matchings.compute(each, max_detections) for name, each in data.items()}
    of_a, of_b = [matchings[name] for name in a], [matchings[name] for name in b]
    names = data[a[0]].class_names
    files = {image["id"]: str(image.get("file_name", "")) for image in content["images"]}
    return Comparison(
        a,
        b,
        len(files),
        num_resamples,
        compare(of_a, of_b, names, num_resamples=num_resamples),
        compare_images(of_a, of_b, files),
    )


def _differing_keys(a: CfgNode, b: CfgNode) -> dict[str, tuple[str, str]]:
    """Return the values of keys that differ, but for those of the data and of a single run."""
    keys = [key for key in all_keys(a) if key not in NOT_LISTED and not key.startswith("DATASETS.")]
    values = {key: (str(read_key(a, key)), str(read_key(b, key))) for key in keys}
    return {key: pair for key, pair in values.items() if pair[0] != pair[1]}


def _refuse_files(folders: Sequence[str]) -> None:
    """Raise an InputError if a JSON is given in place of a run."""
    for path in map(Path, folders):
        if path.suffix == ".json" and not path.is_dir():
            raise InputError(
                f"{path} is not a run; to compare files of detections, add --gt with their "
                "annotations: --gt JSON --a JSON --b JSON"
            )


def _check_arguments(num_resamples: int, out: Path) -> None:
    if num_resamples < MIN_RESAMPLES:
        raise InputError(f"--resamples {num_resamples}: at least {MIN_RESAMPLES} are needed")
    if out.exists():
        raise InputError(f"{out} exists; choose another folder")


def _new_folder(path: Path) -> Path:
    """Return the path, or with a number the first that does not exist."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}_{number}")
    return free


def _write(
    comparison: Comparison,
    out: Path,
    run: Run | None = None,
    detections: Mapping[str, Records] | None = None,
) -> tuple[str, Path]:
    """Write the comparison as text and JSON, then as page; with pictures, if there is a run."""
    text = render_text(comparison)
    content = {**asdict(comparison), "meaning": explain(comparison)}
    make_folder(out)
    write_file(out / "comparison.json", to_json(content, indent=1, ensure_ascii=False) + "\n")
    write_file(out / "comparison.txt", text + "\n")
    with tempfile.TemporaryDirectory() as folder:
        pictures = []
        if run and detections:
            chosen = [i for images in extremes(comparison.images, NUM_PICTURES) for i in images]
            for number, image in enumerate(chosen):
                if _draw(run, detections, image.image_id, Path(folder, f"{number}.png")):
                    pictures.append((image, f"{number}.png"))
        page = render_markdown(comparison, Path(folder), pictures)
        page = render_page(page, Path(folder), title="Comparison")
    write_file(out / "comparison.html", page)
    return text, out


def _draw(run: Run, detections: Mapping[str, Records], image_id: int | str, path: Path) -> bool:
    """Draw the detections of both sides on an image, each beside the ground truth.

    Returns:
        whether the image could be read
    """
    (entry,) = (e for e in DatasetCatalog.get(run.dataset) if e["image_id"] == image_id)
    labels = contiguous_category_ids(run.ground_truth)
    entries, records = [], []
    for side, of_side in detections.items():
        name = f"{image_id}, {side}"
        entries.append({**entry, "image_id": name})
        records += [
            {**record, "image_id": name, "category_id": labels[record["category_id"]]}
            for record in of_side
            if record["image_id"] == image_id
        ]
    return draw_detection_grid(
        entries,
        records,
        class_names(run.ground_truth),
        path,
        num_images=len(entries),
        score_thresh=run.cfg.TEST.DETECTION_GRID.SCORE_THRESH,
        reader=ImageReader.from_config(run.cfg),
    )
