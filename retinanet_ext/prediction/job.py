"""Detect what is on images and videos, and write it: ``retinanet-ext predict``."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from retinanet_ext.data.coco_json import join_some, printable
from retinanet_ext.engine import Predictor
from retinanet_ext.engine.run_folder import load_run
from retinanet_ext.errors import InputError
from retinanet_ext.evaluation.thresholds import choose_thresholds
from retinanet_ext.files import check_writable, sha256_of, write_file
from retinanet_ext.prediction.detection import DetectionOptions, detect_files
from retinanet_ext.prediction.detection_log import DetectionLog, open_log
from retinanet_ext.prediction.drawing import draw_detections, save_crops
from retinanet_ext.prediction.image_sources import SourceFile, find_files
from retinanet_ext.prediction.result_files import WRITERS

PREDICTIONS = "predictions"
"""Folder within a run's folder for what its detector has found."""

UNREADABLE = "unreadable.txt"

logger = logging.getLogger(__name__)


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
        format: one of :data:`~retinanet_ext.prediction.result_files.WRITERS`
        draw: write images with their detections, and videos of such frames, too
        crops: write each detection as an image, too
        opts: alternating keys and values that replace the run's, such as MODEL.WEIGHTS

    Raises:
        InputError: the run, a source, a class or an option cannot be used, or ``out`` cannot be
            written, has detections of another job or is used by another process. Nothing is
            written then. Or a file cannot be written, and the same call continues the job.
    """
    cfg = load_run(run, opts)
    if options.score is not None:
        cfg.MODEL.RETINANET.SCORE_THRESH_TEST = options.score
    results = Path(out) if out else Path(run, PREDICTIONS)
    check_writable(results)
    files = find_files(sources, results)
    thresholds = choose_thresholds(options.score, options.thresholds)
    predictor = Predictor(cfg, thresholds=thresholds)
    names = predictor.class_names or [f"class {k}" for k in range(cfg.MODEL.RETINANET.NUM_CLASSES)]
    kept = _choose_classes(options.classes, names)
    logger.info(_explain_cut(cfg, predictor, names))

    job = _describe(cfg, predictor, files, options)
    folder = results if out else results / _name(sources, job)
    with open_log(folder, job) as log:
        if not log.complete:
            iou_thresh = cfg.MODEL.RETINANET.NMS_THRESH_TEST
            detect_files(predictor, files, options, log, kept=kept, iou_thresh=iou_thresh)
        written = [WRITERS[format](log, files, names, folder)]
        if draw:
            written.append(draw_detections(log, files, names, folder / "drawn", predictor.reader))
        if crops:
            written.append(save_crops(log, files, names, folder / "crops", predictor.reader))
        return _summarize(log, folder, written)


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
    """Return all that the records depend on; the batch size changes them by rounding alone."""
    cfg = cfg.clone()
    weights, cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR = cfg.MODEL.WEIGHTS, "", ""
    names = "\n".join(map(_identify, files))
    thresholds = predictor.thresholds
    return {
        **{key: value for key, value in asdict(options).items() if key != "batch"},
        "sources": f"{len(files)} files, {_checksum(names)}",
        "weights": sha256_of(weights),
        "config": _checksum(cfg.dump()),
        "thresholds": None if thresholds is None else [round(t, 6) for t in thresholds.tolist()],
    }


def _identify(file: SourceFile) -> str:
    """Return a file's names, size and time, so that another image under its name is another job."""
    path = Path(file.path).absolute()
    state = (path.stat().st_size, path.stat().st_mtime_ns) if path.exists() else "missing"
    return f"{file.path} {file.name} {path} {state}"


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:12]


def _name(sources: Sequence[str | Path], job: dict[str, Any]) -> str:
    stem = re.sub(r"[^\w-]+", "_", Path(sources[0]).resolve().stem).strip("_") or "images"
    return f"{stem}_{_checksum(repr(job))[:8]}"


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
