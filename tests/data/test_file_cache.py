"""The cache of what was found about image files: fast, and never wrong."""

from __future__ import annotations

import doctest
import os
from pathlib import Path

import pytest

from retinanet_ext.data import (
    ValidationResult,
    image_files,
    validate_coco,
    validation,
)
from retinanet_ext.data.findings import DEFAULT_POLICY
from retinanet_ext.data.image_files import check_images
from retinanet_ext.data.images import ImageReader

from .eight_images import Eight, picture


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RETINANET_EXT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def old(eight: Eight) -> Eight:
    for file in eight.images.iterdir():
        make_old(file)
    return eight


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are looked at."""
    names: list[str] = []
    original = image_files.inspect_image

    def inspect(path: str, *args: object, **kwargs: object) -> image_files.ImageFacts:
        names.append(Path(path).name)
        return original(path, *args, **kwargs)

    monkeypatch.setattr(image_files, "inspect_image", inspect)
    return names


def make_old(file: Path, *, seconds: int = 100) -> None:
    """Give a file an age at which it is cached."""
    time = file.stat().st_mtime - seconds
    os.utime(file, (time, time))


def look(eight: Eight, opened: list[str], reader: ImageReader | None = None) -> list[str]:
    """Check the images; return the kinds of findings, and leave in ``opened`` what was opened."""
    opened.clear()
    result = ValidationResult("mine.json", DEFAULT_POLICY)
    images = {image["id"]: image for image in eight.content["images"]}
    check_images(images, str(eight.images), reader or ImageReader(), result)
    opened.sort()
    return [finding.kind for finding in result.findings]


def test_unchanged_files_are_opened_once(old: Eight, folder: Path, opened: list[str]) -> None:
    assert look(old, opened) == [] and len(opened) == 8
    assert look(old, opened) == [] and opened == []
    first, second = old.images / "a1.jpg", old.images / "a2.jpg"
    picture(1).resize((8, 8)).save(first)  # another size in bytes
    picture(3).save(second)
    make_old(second, seconds=200)  # another time
    assert look(old, opened) == ["image_size"] and opened == ["a1.jpg", "a2.jpg"]
    # The first is too young to be cached: it might change again at the same time.
    assert look(old, opened) == ["image_size"] and opened == ["a1.jpg"]


def test_findings_come_from_the_cache_but_for_unreadable_files(
    old: Eight, folder: Path, opened: list[str]
) -> None:
    first, second = old.images / "a1.jpg", old.images / "a2.jpg"
    picture(1).point(lambda value: 7).save(first)
    second.write_bytes(b"<html>")
    make_old(first)
    make_old(second)
    assert look(old, opened) == ["constant_image", "unreadable_image"]
    assert look(old, opened) == ["constant_image", "unreadable_image"]
    assert opened == ["a2.jpg"]


def test_settings_of_the_reader_and_decoding_have_their_own_entries(
    old: Eight, folder: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    look(old, opened)
    assert look(old, opened, ImageReader(max_pixels=9)) == ["unreadable_image"] * 8
    monkeypatch.setattr(image_files, "MAX_DECODED_IMAGES", 4)
    look(old, opened)
    assert len(opened) == 8  # only the headers this time
    look(old, opened)
    assert opened == []


@pytest.mark.parametrize("case", ["off", "damaged", "not writable"])
def test_a_cache_that_cannot_be_used_is_ignored(
    case: str, old: Eight, folder: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if case == "off":
        monkeypatch.setenv("RETINANET_EXT_CACHE", "")
    elif case == "not writable":
        folder.write_text("a file in place of the folder")
    look(old, opened)
    for file in folder.glob("*.json"):
        file.write_text('{"a": ')
    assert look(old, opened) == [] and len(opened) == 8
    assert folder.exists() == (case != "off")


def test_validation_without_a_config(eight: Eight) -> None:
    eight.content["annotations"][0]["bbox"] = [1, 2, 3]
    (eight.images / "a2.jpg").unlink()
    eight.write()
    result = validate_coco(str(eight.json), str(eight.images), policy={"MISSING_IMAGE": "drop"})
    assert result.is_refused
    assert list(result.by_kind()) == ["missing_image", "malformed_box", "empty_image"]
    assert len(result.content["images"]) == 7 and len(result.content["annotations"]) == 6
    assert result.original == eight.content


def test_the_example_in_the_docstring_runs() -> None:
    results = doctest.testmod(validation)
    assert results.attempted > 5 and not results.failed
