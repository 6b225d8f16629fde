"""Tiles and flips: what is seen whole, and what the merge leaves of it."""

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances, pairwise_iou

from retinanet_ext.prediction.views import View, make_views, merge_views

SIZE = 900, 1500
TILES = {"tile": 400, "overlap": 0.25}


def instances(boxes, scores, size, classes=None):
    found = Instances(size)
    found.pred_boxes = Boxes(torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    found.scores = torch.as_tensor(scores, dtype=torch.float32)
    found.pred_classes = torch.as_tensor(classes or [0] * len(found.scores))
    return found


def see(view, objects, rng):
    """A detector that finds what a view shows of each object, to half a pixel."""
    left, top, right, bottom = view.box
    boxes = objects.clamp(min=torch.tensor([left, top, left, top]))
    boxes = boxes.minimum(torch.tensor([right, bottom, right, bottom]))
    boxes = boxes - torch.tensor([left, top, left, top])
    boxes = boxes[((boxes[:, 2:] - boxes[:, :2]) > 8).all(1)]
    boxes = boxes + torch.rand(boxes.shape, generator=rng) - 0.5
    if view.flipped:
        x = (right - left) - boxes[:, [2, 0]]
        boxes = torch.stack([x[:, 0], boxes[:, 1], x[:, 1], boxes[:, 3]], 1)
    return instances(boxes, torch.rand(len(boxes), generator=rng), (bottom - top, right - left))


def spread(lengths, gap, rng):
    """Objects of random shape at the points of a grid that is never that of the tiles."""
    low, high = lengths
    x, y = torch.meshgrid(
        torch.arange(4.0, SIZE[1] - high, high + gap),
        torch.arange(4.0, SIZE[0] - high, high + gap),
        indexing="ij",
    )
    corner = torch.stack([x.flatten(), y.flatten()], 1)
    side = low + torch.rand(corner.shape, generator=rng) * (high - low)
    return torch.cat([corner, corner + side], 1)


def test_an_image_that_fits_is_one_view_and_its_detections_are_returned_as_they_are():
    for size in ((400, 400), (1, 400), (17, 3)):
        (view,) = make_views(size, **TILES)
        assert view == View((0, 0, size[1], size[0]))
    found = instances([[0, 0, 5, 5], [0, 0, 5, 5]], [0.9, 0.9], (17, 3))  # no second suppression
    assert merge_views([view], [found], (17, 3), 0.5) is found


@pytest.mark.parametrize("size", [SIZE, (401, 400), (400, 401), (300, 5000), (1111, 777)])
def test_objects_up_to_the_overlap_are_whole_in_a_tile(size):
    whole, *tiles = make_views(size, **TILES)
    assert whole.box == (0, 0, size[1], size[0])
    height, width = min(400, size[0]), min(400, size[1])
    for left, top, right, bottom in (view.box for view in tiles):
        assert left >= 0 and top >= 0 and right <= size[1] and bottom <= size[0]
        assert (right - left, bottom - top) == (width, height)
    rng = np.random.default_rng(0)
    for _ in range(500):
        w, h = rng.uniform(1, np.minimum((100, 100), size[::-1]))
        x, y = rng.uniform(0, (size[1] - w, size[0] - h))
        boxes = [view.box for view in tiles]
        assert any(a <= x and b <= y and x + w <= c and y + h <= d for a, b, c, d in boxes)


@pytest.mark.parametrize("tta", [False, True])
@pytest.mark.parametrize("lengths", [(12, 90), (110, 280)])
def test_each_object_is_found_once_and_where_it_is(lengths, tta):
    """Those up to the overlap by tiles alone, larger ones with the help of the whole image."""
    rng = torch.Generator().manual_seed(0)
    objects = spread(lengths, 20, rng)
    views = make_views(SIZE, **TILES, tta=tta)
    found = [see(view, objects, rng) for view in views]
    merged = merge_views(views, found, SIZE, 0.5)
    if lengths[1] < 100:
        tiles = [[*v] for v in zip(views, found, strict=True) if not v[0].smallest]
        alone = merge_views(*zip(*tiles, strict=True), SIZE, 0.5)
        assert torch.equal(alone.pred_boxes.tensor, merged.pred_boxes.tensor)
    assert len(merged) == len(objects) >= 15
    assert (merged.scores.diff() <= 0).all()
    overlap = pairwise_iou(merged.pred_boxes, Boxes(objects)).max(1)
    assert len(overlap.indices.unique()) == len(objects) and overlap.values.min() > 0.8


def test_a_large_object_that_no_view_shows_whole_keeps_one_box():
    views = [View((0, 0, 400, 400)), View((300, 0, 700, 400))]
    parts = [instances([[260, 50, 400, 90]], [0.6], (400, 400)),
             instances([[0, 50, 180, 90]], [0.8], (400, 400))]  # fmt: skip
    merged = merge_views(views, parts, (400, 700), 0.5)
    assert merged.pred_boxes.tensor.tolist() == [[300, 50, 480, 90]]
    parts[1].pred_classes += 1  # objects of two classes are two
    assert len(merge_views(views, parts, (400, 700), 0.5)) == 2


def test_a_cut_box_beside_others_stays():
    """Of a cut box less than half lies in its neighbour, with a better score or a worse one."""
    views = [View((0, 0, 400, 400)), View((300, 0, 700, 400))]
    for score in (0.9, 0.3):
        parts = [instances([[200, 50, 330, 90], [290, 50, 400, 90]], [score, 0.5], (400, 400)),
                 instances([], [], (400, 400))]  # fmt: skip
        assert len(merge_views(views, parts, (400, 700), 0.5)) == 2


def test_every_view_is_flipped_too():
    views = make_views(SIZE, **TILES, tta=True)
    assert [view for view in views if not view.flipped] == make_views(SIZE, **TILES)
    assert {(view.box, view.flipped) for view in views} == {
        (view.box, flipped) for view in views for flipped in (False, True)
    }
    image = np.arange(24).reshape(2, 4, 3)
    view = View((1, 0, 4, 2), flipped=True)
    assert (view.crop(image)[:, 0] == image[:, 3]).all()
    assert view.to_image(torch.tensor([[0.0, 0, 1, 2]])).tolist() == [[3, 0, 4, 2]]
