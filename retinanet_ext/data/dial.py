"""The imbalance dial: sample sets whose ratio of foreground to background anchors is chosen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

IMBALANCE_DIAL: dict[str, dict[str, Any]] = {
    name: {
        "NUM_TRAIN": 800,
        "NUM_VAL": num_val,
        "IMAGE_SIZE": 192,
        "NUM_OBJECTS": num_objects,
        "OBJECT_SIZE": [16, 32],
        "NUM_CLUTTER": [6, 12],
        "EMPTY_FRACTION": empty_fraction,
    }
    for name, num_objects, empty_fraction, num_val in (
        ("1:30", [22, 28], 0.0, 100),
        ("1:100", [6, 10], 0.0, 100),
        ("1:300", [1, 4], 0.0, 200),
        ("1:1000", [1, 1], 0.2, 300),
        ("1:3000", [1, 1], 0.73, 800),
    )
}
"""Ratio of foreground to background anchors -> keys of ``DATASETS.SAMPLE`` that give about it.

The ratio holds for levels P3 to P7 with the paper's 9 anchors per cell, ``BASE_SCALE`` 2.0, images
at their own size and ``DATALOADER.FILTER_EMPTY_ANNOTATIONS`` False (otherwise the last two are
about 1:800). Counted over the labels of all anchors:

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
foreground anchors everywhere. The number of positives per iteration and the background per object
of the validation set, which costs precision, change as well. Compare losses at one point: a curve
over the points does not show the effect of imbalance on training alone. ``NUM_VAL`` differs so
that every point is evaluated on more than 200 boxes.
"""


def objects_ratio(name: str) -> float:
    """Return how many times fewer objects an image has than at 1:100, at a point of the dial."""

    def per_image(point: Mapping[str, Any]) -> float:
        return sum(point["NUM_OBJECTS"]) / 2 * (1 - point["EMPTY_FRACTION"])

    return per_image(IMBALANCE_DIAL["1:100"]) / per_image(IMBALANCE_DIAL[name])


PROPORTIONAL_DIAL = {
    name: {**point, "NUM_TRAIN": round(400 * objects_ratio(name))}
    for name, point in IMBALANCE_DIAL.items()
}
"""The dial with as many training images as give every point about the same number of objects.

They are 128, 400, 1280, 4000 and 11852 images with about 3200 objects.
"""
