"""Bad inputs as data: what is given, the exit code, and what the one line on stderr says.

``python tests/bad_inputs.py`` tries each and writes the page ``docs/bad_inputs.md``.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import re
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from PIL import Image
from torch import nn
from torchvision.models import resnet34

from training import run_train_net

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/bad_inputs.md"
VERSIONS = " and ".join(
    f"{name} {'.'.join(version.split('.')[:2])}"
    for name, version in {"Python": sys.version, "PyTorch": torch.__version__}.items()
)
INFINITE = float("inf")
NOT_A_NUMBER = float("nan")


@dataclass
class Case:
    """A folder with a copy of five real images, an earlier run, and what a row makes of them."""

    folder: Path
    train: Any
    val: Any
    flags: list[str] = field(default_factory=list)
    opts: list[str] = field(default_factory=list)

    @classmethod
    def make(cls, folder: Path) -> Case:
        shutil.copytree(ROOT / "tests/fixtures/bccd_mini", folder / "data")
        (folder / "earlier").mkdir()
        (folder / "earlier/model_final.pth").write_bytes(b"an earlier run")
        train, val = (
            json.loads((folder / f"data/instances_{name}.json").read_text())
            for name in ("train_raw", "val")
        )
        base = ROOT / "tests/engine/tiny.yaml"
        (folder / "config.yaml").write_text(f"_BASE_: {base}\nMODEL: {{DEVICE: cpu}}\n")
        return cls(folder, train, val)

    def write(self, name: str, content: str | bytes) -> str:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    def save(self, name: str, content: Any) -> str:
        buffer = io.BytesIO()
        torch.save(content, buffer)
        return self.write(name, buffer.getvalue())

    @property
    def box(self) -> dict[str, Any]:
        """An annotation of the training data."""
        return self.train["annotations"][0]

    @property
    def image(self) -> Path:
        """The file of the first training image."""
        return self.folder / "data/images" / self.train["images"][0]["file_name"]

    def argv(self) -> list[str]:
        """Write the data, and return the command line."""
        data = self.folder / "data"
        opts = ["OUTPUT_DIR", str(self.folder / "run")]
        for split, content in (("TRAIN", self.train), ("TEST", self.val)):
            if not isinstance(content, bytes):
                content = json.dumps(content).encode()
            file = self.write(f"data/{split.lower()}.json", content)
            opts += [f"DATASETS.CUSTOM.{split}_JSON", file]
            opts += [f"DATASETS.CUSTOM.{split}_IMAGES", str(data / "images")]
        config = [] if "--config-file" in self.flags else self.config("config.yaml")
        return [*config, *self.flags, *opts, *self.opts]

    def config(self, name: str) -> list[str]:
        return ["--config-file", str(self.folder / name)]

    def contents(self) -> dict[str, str]:
        return {
            str(path.relative_to(self.folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(self.folder.rglob("*"))
            if path.is_file()
        }


Change = Callable[[Case], Any]


@dataclass(frozen=True)
class Row:
    """One bad input.

    Attributes:
        area: data, config, checkpoint or environment
        given: in words
        expected: is in the one line
        change: what is done to a :class:`Case`
        code: exit code
        starts: the training begins, so that it may write into its own folder
    """

    area: str
    given: str
    expected: str
    change: Change
    code: int = 2
    starts: bool = False


def opts(*values: Any) -> Change:
    return lambda case: case.opts.extend(map(str, values))


def timm(name: str, *more: Any) -> Change:
    """Take a model of timm as the backbone."""
    backbone = ("MODEL.BACKBONE.NAME", "build_retinanet_timm_fpn_backbone")
    return opts(*backbone, "MODEL.TIMM.NAME", name, *more)


def flags(*values: str) -> Change:
    return lambda case: case.flags.extend(values)


def box(**values: Any) -> Change:
    return lambda case: case.box.update(values)


def each_box(convert: Callable[..., list[float]]) -> Change:
    def change(case: Case) -> None:
        for annotation in case.train["annotations"]:
            annotation["bbox"] = convert(*annotation["bbox"])

    return change


def image_entry(**values: Any) -> Change:
    return lambda case: case.train["images"][0].update(values)


def config_file(content: str | bytes) -> Change:
    def change(case: Case) -> None:
        case.write("bad.yaml", content)
        case.flags += case.config("bad.yaml")

    return change


def train_json(content: bytes) -> Change:
    return lambda case: setattr(case, "train", content)


def drop(where: str, key: str | None = None) -> Change:
    """Empty a list of the training data, or remove a field of its first entry."""

    def change(case: Case) -> None:
        if key is None:
            case.train[where] = []
        else:
            del case.train[where][0][key]

    return change


def twice(where: str) -> Change:
    return lambda case: case.train[where].append(dict(case.train[where][0]))


def replace_image(write: Callable[[Path], Any]) -> Change:
    return lambda case: write(case.image)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def rotate(path: Path) -> None:
    with Image.open(path) as image:
        exif = image.getexif()
        exif[0x0112] = 6  # a quarter turn
        image.save(path, exif=exif)


def pixel_bomb(path: Path) -> None:
    """A PNG of a few bytes whose header says 60000 x 60000 pixels."""
    Image.new("L", (1, 1)).save(path, format="png")
    content = bytearray(path.read_bytes())
    content[16:24] = (60000).to_bytes(4, "big") * 2
    import zlib

    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    path.write_bytes(content)


def chain(*changes: Change) -> Change:
    return lambda case: [change(case) for change in changes]


def test_data(name: str) -> Change:
    """Test on a registered data set."""
    custom = ("DATASETS.CUSTOM.TEST_JSON", "", "DATASETS.CUSTOM.TEST_IMAGES", "")
    return opts(*custom, "DATASETS.TEST", f"('{name}',)")


def bccd_faults(refused: str) -> Change:
    """Real annotations with faults; images of their size stand for those that are not here."""

    def change(case: Case) -> None:
        picture = case.image
        file = ROOT / "tests/fixtures/bccd_faults/instances_raw.json"
        case.train = json.loads(file.read_text())
        if "MISSING" not in refused:
            for image in case.train["images"]:
                shutil.copy(picture, case.folder / "data/images" / image["file_name"])
        case.opts += [refused, "refuse"]

    return change


def labels(path: str, content: str, data_yaml: str = "names: [RBC]\n") -> Change:
    """Train on YOLO labels or Pascal VOC XML of the first image, with this file among them."""

    def change(case: Case) -> None:
        folder = case.folder / "labelled"
        for name in ("images", "JPEGImages"):
            (folder / name).mkdir(parents=True)
            shutil.copy(case.image, folder / name / "a.jpg")
        case.write("labelled/data.yaml", f"train: images\n{data_yaml}")
        case.write(f"labelled/{path}", content)
        given = folder if path.endswith(".xml") else folder / "data.yaml"
        case.opts += ["DATASETS.CUSTOM.TRAIN_JSON", str(given), "DATASETS.CUSTOM.TRAIN_IMAGES", ""]

    return change


DATA = [
    ("a json that is not there", "none.json", opts("DATASETS.CUSTOM.TRAIN_JSON", "none.json")),
    (
        "a folder without annotations",
        "is a folder without Pascal VOC annotations (*.xml)",
        opts("DATASETS.CUSTOM.TRAIN_JSON", "/"),
    ),
    (
        "a YOLO label of a class that is not listed",
        "annotation labels/a.txt:1 of image 1 (images/a.jpg): category_id 7 is not a category",
        labels("labels/a.txt", "7 0.5 0.5 0.2 0.2"),
    ),
    (
        "a damaged line in a YOLO label",
        "labels/a.txt, line 2: '0 0.5 0.5': a line is 'class cx cy w h'",
        labels("labels/a.txt", "0 0.5 0.5 0.2 0.2\n0 0.5 0.5\n"),
    ),
    (
        "YOLO labels in pixels",
        "numbers must be fractions of the image's width and height, not pixels",
        labels("labels/a.txt", "0 320 240 64 48"),
    ),
    (
        "a YOLO data.yaml without names",
        "names must be the list of class names, got None",
        labels("labels/a.txt", "", "nc: 1\n"),
    ),
    (
        "a YOLO data.yaml of another machine",
        "path is '/content/cells', which is no folder here",
        labels("labels/a.txt", "", "names: [RBC]\npath: /content/cells\n"),
    ),
    (
        "a YOLO data.yaml without labels",
        "none of the 1 training images has a label file, such as",
        labels("a.txt", ""),
    ),
    (
        "half a Pascal VOC XML",
        "Annotations/a.xml: is not valid XML: no element found",
        labels("Annotations/a.xml", "<annotation><object><name>RBC</name>"),
    ),
    (
        "a Pascal VOC object without a box",
        "object 1 has xmin, ymin, xmax and ymax None, None, None, None, which must be finite",
        labels("Annotations/a.xml", "<a><object><name>RBC</name></object></a>"),
    ),
    (
        "a Pascal VOC XML without its image",
        "b.jpg (image id 1) is missing",
        labels(
            "Annotations/b.xml",
            "<a><object><name>RBC</name><bndbox><xmin>1</xmin><ymin>1</ymin>"
            "<xmax>9</xmax><ymax>9</ymax></bndbox></object></a>",
        ),
    ),
    ("half a json", "is not JSON", train_json(b'{"images": [{"id": 1')),
    ("a json that is empty", "is not JSON", train_json(b"")),
    ("a json in another encoding", "is not JSON", train_json(b'{"images": "\xff\xfe"}')),
    ("a json nested 100,000 deep", "is not JSON", train_json(b"[" * 100_000)),
    ("a list in place of a COCO json", "no list of images", train_json(b"[1, 2]")),
    ("no images", "list of images is empty", drop("images")),
    ("no classes", "list of categories is empty", drop("categories")),
    ("no boxes", "nothing to learn", drop("annotations")),
    ("a box that is missing", "bbox is missing; it must be", drop("annotations", "bbox")),
    (
        "NaN in a box",
        "bbox is [nan, 1, 2, 3]; it must be 4 finite numbers",
        box(bbox=[NOT_A_NUMBER, 1, 2, 3]),
    ),
    ("infinity in a box", "bbox is [0, 0, inf, 3]", box(bbox=[0, 0, INFINITE, 3])),
    (
        "an inverted box",
        "bbox [90, 90, -20, 10] must have width and height >= 0",
        box(bbox=[90, 90, -20, 10]),
    ),
    ("a box of three numbers", "bbox is [1, 2, 3]", box(bbox=[1, 2, 3])),
    ("a box of text", "bbox is '1 2 3 4'", box(bbox="1 2 3 4")),
    (
        "boxes as corners",
        "set DATASETS.CUSTOM.BOX_FORMAT xyxy",
        each_box(lambda x, y, w, h: [x, y, x + w, y + h]),
    ),
    (
        "boxes as fractions of the image",
        "set DATASETS.CUSTOM.BOX_FORMAT relative_cxcywh",
        each_box(lambda x, y, w, h: [(x + w / 2) / 640, (y + h / 2) / 480, w / 640, h / 480]),
    ),
    (
        "a box as fractions among others in pixels",
        "boxes are of two formats: annotation 1182",
        box(bbox=[0.26, 0.37, 0.2, 0.29]),
    ),
    (
        "an unknown format of boxes",
        "BOX_FORMAT 'voc' is unknown; known: 'xywh', 'xyxy'",
        opts("DATASETS.CUSTOM.BOX_FORMAT", "voc"),
    ),
    (
        "objects all marked as crowd",
        "DATASETS.CHECK.CROWD object",
        lambda c: [a.update(iscrowd=1) for a in c.train["annotations"]],
    ),
    ("a class id that is not listed", "category_id 9 is not a category", box(category_id=9)),
    ("an image id that is not listed", "image_id 77 is not among the images", box(image_id=77)),
    ("an id that is a fraction", "id is 1.5; it must be an integer", box(id=1.5)),
    ("a crowd flag of 2", "iscrowd is 2; it must be 0 or 1", box(iscrowd=2)),
    ("an area below 0", "area is -1", box(area=-1)),
    ("a number of 400 digits", "it must be an integer", box(id=10**400)),
    ("two images of one id", "image id 80 is used by", twice("images")),
    ("two boxes of one id", "the id is used before", twice("annotations")),
    (
        "two classes of one name",
        "category name RBC is used 2 times",
        lambda c: c.train["categories"].append({"id": 7, "name": "RBC"}),
    ),
    (
        "a class without a name",
        "categories[0] (id 1): name is ''",
        lambda c: c.train["categories"][0].update(name=""),
    ),
    (
        "a class name with half of a surrogate pair",
        "it must be a text of valid Unicode",
        lambda c: c.train["categories"][0].update(name="R\ud800BC"),
    ),
    ("a width of 0", "images[0] (id 80): width is 0", image_entry(width=0)),
    (
        "a file name that climbs out",
        "leaves the image folder",
        image_entry(file_name="../../secret.jpg"),
    ),
    ("an absolute file name", "not an image", image_entry(file_name="/etc/passwd")),
    (
        "one file under two image ids",
        "DATASETS.CHECK.DUPLICATE_FILE merge",
        lambda c: c.train["images"][1].update(file_name=c.image.name),
    ),
    (
        "file names in another case",
        "MISNAMED_FILE mend",
        lambda c: [i.update(file_name=i["file_name"].upper()) for i in c.train["images"]],
    ),
    (
        "file names with a folder that the image folder has too",
        "`images/` is doubled",
        lambda c: [i.update(file_name=f"images/{i['file_name']}") for i in c.train["images"]],
    ),
    (
        "three folders for one json",
        "a folder for each file, or one for all",
        opts("DATASETS.CUSTOM.TRAIN_IMAGES", "[a, b, c]"),
    ),
    (
        "a class that is misspelt",
        "did you mean 'WBC'?",
        opts("DATASETS.CUSTOM.CLASSES", "[WCB]"),
    ),
    ("a URL as file name", "missing", image_entry(file_name="http://a.example/b.jpg")),
    ("a file name with a zero byte", "missing", image_entry(file_name="a\0.jpg")),
    (
        "an image that is missing",
        "BloodImage_00164.jpg (image id 80) is missing",
        replace_image(Path.unlink),
    ),
    ("half an image", "image file is truncated", replace_image(truncate)),
    ("text as an image", "not an image", replace_image(lambda path: path.write_text("text"))),
    ("an image of no bytes", "not an image", replace_image(lambda path: path.write_bytes(b""))),
    (
        "an image of 60000 x 60000 pixels in a few bytes",
        "INPUT.MAX_PIXELS allows 178,956,970",
        replace_image(pixel_bomb),
    ),
    (
        "an image of floats",
        "set INPUT.PIXEL_RANGE to [black, white]",
        replace_image(lambda path: Image.new("F", (640, 480)).save(path, format="tiff")),
    ),
    (
        "an image of another size than the json's",
        "IMAGE_SIZE drop leaves it out",
        image_entry(width=641),
    ),
    (
        "an image turned by EXIF, the json's size not",
        "IMAGE_SIZE drop leaves it out",
        replace_image(rotate),
    ),
    (
        "an image folder that is not there",
        "image folder none does not exist",
        opts("DATASETS.CUSTOM.TRAIN_IMAGES", "none"),
    ),
    (
        "a json without its image folder",
        "TRAIN_IMAGES is empty; set both",
        opts("DATASETS.CUSTOM.TRAIN_IMAGES", ""),
    ),
    (
        "other classes in the test data",
        "must have the same classes",
        lambda c: c.val["categories"][0].update(name="cell"),
    ),
    (
        "a class fewer in the test data",
        "must have the same classes",
        lambda c: (c.val["categories"].pop(), c.val.update(annotations=[])),
    ),
    ("20 classes for data of 3", "NUM_CLASSES is 20, but", opts("MODEL.RETINANET.NUM_CLASSES", 20)),
    ("a data set that is not registered", "which is not registered", test_data("mine")),
    ("other classes in a registered data set", "must have the same", test_data("coco_2017_val")),
    (
        "COCO without its files",
        "DETECTRON2_DATASETS",
        chain(
            flags("--eval-only"), opts("MODEL.WEIGHTS", "config.yaml"), test_data("coco_2017_val")
        ),
    ),
    (
        "BCCD's annotations as they came, faults refused",
        "annotation 2288",
        opts("DATASETS.CHECK.ZERO_AREA_BOX", "refuse"),
    ),
    (
        "BCCD's annotations as they came, with a cell labelled twice",
        "BloodImage_00020",
        bccd_faults("DATASETS.CHECK.DUPLICATE_BOX"),
    ),
    (
        "BCCD's annotations as they came, without their images",
        "missing",
        bccd_faults("DATASETS.CHECK.MISSING_IMAGE"),
    ),
    ("an unknown policy for faults", "refuse", opts("DATASETS.CHECK.INVERTED_BOX", "mend")),
    (
        "no data at all",
        "DATASETS.TRAIN is empty",
        opts("DATASETS.CUSTOM.TRAIN_JSON", "", "DATASETS.CUSTOM.TRAIN_IMAGES", ""),
    ),
]

CONFIG = [
    ("no config file", "--config-file is needed", lambda c: c.flags.extend(["--config-file", ""])),
    (
        "a config file that is not there",
        "No such file",
        lambda c: c.flags.extend(c.config("none.yaml")),
    ),
    (
        "a python tag that runs a program",
        "could not determine a constructor for the tag",
        config_file("OUTPUT_DIR: !!python/object/apply:os.system ['touch ran']"),
    ),
    ("a _BASE_ that is not there", "named by _BASE_", config_file("_BASE_: none.yaml")),
    (
        "a _BASE_ that is the file itself",
        "no file may be its own base",
        config_file("_BASE_: bad.yaml"),
    ),
    ("half a YAML file", "not valid YAML", config_file("SOLVER: {MAX_ITER: [1")),
    ("a picture as YAML", "not valid YAML", config_file(b"\x89PNG\r\n\x1a\n\x00\x00")),
    ("a list in place of keys", "must hold 'KEY: value' lines", config_file("- SOLVER")),
    ("a misspelt key", "did you mean SOLVER.MAX_ITER", opts("SOLVER.MAX_ITR", 5)),
    ("a group of keys as a value", "SOLVER is a group of keys", opts("SOLVER", 5)),
    ("KEY=VALUE", "write KEY VALUE, with a space", opts("SOLVER.MAX_ITER=5", 1)),
    ("a key without a value", "come as pairs KEY VALUE", opts("SOLVER.MAX_ITER")),
    ("a flag behind the keys", "must stand before the first", opts("SEED", 1, "--resume")),
    ("text for a number", "takes a value of type float", opts("SOLVER.BASE_LR", "fast")),
    ("a fraction for a whole number", "takes a value of type int", opts("SOLVER.MAX_ITER", 2.5)),
    (
        "NaN as learning rate",
        "BASE_LR must be finite",
        config_file("_BASE_: config.yaml\nSOLVER: {BASE_LR: .nan}"),
    ),
    (
        "an infinite weight decay",
        "WEIGHT_DECAY must be finite",
        opts("SOLVER.WEIGHT_DECAY", "1e999"),
    ),
    (
        "infinity inside a list",
        "SIZES must be finite",
        opts("MODEL.ANCHOR_GENERATOR.SIZES", "[[32, 1e999]]"),
    ),
    ("a batch of 0", "IMS_PER_BATCH must be a number in [1,", opts("SOLVER.IMS_PER_BATCH", 0)),
    (
        "a batch of 1,000,000,000",
        "IMS_PER_BATCH must be a number in [1,",
        opts("SOLVER.IMS_PER_BATCH", 10**9),
    ),
    ("a training of 0 iterations", "MAX_ITER must be a number in [1,", opts("SOLVER.MAX_ITER", 0)),
    (
        "a checkpoint every 0 iterations",
        "CHECKPOINT_PERIOD must be",
        opts("SOLVER.CHECKPOINT_PERIOD", 0),
    ),
    (
        "an unknown schedule",
        "SOLVER.LR_SCHEDULER_NAME 'WarmupPolyLR' is unknown; known: WarmupMultiStepLR",
        opts("SOLVER.LR_SCHEDULER_NAME", "WarmupPolyLR"),
    ),
    (
        "a learning rate that would rise",
        "falls from SOLVER.BASE_LR, above 0, to SOLVER.BASE_LR_END",
        opts("SOLVER.LR_SCHEDULER_NAME", "WarmupFlatCosineLR", "SOLVER.BASE_LR_END", 1),
    ),
    (
        "an unknown sampler",
        "Unknown training sampler: Shuffle",
        opts("DATALOADER.SAMPLER_TRAIN", "Shuffle"),
    ),
    (
        "a schedule scaled by two keys",
        "both scale the schedule",
        opts("SOLVER.REFERENCE_BATCH", 16, "SOLVER.REFERENCE_WORLD_SIZE", 1),
    ),
    (
        "3 images in 2 batches a step",
        "SOLVER.GRAD_ACCUM_STEPS, 2",
        opts("SOLVER.GRAD_ACCUM_STEPS", 2, "SOLVER.IMS_PER_BATCH", 3),
    ),
    (
        "a step of 0 batches",
        "GRAD_ACCUM_STEPS must be a number in [1,",
        opts("SOLVER.GRAD_ACCUM_STEPS", 0),
    ),
    (
        "an optimizer that is not known",
        "SOLVER.OPTIMIZER 'Adam' is unknown; known: 'SGD', 'AdamW'",
        opts("SOLVER.OPTIMIZER", "Adam"),
    ),
    (
        "a type of gradient clipping that is not known",
        "known: 'value', 'norm', 'full_model'",
        opts("SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "global"),
    ),
    (
        "a decay of the averaged weights that is out of range",
        "SOLVER.EMA.DECAY must be a number in [0, 1)",
        opts("SOLVER.EMA.DECAY", 1.0),
    ),
    (
        "a negative period of the film of the losses",
        "SOLVER.LOSS_FILM_PERIOD must be a number in [0, inf), got -1",
        opts("SOLVER.LOSS_FILM_PERIOD", -1),
    ),
    (
        "a film of the losses of compiled code",
        "SOLVER.LOSS_FILM_PERIOD 10 needs MODEL.COMPILE False",
        opts("SOLVER.LOSS_FILM_PERIOD", 10, "MODEL.COMPILE", True),
    ),
    (
        "a film of a loss that needs more than x_t",
        "SOLVER.LOSS_FILM_PERIOD 10 takes a loss of x_t",
        opts("SOLVER.LOSS_FILM_PERIOD", 10, "MODEL.RETINANET.CLS_LOSS.NAME", "varifocal"),
    ),
    (
        "an auto weight of a loss that needs more than x_t",
        "WEIGHT auto is for a loss of x_t; ghm_c takes a number",
        opts("MODEL.RETINANET.CLS_LOSS.WEIGHT", "auto", "MODEL.RETINANET.CLS_LOSS.NAME", "ghm_c"),
    ),
    (
        "a range of scales the wrong way round",
        "INPUT.SCALE_JITTER takes [least, most]",
        opts("INPUT.SCALE_JITTER", "[2.0, 0.5]"),
    ),
    (
        "alpha from the annotations with a class that has no box",
        "has none of no_box; give numbers",
        chain(
            lambda case: case.train["categories"].append({"id": 99, "name": "no_box"}),
            lambda case: case.val["categories"].append({"id": 99, "name": "no_box"}),
            opts("MODEL.RETINANET.CLS_LOSS.CLASS_ALPHA", "auto"),
        ),
    ),
    (
        "a best metric that is not evaluated",
        "(did you mean 'bbox/AP50'?); they are bbox/AP, bbox/AP50",
        opts("SOLVER.BEST.METRIC", "AP50", "TEST.EVAL_PERIOD", 2),
    ),
    (
        "a best model without evaluations",
        "set TEST.EVAL_PERIOD",
        opts("SOLVER.BEST.METRIC", "bbox/AP"),
    ),
    (
        "a best model without test data",
        "needs test data with annotations",
        chain(
            opts("DATASETS.CUSTOM.TEST_JSON", "", "DATASETS.CUSTOM.TEST_IMAGES", ""),
            opts("SOLVER.BEST.METRIC", "bbox/AP", "TEST.EVAL_PERIOD", 2),
        ),
    ),
    (
        "early stopping without a metric",
        "PATIENCE 2 needs the metric",
        opts("SOLVER.EARLY_STOP.PATIENCE", 2, "TEST.EVAL_PERIOD", 2),
    ),
    (
        "an unknown answer to NaN",
        "NON_FINITE.POLICY 'ignore' is unknown; known:",
        opts("SOLVER.NON_FINITE.POLICY", "ignore"),
    ),
    (
        "padding that the backbone cannot use",
        "SIZE_DIVISIBILITY 3 must be a multiple of the backbone's 32",
        opts("INPUT.SIZE_DIVISIBILITY", 3),
    ),
    (
        "no training size",
        "INPUT.MIN_SIZE_TRAIN must be short sides in pixels",
        opts("INPUT.MIN_SIZE_TRAIN", "()"),
    ),
    (
        "a training size below 0",
        "MIN_SIZE_TRAIN must be a number in [1,",
        opts("INPUT.MIN_SIZE_TRAIN", "(-600,)"),
    ),
    (
        "a range of one size",
        "must be two values using 'range'",
        opts("INPUT.MIN_SIZE_TRAIN_SAMPLING", "range"),
    ),
    (
        "a standard deviation of 0",
        "PIXEL_STD must be a number in (0,",
        opts("MODEL.PIXEL_STD", "[1.0, 0.0, 1.0]"),
    ),
    (
        "a mean of two channels",
        "PIXEL_MEAN needs 3 numbers",
        opts("MODEL.PIXEL_MEAN", "[1.0, 2.0]"),
    ),
    (
        "a range of grey levels that falls",
        "two numbers [black, white] that rise",
        opts("INPUT.PIXEL_RANGE", "[4095, 0]"),
    ),
    ("an unknown order of colours", "INPUT.FORMAT 'BRG' is unknown", opts("INPUT.FORMAT", "BRG")),
    (
        "an unknown architecture",
        "No object named 'Retina' found",
        opts("MODEL.META_ARCHITECTURE", "Retina"),
    ),
    (
        "an unknown backbone",
        "no model, optimizer or loader can be built",
        opts("MODEL.BACKBONE.NAME", "resnet"),
    ),
    ("a timm model that is misspelt", "did you mean mobileone_s2 or", timm("mobilenet_v2")),
    (
        "a timm model of another kind",
        "strides 16, 16, 16; the FPN needs 8, 16, 32",
        timm("test_vit"),
    ),
    (
        "a timm model for images of one size",
        "does not take images of any size",
        timm("visformer_tiny"),
    ),
    (
        "unknown norms in a timm model",
        "known: 'EvalBN'",
        timm("resnet18", "MODEL.TIMM.NORM", "SyncBN"),
    ),
    (
        "a ResNet of 19 layers",
        "no model, optimizer or loader can be built",
        opts("MODEL.RESNETS.DEPTH", 19),
    ),
    (
        "two billion sizes of anchors",
        "SCALES_PER_OCTAVE must be a number in [1, 64]",
        opts("MODEL.ANCHOR_GENERATOR.SCALES_PER_OCTAVE", 2**31),
    ),
    (
        "deformable convolutions without CUDA",
        "DEFORM_ON_PER_STAGE trains on CUDA devices alone",
        opts("MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.DEFORM_ON_PER_STAGE", [0, 0, 0, True]),
    ),
    ("an unknown loss", "focal_star", opts("MODEL.RETINANET.CLS_LOSS.NAME", "focale")),
    ("a gamma below 0", "FOCAL_LOSS_GAMMA", opts("MODEL.RETINANET.FOCAL_LOSS_GAMMA", -1)),
    (
        "alpha of a class that is not there",
        "'Platelet'",
        opts("MODEL.RETINANET.CLS_LOSS.CLASS_ALPHA", "{'Platelet': 0.5}"),
    ),
    ("an unknown selection", "ohem", opts("MODEL.RETINANET.SELECTION.NAME", "hard")),
    (
        "a threshold of scores above 1",
        "SCORE_THRESH_TEST must be a number in [0, 1]",
        opts("MODEL.RETINANET.SCORE_THRESH_TEST", 5),
    ),
]


class Code:
    """What unpickles as a call, as any object may."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


def weights(content: Callable[[Case], str], *more: str) -> Change:
    """Name in MODEL.WEIGHTS a file that ``content`` writes."""

    def change(case: Case) -> None:
        case.opts += ["MODEL.WEIGHTS", content(case)]
        case.flags += more

    return change


def timm_weights(content: Callable[[Case], str]) -> Change:
    """Name in MODEL.TIMM.WEIGHTS a file that ``content`` writes."""
    return lambda case: timm("resnet18", "MODEL.TIMM.WEIGHTS", content(case))(case)


_models: dict[str, dict[str, Any]] = {}


def model_weights(**opts: Any) -> dict[str, Any]:
    """The weights of the model of ``tiny.yaml``."""
    from retinanet_ext.engine import load_config
    from retinanet_ext.modeling import RetinaNetExt

    key = repr(opts)
    if key not in _models:
        pairs = [
            str(part) for name, value in opts.items() for part in (name.replace("__", "."), value)
        ]
        pairs += (
            [] if "MODEL__RETINANET__NUM_CLASSES" in opts else ["MODEL.RETINANET.NUM_CLASSES", "3"]
        )
        cfg = load_config(str(ROOT / "tests/engine/tiny.yaml"), [*pairs, "MODEL.DEVICE", "cpu"])
        _models[key] = RetinaNetExt(cfg).state_dict()
    return _models[key]


def torchvisions_resnet34() -> dict[str, Any]:
    """Zeros under the names and of the shapes of its weights."""
    with torch.device("meta"):
        weights = resnet34().state_dict()
    return {name: torch.zeros(()).expand(tensor.shape) for name, tensor in weights.items()}


def truncated_weights(case: Case) -> str:
    path = case.save("w.pth", {"model": model_weights()})
    truncate(Path(path))
    return path


def flipped_weights(case: Case) -> str:
    path = Path(case.save("w.pth", {"model": model_weights()}))
    content = bytearray(path.read_bytes())
    content[50:90] = bytes(byte ^ 0xFF for byte in content[50:90])
    path.write_bytes(content)
    return str(path)


def resume(**files: str | bytes) -> Change:
    """Files in OUTPUT_DIR and --resume."""

    def change(case: Case) -> None:
        case.flags.append("--resume")
        for name, content in files.items():
            case.write(f"run/{name.replace('__', '.')}", content)

    return change


def resume_from(content: Callable[[], Any], *more: str) -> Change:
    def change(case: Case) -> None:
        case.flags.append("--resume")
        case.save("run/model_0000001.pth", content())
        case.write("run/last_checkpoint", "model_0000001.pth")
        case.opts += more

    return change


CHECKPOINT = [
    ("weights that are not there", "which is not a file", opts("MODEL.WEIGHTS", "none.pth")),
    ("a folder as weights", "which is not a file", opts("MODEL.WEIGHTS", "/")),
    ("weights of no bytes", "are damaged", weights(lambda c: c.write("w.pth", b""))),
    ("text as weights", "are damaged", weights(lambda c: c.write("w.pth", "weights"))),
    ("half a weights file", "are damaged", weights(truncated_weights)),
    ("weights with flipped bytes", "are damaged", weights(flipped_weights)),
    (
        "a .pth that runs code",
        "Python objects other than tensors",
        weights(lambda c: c.save("w.pth", {"model": Code()})),
    ),
    (
        "a .pkl that runs code",
        "Python objects other than tensors",
        weights(lambda c: c.write("w.pkl", pickle.dumps({"model": Code()}))),
    ),
    (
        "a pickled module",
        "Python objects other than tensors",
        weights(lambda c: c.save("w.pth", nn.Linear(2, 2))),
    ),
    ("a .pkl of text", "are damaged", weights(lambda c: c.write("w.pkl", "weights"))),
    ("a .pkl of a list", "w.pkl", weights(lambda c: c.write("w.pkl", pickle.dumps([1, 2])))),
    ("a list in place of tensors by name", "w.pth", weights(lambda c: c.save("w.pth", [1, 2]))),
    (
        "a number in place of the tensors",
        "not a dict of tensors by name",
        weights(lambda c: c.save("w.pth", {"model": 3})),
    ),
    (
        "text in place of a tensor",
        "w.pth do not load",
        weights(
            lambda c: c.save("w.pth", {"model": model_weights() | {"head.cls_score.bias": "text"}})
        ),
    ),
    (
        "weights of another model",
        "hold no tensor of this model",
        weights(lambda c: c.save("w.pth", nn.Linear(2, 2).state_dict())),
    ),
    (
        "a backbone of another depth",
        "torchvision's or timm's ResNet (ResNet-34), but the config's model is ResNet-18",
        weights(lambda c: c.save("w.pth", torchvisions_resnet34())),
    ),
    (
        "weights of 4 classes for 3",
        "head.cls_score.weight is (36, 64, 3, 3), the model's (27, 64, 3, 3)",
        weights(lambda c: c.save("w.pth", model_weights(MODEL__RETINANET__NUM_CLASSES=4))),
    ),
    (
        "weights of classes of other names",
        "are of 3 classes (cat, dog, fox), but the data have 3 classes (RBC, WBC, Platelets)",
        weights(
            lambda c: c.save(
                "w.pth", {"model": model_weights(), "class_names": ["cat", "dog", "fox"]}
            )
        ),
    ),
    (
        "weights of another width",
        "have other shapes",
        weights(lambda c: c.save("w.pth", model_weights(MODEL__FPN__OUT_CHANNELS=32))),
    ),
    (
        "a timm backbone's weights that are not there",
        "for timm's own download write pretrained",
        timm("resnet18", "MODEL.TIMM.WEIGHTS", "none.pth"),
    ),
    (
        "a timm backbone's weights of another model",
        "of resnet18 unfilled: conv1.weight, bn1.weight",
        timm_weights(lambda c: c.save("w.pth", nn.Linear(2, 2).state_dict())),
    ),
    (
        "text as a timm backbone's weights",
        "cannot be read as timm's weights",
        timm_weights(lambda c: c.write("w.pth", "weights")),
    ),
    ("no weights to evaluate", "--eval-only needs weights", flags("--eval-only")),
    (
        "weights of a deeper model to evaluate",
        "another architecture's",
        weights(lambda c: c.save("w.pth", model_weights(MODEL__RESNETS__DEPTH=34)), "--eval-only"),
    ),
    (
        "a backbone alone to evaluate",
        "nothing is evaluated with random layers",
        weights(
            lambda c: c.save(
                "w.pth", {k: v for k, v in model_weights().items() if "bottom_up" in k}
            ),
            "--eval-only",
        ),
    ),
    ("no checkpoint to evaluate", "which holds none", flags("--eval-only", "--resume")),
    ("a checkpoint that is gone", "last_checkpoint names", resume(last_checkpoint="model_9.pth")),
    ("last_checkpoint of no bytes", "last_checkpoint", resume(last_checkpoint="")),
    (
        "last_checkpoint that is no text",
        "last_checkpoint is damaged: no checkpoint is left",
        resume(last_checkpoint=b"\xff\xfe\x00\x01"),
    ),
    (
        "a checkpoint that is not named",
        "last_checkpoint is missing",
        resume(model_0000007__pth="earlier"),
    ),
    (
        "the only checkpoint is damaged",
        "model_0000001.pth",
        resume(last_checkpoint="model_0000001.pth", model_0000001__pth=b"PK half"),
    ),
    (
        "resuming another width",
        "the config the run was started with",
        resume_from(
            lambda: {
                "model": model_weights(MODEL__FPN__OUT_CHANNELS=32),
                "iteration": 1,
                "trainer": {},
            }
        ),
    ),
    (
        "resuming other classes",
        "the config the run was started with",
        resume_from(
            lambda: {
                "model": model_weights(MODEL__RETINANET__NUM_CLASSES=4),
                "iteration": 1,
                "trainer": {},
            }
        ),
    ),
    (
        "resuming weights without a trainer",
        "model_0000001.pth",
        resume_from(lambda: {"model": model_weights()}),
    ),
    (
        "resuming another optimizer's state",
        "model_0000001.pth",
        resume_from(
            lambda: {
                "model": model_weights(),
                "iteration": 1,
                "trainer": {
                    "iteration": 1,
                    "_trainer": {
                        "iteration": 1,
                        "optimizer": torch.optim.SGD(
                            nn.Linear(2, 2).parameters(), 0.1
                        ).state_dict(),
                    },
                    "hooks": {},
                },
            }
        ),
    ),
]


def variables(**values: str) -> Change:
    return lambda case: os.environ.update(values)


def torchrun(**values: str) -> Change:
    """The variables that torchrun gives the only process of a job, except for some."""
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    return variables(**ranks | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"} | values)


def full_disk(case: Case) -> None:
    """No file may grow beyond a megabyte; Python ignores the signal and sees an error."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))


ENVIRONMENT = [
    (
        "an OUTPUT_DIR that is a file",
        "File exists",
        lambda c: c.opts.extend(["OUTPUT_DIR", c.write("file", "")]),
    ),
    ("an OUTPUT_DIR that cannot be made", "OUTPUT_DIR /proc/run", opts("OUTPUT_DIR", "/proc/run")),
    ("an OUTPUT_DIR below a file", "Not a directory", opts("OUTPUT_DIR", "/dev/null/run")),
    ("an OUTPUT_DIR of 300 letters", "File name too long", opts("OUTPUT_DIR", "x" * 300)),
    (
        "an OUTPUT_DIR with an earlier run",
        "holds an earlier run (model_final.pth)",
        lambda c: c.opts.extend(["OUTPUT_DIR", str(c.folder / "earlier")]),
    ),
    ("a device that is none", "is not a device", opts("MODEL.DEVICE", "gpu")),
    (
        "CUDA graphs without CUDA",
        "MODEL.CUDA_GRAPHS True trains on CUDA devices alone",
        opts("MODEL.COMPILE", True, "MODEL.CUDA_GRAPHS", True),
    ),
    (
        "float16 without CUDA",
        "float16 trains on CUDA devices alone",
        opts("SOLVER.AMP.ENABLED", True),
    ),
    ("0 processes", "--num-gpus must be at least 1", flags("--num-gpus", "0")),
    ("two machines without an address", "needs --dist-url tcp://", flags("--num-machines", "2")),
    (
        "machine 2 of 2",
        "--machine-rank must be from 0 to 1",
        flags("--num-machines", "2", "--machine-rank", "2"),
    ),
    (
        "half of torchrun's variables",
        "LOCAL_WORLD_SIZE",
        variables(LOCAL_RANK="0"),
    ),
    (
        "a sample set in a folder that cannot be written",
        "DETECTRON2_DATASETS",
        chain(
            variables(DETECTRON2_DATASETS="/proc/none"),
            opts("DATASETS.CUSTOM.TRAIN_JSON", "", "DATASETS.CUSTOM.TRAIN_IMAGES", ""),
            opts("DATASETS.TRAIN", "('retinanet_ext_sample_train',)"),
        ),
    ),
]

STARTS = [
    ("environment", "a disk that is full at the checkpoint", "cannot be written", full_disk, 2),
    (
        "config",
        "a learning rate of 1e6",
        "diverged at iteration",
        opts("SOLVER.BASE_LR", 1e6, "SOLVER.MAX_ITER", 20),
        3,
    ),
]

ROWS = [
    Row(area, given, expected, change)
    for area, rows in {
        "data": DATA,
        "config": CONFIG,
        "checkpoint": CHECKPOINT,
        "environment": ENVIRONMENT,
    }.items()
    for given, expected, change in rows
] + [
    Row(area, given, expected, change, code, starts=True)
    for area, given, expected, change, code in STARTS
]


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """Undo what rows do to this process."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    place = Path.cwd()
    try:
        with mock.patch.dict(os.environ):
            yield
    finally:
        os.chdir(place)
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def attempt(row: Row, folder: Path) -> str:
    """Give a bad input to the command line, and return its one line, without the folder's name.

    What differs from the row's promises is an assertion.
    """
    case = Case.make(folder)
    with restored():
        os.chdir(folder)
        os.environ.pop("DETECTRON2_DATASETS", None)  # which lines would name
        row.change(case)
        argv = case.argv()
        before = case.contents()
        output = io.StringIO()
        with contextlib.redirect_stderr(output):
            code = run_train_net(*argv)
    after = case.contents()
    text = output.getvalue()
    assert code == row.code, (code, text)
    assert "Traceback" not in text
    _, _, line = text.strip().splitlines()[-1].partition(": error: ")
    assert row.expected in line, line
    assert {path: after.get(path) for path in before} == before, "an earlier file was changed"
    if not row.starts:
        assert after == before, f"written: {after.keys() - before.keys()}"
    assert not (folder / "ran").exists(), "code in an input ran"
    return line.replace(f"{folder}/", "").replace(str(folder), ".").replace(f"{ROOT}/", "")


MEASURED = re.compile(
    r"(?<=, and )\S+(?= GB are free)"
    r"|(?<=after )\S+(?= seconds \()"
    r"|(?<=diverged at iteration ).*?(?= on rank)"
    r"|(?<=weights reach ).*?(?=;)"
    r"|(?<=learning rate ).*?(?= times)"
    r"|(?<=/iter_)\d+"
)
"""What the next run or machine says otherwise: space, time, the numbers of a diverged model."""


def table_line(row: Row, line: str) -> str:
    def cell(text: str) -> str:
        return text.replace("|", "\\|").replace("<", "&lt;")

    return f"| {row.area} | {cell(row.given)} | {row.code} | {cell(MEASURED.sub('…', line))} |"


def page(lines: dict[Row, str]) -> str:
    table = [table_line(row, line) for row, line in lines.items()]
    return "\n".join(
        [
            "# Bad inputs",
            "",
            f"{len(table)} inputs that cannot be used, each tried by",
            "`tests/test_bad_inputs.py`: `train_net.py` ends with the exit code and the one line",
            "on stderr that are named here, without a traceback. Lost was nothing: no file that",
            "was there before is changed or gone; where the training had not begun, no file is",
            "new either. A number that was measured is left out (…). This page is written by",
            f"`python tests/bad_inputs.py`, with {VERSIONS}; others may word",
            "their own messages differently.",
            "",
            "| area | given | exit code | said |",
            "|---|---|---|---|",
            *table,
            "",
        ]
    )


if __name__ == "__main__":
    lines, failed = {}, 0
    for row in ROWS:
        with tempfile.TemporaryDirectory() as folder:
            try:
                lines[row] = attempt(row, Path(folder))
            except BaseException as error:
                failed += 1
                print(f"{row.area}: {row.given}: {type(error).__name__}: {error}", file=sys.stderr)
    if failed:
        sys.exit(f"{failed} of {len(ROWS)} rows are not as promised; nothing is written")
    PAGE.write_text(page(lines))
    print(f"{PAGE}: {len(lines)} rows")
