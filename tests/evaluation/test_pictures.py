"""The picture shows the boxes it is given, where they are, and no others."""

import numpy as np
import pytest
from detectron2.structures import BoxMode
from PIL import Image

from retinanet_ext.evaluation import draw_detection_grid
from retinanet_ext.evaluation.pictures import IMAGE_WIDTH, LINE, MARGIN, PAIR_GAP, _palette

GREY = (128, 128, 128)
NAMES = ["one", "two", "three"]


@pytest.fixture
def make_images(tmp_path):
    def make(*boxes_per_image, size=(240, 160)):
        images = []
        for image_id, boxes in enumerate(boxes_per_image):
            file = tmp_path / f"{image_id}.png"
            Image.new("RGB", size, GREY).save(file)
            annotations = [
                {"bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "category_id": label}
                for label, box in boxes
            ]
            images.append(
                {"file_name": str(file), "image_id": image_id, "annotations": annotations}
            )
        return images

    return make


def draw(images, predictions, path, **kwargs):
    kwargs = {"num_images": 8, "score_thresh": 0.3} | kwargs
    draw_detection_grid(images, predictions, NAMES, path, **kwargs)
    return np.asarray(Image.open(path))


def predicted(image_id, label, box, score):
    return {"image_id": image_id, "category_id": label, "bbox": box, "score": score}


def panels(picture, height):
    """The pixels of the first pair's two images; one line of legend above them."""
    top = MARGIN + LINE + MARGIN + LINE
    right = MARGIN + IMAGE_WIDTH + PAIR_GAP
    rows = slice(top, top + height)
    return picture[rows, MARGIN : MARGIN + IMAGE_WIDTH], picture[rows, right : right + IMAGE_WIDTH]


def test_boxes_are_where_they_belong(make_images, tmp_path):
    images = make_images([(1, [60, 40, 50, 60])])
    predictions = [
        predicted(0, 2, [120, 30, 40, 80], 0.9),
        predicted(0, 0, [20, 90, 30, 30], 0.2),  # below the threshold
        predicted(5, 0, [20, 90, 30, 30], 0.9),  # of an image that is not drawn
    ]
    picture = draw(images, predictions, tmp_path / "grid.png")
    # 240 pixels to 480.
    truth, found = panels(picture, height=320)
    colours = _palette(len(NAMES))
    assert tuple(truth[2 * 100, 2 * 85]) == colours[1]  # its lower edge
    assert tuple(truth[2 * 70, 2 * 60]) == colours[1]  # its left edge
    assert tuple(found[2 * 110, 2 * 140]) == colours[2]
    assert not (truth == colours[2]).all(-1).any()
    assert not (found == colours[1]).all(-1).any()
    assert not (picture == colours[0]).all(-1).any(), "neither drawn nor in the legend"


def test_crowd_regions_are_not_drawn(make_images, tmp_path):
    images = make_images([(1, [60, 40, 50, 60]), (2, [10, 10, 20, 20])])
    images[0]["annotations"][1]["iscrowd"] = 1
    picture = draw(images, [], tmp_path / "grid.png")
    assert not (picture == _palette(3)[2]).all(-1).any()


def test_images_with_objects_come_first_and_are_spread(make_images, tmp_path, monkeypatch):
    box = [(0, [10, 10, 20, 20])]
    images = make_images([], box, [], box, box, box, box, [])
    drawn = []
    monkeypatch.setattr(
        "retinanet_ext.data.images.ImageReader.__call__",
        lambda reader, file: drawn.append(file) or np.asarray(Image.open(file)),
    )
    draw(images, [], tmp_path / "grid.png", num_images=3)
    assert drawn == [images[i]["file_name"] for i in (1, 4, 6)]
    drawn.clear()
    draw(images, [], tmp_path / "grid.png", num_images=6)
    assert drawn == [images[i]["file_name"] for i in (0, 1, 3, 4, 5, 6)]


@pytest.mark.parametrize("size", [(3000, 20), (20, 3000), (1, 1)])
def test_any_shape_of_image_and_box(size, make_images, tmp_path):
    images = make_images([(0, [0, 0, *size]), (1, [0, 0, 0, 0])], size=size)
    images[0].pop("annotations")  # as for a test set without ground truth
    predictions = [
        predicted(0, 0, [-5, -5, 9999, 9999], 1.0),
        predicted(0, 1, [0, 0, 0, 0], 1.0),
        predicted(0, 2, [float("nan"), 0, 1, float("inf")], 1.0),
    ]
    picture = draw(images, predictions, tmp_path / "new/grid.png")
    assert (picture == _palette(3)[0]).all(-1).any()
    assert not (picture == _palette(3)[2]).all(-1).any()


@pytest.mark.parametrize("number", [1, 10, 11, 20, 21, 365])
def test_each_class_has_its_colour(number):
    assert len(set(_palette(number))) == number
