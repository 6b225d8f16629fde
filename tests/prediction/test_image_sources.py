"""Which images and videos sources name, and in which order."""

import cv2
import numpy as np
import pytest
from PIL import Image

from retinanet_ext.errors import InputError
from retinanet_ext.prediction.image_sources import count_pictures, find_files, iterate_pictures


def write_video(path, num_frames=5, size=(64, 48), codec="mp4v"):
    """Frames of one grey level each, 10 times their number."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), 10, size)
    for number in range(num_frames):
        writer.write(np.full((*size[::-1], 3), 10 * number % 256, np.uint8))
    writer.release()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.png", "a.jpg", "sub/a.jpg", "sub/a.JPEG", "results/drawn/a.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "notes.md").write_text("text")
    return tmp_path


def paths(*sources, **options):
    return [file.path for file in find_files(sources, **options)]


def test_files_come_in_the_order_of_the_sources_each_once(folder):
    inside = ["a.jpg", "b.png", "sub/a.JPEG", "sub/a.jpg"]
    assert paths(".", results=folder / "results") == inside
    assert paths(folder, results=folder / "results") == [str(folder / name) for name in inside]
    assert paths("b.png", "*.jpg", "b.png") == ["b.png", "a.jpg"]
    assert paths("*") == ["a.jpg", "b.png", "results/drawn/a.jpg", "sub/a.JPEG", "sub/a.jpg"]
    assert paths("sub/**/*.jpg", "sub") == ["sub/a.jpg", "sub/a.JPEG"]
    (folder / "sub/list.txt").write_text(f"a.jpg\n\n../b.png\n{folder / 'a.jpg'}\nnone.jpg\n")
    listed = ["sub/a.jpg", "sub/../b.png", str(folder / "a.jpg"), "sub/none.jpg"]
    assert paths("sub/list.txt") == listed


def test_a_file_is_found_once_and_a_result_where_it_is_named(folder):
    assert paths("a.jpg", "./a.jpg", folder / "a.jpg", "sub/../a.jpg", "sub/../*.jpg") == ["a.jpg"]
    results, drawn = folder / "results", "results/drawn/a.jpg"
    (folder / "list.txt").write_text(drawn)
    for named in (drawn, "results", "results/drawn", "results/*/*.jpg", "list.txt"):
        assert paths(named, results=results) == [drawn]
    for searched in (".", "../" + folder.name, "**/*.jpg", "*"):
        found = paths(searched, results=results)
        assert found and not any("results" in path for path in found)


def test_names_of_results_are_unique_and_keep_the_folders_of_a_source(folder):
    assert [file.name for file in find_files(["sub", "a.jpg", "."])][:3] == ["a", "a_2", "a_3"]
    nested = [file.name for file in find_files(["."])]
    assert nested == ["a", "b", "results/drawn/a", "sub/a", "sub/a_2"]


def test_a_number_never_gives_the_name_of_another_file(folder):
    for name in ("c.jpg", "c.png", "c_2.jpg", "clip/000001.jpg"):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / name)
    write_video("clip.mp4")
    names = {file.path: file.name for file in find_files(["."], folder / "results")}
    assert [names[name] for name in ("c.jpg", "c.png", "c_2.jpg")] == ["c", "c_3", "c_2"]
    assert names["clip/000001.jpg"] == "clip/000001" and names["clip.mp4"] == "clip_2"


def test_frames_of_a_video(folder):
    write_video("clip.mp4")
    files = find_files(["b.png", "clip.mp4"])
    assert count_pictures(files) == 6
    image, *frames = iterate_pictures(files)
    assert image.frame is None
    assert [(f.file.name, f.frame) for f in frames] == [("clip", number) for number in range(5)]
    assert [round(frame.pixels.mean() / 10) for frame in frames] == [0, 1, 2, 3, 4]


def test_a_video_that_ends_early_is_told(folder):
    write_video("clip.avi", num_frames=60, codec="MJPG")
    whole = (folder / "clip.avi").read_bytes()
    (folder / "clip.avi").write_bytes(whole[: len(whole) // 2])
    *frames, end = iterate_pictures(find_files(["clip.avi"]))
    assert 0 < len(frames) < 50 and all(frame.pixels is not None for frame in frames)
    assert end.error == f"the video ends after {len(frames)} frames, and its header has 60"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("none", "none does not exist; give images, videos"),
        ("none/*.png", r"none/\*\.png has no image and no video"),
        ("empty", "empty has no image and no video; known are .apng"),
        ("empty.txt", "empty.txt has no image and no video"),
        ("picture.txt", "picture.txt cannot be read as a list of files"),
        ("bad.mp4", "bad.mp4 cannot be decoded as a video"),
    ],
)
def test_a_source_without_an_image_is_refused(folder, source, message):
    (folder / "empty").mkdir()
    (folder / "empty.txt").write_text("\n")
    (folder / "picture.txt").write_bytes((folder / "a.jpg").read_bytes())
    (folder / "bad.mp4").write_bytes(b"no video" * 100)
    with pytest.raises(InputError, match=message):
        find_files(["a.jpg", source])
