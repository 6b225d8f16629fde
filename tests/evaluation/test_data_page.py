"""The page of check-data, from the command, in Chromium."""

import json
import re
import shutil

import numpy as np
import pytest
import torch

from browser import measure_page, needs_browser
from retinanet_ext.analysis.anchors import Octaves
from retinanet_ext.cli import main
from retinanet_ext.data.anchor_coverage import TrainingBoxes, describe_shapes
from runs import FIXTURE

NAME = "*cell* | <b>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data with a class and an image whose names are Markdown, and an image in both sets."""
    folder = tmp_path_factory.mktemp("data")
    shutil.copytree(FIXTURE, folder, dirs_exist_ok=True)
    first = ""
    for name in ("train_raw", "val"):
        file = folder / f"instances_{name}.json"
        content = json.loads(file.read_text())
        content["categories"][1]["name"] = NAME
        image = content["images"][0]
        if name == "val":
            shutil.copy(folder / "images" / first, folder / "images/[a](b).jpg")
            image["file_name"] = "[a](b).jpg"
        first = image["file_name"]
        file.write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def page(folder):
    path = folder / "page.html"
    argv = ["check-data", "--config-file", "configs/small_R18_FPN.yaml", "--report", str(path)]
    for split, name in (("TRAIN", "train_raw"), ("TEST", "val")):
        argv += [f"DATASETS.CUSTOM.{split}_JSON", str(folder / f"instances_{name}.json")]
        argv += [f"DATASETS.CUSTOM.{split}_IMAGES", str(folder / "images")]
    assert main(argv) == 0
    before = path.read_bytes()
    assert main(argv) == 2 and path.read_bytes() == before  # an earlier page is kept
    return before.decode()


def test_page_shows_counts_leaks_and_findings(page):
    text = re.sub(r"<[^>]+>", " ", page)
    for expected in (
        "*cell* | &lt;b&gt;",
        "custom_test: 1 of 2 test images is a training image too",
        "[a](b).jpg",
        "copy",
        "Training takes these data; left out: 1, kept: 0.",
        "annotation 2288 of image 171",
        "small, medium, large are COCO's sizes after the resize",
        "small, medium, large: COCO's sizes of the boxes in the images as stored",
    ):
        assert expected in text
    # Two copies, two histograms, two heat maps, and all five images.
    assert page.count("<img ") == 11


@pytest.mark.parametrize("width", [400, 1600])
@pytest.mark.browser
@needs_browser[1]
def test_page_in_a_window(page, width, tmp_path):
    found = measure_page(page, width, tmp_path)
    assert found["title"] == "Data: custom_train, custom_test" and len(found["images"]) == 11


def test_histograms_hold_every_box():
    """Sides and ratios against numpy's; the outer bins hold what is beyond the others."""
    generator = torch.Generator().manual_seed(0)
    sides = torch.rand(500, 2, generator=generator, dtype=torch.float64) * 300 + 1
    sides[:2] = torch.tensor([[1.0, 1.0], [3000.0, 2000.0]])
    boxes = torch.cat([torch.zeros_like(sides), sides], dim=1)
    none = torch.zeros(500, dtype=torch.long)
    grid = Octaves(4.0, 3, (0.5, 1.0, 2.0)).grid([8, 16])
    found = describe_shapes(TrainingBoxes(boxes, none, none, torch.ones(1, 2)), grid)
    for name, values in (
        ("sides", sides.prod(1).sqrt()),
        ("aspect_ratios", sides[:, 1] / sides[:, 0]),
    ):
        edges = np.array(found[name]["edges"])
        inside = values.numpy().clip(edges[0], np.nextafter(edges[-1], 0))
        assert found[name]["counts"] == np.histogram(inside, edges)[0].tolist()
    assert found["aspect_ratios"]["anchors"] == [0.5, 1.0, 2.0]
    octave = 32 * 2 ** (np.arange(6) / 3)
    assert found["sides"]["anchors"] == pytest.approx(octave, abs=0.01)


def test_refusal_names_its_first_finding(folder, tmp_path):
    content = json.loads((folder / "instances_train_raw.json").read_text())
    content["annotations"][0]["bbox"][2] *= -1
    (tmp_path / "train.json").write_text(json.dumps(content))
    argv = ["check-data", "--config-file", "configs/small_R18_FPN.yaml"]
    argv += ["--report", str(tmp_path / "page.html")]
    argv += ["DATASETS.CUSTOM.TRAIN_JSON", str(tmp_path / "train.json")]
    assert main([*argv, "DATASETS.CUSTOM.TRAIN_IMAGES", str(folder / "images")]) == 1
    text = (tmp_path / "page.html").read_text()
    first = f"The first fault: annotation {content['annotations'][0]['id']} of image"
    assert 0 < text.index("Training refuses these data") < text.index(first) < text.index("<h2")


def test_report_is_written_for_data_without_a_box_to_learn(folder, tmp_path, capsys):
    content = json.loads((folder / "instances_train_raw.json").read_text())
    content["annotations"] = []
    (tmp_path / "empty.json").write_text(json.dumps(content))
    argv = ["check-data", "--config-file", "configs/small_R18_FPN.yaml"]
    argv += ["--report", str(tmp_path / "page.html")]
    argv += ["DATASETS.CUSTOM.TRAIN_JSON", str(tmp_path / "empty.json")]
    assert main([*argv, "DATASETS.CUSTOM.TRAIN_IMAGES", str(folder / "images")]) == 1
    assert "There are no training boxes." in (tmp_path / "page.html").read_text()
    assert "nothing to learn" in capsys.readouterr().out
