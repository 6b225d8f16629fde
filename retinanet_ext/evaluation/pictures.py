"""A picture of what a detector finds, beside what there is to find."""

from __future__ import annotations

import colorsys
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.structures import BoxMode
from matplotlib import colormaps
from PIL import Image, ImageDraw

from retinanet_ext.data.images import ImageReader
from retinanet_ext.evaluation.fonts import DEFAULT_FONT, Label, escape, label_classes, load_font

# All in pixels.
IMAGE_WIDTH = 480
MAX_IMAGE_HEIGHT = 600
MARGIN = 16
PAIR_GAP = 4
LINE = 24
FONT_SIZE = 15
LABEL_FONT_SIZE = 12
SWATCH = 14

PAPER = "white"
INK = "#222222"

Colour = tuple[int, int, int]
# Class, box as XYXY in pixels of the image as it is stored, what is written beside the class.
Box = tuple[int, Sequence[float], str]


def draw_detection_grid(
    dataset_dicts: Sequence[Mapping[str, Any]],
    predictions: Sequence[Mapping[str, Any]],
    class_names: Sequence[str],
    path: str | Path,
    *,
    num_images: int,
    score_thresh: float,
    reader: ImageReader | None = None,
) -> None:
    """Draw images twice, ground truth at the left and detections at the right, to a PNG file.

    The images are spread evenly over the set; those with objects come first. Crowd regions are
    not drawn.

    Args:
        dataset_dicts: the images, in Detectron2's format
        predictions: records as in ``COCOEvaluator``'s ``coco_instances_results.json`` (boxes
            XYWH), except that ``category_id`` is an index of ``class_names``
        class_names: K names
        path: the file to write
        num_images: how many images at most, above 0
        score_thresh: detections from this score on are drawn
        reader: reads the images, of any format; by default as Detectron2 reads them
    """
    chosen = _choose(dataset_dicts, num_images)
    detections = defaultdict(list)
    for record in predictions:
        if record["score"] >= score_thresh and all(map(math.isfinite, record["bbox"])):
            detections[record["image_id"]].append(record)
    palette = _palette(len(class_names))
    labels = label_classes(class_names)
    pairs = []
    classes_shown = set()
    reader = replace(reader or ImageReader(), image_format="RGB")
    for image in chosen:
        objects = [_from_annotation(annotation) for annotation in _objects(image)]
        # The highest score last, on top of the others.
        found = sorted(detections[image["image_id"]], key=lambda record: record["score"])
        found = [_from_prediction(record) for record in found]
        title = (
            f"image {escape(str(image['image_id']))}: {_count(len(objects), 'object')} | "
            f"{_count(len(found), 'detection')} >= {score_thresh:.2f}"
        )
        picture = Image.fromarray(reader(image["file_name"]))
        pairs.append(_draw_pair(picture, title, objects, found, labels, palette))
        classes_shown |= {label for label, *_ in objects + found}
    legend = [(labels[label], palette[label]) for label in sorted(classes_shown)]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    _compose(pairs, legend).save(path)


def _choose(images: Sequence[Mapping[str, Any]], number: int) -> list[Mapping[str, Any]]:
    """Return images evenly spread over the set, empty ones only where the others do not do."""
    full = [index for index, image in enumerate(images) if _objects(image)]
    empty = [index for index, image in enumerate(images) if not _objects(image)]
    chosen = _spread(full, number)
    chosen += _spread(empty, number - len(chosen))
    return [images[index] for index in sorted(chosen)]


def _spread(indices: list[int], number: int) -> list[int]:
    if len(indices) <= number:
        return indices
    return [indices[i] for i in np.linspace(0, len(indices) - 1, number).round().astype(int)]


def _objects(image: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [a for a in image.get("annotations", []) if not a.get("iscrowd", 0)]


def _from_annotation(annotation: Mapping[str, Any]) -> Box:
    box = BoxMode.convert(list(annotation["bbox"]), annotation["bbox_mode"], BoxMode.XYXY_ABS)
    return annotation["category_id"], box, ""


def _from_prediction(record: Mapping[str, Any]) -> Box:
    box = BoxMode.convert(list(record["bbox"]), BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
    return record["category_id"], box, f"{record['score']:.2f}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _draw_pair(
    picture: Image.Image,
    title: str,
    objects: Sequence[Box],
    found: Sequence[Box],
    labels: Sequence[Label],
    palette: Sequence[Colour],
) -> Image.Image:
    scale = min(IMAGE_WIDTH / picture.width, MAX_IMAGE_HEIGHT / picture.height)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    picture = picture.resize(size, Image.Resampling.BICUBIC)
    pair = Image.new("RGB", (2 * IMAGE_WIDTH + PAIR_GAP, LINE + picture.height), PAPER)
    ImageDraw.Draw(pair).text((0, 2), title, fill=INK, font=load_font(DEFAULT_FONT, FONT_SIZE))
    for column, boxes in enumerate((objects, found)):
        panel = picture.copy()
        _draw_boxes(panel, boxes, scale, labels, palette)
        pair.paste(panel, (column * (IMAGE_WIDTH + PAIR_GAP), LINE))
    return pair


def _draw_boxes(
    panel: Image.Image,
    boxes: Sequence[Box],
    scale: float,
    labels: Sequence[Label],
    palette: Sequence[Colour],
) -> None:
    draw = ImageDraw.Draw(panel)
    corners = []
    for _, box, _ in boxes:
        left, right = sorted((box[0] * scale, box[2] * scale))
        top, bottom = sorted((box[1] * scale, box[3] * scale))
        corners.append((left, top, right, bottom))
        # A white seam, so that a box shows on a ground of its own colour.
        draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline="white", width=4)
    for (label, _, _), corner in zip(boxes, corners, strict=True):
        draw.rectangle(corner, outline=palette[label], width=2)
    for (label, _, note), (left, top, *_) in zip(boxes, corners, strict=True):
        text = f"{labels[label].text} {note}".strip()
        font = load_font(labels[label].font, LABEL_FONT_SIZE)
        width, height = draw.textlength(text, font=font) + 4, LABEL_FONT_SIZE + 3
        x = min(max(left, 0), panel.width - width)
        y = top - height if top >= height else max(top, 0)
        draw.rectangle((x, y, x + width, y + height), fill=palette[label])
        draw.text((x + 2, y), text, fill=_readable_on(palette[label]), font=font)


def _compose(pairs: Sequence[Image.Image], legend: Sequence[tuple[Label, Colour]]) -> Image.Image:
    """Put the pairs in up to two columns, below the legend."""
    num_columns = min(2, len(pairs))
    pair_width = pairs[0].width
    width = MARGIN + num_columns * (pair_width + MARGIN)
    placed = list(_place_legend(legend, width - MARGIN))
    top = MARGIN + LINE * (placed[-1][1] + 1)
    rows = [pairs[i : i + num_columns] for i in range(0, len(pairs), num_columns)]
    heights = [max(pair.height for pair in row) for row in rows]
    sheet = Image.new("RGB", (width, top + sum(heights) + MARGIN * (len(rows) + 1)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for x, line, label, colour in placed:
        y = MARGIN + line * LINE
        if colour:
            draw.rectangle((x, y + 3, x + SWATCH, y + 3 + SWATCH), fill=colour)
            x += SWATCH + 6
        draw.text((x, y), label.legend, fill=INK, font=load_font(label.font, FONT_SIZE))
    for row, height in zip(rows, heights, strict=True):
        top += MARGIN
        for column, pair in enumerate(row):
            sheet.paste(pair, (MARGIN + column * (pair_width + MARGIN), top))
        top += height
    return sheet


def _place_legend(
    legend: Sequence[tuple[Label, Colour]], right: int
) -> Iterator[tuple[int, int, Label, Colour | None]]:
    """Yield x, number of the line, label and colour of each entry, in lines that end at right."""
    x, line = MARGIN, 0
    head = "left: ground truth, right: detections"
    for label, colour in [(Label(head, head, DEFAULT_FONT), None), *legend]:
        font = load_font(label.font, FONT_SIZE)
        width = SWATCH + 26 + math.ceil(font.getlength(label.legend))
        if x + width > right and x > MARGIN:
            x, line = MARGIN, line + 1
        yield x, line, label, colour
        x += width


def _palette(number: int) -> list[Colour]:
    """Return a colour for each class, as different as their number allows."""
    for name in ("tab10", "tab20"):
        colours = colormaps[name].colors
        if number <= len(colours):
            break
    else:
        golden_ratio = (math.sqrt(5) - 1) / 2
        colours = [
            colorsys.hsv_to_rgb(i * golden_ratio % 1, 0.9, (0.95, 0.65)[i % 2])
            for i in range(number)
        ]
    return [tuple(round(255 * channel) for channel in colour) for colour in colours[:number]]


def _readable_on(colour: Colour) -> str:
    red, green, blue = colour
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"
