"""Copies of real images are found however they were saved, and different images are not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from retinanet_ext.data.duplicate_images import find_near_duplicates, hash_images
from retinanet_ext.data.images import ImageReader
from retinanet_ext.data.validation_report import check_data

from .conftest import BCCD_MINI, Bccd
from .eight_images import small

IMAGES = sorted(map(str, (BCCD_MINI / "images").glob("*.jpg")))


@pytest.fixture
def copies(tmp_path: Path) -> dict[str, str]:
    """The first image: the file again, and saved in other ways."""
    image = Image.open(IMAGES[0])
    width, height = image.size
    exif = image.getexif()
    exif[0x0112] = 3  # upside down
    saved = {
        "copy.jpg": lambda path: path.write_bytes(Path(IMAGES[0]).read_bytes()),
        "png.png": image.save,
        "coarse.jpg": lambda path: image.save(path, quality=30),
        "half.jpg": lambda path: image.resize((width // 2, height // 2)).save(path),
        "cut.jpg": lambda path: image.crop((6, 5, width - 6, height - 5)).save(path),
        "turned.jpg": lambda path: image.rotate(180).save(path, exif=exif),
    }
    for name, save in saved.items():
        save(tmp_path / name)
    return {name: str(tmp_path / name) for name in saved}


def test_copies_are_found_and_other_images_are_not(copies: dict[str, str]) -> None:
    found = find_near_duplicates(IMAGES, {"test": list(copies.values())}, ImageReader())
    between = [pair for pair in found if pair["other_data_set"] == "train"]
    assert [pair["image"] for pair in between] == list(copies.values())
    assert {pair["other"] for pair in between} == {IMAGES[0]}
    assert [pair["equal"] for pair in between] == [True, *[False] * 5]
    within = found[len(between) :]
    assert {(pair["data_set"], pair["other_data_set"]) for pair in within} == {("test", "test")}
    assert [pair["image"] for pair in within] == list(copies.values())[1:]


def test_the_hash_is_of_the_brightness_of_cells(tmp_path: Path) -> None:
    """Against the means of 20 x 15 pixels, but for those that Pillow rounds to the same level."""
    grey = Image.open(IMAGES[0]).convert("L").crop((0, 0, 17 * 20, 16 * 15))
    grey.save(tmp_path / "a.png")
    means = np.asarray(grey, dtype=float).reshape(16, 15, 17, 20).mean((1, 3))
    (found,) = hash_images([str(tmp_path / "a.png")], ImageReader())
    clear = abs(np.diff(means)) > 1
    assert clear.mean() > 0.5
    np.testing.assert_array_equal(found.reshape(16, 16)[clear], np.diff(means)[clear] > 0)


def test_images_without_structure_are_not_alike(tmp_path: Path) -> None:
    """Small objects on a plain ground differ where the objects are; plain images have none."""
    files = []
    for number in range(4):
        image = Image.new("L", (160, 160), 40)
        if number < 3:
            place = (10 + 50 * number, 60)
            image.paste(200, (*place, place[0] + 20, place[1] + 20))
        files.append(str(tmp_path / f"{number}.png"))
        image.save(files[-1])
    (tmp_path / "4.png").write_text("not an image")
    files.append(str(tmp_path / "4.png"))
    assert find_near_duplicates([*files, files[3]], {}, ImageReader()) == []


def test_a_leak_is_told_before_training(bccd: Bccd) -> None:
    image = Image.open(bccd.images / bccd.train["images"][0]["file_name"])
    image.save(bccd.images / bccd.val["images"][0]["file_name"], quality=60)
    report = check_data(bccd.use(small()))
    (pair,) = report.content["near_duplicates"]
    assert pair["data_set"] == "custom_test" and pair["other_data_set"] == "train"
    images = f"test image {pair['image']} and training image {pair['other']}"
    assert f"1 of 2 test images looks like a training image, such as {images}; AP" in report.text
    assert report.exit_code == 0
