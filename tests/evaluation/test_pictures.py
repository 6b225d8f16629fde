"""The picture shows the boxes it is given, where they are, and no others."""

import numpy as np
import pytest
from detectron2.structures import BoxMode
from PIL import Image

from retinanet_ext.data.images import ImageReader
from retinanet_ext.evaluation.pictures import (
    COLORS,
    GAP,
    IMAGE_WIDTH,
    TITLE_HEIGHT,
    draw_detection_grid,
)

GREY = (128, 128, 128)
NAMES = ["one", "$two$", "three"]


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
    return np.asarray(Image.open(path)).astype(int)


def predicted(image_id, label, box, score):
    return {"image_id": image_id, "category_id": label, "bbox": box, "score": score}


def has_color(pixels, label):
    return (np.abs(pixels - 255 * COLORS[label]) < 6).all(-1).any()


def test_an_image_that_cannot_be_read_is_left_out(make_images, tmp_path, caplog):
    images = make_images([(1, [60, 40, 50, 60])], [(0, [20, 20, 50, 60])])
    (tmp_path / "0.png").write_text("text")
    pixels = draw(images, [], tmp_path / "out.png")
    assert has_color(pixels, 0) and not has_color(pixels, 1)
    assert f"{images[0]['file_name']} is not drawn: not an image" in caplog.text
    how = {"num_images": 8, "score_thresh": 0.3}
    assert not draw_detection_grid(images[:1], [], NAMES, tmp_path / "none.png", **how)
    assert not (tmp_path / "none.png").exists()


def test_boxes_are_where_they_belong(make_images, tmp_path):
    images = make_images([(1, [60, 40, 50, 60])])
    predictions = [
        predicted(0, 2, [120, 30, 40, 80], 0.9),
        predicted(0, 0, [20, 90, 30, 30], 0.2),  # below the threshold
        predicted(5, 0, [20, 90, 30, 30], 0.9),  # in an image that is not drawn
    ]
    picture = draw(images, predictions, tmp_path / "grid.png")
    scale, top = IMAGE_WIDTH / 240, GAP + TITLE_HEIGHT
    truth, found = (picture[top:, x : x + IMAGE_WIDTH] for x in (GAP, 2 * GAP + IMAGE_WIDTH))

    def around(panel, x, y):
        x, y = round(scale * x), round(scale * y)
        return panel[y - 2 : y + 3, x - 2 : x + 3]

    assert has_color(around(truth, 85, 100), 1) and has_color(around(truth, 60, 70), 1)
    assert has_color(around(found, 140, 110), 2) and has_color(around(found, 160, 70), 2)
    assert (around(truth, 85, 70) == GREY).all() and (around(found, 140, 90) == GREY).all()
    assert not has_color(truth, 2) and not has_color(found, 1) and not has_color(picture, 0)


def test_crowd_regions_are_not_drawn(make_images, tmp_path):
    images = make_images([(1, [60, 40, 50, 60]), (2, [10, 10, 20, 20])])
    images[0]["annotations"][1]["iscrowd"] = 1
    picture = draw(images, [], tmp_path / "grid.png")
    assert has_color(picture, 1) and not has_color(picture, 2)


@pytest.mark.parametrize(
    ("number", "expected"), [(3, (1, 4, 6)), (6, (0, 1, 3, 4, 5, 6)), (9, range(8))]
)
def test_images_with_objects_come_first_and_are_spread(
    number, expected, make_images, tmp_path, monkeypatch
):
    box = [(0, [10, 10, 20, 20])]
    images = make_images([], box, [], box, box, box, box, [])
    drawn, read = [], ImageReader.__call__
    monkeypatch.setattr(
        ImageReader, "__call__", lambda self, file: drawn.append(file) or read(self, file)
    )
    draw(images, [], tmp_path / "grid.png", num_images=number)
    assert drawn == [images[i]["file_name"] for i in expected]


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
    assert has_color(picture, 0) and not has_color(picture, 2)


@pytest.mark.parametrize("image_format", ["BGR", "L", "YUV-BT.601"])
def test_an_image_of_any_input_format_is_drawn_in_rgb(image_format, make_images, tmp_path):
    images = make_images([])
    Image.new("RGB", (240, 160), "red").save(images[0]["file_name"])
    picture = draw(images, [], tmp_path / "grid.png", reader=ImageReader(image_format))
    assert tuple(picture[GAP + TITLE_HEIGHT + 50, GAP + 50]) == (255, 0, 0)
