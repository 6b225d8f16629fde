"""Detect what is on images and videos, and write it: ``retinanet-ext predict``."""

from __future__ import annotations

import hashlib
import logging
import queue
import re
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from itertools import groupby, islice
from pathlib import Path
from typing import Any, TypeVar

from detectron2.config import CfgNode, get_cfg
from detectron2.structures import Instances
from tqdm import tqdm

from retinanet_ext.data.coco_json import join_some, printable
from retinanet_ext.data.images import explain_unreadable
from retinanet_ext.engine import Predictor
from retinanet_ext.engine.run_folder import load_run
from retinanet_ext.errors import InputError
from retinanet_ext.evaluation.thresholds import Thresholds
from retinanet_ext.files import sha256_of, write_file
from retinanet_ext.losses import Interval
from retinanet_ext.prediction.detection_log import DetectionLog, Record
from retinanet_ext.prediction.drawing import draw_detections, save_crops
from retinanet_ext.prediction.formats import WRITERS
from retinanet_ext.prediction.image_sources import (
    Picture,
    SourceFile,
    count_pictures,
    find_files,
    iterate_pictures,
)
from retinanet_ext.prediction.views import View, make_views, merge_views

PREDICTIONS = "predictions"
"""Folder within a run's folder for what its detector has found."""

UNREADABLE = "unreadable.txt"

WINDOW = 4
"""Batches' worth of images that are detected together, so that those of one size share batches."""

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class DetectionOptions:
    """How images are detected.

    Attributes:
        batch: views at a time, at most
        tile: side of the tiles in pixels; 0: no tiles
        overlap: fraction of a tile's side that neighbours share, at least
        tta: detect flipped and larger views too
        classes: names of the classes to keep; empty: all
        score: lowest score in place of the run's
        thresholds: file of thresholds per class in place of the run's
    """

    batch: int = 8
    tile: int = 0
    overlap: float = 0.2
    tta: bool = False
    classes: Sequence[str] = ()
    score: float | None = None
    thresholds: str | None = None

    def __post_init__(self) -> None:
        Interval("[1, inf)").check("--batch", self.batch)
        Interval("[0, inf)").check("--tile", self.tile)
        Interval("[0, 1)").check("--overlap", self.overlap)
        if self.score is not None:
            Interval("[0, 1]").check("--score", self.score)


@dataclass(frozen=True)
class Summary:
    """What a job has written.

    Attributes:
        images: number of images and frames, the unreadable ones included
        detections: number of detections
        unreadable: "file: reason" of each image that could not be read
        written: files and folders
    """

    images: int
    detections: int
    unreadable: list[str]
    written: list[Path]

    def __str__(self) -> str:
        lines = [f"{self.images:,} images, {self.detections:,} detections"]
        return "\n".join([*lines, *(f"Wrote {path}" for path in self.written)])

    @property
    def complaint(self) -> str:
        """One line that names the unreadable images."""
        return (
            f"{len(self.unreadable):,} of {self.images:,} images cannot be read: "
            f"{join_some(self.unreadable, separator='; ')}"
        )


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the sources, and the keys and values of the config that follow them."""
    sections = {key for key, value in get_cfg().items() if isinstance(value, CfgNode)}
    for index, argument in enumerate(arguments):
        section, dot, _ = argument.partition(".")
        if dot and section in sections:
            return [*arguments[:index]], [*arguments[index:]]
    return [*arguments], []


def predict(
    run: str | Path,
    sources: Sequence[str | Path],
    options: DetectionOptions,
    *,
    out: str | Path | None = None,
    format: str = "json",
    draw: bool = False,
    crops: bool = False,
    opts: Sequence[str] = (),
) -> Summary:
    """Detect what is on images and videos with a run's weights, and write it to a folder.

    The same call goes on where an earlier one was cut off, and writes the same files.

    Args:
        run: OUTPUT_DIR of a training
        sources: images, videos, folders, globs and lists, see
            :func:`~retinanet_ext.prediction.image_sources.find_files`
        options: how images are detected
        out: folder to write; by default one within the run's that is named after the job
        format: one of :data:`~retinanet_ext.prediction.formats.WRITERS`
        draw: write images with their detections, and videos of such frames, too
        crops: write each detection as an image, too
        opts: alternating keys and values that replace the run's, such as MODEL.WEIGHTS

    Raises:
        InputError: the run, a source, a class or an option cannot be used, or ``out`` has
            detections of another job. Nothing is written then.
    """
    cfg = load_run(run, opts)
    if options.score is not None:
        cfg.MODEL.RETINANET.SCORE_THRESH_TEST = options.score
    files = find_files(sources, results=Path(out) if out else Path(run, PREDICTIONS))
    predictor = Predictor(cfg, thresholds=_choose_thresholds(options))
    names = predictor.class_names or [f"class {k}" for k in range(cfg.MODEL.RETINANET.NUM_CLASSES)]
    kept = _choose_classes(options.classes, names)
    logger.info(_explain_cut(cfg, predictor, names))

    job = _describe(cfg, predictor, files, options)
    folder = Path(out) if out else Path(run, PREDICTIONS, _name(sources, job))
    log = DetectionLog(folder, job)
    if not log.complete:
        iou_thresh = cfg.MODEL.RETINANET.NMS_THRESH_TEST
        detect_files(predictor, files, options, log, kept=kept, iou_thresh=iou_thresh)

    written = [WRITERS[format](log, files, names, folder)]
    if draw:
        written.append(draw_detections(log, files, names, folder / "drawn", predictor.reader))
    if crops:
        written.append(save_crops(log, files, names, folder / "crops", predictor.reader))
    return _summarize(log, folder, written)


def _choose_thresholds(options: DetectionOptions) -> Any:
    """Return the thresholds as ``Predictor`` takes them."""
    if options.thresholds is None:
        return "run" if options.score is None else None
    if options.score is not None:
        raise InputError("--score and --thresholds are two cuts; give one of them")
    return Thresholds.read(options.thresholds)


def _choose_classes(chosen: Sequence[str], names: Sequence[str]) -> set[int]:
    """Return the indices of the classes to keep."""
    for name in chosen:
        if name not in names:
            close = get_close_matches(name, names, 1)
            hint = f" (did you mean {printable(close[0])!r}?)" if close else ""
            raise InputError(
                f"--classes: the model has no class {printable(name)!r}{hint}; it has "
                f"{join_some(map(printable, names))}"
            )
    return {names.index(name) for name in chosen or names}


def _explain_cut(cfg: CfgNode, predictor: Predictor, names: Sequence[str]) -> str:
    if predictor.thresholds is None:
        return (
            f"Detections have scores above {cfg.MODEL.RETINANET.SCORE_THRESH_TEST:g} "
            "(--score or MODEL.RETINANET.SCORE_THRESH_TEST)"
        )
    cuts = zip(names, predictor.thresholds.tolist(), strict=True)
    return "Detections have at least the score of their class: " + join_some(
        f"{printable(name)} {cut:.3g}" for name, cut in cuts
    )


def _describe(
    cfg: CfgNode, predictor: Predictor, files: Sequence[SourceFile], options: DetectionOptions
) -> dict[str, Any]:
    """Return all that the detections depend on."""
    cfg = cfg.clone()
    weights, cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR = cfg.MODEL.WEIGHTS, "", ""
    names = "\n".join(file.path for file in files)
    thresholds = predictor.thresholds
    return {
        **asdict(options),
        "sources": f"{len(files)} files, {_checksum(names)}",
        "weights": sha256_of(weights),
        "config": _checksum(cfg.dump()),
        "thresholds": None if thresholds is None else [round(t, 6) for t in thresholds.tolist()],
    }


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:12]


def _name(sources: Sequence[str | Path], job: dict[str, Any]) -> str:
    stem = re.sub(r"[^\w-]+", "_", Path(sources[0]).resolve().stem).strip("_") or "images"
    return f"{stem}_{_checksum(repr(job))[:8]}"


@dataclass
class _Pending:
    """A picture whose views are being detected."""

    picture: Picture
    index: int
    size: tuple[int, int] = (0, 0)
    error: str = ""
    views: list[View] = field(default_factory=list)
    found: dict[View, Instances] = field(default_factory=dict)


def detect_files(
    predictor: Predictor,
    files: Sequence[SourceFile],
    options: DetectionOptions,
    log: DetectionLog,
    *,
    kept: set[int],
    iou_thresh: float,
) -> None:
    """Append the records of the images and frames that the log does not have yet.

    Args:
        predictor: the detector
        files: the images and videos
        options: how they are detected
        log: a job's, which may have a part of the records
        kept: indices of the classes to keep
        iou_thresh: of the merge of views, see :func:`~retinanet_ext.prediction.views.merge_views`
    """
    window = WINDOW * options.batch
    start = log.start(window)
    bar = tqdm(total=count_pictures(files), initial=start, unit=" images", disable=None)
    inputs = _prepare_views(
        predictor, islice(enumerate(iterate_pictures(files)), start, None), options
    )
    with bar:
        for _, views in groupby(read_ahead(inputs, options.batch), lambda v: v[0].index // window):
            pictures = _detect_window(predictor, views, options.batch)
            log.append(_to_record(pending, kept, iou_thresh) for pending in pictures)
            bar.update(len(pictures))
    log.finish()


def _prepare_views(
    predictor: Predictor, pictures: Iterable[tuple[int, Picture]], options: DetectionOptions
) -> Iterator[tuple[_Pending, View | None, dict[str, Any]]]:
    """Yield each view of each picture with the model's inputs; None of a picture without one."""
    for index, picture in pictures:
        pending = _Pending(picture, index)
        try:
            if picture.error:
                raise InputError(picture.error)
            pixels = predictor.read(picture.file.path if picture.pixels is None else picture.pixels)
            pending.size = pixels.shape[:2]
            pending.views = make_views(
                pending.size, tile=options.tile, overlap=options.overlap, tta=options.tta
            )
            for view in pending.views:
                yield pending, view, predictor.to_inputs(view.crop(pixels), view.scale)
        except Exception as error:  # Pillow's decoders raise many types
            pending.error = explain_unreadable(error)
            yield pending, None, {}


def _detect_window(
    predictor: Predictor, views: Iterable[tuple[_Pending, View | None, dict[str, Any]]], batch: int
) -> list[_Pending]:
    """Return the pictures of views, with their detections; views of one size share batches."""
    pictures: dict[int, _Pending] = {}
    waiting: dict[tuple[int, ...], list[Any]] = defaultdict(list)

    def detect(views: list[Any]) -> None:
        found = predictor.detect([inputs for _, _, inputs in views])
        for (pending, view, _), instances in zip(views, found, strict=True):
            pending.found[view] = instances.to("cpu")
        views.clear()

    for pending, view, inputs in views:
        pictures[pending.index] = pending
        if view is None:
            continue
        group = waiting[predictor.padded_size(inputs)]
        group.append((pending, view, inputs))
        if len(group) == batch:
            detect(group)
    for group in waiting.values():
        if group:
            detect(group)
    return list(pictures.values())


def _to_record(pending: _Pending, kept: set[int], iou_thresh: float) -> Record:
    picture = pending.picture
    record: Record = {"file": picture.file.path}
    if picture.frame is not None:
        record["frame"] = picture.frame
    if pending.error:
        return {**record, "error": pending.error}
    found = [pending.found[view] for view in pending.views]
    merged = merge_views(pending.views, found, pending.size, iou_thresh)
    height, width = pending.size
    columns = (merged.pred_classes, merged.scores, merged.pred_boxes.tensor)
    detections = [
        {"class": label, "score": round(score, 4), "box": [round(x, 2) for x in box]}
        for label, score, box in zip(*(column.tolist() for column in columns), strict=True)
        if label in kept
    ]
    return {**record, "width": width, "height": height, "detections": detections}


def _summarize(log: DetectionLog, folder: Path, written: list[Path]) -> Summary:
    """Count the records, and write the list of unreadable images."""
    images = detections = 0
    unreadable = []
    for record in log:
        images += 1
        detections += len(record.get("detections", []))
        if "error" in record:
            unreadable.append(f"{printable(record['file'])}: {printable(record['error'])}")
    if unreadable:
        write_file(folder / UNREADABLE, "\n".join(unreadable) + "\n")
        written = [*written, folder / UNREADABLE]
    return Summary(images, detections, unreadable, written)


def read_ahead(items: Iterable[T], count: int) -> Iterator[T]:
    """Yield items that a thread takes from an iterator, at most ``count`` of them in advance."""
    done = object()
    ready: queue.Queue[Any] = queue.Queue(count)

    def take() -> None:
        try:
            for item in items:
                ready.put(item)
            ready.put(done)
        except BaseException as error:
            ready.put(error)

    threading.Thread(target=take, daemon=True).start()
    while (item := ready.get()) is not done:
        if isinstance(item, BaseException):
            raise item
        yield item
