"""Pictures of detections: drawn into images and videos, or cut out of them."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, groupby
from pathlib import Path

import cv2
import numpy as np
from detectron2.utils.visualizer import Visualizer
from PIL import Image
from tqdm import tqdm

from retinanet_ext.data.coco_json import printable
from retinanet_ext.data.images import ImageReader
from retinanet_ext.errors import InputError
from retinanet_ext.evaluation.fonts import choose_fonts
from retinanet_ext.evaluation.pictures import COLORS
from retinanet_ext.files import atomic_write, write_file
from retinanet_ext.prediction.detection_log import DetectionLog, Record
from retinanet_ext.prediction.image_sources import (
    SourceFile,
    frame_count_and_rate,
    frame_name,
    iterate_pictures,
)

QUALITY = 92  # of JPEG
CODEC = "mp4v"


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
    """
    paint = Painter(classes)
    for file, records in _by_file(log, files, "drawn"):
        path = folder / f"{file.name}{'.mp4' if file.is_video else '.jpg'}"
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        pictures = (paint(pixels, record) for pixels, record in _pixels(file, records, reader))
        if file.is_video:
            _write_video(path, pictures, frame_count_and_rate(file.path)[1])
            continue
        for picture in pictures:  # one, or none of an unreadable image
            write_file(path, _encode(picture))
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
    """
    folders = [re.sub(r"[/\\\0]", "_", printable(name)) for name in classes]
    for file, records in _by_file(log, files, "cut out"):
        for pixels, record in _pixels(file, records, reader):
            name = frame_name(file.name, record.get("frame"))
            for number, found in enumerate(record["detections"]):
                left, top = np.floor(found["box"][:2]).astype(int)
                right, bottom = np.ceil(found["box"][2:]).astype(int)
                path = folder / folders[found["class"]] / f"{name}_{number}.jpg"
                if left == right or top == bottom:  # thinner than the log's digits
                    continue
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(_encode(pixels[top:bottom, left:right]))
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


def _encode(pixels: np.ndarray) -> bytes:
    """Return an image, uint8 (H, W, 3) of RGB, as JPEG; Pillow hides why it cannot write a file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def _write_video(path: Path, pictures: Iterable[np.ndarray], rate: float) -> None:
    """Write pictures, uint8 (H, W, 3) of RGB, as a video of ``rate`` frames per second.

    Raises:
        InputError: it cannot be encoded, or a frame is not in the file. OpenCV says neither: it
            passes over a frame of another size than the first, and goes on when the disk is full.
    """
    part = path.with_name(f".part_{path.name}")  # OpenCV chooses the container by the suffix
    pictures = iter(pictures)
    first = next(pictures, None)
    if first is None:
        raise InputError(f"{path} cannot be drawn: no frame of the video can be read any more")
    height, width = first.shape[:2]
    frames = 0
    with atomic_write(path, part=part):
        writer = cv2.VideoWriter(str(part), cv2.VideoWriter.fourcc(*CODEC), rate, (width, height))
        try:
            if not writer.isOpened():
                raise InputError(
                    f"{path} cannot be written: OpenCV does not encode {width} x {height} pixels "
                    f"at {rate:g} frames per second as {CODEC}"
                )
            for picture in chain([first], pictures):
                writer.write(picture[:, :, ::-1])
                frames += 1
        finally:
            writer.release()
        written, _ = frame_count_and_rate(str(part))
        if written != frames:
            raise InputError(
                f"{path} cannot be written: {written:,} of {frames:,} frames are in the file, "
                "because the disk is full or the frames differ in size"
            )
