"""Coverage against the whole matrix of IoUs, with the detector's own anchors and matcher."""

import subprocess
import sys
import time

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_anchor_generator
from detectron2.structures import Boxes, pairwise_iou

from retinanet_ext import add_retinanet_ext_config
from retinanet_ext.analysis.anchors import (
    AnchorGrid,
    Octaves,
    best_ious,
    count_positives,
    search_octaves,
)
from retinanet_ext.modeling.matching import AnchorMatcher

STRIDES = [8, 16, 32, 64, 128]
PADDED = [(224, 160), (320, 352)]  # width, height


def make_boxes(num_boxes: int, seed: int = 0, largest: float = 200.0):
    """Boxes of all sizes and ratios on images of two sizes: boxes, images, padded sizes."""
    rng = torch.Generator().manual_seed(seed)
    images = torch.arange(num_boxes) * len(PADDED) // num_boxes
    padded = torch.tensor(PADDED)[images]
    sides = torch.exp(torch.rand(num_boxes, 2, generator=rng) * torch.tensor(largest).log()) + 1
    centers = torch.rand(num_boxes, 2, generator=rng) * padded
    corners = torch.cat([centers - sides / 2, centers + sides / 2], dim=1)
    inside = torch.minimum(corners.clamp(min=0), padded.repeat(1, 2))
    # Many of one image overlap and some are equal, so that anchors have to choose.
    inside[1::7] = inside[::7][: len(inside[1::7])]
    return inside, images, padded


def make_generator(name: str, **keys):
    cfg = get_cfg()
    add_retinanet_ext_config(cfg)
    node = cfg.MODEL.ANCHOR_GENERATOR
    node.NAME = name
    for key, value in keys.items():
        node[key] = value
    return build_anchor_generator(cfg, [ShapeSpec(stride=stride) for stride in STRIDES])


def in_float64(boxes):
    """Detectron2's boxes are in float32 when they are made."""
    made = Boxes(boxes)
    made.tensor = boxes
    return made


GENERATORS = {
    "paper": ("OctaveAnchorGenerator", {}),
    "other octaves": (
        "OctaveAnchorGenerator",
        {"SCALES_PER_OCTAVE": 2, "BASE_SCALE": 1.7, "ASPECT_RATIOS": [[0.3, 1.2]], "OFFSET": 0.0},
    ),
    "Detectron2's": (
        "DefaultAnchorGenerator",
        {"SIZES": [[16, 30], [33, 60], [60, 100], [128, 140], [256, 300]], "OFFSET": 0.25},
    ),
}


@pytest.mark.parametrize("case", GENERATORS)
def test_equals_the_matrix(case):
    name, keys = GENERATORS[case]
    generator = make_generator(name, **keys)
    sizes = [(cell[:, 2:] - cell[:, :2]).double() for cell in generator.cell_anchors]
    grid = AnchorGrid(sizes, generator.strides, generator.offset)
    boxes, images, padded = make_boxes(400)

    ious, positives, num_anchors = [], [], []
    for image, (width, height) in enumerate(PADDED):
        grid_sizes = [(-(-height // stride), -(-width // stride)) for stride in STRIDES]
        # Its forward ends in float32, which alone moves small boxes' IoU by more than 1e-6.
        anchors = torch.cat(generator.double()._grid_anchors(grid_sizes))
        of_image = boxes[images == image].double()
        ious.append(pairwise_iou(in_float64(of_image), in_float64(anchors)).amax(1))
        matches, labels = AnchorMatcher([0.4, 0.5], [0, -1, 1], "none")(of_image, anchors)
        positives.append(torch.bincount(matches[labels == 1], minlength=len(of_image)))
        num_anchors.append(len(anchors))
    found = best_ious(boxes, padded, grid)
    torch.testing.assert_close(found, torch.cat(ious), rtol=0, atol=1e-6)
    assert 0.1 < (found >= 0.5).double().mean() < 0.99
    assert torch.equal(count_positives(boxes, images, padded, grid), torch.cat(positives))
    assert grid.num_anchors(torch.tensor(PADDED)).tolist() == num_anchors


def test_octaves_are_those_of_the_generator():
    octaves = Octaves(2.5, 2, (0.4, 1.0, 3.0))
    keys = {"BASE_SCALE": 2.5, "SCALES_PER_OCTAVE": 2, "ASPECT_RATIOS": [[0.4, 1.0, 3.0]]}
    generator = make_generator("OctaveAnchorGenerator", **keys)
    for sizes, cell in zip(octaves.grid(STRIDES).sizes, generator.cell_anchors, strict=True):
        expected = (cell[:, 2:] - cell[:, :2]).double()
        in_order = [torch.tensor(sorted(shapes.tolist())) for shapes in (sizes, expected)]
        torch.testing.assert_close(*in_order, rtol=1e-6, atol=0)


def test_no_boxes():
    grid = Octaves(4.0, 3, (0.5, 1.0, 2.0)).grid(STRIDES)
    nothing = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 2).long()
    assert len(count_positives(*nothing, grid)) == len(best_ious(nothing[0], nothing[2], grid)) == 0


def test_search_finds_anchors_for_small_and_tall_boxes():
    boxes, _, padded = make_boxes(300)
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    half = torch.tensor([5.0, 15.0])
    tall = torch.cat([centers - half, centers + half], dim=1)
    current = Octaves(4.0, 3, (0.5, 1.0, 2.0)).grid(STRIDES)
    assert (best_ious(tall, padded, current) < 0.5).double().mean() > 0.9
    found = search_octaves(tall, padded, current, max_anchors=9)
    assert found.is_better and found.reached > 0.9
    assert found.octaves.num_anchors <= 9
    # What it says of them is so.
    ious = best_ious(tall, padded, found.octaves.grid(STRIDES))
    assert float((ious >= 0.5).double().mean()) == found.reached
    assert float(ious.mean()) == found.mean_iou
    again = search_octaves(tall, padded, found.octaves.grid(STRIDES), max_anchors=9)
    assert not again.is_better


def test_ten_thousand_boxes_take_seconds():
    boxes, _, padded = make_boxes(10_000)
    grid = Octaves(4.0, 3, (0.5, 1.0, 2.0)).grid(STRIDES)
    start = time.process_time()
    best_ious(boxes, padded, grid)
    count_positives(boxes, torch.arange(len(boxes)) // 8, padded, grid)
    assert time.process_time() - start < 10


def test_detectron2_is_not_needed():
    program = "import sys; sys.modules['detectron2'] = None; import retinanet_ext.analysis."
    subprocess.run([sys.executable, "-c", f"{program}anchors"], check=True)
