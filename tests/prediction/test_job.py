"""``retinanet-ext predict`` on a run: its files, its end when cut off, and what it refuses."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from retinanet_ext.cli import main
from retinanet_ext.engine import Predictor
from retinanet_ext.engine.config_load import split_arguments
from retinanet_ext.engine.run_folder import load_run
from retinanet_ext.evaluation.thresholds import THRESHOLDS, Thresholds
from retinanet_ext.files import sha256_of
from retinanet_ext.prediction import detection, job
from retinanet_ext.prediction.detection_log import DetectionLog
from runs import CLASS_NAMES, make_run

pytestmark = pytest.mark.usefixtures("restore_logging")

PATHS = sorted(Path("tests/fixtures/bccd_mini/images").resolve().glob("*.jpg"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run") / "mine")


@pytest.fixture
def images(tmp_path):
    """Ten images in two orientations, in turn."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number, path in enumerate(PATHS * 2):
        picture = Image.open(path)
        picture = picture.transpose(Image.Transpose.ROTATE_90) if number % 2 else picture
        picture.save(folder / f"{number}.png")
    return folder


def predict(*arguments):
    return main(["predict", *map(str, arguments)])


def read(out):
    return [json.loads(line) for line in (out / "detections.jsonl").read_text().splitlines()]


def test_detections_are_those_of_the_predictor_in_the_order_of_the_sources(run, images, tmp_path):
    assert predict(run, images, "--output", tmp_path / "out", "--batch", 2) == 0
    records = read(tmp_path / "out")
    assert [Path(record["file"]).name for record in records] == [f"{n}.png" for n in range(10)]
    expected = Predictor(load_run(run))([record["file"] for record in records], batch_size=1)
    for record, instances in zip(records, expected, strict=True):
        assert (record["height"], record["width"]) == instances.image_size
        found = record["detections"]
        assert len(found) == len(instances) > 0
        assert [d["class"] for d in found] == instances.pred_classes.tolist()
        assert np.allclose([d["score"] for d in found], instances.scores, atol=6e-5)
        assert np.allclose([d["box"] for d in found], instances.pred_boxes.tensor, atol=0.02)


def test_images_of_one_size_share_batches(run, images, tmp_path, monkeypatch):
    sizes, detect = [], Predictor.detect
    monkeypatch.setattr(
        Predictor, "detect", lambda self, batch: sizes.append(len(batch)) or detect(self, batch)
    )
    assert predict(run, images, "--output", tmp_path / "out", "--batch", 4) == 0
    assert sizes == [4, 4, 1, 1]


def test_killed_and_started_again_it_writes_the_same_file(run, images, tmp_path, capsys):
    """After a kill, with half a line at the end; and once more when it is done. Not before."""
    call = [run, images, "--batch", 1]
    assert predict(*call, "--output", tmp_path / "whole") == 0
    expected = (tmp_path / "whole/detections.jsonl").read_bytes()
    command = [sys.executable, "-m", "retinanet_ext", "predict", *map(str, call)]
    process = subprocess.Popen([*command, "--output", tmp_path / "cut"], env=os.environ)
    log = tmp_path / "cut/detections.jsonl"
    while process.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)
    assert predict(*call, "--output", tmp_path / "cut") == 2
    assert f"another process is writing {log.parent}" in capsys.readouterr().err
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and len(read(log.parent)) < 10
    with open(log, "ab") as file:
        file.write(expected[log.stat().st_size :][:99])
    for _ in range(2):
        assert predict(*call, "--output", tmp_path / "cut") == 0
        assert log.read_bytes() == expected


def test_a_job_of_something_else_is_not_continued(run, images, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert predict(run, PATHS[0], "--output", out) == 0
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert predict(run, PATHS[0], "--output", out, "--score", ".3", "--tile", 99) == 2
    line = capsys.readouterr().err
    assert "detections of other config and score and tile (job.json: config " in line
    assert ", score None, now 0.3, tile 0, now 99)" in line
    assert predict(run, PATHS[1], "--output", out) == 2
    assert "detections of other sources" in capsys.readouterr().err
    with monkeypatch.context() as patch:  # the records have the names as they were given
        patch.chdir(PATHS[0].parent)
        assert predict(run, PATHS[0].name, "--output", out, "--draw") == 2
    assert "detections of other sources" in capsys.readouterr().err
    assert predict(run, PATHS[1], "--output", images) == 2
    assert "has files of something else" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    assert predict(run, PATHS[0], "--output", out, "--format", "coco") == 0  # from the same log


def test_out_of_space_and_continued_with_another_batch_size(
    run, images, tmp_path, monkeypatch, capsys
):
    assert predict(run, images, "--output", tmp_path / "whole", "--batch", 1) == 0
    append, detect, sizes = DetectionLog.append, Predictor.detect, []
    monkeypatch.setattr(
        Predictor, "detect", lambda self, batch: sizes.append(len(batch)) or detect(self, batch)
    )

    def append_once(log, records):
        if log.path.stat().st_size:
            log.path.write_bytes(log.path.read_bytes() + b'{"file": "images/')
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(log, records)

    call = [run, images, "--output", tmp_path / "out"]
    monkeypatch.setattr(DetectionLog, "append", append_once)
    assert predict(*call, "--batch", 2) == 2
    said = f"{tmp_path}/out is incomplete: [Errno 28] No space left on device; the same call cont"
    assert said in capsys.readouterr().err
    monkeypatch.setattr(DetectionLog, "append", append)
    assert predict(*call, "--batch", 1) == 0
    assert sizes == [2, 2, 2, 2, 1, 1, 1, 1]  # the second window: in vain, and one by one
    for whole, continued in zip(read(tmp_path / "whole"), read(tmp_path / "out"), strict=True):
        assert whole["file"] == continued["file"]
        for key, tolerance in (("class", 0), ("score", 2e-4), ("box", 0.02)):
            found = [[d[key] for d in record["detections"]] for record in (whole, continued)]
            assert np.allclose(*found, rtol=0, atol=tolerance)


@pytest.mark.parametrize("option", [["--crops"], ["--format", "yolo"]])
def test_a_result_that_cannot_be_written_is_one_line(run, option, tmp_path, capsys):
    call = [run, PATHS[0], "--output", tmp_path / "out", *option]
    assert predict(*call) == 0
    files = [*tmp_path.rglob("crops/*/*.jpg"), *tmp_path.rglob("labels/*.txt")]
    before = {path: path.read_bytes() for path in files}
    files[0].unlink()
    files[0].symlink_to("/dev/full")
    assert predict(*call) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith(f"retinanet-ext predict: error: {tmp_path}/out is incomplete: ")
    assert "No space left on device" in line
    files[0].unlink()
    assert predict(*call) == 0
    assert {path: path.read_bytes() for path in files} == before


def test_a_folder_that_cannot_be_written_is_refused_before_the_model_is_loaded(
    run, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(job, "Predictor", None)
    (tmp_path / "file").write_text("text")
    for out in (tmp_path / "file", tmp_path / "file/out", Path("/proc/out")):
        assert predict(run, PATHS[0], "--output", out) == 2
        assert f"error: folder {out} cannot be written: " in capsys.readouterr().err


def test_another_image_under_the_same_name_is_another_job(run, tmp_path, capsys):
    image, out = tmp_path / "image.jpg", tmp_path / "out"
    image.write_bytes(PATHS[0].read_bytes())
    assert predict(run, image, "--output", out) == 0
    image.write_bytes(PATHS[1].read_bytes())
    assert predict(run, image, "--output", out) == 2
    assert "detections of other sources" in capsys.readouterr().err


def test_unreadable_images_are_named_and_the_others_done(run, tmp_path, capsys):
    Path(tmp_path / "cut.jpg").write_bytes(PATHS[0].read_bytes()[:3000])
    (tmp_path / "list.txt").write_text(f"{PATHS[0]}\ncut.jpg\nnone.png\n{PATHS[1]}\n")
    out = tmp_path / "out"
    for _ in range(2):
        assert (
            predict(run, tmp_path / "list.txt", "--output", out, "--draw", "--format", "yolo") == 1
        )
        said = capsys.readouterr().err
        assert "2 of 4 images cannot be read: " in said
        for text in (said, (out / "unreadable.txt").read_text()):
            assert "cut.jpg: image file is truncated" in text
            assert "none.png: [Errno 2] No such file" in text
    assert sorted(p.stem for p in (out / "labels").iterdir()) == [p.stem for p in PATHS[:2]]
    assert sorted(p.stem for p in (out / "drawn").iterdir()) == [p.stem for p in PATHS[:2]]
    assert [("error" in record) for record in read(out)] == [False, True, True, False]


def test_the_cut_and_the_classes(run, tmp_path):
    folder = tmp_path / "mine"
    shutil.copytree(run, folder)
    assert predict(folder, PATHS[0], "--output", tmp_path / "all", "--score", 0) == 0
    (every,) = read(tmp_path / "all")
    scores = sorted(d["score"] for d in every["detections"])
    middle = scores[len(scores) // 2] + 5e-5

    def kept(*options):
        out = tmp_path / "-".join(map(str, ["out", *options])).replace("/", "_")
        assert predict(folder, PATHS[0], "--output", out, *options) == 0
        return [(d["class"], d["score"]) for d in read(out)[0]["detections"]]

    assert 0 < len(kept("--score", middle)) == sum(score > middle for score in scores)
    classes = {c for c, _ in kept("--score", 0, "--classes", "WBC", "RBC")}
    assert classes and classes <= {0, 1}
    thresholds = Thresholds({"RBC": 1.0, "WBC": middle, "Platelets": 1.0}, "", "")
    thresholds.write(tmp_path / "mine.json")
    wanted = [(d["class"], d["score"]) for d in every["detections"]
              if d["class"] == 1 and d["score"] > middle]  # fmt: skip
    assert kept("--thresholds", tmp_path / "mine.json") == wanted
    weights = sha256_of(folder / "model_0000009.pth")
    Thresholds(thresholds.scores, "", weights).write(folder / THRESHOLDS)
    assert kept() == wanted
    assert len(kept("--score", "0.0")) == len(scores)


@pytest.mark.parametrize("size", [(480, 640), (32, 700)])
def test_tiles_change_nothing_where_the_image_fits(run, size, tmp_path):
    path = tmp_path / "image.png"
    Image.open(PATHS[0]).resize(size[::-1]).save(path)
    found = []
    for tile in (0, max(size)):
        assert predict(run, path, "--output", tmp_path / f"{tile}", "--tile", tile) == 0
        found.append(read(tmp_path / f"{tile}"))
    assert found[0] == found[1]
    assert predict(run, path, "--output", tmp_path / "more", "--tile", 300, "--tta") == 0
    assert read(tmp_path / "more") != found[0]


def test_a_video_is_detected_drawn_and_cut_out(run, tmp_path):
    clip = tmp_path / "clip.mp4"
    writer = cv2.VideoWriter(str(clip), cv2.VideoWriter.fourcc(*"mp4v"), 12, (640, 480))
    for path in PATHS:
        writer.write(cv2.imread(str(path)))
    writer.release()
    out = tmp_path / "out"
    assert predict(run, clip, "--output", out, "--draw", "--crops", "--batch", 2) == 0
    records = read(out)
    assert [record["frame"] for record in records] == [0, 1, 2, 3, 4]
    drawn = cv2.VideoCapture(str(out / "drawn/clip.mp4"))
    assert drawn.get(cv2.CAP_PROP_FPS) == 12 and drawn.get(cv2.CAP_PROP_FRAME_COUNT) == 5
    crops = list((out / "crops").rglob("*.jpg"))
    assert len(crops) == sum(len(record["detections"]) for record in records)
    assert {path.relative_to(out / "crops").parts[0] for path in crops} <= set(CLASS_NAMES)


def test_keys_and_values_may_follow():
    arguments = ["IMAGE.JPG", "INPUT", "models/MODEL.png", "--classes", "RBC"]
    opts = ["TEST.PRECISION", "float32"]
    assert split_arguments([*arguments, *opts]) == (arguments, opts)
    assert split_arguments(arguments) == (arguments, [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "IMAGE"], "nowhere is not a folder"),
        (["empty", "IMAGE"], "not the folder of a run, because it holds no config.yaml"),
        (["untrained", "IMAGE"], "holds no checkpoint yet"),
        (["RUN", "empty"], "empty has no image and no video"),
        (["RUN", "bad.avi"], "bad.avi cannot be decoded as a video"),
        (["RUN", "IMAGE", "--classes", "RBC", "WBCs"], "no class 'WBCs' (did you mean 'WBC'?)"),
        (["RUN", "IMAGE", "--thresholds", "others.json"], "are of other classes than the model's"),
        (["RUN", "IMAGE", "--thresholds", "none.json"], "none.json cannot be read"),
        (["RUN", "IMAGE", "--thresholds", "others.json", "--score", "1"], "are two cuts"),
        (["RUN", "IMAGE", "--score", "1.5"], "--score must be a number in [0, 1]"),
        (["RUN", "IMAGE", "--tile", "9", "--overlap", "1"], "--overlap must be a number in [0, 1)"),
        (["RUN", "IMAGE", "--overlap", "0.3"], "--overlap counts only with --tile"),
        (["RUN", "IMAGE", "--batch", "0"], "--batch must be a number in [1, inf)"),
        (["RUN", "IMAGE", "--weights", "none.pth"], "MODEL.WEIGHTS is none.pth, which is not"),
        (["RUN", "IMAGE", "--classes", "RBC", "MODEL.DEVICES", "cpu"], "did you mean MODEL.DEVICE"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    arguments, message, run, tmp_path, monkeypatch, capsys
):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.avi").write_bytes(b"RIFF" + b"no video" * 100)
    (tmp_path / "untrained").mkdir()
    shutil.copy(run / "config.yaml", tmp_path / "untrained")
    Thresholds({"cell": 0.5}).write(tmp_path / "others.json")
    monkeypatch.chdir(tmp_path)
    before = sorted(path for folder in (tmp_path, run) for path in folder.rglob("*"))
    given = {"RUN": run, "IMAGE": PATHS[0]}
    assert predict(*(given.get(argument, argument) for argument in arguments)) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("retinanet-ext predict: error: ") and message in line
    assert sorted(path for folder in (tmp_path, run) for path in folder.rglob("*")) == before


def test_the_thread_that_reads_ends_with_the_detection(run, images, tmp_path, monkeypatch):
    threads = threading.active_count()
    monkeypatch.setattr(Predictor, "detect", lambda self, batch: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        predict(run, images, "--output", tmp_path / "out", "--batch", 1)
    assert threading.active_count() == threads


def test_reading_ahead_is_bounded_and_passes_errors_on():
    taken = []

    def items():
        for number in range(100):
            taken.append(number)
            yield number
        raise OSError("the end")

    ahead = detection.read_ahead(items(), 3)
    assert next(ahead) == 0
    time.sleep(0.2)
    assert len(taken) <= 6
    with pytest.raises(OSError, match="the end"):
        list(ahead)
    assert taken == [*range(100)]


def test_freed_memory_is_kept_for_the_next_batch():
    """The pages of 128 MB are new the first time alone."""
    detection.keep_freed_memory()

    def count_new_pages():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        np.ones(2**24)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    count_new_pages()
    assert count_new_pages() < 1000
