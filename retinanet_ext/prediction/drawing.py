"""Pictures of detections: drawn into images and videos, or cut out of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import cv2
import numpy as np
from detectron2.utils.visualizer import Visualizer
from PIL import Image
from tqdm import tqdm

from retinanet_ext.data.coco_json import printable
from retinanet_ext.data.images import ImageReader
from retinanet_ext.evaluation.fonts import choose_fonts
from retinanet_ext.evaluation.pictures import COLORS
from retinanet_ext.prediction.detection_log import DetectionLog, Record
from retinanet_ext.prediction.image_sources import (
    SourceFile,
    frame_count_and_rate,
    frame_name,
    iterate_pictures,
)

QUALITY = 92  # of JPEG


class Painter:
    """Draws detections into images by Detectron2's ``Visualizer``, in fonts that have the names."""

    def __init__(self, classes: Sequence[str]) -> None:
        self.names, self.families = choose_fonts(classes)

    def __call__(self, image: np.ndarray, record: Record) -> np.ndarray:
        """Return an image, uint8 (H, W, 3) of RGB, with the detections of its record."""
        found = record["detections"][::-1]  # the best on top
        visualizer = Visualizer(image)
        visualizer.overlay_instances(
            boxes=np.array([d["box"] for d in found]).reshape(-1, 4),
            labels=[f"{self.names[d['class']]} {d['score']:.2f}" for d in found],
            assigned_colors=[COLORS[d["class"] % len(COLORS)] for d in found],
        )
        for text in visualizer.output.ax.texts:
            text.set(fontfamily=self.families, parse_math=False)
            if text.get_position()[0] > 0.85 * image.shape[1]:  # it would leave the image
                text.set(x=image.shape[1], horizontalalignment="right")
        return visualizer.output.get_image()


def draw_detections(
    log: DetectionLog,
    files: Sequence[SourceFile],
    classes: Sequence[str],
    folder: Path,
    reader: ImageReader,
) -> Path:
    """Write each image with its detections as a JPEG file, and each video as MP4.

    Files of an earlier call are kept, because a file is there only once it is complete.

    Args:
        log: the detections
        files: the images and videos, in the order of the log
        classes: names of classes 0..K-1
        folder: folder to write
        reader: reads images as the detector does

    Returns:
        the folder
    """
    paint = Painter(classes)
    for file, records in _by_file(log, files, "drawn"):
        path = folder / f"{file.name}{'.mp4' if file.is_video else '.jpg'}"
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".part_{path.name}")
        if file.is_video:
            _write_video(part, file, records, paint)
        else:
            for pixels, record in _pixels(file, records, reader):
                Image.fromarray(paint(pixels, record)).save(part, quality=QUALITY)
        if part.exists():
            part.replace(path)
    return folder


def save_crops(
    log: DetectionLog,
    files: Sequence[SourceFile],
    classes: Sequence[str],
    folder: Path,
    reader: ImageReader,
) -> Path:
    """Write each detection as a JPEG file, ``CLASS/NAME_NUMBER.jpg``; the best has number 0.

    Args:
        log, files, classes, folder, reader: as for :func:`draw_detections`

    Returns:
        the folder
    """
    folders = [re.sub(r"[/\\\0]", "_", printable(name)) for name in classes]
    for file, records in _by_file(log, files, "cut out"):
        for pixels, record in _pixels(file, records, reader):
            name = file.name if "frame" not in record else frame_name(file.name, record["frame"])
            for number, found in enumerate(record["detections"]):
                left, top = np.floor(found["box"][:2]).astype(int)
                right, bottom = np.ceil(found["box"][2:]).astype(int)
                path = folder / folders[found["class"]] / f"{name}_{number}.jpg"
                if left == right or top == bottom:  # thinner than the log's digits
                    continue
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels[top:bottom, left:right]).save(path, quality=QUALITY)
    return folder


def _by_file(
    log: DetectionLog, files: Sequence[SourceFile], what: str
) -> Iterator[tuple[SourceFile, Iterator[Record]]]:
    """Yield each file with its records, and show the progress."""
    by_path = {file.path: file for file in files}
    groups = groupby(log, key=lambda record: record["file"])
    for path, records in tqdm(groups, what, len(files), unit=" files", disable=None):
        yield by_path[path], records


def _pixels(
    file: SourceFile, records: Iterable[Record], reader: ImageReader
) -> Iterator[tuple[np.ndarray, Record]]:
    """Yield the RGB pixels of a file's readable images or frames, and their records."""
    reader = replace(reader, image_format="RGB")
    for picture, record in zip(iterate_pictures([file]), records, strict=False):
        if "error" not in record:
            frame = picture.pixels
            yield reader(file.path) if frame is None else frame[:, :, ::-1].copy(), record


def _write_video(path: Path, file: SourceFile, records: Iterable[Record], paint: Painter) -> None:
    """Write a video of the frames with their detections, at the rate of the original."""
    _, rate = frame_count_and_rate(file.path)
    writer = None
    for pixels, record in _pixels(file, records, ImageReader()):
        painted = paint(pixels, record)
        height, width = painted.shape[:2]
        if writer is None:
            codec = cv2.VideoWriter.fourcc(*"mp4v")
            writer = cv2.VideoWriter(str(path), codec, rate, (width, height))
        writer.write(painted[:, :, ::-1])
    if writer is not None:
        writer.release()
