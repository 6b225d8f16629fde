"""The images and videos that a prediction is made of, in a stable order."""

from __future__ import annotations

import glob
import os
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path, PurePosixPath

import cv2
import numpy as np

from retinanet_ext.errors import InputError

IMAGE_SUFFIXES = (
    *(".apng", ".avif", ".bmp", ".dib", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
    *(".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
)
VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")
LIST_SUFFIX = ".txt"


@dataclass(frozen=True)
class SourceFile:
    """An image or a video.

    Attributes:
        path: as the user named it
        name: path of what is written about it, without suffix, relative to a folder of results
    """

    path: str
    name: str

    @property
    def is_video(self) -> bool:
        return Path(self.path).suffix.lower() in VIDEO_SUFFIXES


@dataclass(frozen=True)
class Picture:
    """An image file or a frame of a video.

    Attributes:
        file: where it is from
        frame: number of the frame from 0, None for an image file
        pixels: the frame, uint8 (H, W, 3) in the order BGR; None for an image file
        error: why there are no pixels
    """

    file: SourceFile
    frame: int | None = None
    pixels: np.ndarray | None = None
    error: str = ""


def frame_name(name: str, frame: int | None) -> str:
    """Return the name of a video's frame; that of an image, which has none, unchanged."""
    return name if frame is None else f"{name}/{frame:06d}"


def find_files(sources: Sequence[str | Path], results: Path | None = None) -> list[SourceFile]:
    """Return the images and videos of the sources, each once.

    The order is that of the sources, and within a folder or glob the alphabetical one.

    Args:
        sources: files, folders (searched recursively), globs, and ``.txt`` files with one of these
            per line, relative to the list's folder
        results: folder of results, which folders and globs pass over unless they start in it

    Raises:
        InputError: a source does not exist or has no image and no video, or a video cannot be
            decoded
    """
    results = results and Path(os.path.abspath(results))
    found: dict[str, tuple[str, str]] = {}
    for source in sources:
        files = _expand(Path(source), results)
        if not files:
            known = " ".join(IMAGE_SUFFIXES + VIDEO_SUFFIXES)
            raise InputError(f"{source} has no image and no video; known are {known}")
        for path, name in files:
            found.setdefault(os.path.abspath(path), (str(path), name.with_suffix("").as_posix()))
    named = list(_name_results(found.values()))
    for file in named:
        if file.is_video:
            check_video(file.path)
    return named


def _expand(
    source: Path, results: Path | None, *, must_exist: bool = True
) -> list[tuple[Path, Path]]:
    """Return the files of a source, each with its path relative to the source."""
    if source.is_dir():
        files = sorted(path for path in source.rglob("*") if _is_known(path) and path.is_file())
        return [(path, path.relative_to(source)) for path in _pass_over(results, files, source)]
    if source.is_file() and source.suffix.lower() == LIST_SUFFIX:
        return _read_list(source, results)
    if source.exists() or not (glob.has_magic(str(source)) or must_exist):
        return [(source, Path(source.name))]
    if not glob.has_magic(str(source)):
        raise InputError(f"{source} does not exist; give images, videos, folders, globs or lists")
    matches = sorted(map(Path, glob.glob(str(source), recursive=True)))
    matches = [path for path in matches if path.is_dir() or _is_known(path)]
    start = next(parent for parent in source.parents if not glob.has_magic(str(parent)))
    matches = _pass_over(results, matches, start)
    return [file for path in matches for file in _expand(path, results)]


def _pass_over(results: Path | None, found: list[Path], start: Path) -> list[Path]:
    """Return what a search has found outside of the results; all of it if it started in them."""

    def is_result(path: Path) -> bool:
        absolute = Path(os.path.abspath(path))
        return results in (absolute, *absolute.parents)

    return found if is_result(start) else [path for path in found if not is_result(path)]


def _read_list(file: Path, results: Path | None) -> list[tuple[Path, Path]]:
    """Return the files that a list names; those that do not exist too."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read as a list of files: {error}") from error
    entries = [file.parent / line.strip() for line in lines if line.strip()]
    return [found for entry in entries for found in _expand(entry, results, must_exist=False)]


def _is_known(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES + VIDEO_SUFFIXES


def _name_results(found: Collection[tuple[str, str]]) -> Iterator[SourceFile]:
    """Yield files, each with a name that no other has.

    The first file of a name keeps it; the others get a number that makes it the name of no file. A
    video's name is no folder of another file, because the frames have one of the video's name.

    Args:
        found: path and name of each file
    """
    names = {name for _, name in found}
    folders = {str(folder) for name in names for folder in PurePosixPath(name).parents}
    numbers: dict[str, Iterator[int]] = defaultdict(lambda: count(1))
    for path, name in found:
        for number in numbers[name]:
            file = SourceFile(path, name if number == 1 else f"{name}_{number}")
            is_taken = number > 1 and file.name in names
            if not (is_taken or (file.is_video and file.name in folders)):
                yield file
                break


def check_video(path: str) -> None:
    """Raise ``InputError`` if no frame of a video can be decoded."""
    if not any(True for _ in read_frames(path)):
        raise InputError(f"{path} cannot be decoded as a video, or has no frame")


def read_frames(path: str) -> Iterator[np.ndarray]:
    """Yield the frames of a video, uint8 (H, W, 3) in the order BGR."""
    capture = cv2.VideoCapture(path)
    try:
        while True:
            decoded, pixels = capture.read()
            if not decoded:
                return
            yield pixels
    finally:
        capture.release()


def frame_count_and_rate(path: str) -> tuple[int, float]:
    """Return the number of frames and the frames per second that a video's header has."""
    video = cv2.VideoCapture(path)
    return max(int(video.get(cv2.CAP_PROP_FRAME_COUNT)), 0), video.get(cv2.CAP_PROP_FPS) or 25.0


def count_pictures(files: Iterable[SourceFile]) -> int:
    """Return the number of images and frames; that of frames is what the videos' headers have."""
    return sum(frame_count_and_rate(file.path)[0] if file.is_video else 1 for file in files)


def iterate_pictures(files: Iterable[SourceFile]) -> Iterator[Picture]:
    """Yield the images and the frames of files.

    A picture with an error follows a video that ends more than a second before its header says; the
    frames that a header has may be an estimate.
    """
    for file in files:
        if not file.is_video:
            yield Picture(file)
            continue
        number = 0
        for pixels in read_frames(file.path):
            yield Picture(file, number, pixels)
            number += 1
        expected, rate = frame_count_and_rate(file.path)
        if expected - number > rate:
            error = f"the video ends after {number:,} frames, and its header has {expected:,}"
            yield Picture(file, number, error=error)
