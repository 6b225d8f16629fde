"""COCO data written as YOLO labels and as Pascal VOC XML, as annotation tools write them."""

from __future__ import annotations

import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import yaml


def _by_image(content: dict[str, Any]) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    boxes = defaultdict(list)
    for annotation in content["annotations"]:
        boxes[annotation["image_id"]].append(annotation)
    return [(image, boxes[image["id"]]) for image in content["images"]]


def write_yolo(folder: Path, images: Path, **splits: dict[str, Any]) -> Path:
    """Write ``data.yaml``, ``images/SPLIT`` and ``labels/SPLIT``; numbers have six decimals."""
    for split, content in splits.items():
        (folder / "images" / split).mkdir(parents=True)
        (folder / "labels" / split).mkdir(parents=True)
        index = {c["id"]: number for number, c in enumerate(content["categories"])}
        for image, boxes in _by_image(content):
            width, height = image["width"], image["height"]
            shutil.copy(images / image["file_name"], folder / "images" / split)
            lines = []
            for annotation in boxes:
                x, y, w, h = annotation["bbox"]
                numbers = (x + w / 2) / width, (y + h / 2) / height, w / width, h / height
                fields = " ".join(f"{number:.6f}" for number in numbers)
                lines.append(f"{index[annotation['category_id']]} {fields}\n")
            label = Path(image["file_name"]).with_suffix(".txt")
            (folder / "labels" / split / label).write_text("".join(lines))
    config = {split: f"images/{split}" for split in splits}
    config["names"] = [category["name"] for category in content["categories"]]
    (folder / "data.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return folder / "data.yaml"


def write_voc(folder: Path, images: Path, content: dict[str, Any]) -> Path:
    """Write ``Annotations/`` and ``JPEGImages/``; pixels count from 1, and corners are inside."""
    for name in ("Annotations", "JPEGImages"):
        (folder / name).mkdir(parents=True)
    names = {category["id"]: category["name"] for category in content["categories"]}
    for image, boxes in _by_image(content):
        shutil.copy(images / image["file_name"], folder / "JPEGImages")
        sides = "".join(f"<{side}>{image[side]}</{side}>" for side in ("width", "height"))
        objects = ""
        for annotation in boxes:
            x, y, w, h = annotation["bbox"]
            corners = {"xmin": x + 1, "ymin": y + 1, "xmax": x + w, "ymax": y + h}
            box = "".join(f"<{key}>{value:.0f}</{key}>" for key, value in corners.items())
            objects += (
                f"<object><name>{escape(names[annotation['category_id']])}</name>"
                f"<difficult>{annotation.get('ignore', 0)}</difficult>"
                f"<bndbox>{box}</bndbox></object>"
            )
        name = Path(image["file_name"])
        (folder / "Annotations" / name.with_suffix(".xml")).write_text(
            f"<annotation><filename>{escape(name.name)}</filename><size>{sides}</size>{objects}"
            "</annotation>",
            encoding="utf-8",
        )
    return folder
