"""Augmentations: boxes and ignore regions follow the pixels."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from detectron2.config import CfgNode
from detectron2.structures import BoxMode
from PIL import Image

from retinanet_ext.data import CheckedDatasetMapper, prepare_datasets
from retinanet_ext.engine import Trainer

from .conftest import Bccd

HEIGHT, WIDTH = 120, 200
BOX, REGION = [40, 30, 90, 60], [120, 70, 180, 110]  # in the first and second channel


@pytest.fixture
def record(tmp_path) -> dict:
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    for channel, (left, top, right, bottom) in enumerate((BOX, REGION)):
        image[top:bottom, left:right, channel] = 250
    Image.fromarray(image).save(tmp_path / "image.png")
    annotations = [
        {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0, "iscrowd": crowd}
        for box, crowd in ((BOX, 0), (REGION, 1))
    ]
    path = str(tmp_path / "image.png")
    size = {"height": HEIGHT, "width": WIDTH}
    return {"file_name": path, "image_id": 1, **size, "annotations": annotations}


def painted(channel: np.ndarray) -> list[int]:
    """Return the box of the pixels that are not dark; empty if there is none."""
    rows, columns = np.where(channel > 125)
    box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] if rows.size else []
    return list(map(int, box))


def test_the_log_names_the_augmentations(cfg: CfgNode) -> None:
    cfg.INPUT.QUARTER_TURNS, cfg.INPUT.SCALE_JITTER = True, [0.5, 2.0]
    text = str(CheckedDatasetMapper(cfg, is_train=True).augmentations)
    assert "ScaleJitter(low=0.5, high=2.0)" in text and "QuarterTurns()" in text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("SCALE_JITTER", [0.5, 2.0]),
        ("VERTICAL_FLIP", True),
        ("QUARTER_TURNS", True),
        ("RANDOM_FLIP", "horizontal"),
    ],
)
def test_boxes_follow_the_pixels(key: str, value: object, record: dict, cfg: CfgNode) -> None:
    cfg.INPUT.FORMAT, cfg.INPUT.RANDOM_FLIP = "RGB", "none"
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (HEIGHT,), 10000
    cfg.INPUT[key] = value
    mapper = CheckedDatasetMapper(cfg, is_train=True)
    np.random.seed(0)
    seen = set()
    for _ in range(24):
        mapped = mapper(record)
        image = mapped["image"].numpy()
        seen.add((image.shape, *painted(image[0])))
        boxes, regions = mapped["instances"].gt_boxes.tensor, mapped["ignore_regions"]
        for channel, found in zip(image, (boxes, regions), strict=False):
            if box := painted(channel):
                np.testing.assert_allclose(found[0].numpy(), box, atol=1)
    assert len(seen) > (1 if key.endswith("FLIP") else 3)


def test_scale_jitter_keeps_the_size_or_less(record: dict, cfg: CfgNode) -> None:
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (60,), 10000
    cfg.INPUT.SCALE_JITTER = [0.5, 2.0]
    mapper = CheckedDatasetMapper(cfg, is_train=True)
    heights = [mapper(record)["image"].shape[1] for _ in range(40)]
    assert max(heights) == 60 and 30 <= min(heights) < 40


def test_color_jitter_changes_levels_by_at_most_its_ratio(record: dict, cfg: CfgNode) -> None:
    cfg.INPUT.RANDOM_FLIP = "none"
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (HEIGHT,), 10000
    plain = CheckedDatasetMapper(cfg, is_train=True)(record)
    cfg.INPUT.COLOR_JITTER = 0.1
    mapper = CheckedDatasetMapper(cfg, is_train=True)
    changed = [mapper(record) for _ in range(20)]
    levels = np.array([item["image"].numpy().max() for item in changed], float)
    assert levels.std() > 3 and levels.min() > 250 * 0.9**2 - 2
    assert all(
        (c["instances"].gt_boxes.tensor == plain["instances"].gt_boxes.tensor).all()
        for c in changed
    )


def test_evaluation_is_not_augmented(record: dict, cfg: CfgNode) -> None:
    plain = CheckedDatasetMapper(cfg, is_train=False)(record)["image"]
    cfg.INPUT.SCALE_JITTER, cfg.INPUT.COLOR_JITTER = [0.5, 2.0], 0.5
    cfg.INPUT.VERTICAL_FLIP = cfg.INPUT.QUARTER_TURNS = True
    for _ in range(5):
        assert (CheckedDatasetMapper(cfg, is_train=False)(record)["image"] == plain).all()


def test_batches_of_turned_images_have_one_orientation(bccd: Bccd, cfg: CfgNode) -> None:
    """All images are wide; a batch of wide and tall ones would be padded to squares."""
    cfg.INPUT.QUARTER_TURNS, cfg.INPUT.MIN_SIZE_TRAIN = True, (48,)
    cfg.SOLVER.IMS_PER_BATCH, cfg.SEED, cfg.DATALOADER.NUM_WORKERS = 3, 1, 0
    prepare_datasets(bccd.use(cfg), eval_only=False)
    batches = itertools.islice(Trainer.build_train_loader(cfg), 20)
    orientations = [
        {image["image"].shape[1] > image["image"].shape[2] for image in batch} for batch in batches
    ]
    assert all(len(kinds) == 1 for kinds in orientations)
    assert 4 < sum(kinds == {True} for kinds in orientations) < 16


def test_turns_do_not_group_batches_without_grouping(bccd: Bccd, cfg: CfgNode) -> None:
    cfg.SOLVER.IMS_PER_BATCH, cfg.SEED, cfg.DATALOADER.NUM_WORKERS = 3, 1, 0
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.DATALOADER.ASPECT_RATIO_GROUPING = (48,), False
    prepare_datasets(bccd.use(cfg), eval_only=False)

    def ids() -> list[int]:
        batches = itertools.islice(Trainer.build_train_loader(cfg), 4)
        return [image["image_id"] for batch in batches for image in batch]

    expected = ids()
    cfg.INPUT.QUARTER_TURNS = True
    assert ids() == expected


@pytest.mark.parametrize("image_format", ["L", "YUV-BT.601", "CMYK"])
def test_all_augmentations_of_other_formats(image_format: str, record: dict, cfg: CfgNode) -> None:
    cfg.INPUT.FORMAT, cfg.INPUT.COLOR_JITTER = image_format, 0.5
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.SCALE_JITTER = (60,), [0.5, 2.0]
    cfg.INPUT.VERTICAL_FLIP = cfg.INPUT.QUARTER_TURNS = True
    channels = {"L": 1, "CMYK": 4}.get(image_format, 3)
    mapper = CheckedDatasetMapper(cfg, is_train=True)
    assert {mapper(record)["image"].shape[0] for _ in range(8)} == {channels}


def test_colors_of_bgr_change_as_those_of_rgb(record: dict, cfg: CfgNode) -> None:
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.COLOR_JITTER = (HEIGHT,), 0.9
    images = []
    for image_format, step in (("RGB", 1), ("BGR", -1)):
        cfg.INPUT.FORMAT = image_format
        np.random.seed(1)
        mapper = CheckedDatasetMapper(cfg, is_train=True)
        images.append(np.stack([mapper(record)["image"].numpy()[::step] for _ in range(4)]))
    np.testing.assert_allclose(*(image.astype(int) for image in images), atol=1)
