"""``retinanet-ext evaluate``: a run by its folder, or any detector by two files."""

import html
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from detectron2.utils.logger import setup_logger

from browser import measure_page, needs_browser
from evaluation.box_sets import draw_boxes, pycocotools_evaluation
from retinanet_ext.cli import main
from retinanet_ext.engine import Predictor
from retinanet_ext.engine.run_evaluation import evaluate_files, evaluate_run
from retinanet_ext.engine.run_folder import load_run
from retinanet_ext.evaluation.detection_matches import ERROR_KINDS
from retinanet_ext.evaluation.thresholds import THRESHOLDS
from runs import CLASS_NAMES, FIXTURE, make_run

IMAGES = sorted((FIXTURE / "images").glob("*.jpg"))
VAL = FIXTURE / "instances_val.json"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "mine")


@pytest.fixture(scope="module")
def kept_files(tmp_path_factory):
    """BCCD's ground truth, and detections that are it but for the first image's."""
    content = json.loads(VAL.read_text())
    first = content["images"][0]["id"]
    results = [
        {
            "image_id": a["image_id"],
            "category_id": a["category_id"],
            "bbox": [a["bbox"][0] + (200 if a["image_id"] == first else 1), *a["bbox"][1:]],
            "score": 0.9 - 0.001 * index,
        }
        for index, a in enumerate(content["annotations"])
    ]
    folder = tmp_path_factory.mktemp("files")
    for name, entries in (("gt.json", content), ("dt.json", results)):
        (folder / name).write_text(json.dumps(entries))
    return folder / "gt.json", folder / "dt.json"


@pytest.fixture
def files(kept_files, tmp_path):
    return tuple(Path(shutil.copy(file, tmp_path)) for file in kept_files)


@pytest.fixture(scope="module")
def evaluated(kept_files, tmp_path_factory):
    """The page of two files and its figures."""
    out = tmp_path_factory.mktemp("evaluated")
    (item,) = evaluate_files(*kept_files, images=FIXTURE / "images", out=out).items()
    return item


def test_page_of_a_run_with_its_thresholds(run, tmp_path, capsys):
    folder = shutil.copytree(run, tmp_path / "run")
    assert main(["evaluate", str(folder), "--save-thresholds", "accuracy=1"]) == 2
    assert "P and R in (0, 1], got accuracy=1" in capsys.readouterr().err
    assert not (folder / THRESHOLDS).exists()
    opts = ["TEST.DETECTIONS_PER_IMAGE", "40"]
    assert main(["evaluate", str(folder), "--save-thresholds", *opts]) == 0
    printed = capsys.readouterr().out
    (page,) = (folder / "evaluation").glob("*.html")
    assert f"Wrote {page} and .json" in printed and "RBC" in printed
    report = json.loads(page.with_suffix(".json").read_text())
    saved = json.loads((folder / THRESHOLDS).read_text())
    assert saved["criterion"] == report["criterion"] == "best F1"
    chosen = {each["name"]: each["threshold"]["threshold"] for each in report["classes"]}
    assert saved["scores"] == chosen and list(chosen) == CLASS_NAMES
    # The predictor takes them.
    assert Predictor(load_run(folder)).thresholds.tolist() == pytest.approx(list(chosen.values()))
    # The AP is that of the training's own evaluation.
    (detections,) = (folder / "evaluation").glob("detections_*.json")
    reference = pycocotools_evaluation(
        json.loads(VAL.read_text()), json.loads(detections.read_text())
    )
    reference.summarize()
    assert report["metrics"]["AP"] == pytest.approx(100 * reference.stats[0], abs=1e-12)

    before = {path: path.read_bytes() for path in page.parent.iterdir()}
    evaluate_run(folder, opts)
    assert {path: path.read_bytes() for path in page.parent.iterdir()} == before


def test_figures_of_two_files(evaluated, files, tmp_path):
    page, report = evaluated
    content = json.loads(files[0].read_text())
    first = content["images"][0]["id"]
    of_first = sum(a["image_id"] == first for a in content["annotations"])
    worst = report["worst_images"]
    assert [each["image_id"] for each in worst] == [first] and worst[0]["missed"] == of_first
    doubts = [each for found in report["label_doubts"].values() for each in found]
    names = {image["id"]: image["file_name"] for image in content["images"]}
    assert doubts and all(e["file_name"] == names[e["image_id"]] for e in (*worst, *doubts))
    assert sum(each["count"] for each in report["errors"].values()) >= of_first
    assert report["num_objects"] == len(content["annotations"])
    # The score of the first image's detections is above .5, where they count as wrong.
    (rbc,) = (each for each in report["classes"] if each["name"] == "RBC")
    assert rbc["at_threshold"]["recall"][50] == pytest.approx(
        sum(a["image_id"] != first for a in content["annotations"] if a["category_id"] == 1)
        / rbc["objects"]
    )
    assert rbc["at_threshold"]["recall"][100] == 0
    assert len(rbc["precision_at_recall"]) == 101 and max(rbc["precision_at_recall"]) > 0.3
    text = page.read_text()
    for title in ("Average precision", "Operating thresholds", "Confusion", "Kinds of error",
                  "Calibration", "Worst images", "Labels to look at"):  # fmt: skip
        assert re.search(rf"<h2[^>]*>{title}", text)
    assert all(kind in text for kind in ERROR_KINDS)
    assert f"<td>{first} ({names[first]})</td>" in text
    assert text.count("data:image/jpeg") >= 2 and text.count("data:image/svg+xml") == 9
    (other,) = evaluate_files(*files, criterion="recall=.1", out=tmp_path)
    assert other.name == f"{page.stem}_recall0.1.html"


@needs_browser[0]
@needs_browser[1]
@pytest.mark.parametrize("width", [400, 1400])
def test_page_in_a_window(width, evaluated, tmp_path):
    found = measure_page(evaluated[0].read_text(), width, tmp_path)
    assert len(found["images"]) >= 8 and len(found["links"]) == 7
    assert found["title"] == "Evaluation of dt.json"


@needs_browser[0]
@needs_browser[1]
def test_page_of_80_classes_with_hostile_names(tmp_path):
    content, results = draw_boxes(0, num_images=60)
    rng = np.random.default_rng(0)
    hostile = "<script>alert(1)</script> a|b *bold* `code` [link](http://a.b) $x^2$ 细胞"
    content["categories"] = [
        {"id": k, "name": f"class {k}" if k else hostile * 3} for k in range(80)
    ]
    for each in (*content["annotations"], *results):
        each["category_id"] = int(rng.integers(79))
    for name, entries in (("gt.json", content), ("dt.json", results)):
        (tmp_path / name).write_text(json.dumps(entries))
    (page,) = evaluate_files(tmp_path / "gt.json", tmp_path / "dt.json", out=tmp_path)
    text = page.read_text()
    assert "<script" not in text and html.escape("<script>alert(1)") in text
    assert text.count("<td>class 41</td>") >= 2  # in the section of all classes
    measure_page(text, 400, tmp_path)


def corrupt(files, which, change):
    content = json.loads(files[which].read_text())
    change(content)
    files[which].write_text(json.dumps(content))


BAD = {
    "no COCO file as ground truth": (
        lambda gt, dt: gt.write_text("[]"),
        r"gt.json: is not a COCO instances file: no list of images",
    ),
    "no COCO file as detections": (
        lambda gt, dt: shutil.copy(gt, dt),
        r"dt.json is no file of detections in COCO's results format",
    ),
    "no detections": (lambda gt, dt: dt.write_text("[]"), r"dt.json holds no detections"),
    "not JSON": (lambda gt, dt: dt.write_text("{"), r"dt.json is not JSON"),
    "not there": (lambda gt, dt: dt.unlink(), r"dt.json cannot be read: No such file"),
    "image ids of other images": (
        lambda gt, dt: corrupt((gt, dt), 1, lambda c: [r.update(image_id=7000 + i)
                                                       for i, r in enumerate(c[:6])]),
        r"dt.json: the image_id of 6 of \d+ detections is not listed in .*gt.json: "
        r"7000, 7001, 7002, 7003, 7004, and 1 more",
    ),
    "image ids that are text": (
        lambda gt, dt: corrupt((gt, dt), 1, lambda c: c[0].update(image_id=str(c[0]["image_id"]))),
        r"dt.json: the image_id of 1 of \d+ detections is not listed in .*gt.json: \"\d+\"",
    ),
    "other classes": (
        lambda gt, dt: corrupt((gt, dt), 1, lambda c: c[0].update(category_id=99)),
        r"the category_id of 1 of \d+ detections is not listed in .*gt.json: 99",
    ),
    "a box of three numbers": (
        lambda gt, dt: corrupt((gt, dt), 1, lambda c: c[4].update(bbox=[1, 2, 3])),
        r"dt.json: detection 4 has no bbox of four finite numbers",
    ),
    "a box that is not finite": (
        lambda gt, dt: corrupt((gt, dt), 1, lambda c: c[4]["bbox"].__setitem__(3, float("nan"))),
        r"dt.json: detection 4 has no bbox of four finite numbers",
    ),
    "a record that is a number": (
        lambda gt, dt: corrupt((gt, dt), 1, lambda c: c.__setitem__(4, 7)),
        r"dt.json: detection 4 has no score of a finite number",
    ),
    "no score": (
        lambda gt, dt: corrupt((gt, dt), 1, lambda c: c[4].pop("score")),
        r"dt.json: detection 4 has no score of a finite number",
    ),
    "a score of 40": (
        lambda gt, dt: corrupt((gt, dt), 1, lambda c: c[2].update(score=40)),
        r"dt.json: score 40 of detection 2 is not in \[0, 1\]",
    ),
    "an annotation of no box": (
        lambda gt, dt: corrupt((gt, dt), 0, lambda c: c["annotations"][3].pop("bbox")),
        r"gt.json: annotation 3 has no bbox",
    ),
    "a category without id": (
        lambda gt, dt: corrupt((gt, dt), 0, lambda c: c["categories"][1].pop("id")),
        r"gt.json: entry 1 of categories has no id",
    ),
    "no objects": (
        lambda gt, dt: corrupt((gt, dt), 0, lambda c: c["annotations"].clear()),
        r"the ground truth has no objects",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_files_that_cannot_be_used(name, files, tmp_path, capsys):
    """``compare`` says the same, but takes a file of no detections, whose AP is 0."""
    change, message = BAD[name]
    change(*files)
    out = tmp_path / "out"
    gt, dt = map(str, files)
    commands = [["evaluate", "--gt", gt, "--dt", dt]]
    if name != "no detections":
        commands.append(["compare", "--gt", gt, "--a", dt, "--b", dt])
    for command in commands:
        assert main([*command, "--output", str(out)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert re.search(message, line) and not out.exists()


@pytest.fixture
def new_log(restore_logging):
    setup_logger.cache_clear()  # it would keep the stderr of an earlier test


def as_corners(box):
    return [*box[:2], box[0] + box[2], box[1] + box[3]]


def as_fractions(box):
    return [box[0] / 640, box[1] / 480, box[2] / 640, box[3] / 480]


@pytest.mark.usefixtures("new_log")
@pytest.mark.parametrize(
    ("convert", "reason"),
    [
        (list, None),
        (as_corners, r"as xywh \d+ of \d+ boxes do not lie inside their images; as xyxy all "),
        (as_fractions, r"no number of \d+ boxes is above .*; they look like fractions"),
    ],
)
def test_boxes_of_another_format_are_warned_of(convert, reason, files, tmp_path, capsys):
    truth = json.loads(files[0].read_text())["annotations"]
    found = [{**each, "bbox": convert(each["bbox"]), "score": 0.5} for each in truth]
    files[1].write_text(json.dumps(found))
    gt, dt = map(str, files)
    commands = [["evaluate", "--gt", gt, "--dt", dt]]
    commands.append(["compare", "--resamples", "100", "--gt", gt, "--a", dt, "--b", dt])
    for command in commands:
        assert main([*command, "--output", str(tmp_path / command[0])]) == 0
        said = capsys.readouterr().err
        assert reason is None or re.search(rf"dt.json: {reason}", said), said
        assert (" has [x, y, width, height] in pixels" in said) == (reason is not None)


@pytest.mark.usefixtures("new_log")
def test_an_image_that_cannot_be_read_is_named_and_left_out(files, evaluated, tmp_path, capsys):
    images = shutil.copytree(FIXTURE / "images", tmp_path / "images")
    (worst,) = evaluated[1]["worst_images"]
    (images / worst["file_name"]).write_text("text")
    out = tmp_path / "out"
    command = ["evaluate", "--gt", files[0], "--dt", files[1], "--images", images]
    assert main([*map(str, command), "--output", str(out)]) == 0
    assert f"{images / worst['file_name']} is not drawn: not an image" in capsys.readouterr().err
    (page,) = out.glob("*.html")
    written = json.loads(page.with_suffix(".json").read_text())
    assert written["metrics"]["AP"] == evaluated[1]["metrics"]["AP"]
    assert page.read_text().count("data:image/jpeg") < evaluated[0].read_text().count("image/jpeg")
    assert "data:," not in page.read_text().partition("<style>")[2]


def test_images_that_are_not_there_leave_no_page(files, tmp_path, capsys):
    content = json.loads(VAL.read_text())
    names = [image["file_name"] for image in content["images"]]
    images = shutil.copytree(FIXTURE / "images", tmp_path / "images")
    (images / names[1]).unlink()
    command = ["evaluate", "--gt", files[0], "--dt", files[1], "--images", images]
    assert main([*map(str, command), "--output", str(tmp_path / "out")]) == 2
    message = f"1 of {len(names)} images are missing in {images}, the first of them: {names[1]}\n"
    assert capsys.readouterr().err.endswith(message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [[], ["--gt", "a.json"], ["run", "--gt", "a.json", "--dt", "b.json"],
     ["--gt", "a.json", "--dt", "b.json", "--save-thresholds"],
     ["--gt", "a.json", "--dt", "b.json", "MODEL.DEVICE", "cpu"]],
)  # fmt: skip
def test_a_run_or_two_files(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", *arguments])
    assert ended.value.code == 2
    assert (
        "give the folder of a run, before the options, or --gt and --dt" in capsys.readouterr().err
    )


def test_no_run(tmp_path, capsys):
    assert main(["evaluate", str(Path(tmp_path, "none"))]) == 2
    assert "is not a folder; give the OUTPUT_DIR of a training" in capsys.readouterr().err
