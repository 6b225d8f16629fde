"""Eight images with one box each, written as annotation tools write them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image

from retinanet_ext import add_retinanet_ext_config
from retinanet_ext.data import ValidationResult, prepare_datasets
from retinanet_ext.data.coco_json import AnnotationFile
from retinanet_ext.data.findings import DEFAULT_POLICY
from retinanet_ext.data.images import ImageReader
from retinanet_ext.data.validation import check_data_set, check_file
from retinanet_ext.engine import load_config
from retinanet_ext.errors import InputError

SMALL = Path(__file__).parents[2] / "configs" / "small_R18_FPN.yaml"
WIDTH, HEIGHT = 80, 60
CLASSES = ("cat", "dog")
# Of the size and at the places that objects have: at the borders too.
BOXES = [
    *([2, 3, 24, 20], [50, 5, 28, 18], [10, 35, 22, 24], [55, 38, 24, 20]),
    *([30, 20, 26, 22], [1, 18, 16, 30], [60, 2, 19, 33], [25, 40, 30, 19]),
]
ALL = [(f"a{n}.jpg", [(n % 2, box)]) for n, box in enumerate(BOXES, start=1)]
"""What is trained on where nothing is at fault."""


def picture(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


class Eight:
    """A folder with ``images/`` and a json; a test changes ``content`` or the files."""

    def __init__(self, folder: Path, names: str = "a{}.jpg", *, seed: int = 0) -> None:
        self.folder = folder
        self.images = folder / "images"
        self.images.mkdir(parents=True)
        self.content: dict[str, Any] = {"info": {}, "images": [], "annotations": []}
        self.content["categories"] = [
            {"id": number, "name": name} for number, name in enumerate(CLASSES, start=1)
        ]
        for number, box in enumerate(BOXES, start=1):
            name = names.format(number)
            picture(100 * seed + number).save(self.images / name, format="JPEG")
            self.content["images"].append(
                {"id": number, "file_name": name, "width": WIDTH, "height": HEIGHT}
            )
            self.content["annotations"].append(
                {
                    "id": number,
                    "image_id": number,
                    "category_id": 1 + number % 2,
                    "bbox": list(map(float, box)),
                    "area": float(box[2] * box[3]),
                    "iscrowd": 0,
                }
            )

    @property
    def json(self) -> Path:
        return self.folder / "instances.json"

    def rename(self, spell: Callable[[str], str]) -> None:
        """Change the file names in the json."""
        for image in self.content["images"]:
            image["file_name"] = spell(image["file_name"])

    def move_into(self, folder: str) -> None:
        """Move the files into a folder below their own."""
        files = list(self.images.iterdir())
        (self.images / folder).mkdir()
        for file in files:
            file.rename(self.images / folder / file.name)

    def write(self, encoding: str = "utf-8") -> Eight:
        self.json.write_bytes(json.dumps(self.content).encode(encoding))
        return self

    def opts(self, split: str = "TRAIN") -> list[str]:
        """Write the json, and return the keys that name it."""
        if not self.json.exists() or json.loads(self.json.read_bytes()) != self.content:
            self.write()
        key = f"DATASETS.CUSTOM.{split}"
        return [f"{key}_JSON", str(self.json), f"{key}_IMAGES", str(self.images)]

    def check(self, box_format: str = "xywh", **policy: str) -> ValidationResult:
        return check(self.content, self.images, box_format, **policy)

    def messages(self, *args: str, **policy: str) -> dict[str, list[str]]:
        """Check the data and return kind of finding -> messages."""
        found = self.check(*args, **policy).by_kind()
        return {kind: [finding.message for finding in group] for kind, group in found.items()}


def check(
    content: dict[str, Any], image_root: Path, box_format: str = "xywh", **policy: str
) -> ValidationResult:
    """Check the content of a json, which stays as it is."""
    before = copy.deepcopy(content)
    policy = {**DEFAULT_POLICY, **policy}
    file = AnnotationFile("mine.json", str(image_root), content, box_format)
    checked = check_data_set(check_file(file, policy, reader=ImageReader()))
    assert str(content) == str(before)  # NaN is not equal to itself
    return checked


def config(*opts: Any) -> CfgNode:
    cfg = get_cfg()
    add_retinanet_ext_config(cfg)
    cfg.merge_from_list([copy.deepcopy(opt) for opt in opts])
    return cfg


def small(*opts: Any) -> CfgNode:
    """Return the config of the small detector."""
    return load_config(str(SMALL), [str(opt) for opt in opts])


def prepare(*opts: Any, eval_only: bool = False) -> CfgNode:
    """Check and register the data that keys name."""
    cfg = config(*opts)
    prepare_datasets(cfg, eval_only=eval_only)
    return cfg


def refusal(*opts: Any) -> str:
    """Return the one line by which training refuses data."""
    with pytest.raises(InputError) as error:
        prepare(*opts)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def trained_on(name: str = "custom_train") -> list[tuple[str, list[tuple[int, list[float]]]]]:
    """Return the file of each image and its boxes with their classes, and see that it is there."""
    records = DatasetCatalog.get(name)
    assert all((record["width"], record["height"]) == (WIDTH, HEIGHT) for record in records)
    assert all(Path(record["file_name"]).is_file() for record in records)
    return [
        (
            Path(record["file_name"]).name,
            [(a["category_id"], a["bbox"]) for a in record["annotations"]],
        )
        for record in records
    ]


def evaluate(folder: Path, name: str = "custom_test", *, shift: float = 0) -> dict[str, float]:
    """Return AP by class of the ground truth as detections, shifted by up to so many pixels."""
    evaluator = COCOEvaluator(name, output_dir=str(folder))
    evaluator.reset()
    for record in DatasetCatalog.get(name):
        objects = [a for a in record["annotations"] if not a["iscrowd"]]
        generator = np.random.default_rng(len(objects))
        boxes = torch.tensor([a["bbox"] for a in objects]).reshape(-1, 4)
        boxes[:, :2] += torch.from_numpy(generator.uniform(-shift, shift, (len(boxes), 2))).float()
        instances = Instances(
            (record["height"], record["width"]),
            pred_boxes=Boxes(BoxMode.convert(boxes, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)),
            scores=torch.from_numpy(generator.uniform(0, 1, len(boxes))),
            pred_classes=torch.tensor([a["category_id"] for a in objects]).long(),
        )
        evaluator.process([record], [{"instances": instances}])
    return evaluator.evaluate()["bbox"]


def perfect_ap(folder: Path) -> float:
    """Return the AP of detections that equal the ground truth."""
    return evaluate(folder)["AP"]
