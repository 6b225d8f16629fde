"""A picture of detections beside the ground truth, drawn by Detectron2's ``Visualizer``."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.structures import BoxMode
from detectron2.utils.colormap import colormap
from detectron2.utils.visualizer import Visualizer
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad
from torchvision.utils import make_grid, save_image

from retinanet_ext.data.coco_json import printable
from retinanet_ext.data.images import ImageReader, explain_unreadable
from retinanet_ext.evaluation.fonts import choose_fonts

# All in pixels.
IMAGE_WIDTH, MAX_IMAGE_HEIGHT, TITLE_HEIGHT, GAP = 640, 800, 22, 4
FONT_SIZE = 7  # points

COLORS = colormap(rgb=True, maximum=1)
"""Detectron2's colours, one per class; they repeat after 74 classes."""

# Class, box (XYXY in pixels of the stored image), text.
Box = tuple[int, Sequence[float], str]

logger = logging.getLogger(__name__)


def draw_detection_grid(
    dataset_dicts: Sequence[Mapping[str, Any]],
    predictions: Sequence[Mapping[str, Any]],
    class_names: Sequence[str],
    path: str | Path,
    *,
    num_images: int,
    score_thresh: float,
    reader: ImageReader | None = None,
) -> bool:
    """Draw images twice, with the ground truth at the left and the detections at the right.

    The images are spread evenly over the data set; images with objects come first. Crowd regions
    are not drawn. Images that cannot be read are left out, and a warning names them.

    Args:
        dataset_dicts: the images in Detectron2's format
        predictions: records as in ``COCOEvaluator``'s ``coco_instances_results.json`` (boxes
            XYWH in pixels), except that ``category_id`` is an index of ``class_names``
        class_names: K names
        path: PNG file to write; its folder is created
        num_images: maximum number of images, above 0
        score_thresh: lowest score of the detections that are drawn
        reader: reads images of any format; by default as Detectron2 does

    Returns:
        whether the file was written; it is not if no image can be read

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     Image.new("RGB", (60, 40)).save(f"{folder}/1.png")
        ...     images = [{"file_name": f"{folder}/1.png", "image_id": 1}]
        ...     found = [{"image_id": 1, "category_id": 0, "bbox": [9, 9, 20, 20], "score": 0.9}]
        ...     path = f"{folder}/grid.png"
        ...     _ = draw_detection_grid(
        ...         images, found, ["cell"], path, num_images=1, score_thresh=0.3
        ...     )
        ...     Image.open(path).size[0]
        1292
    """
    detections = defaultdict(list)
    for record in sorted(predictions, key=lambda record: record["score"]):  # the best on top
        if record["score"] >= score_thresh and all(map(math.isfinite, record["bbox"])):
            box = BoxMode.convert(list(record["bbox"]), BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
            label = record["category_id"]
            detections[record["image_id"]].append((label, box, f" {record['score']:.2f}"))
    names, families = choose_fonts(class_names)
    panels = []
    for image, picture in _read_some(dataset_dicts, num_images, reader):
        objects = [(a["category_id"], _xyxy(a), "") for a in _objects(image)]
        found = detections[image["image_id"]]
        for boxes, title in (
            (objects, f"image {image['image_id']}: ground truth ({len(objects)})"),
            (found, f"detections with score >= {score_thresh:.2f} ({len(found)})"),
        ):
            panels.append(draw_panel(picture, title, boxes, names, families))
    if panels:
        save_grid(panels, Path(path))
    return bool(panels)


def draw_ground_truth(
    dataset_dicts: Sequence[Mapping[str, Any]],
    class_names: Sequence[str],
    folder: Path,
    *,
    num_images: int,
    reader: ImageReader | None = None,
) -> list[Path]:
    """Draw images with their ground truth, each into a PNG file of its own.

    Args:
        dataset_dicts, class_names, num_images, reader: as for :func:`draw_detection_grid`
        folder: folder of the files, which is created

    Returns:
        the files of the images that can be read
    """
    names, families = choose_fonts(class_names)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number, (image, picture) in enumerate(_read_some(dataset_dicts, num_images, reader)):
        objects: list[Box] = [(a["category_id"], _xyxy(a), "") for a in _objects(image)]
        title = f"image {image['image_id']}: {Path(image['file_name']).name} ({len(objects)})"
        panel = draw_panel(picture, printable(title), objects, names, families)
        files.append(folder / f"{number}.png")
        save_image(panel, files[-1])
    return files


def read_picture(reader: ImageReader, file: str) -> Image.Image | None:
    """Return an image as RGB; None, after a warning, if it cannot be read."""
    try:
        return Image.fromarray(replace(reader, image_format="RGB")(file))
    except Exception as error:  # Pillow's decoders raise many types
        logger.warning("%s is not drawn: %s", printable(file), explain_unreadable(error))
        return None


def save_grid(panels: Sequence[Tensor], path: Path) -> None:
    """Write panels to a file, two or four per row, padded with white to the same height."""
    height = max(panel.shape[1] for panel in panels)
    panels = [pad(panel, (0, 0, 0, height - panel.shape[1]), value=1.0) for panel in panels]
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = 2 if len(panels) <= 4 else 4
    save_image(make_grid(panels, nrow=columns, padding=GAP, pad_value=1.0), path, format="png")


def _read_some(
    images: Sequence[Mapping[str, Any]], number: int, reader: ImageReader | None
) -> Iterator[tuple[Mapping[str, Any], Image.Image]]:
    """Yield the chosen images that can be read, with their pictures."""
    for image in _choose(images, number):
        picture = read_picture(reader or ImageReader(), image["file_name"])
        if picture is not None:
            yield image, picture


def _choose(images: Sequence[Mapping[str, Any]], number: int) -> list[Mapping[str, Any]]:
    """Return images spread evenly over the data set, empty ones only where others run out."""
    chosen: list[int] = []
    for empty in (False, True):
        indices = [i for i, image in enumerate(images) if (not _objects(image)) == empty]
        count = min(len(indices), number - len(chosen))
        spread = np.linspace(0, len(indices) - 1, count).round().astype(int)
        chosen += [indices[i] for i in spread]
    return [images[index] for index in sorted(chosen)]


def _objects(image: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [a for a in image.get("annotations", []) if not a.get("iscrowd", 0)]


def _xyxy(annotation: Mapping[str, Any]) -> Sequence[float]:
    return BoxMode.convert(list(annotation["bbox"]), annotation["bbox_mode"], BoxMode.XYXY_ABS)


def draw_panel(
    picture: Image.Image,
    title: str,
    boxes: Sequence[Box],
    names: Sequence[str],
    families: Sequence[str],
) -> Tensor:
    """Return a picture with its title and boxes, (3, TITLE_HEIGHT + H, IMAGE_WIDTH) in [0, 1].

    Args:
        picture: RGB
        title: text above the picture
        boxes: class, XYXY in pixels of the picture, and text after the class name, of each
        names: class names, from :func:`~retinanet_ext.evaluation.fonts.choose_fonts`
        families: their fonts, from the same
    """
    scale = min(IMAGE_WIDTH / picture.width, MAX_IMAGE_HEIGHT / picture.height)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    canvas = Image.new("RGB", (IMAGE_WIDTH, TITLE_HEIGHT + height), "white")
    canvas.paste(picture.resize((width, height), Image.Resampling.BICUBIC), (0, TITLE_HEIGHT))
    visualizer = Visualizer(np.asarray(canvas))
    axes = visualizer.output.ax

    def write(text: str, position: tuple[float, float], color: Any, align: str, size: int) -> None:
        visualizer.draw_text(
            text, position, color=color, horizontal_alignment=align, font_size=size
        )
        axes.texts[-1].set(fontfamily=families, parse_math=False)

    write(title, (2, 2), "white", "left", FONT_SIZE + 3)
    for label, box, note in boxes:
        left, top, right, bottom = np.clip(np.multiply(box, scale), 0, (width, height) * 2)
        top, bottom = top + TITLE_HEIGHT, bottom + TITLE_HEIGHT
        color = COLORS[label % len(COLORS)]
        visualizer.draw_box((left, top, right, bottom), alpha=1.0, edge_color=color)
        axes.patches[-1].set_linewidth(1.5)
        x, align = (left, "left") if left < 0.8 * width else (right, "right")
        write(names[label] + note, (x, top), (1 + color) / 2, align, FONT_SIZE)
    return torch.from_numpy(visualizer.output.get_image().copy()).permute(2, 0, 1) / 255
