"""Detect the images and frames of files, in batches, and append what is found to a log."""

from __future__ import annotations

import ctypes
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from itertools import groupby, islice
from typing import Any, TypeVar, cast

from detectron2.structures import Instances
from tqdm import tqdm

from retinanet_ext.data.images import explain_unreadable
from retinanet_ext.engine import Predictor
from retinanet_ext.errors import InputError
from retinanet_ext.losses import Interval
from retinanet_ext.prediction.detection_log import DetectionLog, Record
from retinanet_ext.prediction.image_sources import (
    Picture,
    SourceFile,
    count_pictures,
    iterate_pictures,
)
from retinanet_ext.prediction.views import View, make_views, merge_views

WINDOW = 4
"""Batches' worth of images that are detected together, so that those of one size share batches."""

T = TypeVar("T")


@dataclass(frozen=True)
class DetectionOptions:
    """How images are detected.

    Attributes:
        batch: views at a time, at most
        tile: side of the tiles in pixels; 0: no tiles
        overlap: fraction of a tile's side that neighbours share, at least
        tta: detect flipped views too
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
    pictures = islice(enumerate(iterate_pictures(files)), start, None)
    with (
        closing(read_ahead(_prepare_views(predictor, pictures, options), options.batch)) as views,
        tqdm(total=count_pictures(files), initial=start, unit=" images", disable=None) as bar,
    ):
        for _, group in groupby(views, key=lambda view: view[0].index // window):
            done = _detect_window(predictor, group, options.batch)
            log.append(_to_record(pending, kept, iou_thresh) for pending in done)
            bar.update(len(done))
    log.finish()


def _prepare_views(
    predictor: Predictor, pictures: Iterable[tuple[int, Picture]], options: DetectionOptions
) -> Iterator[tuple[_Pending, View | None, dict[str, Any]]]:
    """Yield each view of each picture with the model's inputs; None of a picture without one."""
    for index, picture in pictures:
        pending = _Pending(replace(picture, pixels=None), index)  # a window's frames are large
        try:
            if picture.error:
                raise InputError(picture.error)
            pixels = predictor.read(picture.file.path if picture.pixels is None else picture.pixels)
            pending.size = pixels.shape[:2]
            pending.views = make_views(
                pending.size, tile=options.tile, overlap=options.overlap, tta=options.tta
            )
            for view in pending.views:
                yield pending, view, predictor.to_inputs(view.crop(pixels))
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


def read_ahead(items: Iterable[T], count: int) -> Iterator[T]:
    """Yield items that a thread takes from an iterator, ``count`` of them in advance.

    The thread ends with the generator. Close a generator that is not read to its end.
    """
    done = object()
    iterator = iter(items)
    thread = ThreadPoolExecutor(1)
    try:
        ahead = deque(thread.submit(next, iterator, done) for _ in range(count))
        while (item := ahead.popleft().result()) is not done:
            ahead.append(thread.submit(next, iterator, done))
            yield cast(T, item)
    finally:
        thread.shutdown(cancel_futures=True)


def keep_freed_memory() -> None:
    """Make glibc keep the memory that a batch frees, for the next batch in this process.

    glibc returns blocks above 32 MB to the system, which are many of a batch's activations. The
    system then clears each page anew: at batch 8 on a CPU that was 70 of 180 ms per image.
    """
    mmap_max, trim_threshold = -4, -1  # names of malloc.h
    with suppress(AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)  # never
