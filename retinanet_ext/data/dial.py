"""The imbalance dial: sample sets whose ratio of foreground to background anchors is chosen."""

from __future__ import annotations

from typing import Any

_POINTS = {
    "1:30": ([22, 28], 0.0, 100),
    "1:100": ([6, 10], 0.0, 100),
    "1:300": ([1, 4], 0.0, 200),
    "1:1000": ([1, 1], 0.2, 300),
    "1:3000": ([1, 1], 0.73, 800),
}
"""Ratio -> objects per image, share of empty images, validation images."""


def objects_ratio(name: str) -> float:
    """Return how many times fewer objects an image has than at 1:100, at a point of the dial."""
    dense, sparse = (
        sum(bounds) / 2 * (1 - empty) for bounds, empty, _ in (_POINTS["1:100"], _POINTS[name])
    )
    return dense / sparse


IMBALANCE_DIAL: dict[str, dict[str, Any]] = {
    name: {
        "NUM_TRAIN": round(400 * objects_ratio(name)),
        "NUM_VAL": num_val,
        "IMAGE_SIZE": 192,
        "NUM_OBJECTS": num_objects,
        "OBJECT_SIZE": [16, 32],
        "NUM_CLUTTER": [6, 12],
        "EMPTY_FRACTION": empty_fraction,
    }
    for name, (num_objects, empty_fraction, num_val) in _POINTS.items()
}
"""Ratio of foreground to background anchors -> keys of ``DATASETS.SAMPLE`` that give about it.

The ratio holds for levels P3 to P7 with the paper's 9 anchors per cell, ``BASE_SCALE`` 2.0, images
at their own size and ``DATALOADER.FILTER_EMPTY_ANNOTATIONS`` False (otherwise the last two are
about 1:800). Counted over the labels of all anchors of 800 training images:

====== ======= ======= =============== ===============
name   train   val     boxes per image empty images
====== ======= ======= =============== ===============
1:30   1:30    1:29    24.9            none
1:100  1:98    1:98    8.0             none
1:300  1:323   1:316   2.5             none
1:1000 1:1056  1:1027  0.8             20 %
1:3000 1:3068  1:2887  0.3             73 %
====== ======= ======= =============== ===============

Only the number of objects and the share of empty images differ; each object has about 8.6
foreground anchors everywhere. The 128, 400, 1280, 4000 and 11852 training images have about 3200
objects at every point. The background per object of the validation set, which costs precision,
changes as well: compare losses at one point. ``NUM_VAL`` differs so that every point is evaluated
on more than 200 boxes.
"""
