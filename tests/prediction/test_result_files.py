"""Every format says what the log says, and other software reads it."""

import csv
import json
from pathlib import Path

import pytest
from pycocotools.coco import COCO

from retinanet_ext.data import validate_coco
from retinanet_ext.prediction.detection_log import DetectionLog
from retinanet_ext.prediction.image_sources import SourceFile
from retinanet_ext.prediction.result_files import WRITERS

CLASSES = ["RBC", "血小板, small"]
FIXTURE = Path("tests/fixtures/bccd_mini/images").resolve()
FILES = [SourceFile(str(path), path.stem) for path in sorted(FIXTURE.glob("*.jpg"))[:3]]


@pytest.fixture
def log(tmp_path):
    log = DetectionLog(tmp_path, {})
    log.start(1)
    first = {"class": 1, "score": 0.9, "box": [10.0, 20.0, 110.5, 70.0]}
    second = {"class": 0, "score": 0.5, "box": [0.0, 0.0, 640.0, 480.0]}
    size = {"width": 640, "height": 480}
    log.append([{"file": FILES[0].path, **size, "detections": [first, second]}])
    log.append([{"file": FILES[1].path, "error": "not an image"}])
    log.append([{"file": FILES[2].path, **size, "detections": []}])
    log.append([{"file": "clip.mp4", "frame": 3, **size, "detections": [second]}])
    return log


def write(log, format):
    files = [*FILES, SourceFile("clip.mp4", "clip")]
    return WRITERS[format](log, files, CLASSES, log.path.parent)


def test_json_has_the_records_with_names(log):
    content = json.loads(write(log, "json").read_text())
    assert content["classes"] == CLASSES
    first, second, third, frame = content["images"]
    assert [d["class"] for d in first["detections"]] == [CLASSES[1], CLASSES[0]]
    assert second["error"] == "not an image" and third["detections"] == []
    assert frame["frame"] == 3


def test_coco_loads_as_a_data_set(log, monkeypatch):
    monkeypatch.chdir(FIXTURE)
    path = write(log, "coco")
    coco = COCO(str(path))
    assert coco.dataset["info"] == {"image_root": str(FIXTURE)}
    names = [FILES[0].name + ".jpg", FILES[2].name + ".jpg", "clip.mp4/000003"]
    assert [(i["id"], i["file_name"]) for i in coco.dataset["images"]] == [*enumerate(names, 1)]
    assert {c["id"]: c["name"] for c in coco.loadCats([1, 2])} == dict(enumerate(CLASSES, 1))
    assert [(a["image_id"], a["category_id"], a["score"]) for a in coco.loadAnns([1, 2, 3])] == [
        (1, 2, 0.9), (1, 1, 0.5), (3, 1, 0.5)
    ]  # fmt: skip
    assert coco.loadAnns([1])[0]["bbox"] == [10, 20, 100.5, 50]
    result = validate_coco(str(path), str(FIXTURE), policy={"MISSING_IMAGE": "drop"})
    result.raise_refused()
    assert len(result.content["annotations"]) == 2


def test_csv_has_a_row_per_detection(log):
    with open(write(log, "csv"), encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["class"], row["frame"]) for row in rows] == [
        (CLASSES[1], ""), (CLASSES[0], ""), (CLASSES[0], "3")
    ]  # fmt: skip
    assert [float(rows[0][key]) for key in ("left", "top", "right", "bottom")] == [
        10,
        20,
        110.5,
        70,
    ]


def test_yolo_has_a_file_per_readable_image(log):
    labels = write(log, "yolo")
    texts = {str(p.relative_to(labels)): p.read_text() for p in sorted(labels.rglob("*.txt"))}
    frame = "0 0.500000 0.500000 1.000000 1.000000 0.5000\n"
    box = "1 0.094141 0.093750 0.157031 0.104167 0.9000\n"
    assert texts == {
        f"{FILES[0].name}.txt": box + frame,
        f"{FILES[2].name}.txt": "",
        "clip/000003.txt": frame,
    }
    assert (labels.parent / "classes.txt").read_text().splitlines() == CLASSES
