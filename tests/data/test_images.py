"""Files of all kinds: what they are read as, and what is said where they cannot be."""

from __future__ import annotations

import logging
import multiprocessing
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.data.detection_utils import read_image
from PIL import Image

from retinanet_ext.data import CheckedDatasetMapper, prepare_datasets
from retinanet_ext.data.findings import KINDS
from retinanet_ext.data.image_files import inspect_image
from retinanet_ext.data.images import (
    ImageReader,
    bit_depth,
    measure_pixel_range,
    parse_pixel_range,
)
from retinanet_ext.data.validation_report import check_data
from retinanet_ext.engine import load_config
from retinanet_ext.errors import InputError

from .conftest import BCCD_MINI, Bccd

PHOTOS = sorted((BCCD_MINI / "images").glob("*.jpg"))
FORMATS = ["BGR", "RGB", "L", "YUV-BT.601", "HSV", "YCbCr", "LAB", "RGBA", "CMYK"]
GREY = np.asarray(Image.open(PHOTOS[0]).convert("L").resize((64, 48)))
GREY16 = GREY.astype(np.uint16) * 257


def big_endian(path: Path) -> None:
    Image.frombytes("I;16B", GREY.shape[::-1], GREY16.astype(">u2").tobytes()).save(path)


def write_frames(path: Path, number: int = 3, image: Image.Image | None = None) -> Path:
    frames = [image or Image.fromarray(np.roll(GREY, i)) for i in range(number)]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    return path


def turned(path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    Image.open(PHOTOS[0]).save(path, exif=exif)


ORDINARY: dict[str, Callable[[Path], Any]] = {
    "turned.jpg": turned,
    "grey.png": lambda path: Image.fromarray(GREY).save(path),
    "alpha.png": lambda path: Image.open(PHOTOS[0]).convert("RGBA").save(path),
    "palette.png": lambda path: Image.open(PHOTOS[0]).quantize(16).save(path, transparency=3),
    "bits.png": lambda path: Image.fromarray(GREY > 99).save(path),
    "frames.gif": write_frames,
    "pages.tif": write_frames,
    "a JPEG.png": lambda path: path.write_bytes(PHOTOS[0].read_bytes()),
    "inks.jpg": lambda path: Image.open(PHOTOS[0]).convert("CMYK").save(path),
}


@pytest.mark.parametrize("image_format", FORMATS)
def test_images_of_8_bits_are_detectron2s(image_format: str, tmp_path: Path) -> None:
    files = PHOTOS[:2]
    for name, write in ORDINARY.items():
        write(tmp_path / name)
        files.append(tmp_path / name)
    for file in files:
        expected = read_image(file, format=image_format)
        for pixel_range in (None, (0.0, 4095.0)):
            found = ImageReader(image_format, pixel_range)(file)
            assert found.dtype == expected.dtype and np.array_equal(found, expected), file.name


# What is written, and whether its depth says what white is.
DEEP: dict[str, tuple[Callable[[Path], Any], bool]] = {
    "16.png": (lambda path: Image.fromarray(GREY16).save(path), True),
    "16.tif": (lambda path: Image.fromarray(GREY16).save(path), True),
    "16 big-endian.tif": (big_endian, True),
    "16.pgm": (lambda path: Image.fromarray(GREY16).save(path), True),
    "16 colour.png": (lambda path: cv2.imwrite(str(path), np.dstack([GREY16] * 3)), True),
    "16 colour.tif": (lambda path: cv2.imwrite(str(path), np.dstack([GREY16] * 3)), True),
    "signed.tif": (lambda path: cv2.imwrite(str(path), (GREY16 // 2).astype(np.int16)), False),
    "32.tif": (lambda path: Image.fromarray(GREY16.astype(np.int32)).save(path), False),
    "float.tif": (lambda path: Image.fromarray(GREY16.astype(np.float32)).save(path), False),
}


@pytest.mark.parametrize("name", DEEP)
def test_deeper_images_are_those_of_8_bits_once_scaled(name: str, tmp_path: Path) -> None:
    """All of Detectron2's read as 255 or 0, or by their upper 8 bits."""
    write, has_depth = DEEP[name]
    write(tmp_path / name)
    path = str(tmp_path / name)
    expected = np.dstack([GREY] * 3)
    if has_depth:
        assert np.array_equal(ImageReader()(tmp_path / name), expected)
        assert not inspect_image(path, ImageReader(), decode=True).kind
        with Image.open(tmp_path / name) as image:
            assert bit_depth(image) == 16
    else:
        _, kind, what = inspect_image(path, ImageReader(), decode=True)
        assert kind == "unreadable_image" and "INPUT.PIXEL_RANGE" in what and " here " in what
    white = 65535 // 2 if "signed" in name else 65535
    if "colour" in name:
        with pytest.raises(InputError, match=r"16 bits .*INPUT\.PIXEL_RANGE auto"):
            ImageReader(pixel_range=(0, white))(tmp_path / name)
    else:
        assert np.array_equal(ImageReader(pixel_range=(0, white))(tmp_path / name), expected)


def test_a_range_is_scaled_and_clipped(tmp_path: Path) -> None:
    values = np.array([[-np.inf, -5, 10, 10.3, 60.1, 110, 7e8, np.inf, np.nan]], np.float32)
    Image.fromarray(values).save(tmp_path / "a.tif")
    found = ImageReader("L", (10.0, 110.0))(tmp_path / "a.tif")
    assert found[0, :, 0].tolist() == [0, 0, 0, 1, 128, 255, 255, 255, 0]
    Image.fromarray(np.array([[900, 1000, 1100, 3000]], np.uint16)).save(tmp_path / "a.png")
    found = ImageReader("L", (1000.0, 2000.0))(tmp_path / "a.png")
    assert found[0, :, 0].tolist() == [0, 0, 26, 255]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("auto", ["auto"]),
        ("percentiles", ["percentiles"]),
        ("[0, 4095]", [0, 4095]),
        ("-0.5,2.5", [-0.5, 2.5]),
        ("[4095, 0]", None),
        ("dark", None),
    ],
)
def test_the_key_on_the_command_line(given: Any, expected: Any) -> None:
    try:
        cfg = load_config("configs/quickstart.yaml", ["INPUT.PIXEL_RANGE", given])
        parse_pixel_range(cfg.INPUT.PIXEL_RANGE)
    except InputError as error:
        assert expected is None and "INPUT.PIXEL_RANGE" in str(error)
    else:
        assert expected == cfg.INPUT.PIXEL_RANGE


def test_the_key_in_a_saved_config(tmp_path: Path, cfg: CfgNode) -> None:
    for value in (["auto"], [0.5, 4095.0]):
        cfg.INPUT.PIXEL_RANGE = value
        (tmp_path / "config.yaml").write_text(cfg.dump())
        file, word = str(tmp_path / "config.yaml"), ["INPUT.PIXEL_RANGE", "percentiles"]
        found = load_config(file).INPUT.PIXEL_RANGE
        assert found == value
        assert load_config(file, word).INPUT.PIXEL_RANGE == ["percentiles"]
        plain = cfg.clone()
        plain.INPUT.PIXEL_RANGE = ["auto"]
        plain.merge_from_file(file)  # as Detectron2 does
        assert value == plain.INPUT.PIXEL_RANGE


def deepen(bccd: Bccd, convert: Callable[[np.ndarray], np.ndarray], suffix: str = ".png") -> None:
    """Replace the images of the data by grey ones of another depth."""
    for image in [*bccd.train["images"], *bccd.val["images"]]:
        stem = Path(image["file_name"]).stem
        grey = np.asarray(Image.open(BCCD_MINI / "images" / f"{stem}.jpg").convert("L"))
        image["file_name"] = stem + suffix
        Image.fromarray(convert(grey)).save(bccd.images / image["file_name"])


def small(bccd: Bccd) -> CfgNode:
    return bccd.use(load_config("configs/small_R18_FPN.yaml"))


def test_percentiles_become_two_numbers_of_the_training_images(
    bccd: Bccd, log: pytest.LogCaptureFixture
) -> None:
    deepen(bccd, lambda grey: 1000 + 8 * grey.astype(np.int32), ".tif")
    cfg = small(bccd)
    cfg.INPUT.PIXEL_RANGE = ["percentiles"]
    before = cfg.clone()
    with pytest.raises(InputError, match=r"PIXEL_RANGE percentiles .* config\.yaml of that run"):
        prepare_datasets(cfg.clone(), eval_only=True)
    assert check_data(cfg).exit_code == 0
    assert cfg == before
    prepare_datasets(cfg, eval_only=False)
    files = [bccd.images / image["file_name"] for image in bccd.train["images"]]
    values = np.concatenate([np.asarray(Image.open(file)).ravel() for file in files])
    assert pytest.approx(np.percentile(values, [0.1, 99.9]), abs=16) == cfg.INPUT.PIXEL_RANGE
    assert str(cfg.INPUT.PIXEL_RANGE) in log.text
    prepare_datasets(cfg, eval_only=True)
    image = CheckedDatasetMapper(cfg, is_train=False)({"file_name": str(files[0])})["image"]
    assert image.min() < 20 and image.max() > 200


def test_percentiles_of_8_bits_are_the_bit_depth_and_of_one_value_nothing(tmp_path: Path) -> None:
    assert measure_pixel_range([*map(str, PHOTOS), "missing.png"], 10**9) == ["auto"]
    Image.fromarray(np.full((4, 4), 7, np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match=r"PIXEL_RANGE percentiles: .* all 7"):
        measure_pixel_range([str(tmp_path / "a.tif")], 10**9)


def test_a_set_of_16_bits_gives_the_pixels_of_8_bits(bccd: Bccd, cfg: CfgNode) -> None:
    """Bit for bit, after the augmentation of training too."""
    records = []
    for convert in (lambda grey: grey, lambda grey: grey.astype(np.uint16) * 257):
        deepen(bccd, convert)
        mapper = CheckedDatasetMapper(cfg, is_train=True)
        for image in bccd.train["images"]:
            np.random.seed(3)
            records.append(mapper({"file_name": str(bccd.images / image["file_name"])})["image"])
    half = len(records) // 2
    assert all(map(np.array_equal, records[:half], records[half:]))
    assert all(len(image.unique()) > 50 for image in records)


def save_constant(path: Path) -> None:
    Image.fromarray(np.full((480, 640, 3), (9, 8, 7), np.uint8)).save(path)


def save_dark(path: Path) -> None:
    levels = np.linspace(0, 4000, 480 * 640).reshape(480, 640)
    Image.fromarray(levels.astype(np.uint16)).save(path)


FINDINGS = {
    "one colour": (save_constant, "constant_image", r"every pixel is \[7, 8, 9\]"),
    "12 of 16 bits": (save_dark, "constant_image", "0 to 4000, become at most 17 .*PIXEL_RANGE"),
    "pages": (
        lambda path: write_frames(path, 3, Image.open(PHOTOS[0])),
        "several_frames",
        "it has 3 pages or frames, and the first is read",
    ),
}


@pytest.mark.parametrize("max_decoded", [1000, 2], ids=["decoded", "headers"])
@pytest.mark.parametrize("case", FINDINGS)
def test_findings_about_images_are_kept_with_a_warning(
    case: str,
    max_decoded: int,
    bccd: Bccd,
    cfg: CfgNode,
    log: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write, kind, message = FINDINGS[case]
    monkeypatch.setattr("retinanet_ext.data.image_files.MAX_DECODED_IMAGES", max_decoded)
    bccd.train["images"][0]["file_name"] = "found.tif"
    write(bccd.images / "found.tif")
    prepare_datasets(bccd.use(cfg), eval_only=False)
    warnings = {r.getMessage() for r in log.records if r.levelno == logging.WARNING}
    found = [line for line in warnings if f"{KINDS[kind].what}: 1: " in line]
    if max_decoded == 2 and kind == "constant_image":
        assert not found  # which only pixels show
        return
    (line,) = found
    assert "found.tif (image id 80)" in line and re.search(message, line)
    cfg.DATASETS.CHECK[kind.upper()] = "drop"
    prepare_datasets(cfg, eval_only=False)
    assert len(DatasetCatalog.get("custom_train")) == 2
    cfg.DATASETS.CHECK[kind.upper()] = "refuse"
    with pytest.raises(InputError, match=rf"found\.tif .*{KINDS[kind].key} drop"):
        prepare_datasets(cfg, eval_only=False)


@pytest.mark.parametrize("max_decoded", [1000, 2], ids=["decoded", "headers"])
def test_images_without_a_range_or_too_large_are_refused_before_training(
    max_decoded: int, bccd: Bccd, cfg: CfgNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retinanet_ext.data.image_files.MAX_DECODED_IMAGES", max_decoded)
    cfg.INPUT.MAX_PIXELS = 640 * 480 - 1
    with pytest.raises(InputError, match=r"^\S+: 3 image files .*INPUT\.MAX_PIXELS allows 307,199"):
        prepare_datasets(bccd.use(cfg), eval_only=False)
    cfg.INPUT.MAX_PIXELS += 1
    bccd.train["images"][0]["file_name"] = "float.tif"
    Image.fromarray(np.ones((480, 640), np.float32)).save(bccd.images / "float.tif")
    with pytest.raises(
        InputError, match=r"float\.tif \(image id 80\): .* floats, here 1 to 1.*percentiles, which"
    ):
        prepare_datasets(bccd.use(cfg), eval_only=False)
    cfg.INPUT.PIXEL_RANGE = [0, 2]
    prepare_datasets(cfg, eval_only=False)


def test_a_limit_in_pixels_is_the_keys_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above Pillow's limit, of which ours knows nothing, and below it."""
    Image.fromarray(GREY).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(Image.DecompressionBombError):
        read_image(tmp_path / "a.png")
    assert np.array_equal(ImageReader("L")(tmp_path / "a.png")[:, :, 0], GREY)
    assert Image.MAX_IMAGE_PIXELS == 1000
    path = str(tmp_path / "a.png")
    for limit in (None, 1000, 10**9):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert not inspect_image(path, ImageReader(max_pixels=64 * 48), decode=True).kind
        reader = ImageReader(max_pixels=64 * 48 - 1)
        _, kind, what = inspect_image(path, reader, decode=True)
        assert kind == "unreadable_image"
        assert what == (
            "it has 64 x 48 = 3,072 pixels, which take 0 MB of memory, and INPUT.MAX_PIXELS "
            "allows 3,071"
        )
        assert limit == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_have_the_limit_of_the_config(method: str, cfg: CfgNode) -> None:
    cfg.INPUT.MAX_PIXELS = 640 * 480 - 1
    mapper = CheckedDatasetMapper(cfg, is_train=False)
    record = {"file_name": str(PHOTOS[0]), "image_id": 5}
    # Not a DataLoader, which waits five seconds for its workers after an error.
    with (
        multiprocessing.get_context(method).Pool(1) as pool,
        pytest.raises(InputError, match=r"\(image id 5\).* INPUT\.MAX_PIXELS allows 307,199"),
    ):
        pool.apply(mapper, (record,))


@pytest.mark.parametrize("sizes", [True, False], ids=["given", "from the file"])
def test_a_tiff_is_turned_once(sizes: bool, bccd: Bccd, cfg: CfgNode, tmp_path: Path) -> None:
    """Pillow turns a TIFF by itself while it decodes it."""
    picture = Image.fromarray(np.arange(480 * 640 * 3).reshape(480, 640, 3).astype(np.uint8))
    exif = Image.Exif()
    exif[274] = 6
    picture.save(bccd.images / "turned.tif", exif=exif)
    upright = np.asarray(picture.transpose(Image.Transpose.ROTATE_270))
    assert np.array_equal(ImageReader("RGB")(bccd.images / "turned.tif"), upright)
    entry = bccd.train["images"][0]
    entry |= {"file_name": "turned.tif", "width": 480, "height": 640}
    if not sizes:
        del entry["width"], entry["height"]
    prepare_datasets(bccd.use(cfg), eval_only=False)
    record = DatasetCatalog.get("custom_train")[0]
    assert (record["width"], record["height"]) == (480, 640)
    CheckedDatasetMapper(cfg, is_train=True)(record)


def test_percentiles_are_measured_on_files_under_other_names(bccd: Bccd, cfg: CfgNode) -> None:
    deepen(bccd, lambda grey: np.linspace(1000, 5000, grey.size).reshape(grey.shape).astype("u2"))
    for image in bccd.train["images"]:
        image["file_name"] = image["file_name"].upper()
    bccd.use(cfg).INPUT.PIXEL_RANGE = ["percentiles"]
    with pytest.raises(InputError, match="percentiles: none of the 3 training images is there"):
        prepare_datasets(cfg, eval_only=False)
    cfg.DATASETS.CHECK.MISNAMED_FILE = "mend"
    prepare_datasets(cfg, eval_only=False)
    assert [pytest.approx(1004, abs=5), pytest.approx(4996, abs=5)] == cfg.INPUT.PIXEL_RANGE
