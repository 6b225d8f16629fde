"""``retinanet-ext compare`` on runs and on files of detections."""

import json
import re

import pytest
from PIL import Image, ImageOps
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detectors import make_cfg
from drawn_detections import draw
from retinanet_ext import cli
from retinanet_ext.engine.compare_runs import Run, refuse_difference
from retinanet_ext.errors import InputError
from runs import FIXTURE, make_run

pytestmark = pytest.mark.usefixtures("restore_logging")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three runs whose detections are computed once."""
    folder = tmp_path_factory.mktemp("runs")
    return [make_run(folder / name, seed=seed) for seed, name in enumerate("abc")]


def compare(*arguments):
    return cli.main(["compare", "--resamples", "100", *map(str, arguments)])


def refuse(capsys, *arguments):
    """Return the one line of a refusal."""
    assert compare(*arguments) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("retinanet-ext compare: error: ")
    return line


def test_two_runs(runs, capsys):
    a, b, _ = runs
    assert compare(a, b) == 0
    printed = capsys.readouterr().out
    folder = b / "evaluation/compare_a"
    written = json.loads((folder / "comparison.json").read_text())
    assert (folder / "comparison.txt").read_text() in printed
    assert "AP of a" in printed and "pycocotools" not in printed
    assert [group["name"] for group in written["groups"][4:]] == ["RBC", "WBC", "Platelets"]
    assert "of the images, not of the seeds" in written["meaning"]
    truth = COCO(FIXTURE / "instances_val.json")
    (detections,) = (b / "evaluation").glob("detections_*.json")
    evaluation = COCOeval(truth, truth.loadRes(str(detections)), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    ours = [written["groups"][0]["metrics"][metric]["b"] for metric in ("AP", "AP50", "AP75")]
    assert ours == pytest.approx(100 * evaluation.stats[:3], abs=1e-9) and ours[1] > 0

    page = (folder / "comparison.html").read_text()
    assert page.count("<img ") >= 3 and "data:image/svg+xml" in page

    assert compare(a, b) == 0  # no earlier result is replaced
    assert (b / "evaluation/compare_a_2/comparison.json").is_file()
    assert (folder / "comparison.html").read_text() == page


def test_images_that_cannot_be_read_are_left_out_of_the_page(runs, tmp_path, monkeypatch):
    a, b, _ = runs
    monkeypatch.setattr("retinanet_ext.evaluation.pictures.read_picture", lambda *args: None)
    assert compare(a, b, "--output", tmp_path / "new") == 0
    page = (tmp_path / "new/comparison.html").read_text()
    assert page.count("<img ") == page.count('<img src="data:image/svg') == 3


def test_a_run_against_itself(runs, capsys, tmp_path):
    a, *_ = runs
    assert compare(a, a, "--output", tmp_path / "new/itself") == 0
    written = json.loads((tmp_path / "new/itself/comparison.json").read_text())
    for group in written["groups"]:
        for metric in group["metrics"].values():
            assert metric["difference"] in (0, None) and metric["images"] in ([0, 0], [None, None])
    assert "exists; choose another folder" in refuse(
        capsys, a, a, "--output", tmp_path / "new/itself"
    )


def test_seeds(runs, tmp_path):
    a, b, c = runs
    assert compare("--a", a, b, "--b", b, c, "--output", tmp_path / "seeds") == 0
    written = json.loads((tmp_path / "seeds/comparison.json").read_text())
    metric = written["groups"][0]["metrics"]["AP"]
    assert None not in (*metric["images_and_seeds"], *metric["seeds"])


def test_each_run_is_tested_on_its_own_images(runs, tmp_path):
    """Test sets of one name and the same boxes, whose images are in other folders."""
    a, *_ = runs
    (tmp_path / "images").mkdir()
    for path in (FIXTURE / "images").glob("*.jpg"):
        ImageOps.invert(Image.open(path)).save(tmp_path / "images" / path.name)
    b = make_run(tmp_path / "b", "DATASETS.CUSTOM.TEST_IMAGES", str(tmp_path / "images"))
    assert compare(b, a, "--output", tmp_path / "one") == 0
    assert compare(b, a, "--output", tmp_path / "again") == 0
    (of_b,) = (b / "evaluation").glob("detections_*.json")
    plain = [path.read_bytes() for path in (a / "evaluation").glob("detections_*.json")]
    assert of_b.read_bytes() not in plain
    one, again = ((tmp_path / name / "comparison.json").read_text() for name in ("one", "again"))
    assert one == again


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("names", "must have the same classes .* class 1 is 'WBC' in .*/a .* 'other' in .*/b"),
        ("boxes", "test data differ: other images or boxes under the image ids 218"),
        ("images", "they differ in number of test images: 1 and 2"),
        ("setting", "they differ in TEST.DETECTIONS_PER_IMAGE: 50 and 100"),
    ],
)
def test_runs_that_cannot_be_compared(runs, change, message, tmp_path, capsys):
    a, b = runs[0], tmp_path / "b"
    content = json.loads((FIXTURE / "instances_val.json").read_text())
    opts = []
    if change == "names":
        content["categories"][1]["name"] = "other"
    elif change == "boxes":
        (first, *_) = (x for x in content["annotations"] if x["image_id"] == 218)
        first["bbox"][2] -= 1
    elif change == "images":
        content["images"] = content["images"][:1]
        kept = content["images"][0]["id"]
        content["annotations"] = [x for x in content["annotations"] if x["image_id"] == kept]
    else:
        opts = ["TEST.DETECTIONS_PER_IMAGE", 50]
    (tmp_path / "val.json").write_text(json.dumps(content))
    make_run(b, "DATASETS.CUSTOM.TEST_JSON", str(tmp_path / "val.json"), *opts)
    line = refuse(capsys, a, b)
    assert re.search(message, line), line
    assert not (b / "evaluation").exists()


def test_a_region_to_ignore_is_no_object():
    content = json.loads((FIXTURE / "instances_val.json").read_text())
    other = json.loads(json.dumps(content))
    other["annotations"][0]["ignore"] = 1
    cfg = make_cfg()
    a, b = (Run(name, cfg, "test", truth) for name, truth in (("a", content), ("b", other)))
    refuse_difference(a, a)
    with pytest.raises(InputError, match="their test data differ: other images or boxes"):
        refuse_difference(a, b)


def test_no_run_and_too_few_resamples(runs, tmp_path, capsys):
    a, *_ = runs
    assert "is not a folder" in refuse(capsys, a, tmp_path / "none")
    assert "at least 100 are needed" in refuse(capsys, a, a, "--resamples", 10)


@pytest.mark.parametrize("arguments", [["x"], ["x", "y", "z"], ["--a", "x"], ["x", "--b", "y"]])
def test_other_numbers_of_runs(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        compare(*arguments)
    assert ended.value.code == 2
    assert "give two runs, or those of --a and those of --b" in capsys.readouterr().err


@pytest.fixture
def files(tmp_path):
    """Ground truth, good and worse detections."""
    content, detections = draw(0)
    worse = [d for index, d in enumerate(detections) if index % 3]
    for name, value in (("gt", content), ("good", detections), ("worse", worse)):
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    return [tmp_path / f"{name}.json" for name in ("gt", "good", "worse")]


def test_detections_of_any_detector(files, tmp_path):
    gt, good, worse = files
    assert compare("--gt", gt, "--a", worse, "--b", good) == 0
    written = json.loads((tmp_path / "compare_worse_good/comparison.json").read_text())
    assert written["groups"][0]["metrics"]["AP"]["difference"] > 0
    (tmp_path / "nothing.json").write_text("[]")
    assert compare("--gt", gt, "--a", good, "--b", tmp_path / "nothing.json") == 0
    written = json.loads((tmp_path / "compare_good_nothing/comparison.json").read_text())
    assert written["groups"][0]["metrics"]["AP"]["b"] == 0


@pytest.mark.parametrize("sides", [("--a", "--b"), ()])
def test_files_of_detections_need_their_annotations(sides, files, capsys):
    _, good, worse = files
    arguments = [worse, good] if not sides else [sides[0], worse, sides[1], good]
    assert f"{worse} is not a run; to compare files of detections, add --gt" in refuse(
        capsys, *arguments
    )
