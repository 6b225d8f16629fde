"""Image files as annotation tools name them: what is said, and what is trained on."""

from __future__ import annotations

import os
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from retinanet_ext.data import image_files
from retinanet_ext.data.file_names import MisnamedFiles
from retinanet_ext.data.validation_report import check_data

from .eight_images import (
    ALL,
    HEIGHT,
    WIDTH,
    Eight,
    picture,
    prepare,
    refusal,
    small,
    trained_on,
)

MEND = ("DATASETS.CHECK.MISNAMED_FILE", "mend")
MERGE = ("DATASETS.CHECK.DUPLICATE_FILE", "merge")


def test_file_under_several_ids_is_refused_or_merged(
    eight: Eight, log: pytest.LogCaptureFixture
) -> None:
    eight.rename(lambda name: "a1.jpg")
    opts = eight.opts()
    message = refusal(*opts)
    path = eight.images / "a1.jpg"
    assert f"{path} is listed under 8 image ids: 1, 2, 3, 4, 5, 6, 7, 8" in message
    assert "(DATASETS.CHECK.DUPLICATE_FILE merge makes one image of a file's" in message

    prepare(*opts, *MERGE)
    assert trained_on() == [("a1.jpg", [box for _, (box,) in ALL])]
    assert any("under several image ids, merged: 1: " in line for line in log.messages)
    prepare(*opts, MERGE[0], "keep")
    assert trained_on() == [("a1.jpg", boxes) for _, boxes in ALL]


@pytest.mark.parametrize("case", ["x/..//", "absolute", "link", "link to the folder"])
def test_same_file_is_told_by_its_place(case: str, eight: Eight) -> None:
    second = eight.content["images"][1]
    opts: tuple[str, ...] = ()
    if case == "absolute":
        second["file_name"] = str(eight.images / "a1.jpg")
    elif case == "link":
        (eight.images / "a2.jpg").unlink()
        (eight.images / "a2.jpg").symlink_to("a1.jpg")
    elif case == "link to the folder":
        (eight.images / "x").symlink_to(".")
        second["file_name"] = "x/a1.jpg"
    else:
        (eight.images / "x").mkdir()
        second["file_name"] = f"{case}a1.jpg"
        opts = ("DATASETS.CHECK.FILE_OUTSIDE", "keep") if ".." in case else ()
    opts = (*eight.opts(), *opts)
    assert "a1.jpg is listed under 2 image ids: 1, 2" in refusal(*opts)
    prepare(*opts, *MERGE)
    assert trained_on() == [("a1.jpg", ALL[0][1] + ALL[1][1]), *ALL[2:]]


def test_files_that_differ_by_case_alone_are_two(eight: Eight) -> None:
    picture(9).save(eight.images / "A1.jpg")
    eight.content["images"][1]["file_name"] = "A1.jpg"
    prepare(*eight.opts())
    assert [name for name, _ in trained_on()][:2] == ["a1.jpg", "A1.jpg"]


@pytest.mark.parametrize("case", ["same folder", "copies", "links", "others", "same size"])
def test_test_images_that_are_training_images_are_counted(
    case: str, eight: Eight, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    test = Eight(tmp_path / "test", "b{}.jpg", seed=case in ("others", "same size"))
    if case == "same folder":
        test.images, test.content = eight.images, eight.content
    elif case == "links":
        (test.images / "b1.jpg").unlink()
        (test.images / "b1.jpg").symlink_to(eight.images / "a1.jpg")
    elif case == "same size":  # other content, up to the block that is compared first
        for folder, fill in ((eight.images, b"\0"), (test.images, b"\1")):
            for file in folder.iterdir():
                file.write_bytes(file.read_bytes().ljust(200_000, b"\0") + 100 * fill)
    opts = [*eight.opts(), *test.opts("TEST")]
    prepare(*opts)
    lines = list({line for line in log.messages if "are training images too" in line})
    report = check_data(small(*opts))
    assert report.content["shared_images"] == lines and report.exit_code == 0
    if case in ("others", "same size"):
        assert not lines
        return
    (line,) = lines
    assert line in report.text
    assert line.startswith("custom_test: 8 of 8 test images are training images too, such as ")
    first = eight.images / "a1.jpg"
    assert (
        f"{first}; AP" in line
        if case == "same folder"
        else f"b1.jpg, which is training image {first}; " in line
    )


def test_absolute_paths_are_used_and_paths_upwards_on_request_alone(
    eight: Eight, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    eight.rename(lambda name: str(eight.images / name))
    prepare(*eight.opts(), "DATASETS.CUSTOM.TRAIN_IMAGES", str(tmp_path / "elsewhere"))
    assert trained_on() == ALL
    eight.rename(lambda name: f"../images/{Path(name).name}")
    opts = eight.opts()
    assert "(DATASETS.CHECK.FILE_OUTSIDE keep takes such files)" in refusal(*opts)
    prepare(*opts, "DATASETS.CHECK.FILE_OUTSIDE", "keep")
    assert trained_on() == ALL


# How names are written in the json -> what is said of them.
SPELLINGS: dict[str, tuple[Callable[[str], str], str]] = {
    "backslashes": (lambda name: f".\\x\\{name}", "file names use backslashes"),
    "Windows": (
        lambda name: f"C:\\data\\x\\{name}",
        "file names use backslashes and files are in another folder",
    ),
    "extension": (lambda name: f"x/{name.upper()}", "upper and lower case differ"),
    "folder": (lambda name: f"X/{name}", "upper and lower case differ"),
    "space after": (lambda name: f"x/{name} ", "there are spaces at an end"),
    "percent": (lambda name: f"x%2F{name}", "file names are percent-encoded"),
    "URL": (
        lambda name: f"https://host/x/{name}?raw=1",
        "file names are URLs and files are in another folder",
    ),
    "absolute": (lambda name: f"/home/me/data/x/{name}", "files are in another folder"),
    "folder of its own": (lambda name: f"y/{name}", "files are in another folder"),
    "two": (
        lambda name: f"x\\{name.upper()}",
        "file names use backslashes and upper and lower case differ",
    ),
}


@pytest.mark.parametrize("case", SPELLINGS)
def test_missing_file_names_what_is_there(
    case: str, eight: Eight, log: pytest.LogCaptureFixture
) -> None:
    spell, reason = SPELLINGS[case]
    place = "" if case == "folder of its own" else "x/"
    if place:
        eight.move_into("x")
    eight.rename(spell)
    opts = eight.opts()
    message = refusal(*opts)
    assert message.startswith(f"{eight.json}: 8 image files that are there under another name: ")
    assert f"(image id 1) is missing: {reason}; `{place}a1.jpg` is there; " in message
    assert "and 5 more (DATASETS.CHECK.MISNAMED_FILE mend takes the files that" in message

    prepare(*opts, *MEND)
    assert trained_on() == ALL
    assert any("under another name, mended: 8: " in line for line in log.messages)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_other_unicode_normal_form(form: str, tmp_path: Path) -> None:
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    eight = Eight(tmp_path / "mine", unicodedata.normalize(form, "ä{}.jpg"))
    eight.rename(lambda name: unicodedata.normalize(other, name))
    opts = eight.opts()
    assert "is missing: the Unicode normal form differs; `" in refusal(*opts)
    prepare(*opts, *MEND)
    names = [unicodedata.normalize("NFC", name) for name, _ in trained_on()]
    assert names == [f"ä{n}.jpg" for n in range(1, 9)]


@pytest.mark.parametrize("case", ["doubled", "twice doubled", "below"])
def test_better_image_folder_is_named(case: str, eight: Eight) -> None:
    if case == "below":
        eight.move_into("x")
        reason, folder = "files are in `x/`", eight.images / "x"
    elif case == "doubled":
        eight.rename(lambda name: f"images/{name}")
        reason, folder = "`images/` is doubled", eight.folder
    else:
        eight.rename(lambda name: f"mine/images/{name}")
        reason, folder = "`mine/images/` is doubled", eight.folder.parent
    opts = eight.opts()
    message = refusal(*opts)
    key = "DATASETS.CUSTOM.TRAIN_IMAGES"
    assert f"is missing: {reason}; `" in message and f"({key} {folder} finds them)" in message
    prepare(*opts, key, str(folder))
    assert trained_on() == ALL
    prepare(*opts, *MEND)
    assert trained_on() == ALL
    # Not all are found there: a file of the folder itself is among them.
    picture(9).save(eight.images / "own.jpg")
    eight.content["images"][0]["file_name"] = "own.jpg"
    message = refusal(*eight.opts())
    assert key not in message and "MISNAMED_FILE mend takes the files" in message


def test_what_may_be_meant_twice_is_not_guessed(eight: Eight) -> None:
    picture(9).save(eight.images / "A1.JPG")
    eight.content["images"][0]["file_name"] = "A1.jpg"
    message = refusal(*eight.opts(), *MEND)
    assert "A1.jpg (image id 1) is missing: `" in message
    assert "are there, and which is meant cannot be known" in message
    assert "(DATASETS.CHECK.MISSING_IMAGE drop leaves it out)" in message


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gone.jpg", "gone.jpg (image id 1) is missing (DATASETS.CHECK.MISSING_IMAGE drop"),
        ("https://host/gone.jpg", "is missing: it is a URL, and images are read from files"),
        ("link.jpg", "is missing: it is a symbolic link to /none/a.jpg, which is missing"),
        ("folder", "folder (image id 1) is missing"),
        ("a\0.jpg", "a\\x00.jpg (image id 1) is missing"),
        ("../a1.JPG", "leaves the image folder"),
    ],
)
def test_what_is_nowhere_stays_missing(name: str, expected: str, eight: Eight) -> None:
    (eight.images / "link.jpg").symlink_to("/none/a.jpg")
    (eight.images / "folder").mkdir()
    eight.content["images"][0]["file_name"] = name
    opts = eight.opts()
    assert expected in refusal(*opts, *MEND)
    kind = "FILE_OUTSIDE" if ".." in name else "MISSING_IMAGE"
    prepare(*opts, f"DATASETS.CHECK.{kind}", "drop")
    assert trained_on() == ALL[1:]


def test_many_missing_files_are_searched_in_one_reading_of_the_folder(
    eight: Eight, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(100):
        (eight.images / f"{number}.jpg").touch()
    listed: list[Any] = []
    read = os.listdir

    def list_folder(folder: Any) -> list[str]:
        listed.append(folder)
        return read(folder)

    monkeypatch.setattr(os, "listdir", list_folder)
    files = MisnamedFiles(str(eight.images))
    found = [files.find(f"images\\{number}.JPG") for number in range(1000)]
    assert sum(match is not None for match in found) == 100
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize("max_decoded", [4, 1000], ids=["headers", "decoded"])
@pytest.mark.parametrize("absent", [("width", "height"), ("height",), None])
def test_size_that_is_left_out_is_the_files(
    absent: tuple[str, ...] | None,
    max_decoded: int,
    eight: Eight,
    log: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(image_files, "MAX_DECODED_IMAGES", max_decoded)
    exif = Image.Exif()
    exif[274] = 6  # a quarter turn
    picture(1).transpose(Image.Transpose.ROTATE_90).save(eight.images / "a1.jpg", exif=exif)
    for image in eight.content["images"]:
        if absent is None:
            image.update(width=None, height=None)
        for field in absent or ():
            del image[field]
    opts = eight.opts()
    prepare(*opts, *eight.opts("TEST"))
    assert trained_on() == trained_on("custom_test") == ALL
    (line,) = {line for line in log.messages if line.startswith(f"{eight.json}: images without")}
    assert line.endswith(f"files: 8, such as a1.jpg (image id 1) of {WIDTH} x {HEIGHT}")
    report = check_data(small(*opts))
    assert f"note  {report.content['data_sets'][0]['notes'][0]}\nNothing is wrong" in report.text


def test_size_of_a_file_that_is_no_image_is_not_asked_for(eight: Eight) -> None:
    first, second, *_ = eight.content["images"]
    for image in (first, second):
        del image["width"], image["height"]
    (eight.images / "a1.jpg").unlink()
    (eight.images / "a2.jpg").write_bytes(b"<html>")
    assert list(eight.messages()) == ["missing_image", "unreadable_image"]
    drop = [f"DATASETS.CHECK.{kind}" for kind in ("MISSING_IMAGE", "UNREADABLE_IMAGE")]
    prepare(*eight.opts(), drop[0], "drop", drop[1], "drop")
    assert trained_on() == ALL[2:]


def test_half_a_size_is_compared(eight: Eight) -> None:
    image = eight.content["images"][0]
    image["width"] += 1
    del image["height"]
    message = refusal(*eight.opts())
    assert f"it has {WIDTH} x {HEIGHT} pixels when upright, not {WIDTH + 1} x {HEIGHT}" in message


def test_links_and_copies_are_images_of_their_own(eight: Eight) -> None:
    """A folder of links to a store of files is a usual way to make a data set."""
    store = eight.folder / "store"
    shutil.move(eight.images, store)
    eight.images.mkdir()
    for file in store.iterdir():
        os.symlink(file, eight.images / file.name)
    prepare(*eight.opts())
    assert trained_on() == ALL
