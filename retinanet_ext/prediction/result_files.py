"""The formats that detections are written in, each from the log, one record at a time."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from retinanet_ext.data.coco_json import printable
from retinanet_ext.files import atomic_write, write_file
from retinanet_ext.prediction.detection_log import DetectionLog, Record
from retinanet_ext.prediction.image_sources import SourceFile, frame_name

Files = Sequence[SourceFile]
Names = Sequence[str]


def write_json(log: DetectionLog, files: Files, classes: Names, folder: Path) -> Path:
    """Write ``detections.json``: the records, with names in place of the indices of classes."""

    def named(record: Record) -> Record:
        found = [{**d, "class": classes[d["class"]]} for d in record.get("detections", [])]
        return {**record, "detections": found} if "detections" in record else record

    path = folder / "detections.json"
    with atomic_write(path) as file:
        file.write(f'{{"classes": {json.dumps(list(classes))},\n"images": '.encode())
        file.writelines(_json_list(map(named, log)))
        file.write(b"}\n")
    return path


def write_coco(log: DetectionLog, files: Files, classes: Names, folder: Path) -> Path:
    """Write ``coco.json``, a data set in COCO's format whose annotations have scores too.

    File names are relative to the folder that all images are in, which ``info`` names.
    """
    root = os.path.commonpath([os.path.dirname(os.path.abspath(file.path)) for file in files])

    def images() -> Iterator[dict[str, Any]]:
        for number, record in _numbered(log):
            name = frame_name(os.path.relpath(record["file"], root), record.get("frame"))
            size = {"width": record["width"], "height": record["height"]}
            yield {"id": number, "file_name": name, **size}

    def annotations() -> Iterator[dict[str, Any]]:
        count = 0
        for number, record in _numbered(log):
            for found in record["detections"]:
                count += 1
                left, top, right, bottom = found["box"]
                width, height = round(right - left, 2), round(bottom - top, 2)
                yield {
                    "id": count,
                    "image_id": number,
                    "category_id": found["class"] + 1,
                    "bbox": [left, top, width, height],
                    "area": round(width * height, 2),
                    "iscrowd": 0,
                    "score": found["score"],
                }

    categories = [{"id": number, "name": name} for number, name in enumerate(classes, start=1)]
    start = json.dumps({"info": {"image_root": root}, "categories": categories})
    path = folder / "coco.json"
    with atomic_write(path) as file:
        file.write(f'{start[:-1]},\n"images": '.encode())
        file.writelines(_json_list(images()))
        file.write(b',\n"annotations": ')
        file.writelines(_json_list(annotations()))
        file.write(b"}\n")
    return path


def write_csv(log: DetectionLog, files: Files, classes: Names, folder: Path) -> Path:
    """Write ``detections.csv``: a row per detection, with its box as corners in pixels."""
    path = folder / "detections.csv"
    with atomic_write(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
        table = csv.writer(text)
        table.writerow(["file", "frame", "class", "score", "left", "top", "right", "bottom"])
        for record in log:
            start = [record["file"], record.get("frame", "")]
            for found in record.get("detections", []):
                table.writerow([*start, classes[found["class"]], found["score"], *found["box"]])
        text.flush()
        text.detach()
    return path


def write_yolo(log: DetectionLog, files: Files, classes: Names, folder: Path) -> Path:
    """Write ``labels``: a text file per image, and ``classes.txt``.

    A line is the index of the class, the box's centre and size as fractions of the image's, and the
    score.
    """
    labels = folder / "labels"
    names = {file.path: file.name for file in files}
    for record in log:
        if "error" in record:
            continue
        width, height = record["width"], record["height"]
        lines = []
        for found in record["detections"]:
            left, top, right, bottom = found["box"]
            centre = (left + right) / 2 / width, (top + bottom) / 2 / height
            box = (*centre, (right - left) / width, (bottom - top) / height)
            numbers = " ".join(f"{value:.6f}" for value in box)
            lines.append(f"{found['class']} {numbers} {found['score']:.4f}\n")
        name = frame_name(names[record["file"]], record.get("frame"))
        path = labels / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(lines))
    write_file(folder / "classes.txt", "".join(f"{printable(name)}\n" for name in classes))
    return labels


WRITERS: dict[str, Callable[[DetectionLog, Files, Names, Path], Path]] = {
    "json": write_json,
    "coco": write_coco,
    "csv": write_csv,
    "yolo": write_yolo,
}


def _numbered(log: DetectionLog) -> Iterator[tuple[int, Record]]:
    """Yield the readable images with their numbers from 1."""
    return enumerate((record for record in log if "error" not in record), start=1)


def _json_list(items: Iterable[Any]) -> Iterator[bytes]:
    """Yield a JSON list in parts, one item per line."""
    yield b"["
    for number, item in enumerate(items):
        yield b"\n" if number == 0 else b",\n"
        yield json.dumps(item).encode()
    yield b"]"
