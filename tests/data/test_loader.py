"""Training samples: the same whatever processes, micro-batches and workers load them."""

import itertools
import random
from collections import Counter
from unittest.mock import patch

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, build_detection_train_loader
from detectron2.data.samplers import TrainingSampler
from detectron2.structures import BoxMode
from detectron2.utils import comm
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from retinanet_ext.data import CheckedDatasetMapper
from retinanet_ext.data.loader import build_train_loader, group_batches, share_out
from retinanet_ext.engine.config import TRAINING_CHOICES
from retinanet_ext.errors import InputError

NAME, OTHER = "loader_test", "loader_test_2"
SIZES = [(60, 40), (40, 60), (50, 50), (64, 32), (32, 64), (48, 40), (60, 44)]
BATCH = 4


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Images of noise, wide ones and others, with a box each; the last has none."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    records = []
    for index, (width, height) in enumerate(SIZES):
        file = folder / f"{index}.png"
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file)
        box = {"bbox": [4, 4, 30, 25], "bbox_mode": BoxMode.XYXY_ABS, "category_id": index % 2}
        records.append(
            {
                "file_name": str(file),
                "image_id": index,
                "width": width,
                "height": height,
                "annotations": [box] if index < len(SIZES) - 1 else [],
            }
        )
    return records


@pytest.fixture(autouse=True)
def registered(records):
    DatasetCatalog.register(NAME, lambda: records)
    DatasetCatalog.register(
        OTHER, lambda: [{**r, "image_id": 100 + i} for i, r in enumerate(records)]
    )
    yield
    DatasetCatalog.remove(NAME)
    DatasetCatalog.remove(OTHER)


@pytest.fixture
def loader_cfg(cfg):
    """Every augmentation there is, so that images show the mapper's randomness."""
    cfg.merge_from_list(
        [
            *("DATASETS.TRAIN", (NAME,), "MODEL.DEVICE", "cpu", "SEED", 7),
            *("SOLVER.IMS_PER_BATCH", BATCH, "DATALOADER.NUM_WORKERS", 0),
            *("INPUT.MIN_SIZE_TRAIN", (32, 40, 48), "INPUT.CROP.ENABLED", True),
        ]
    )
    return cfg


def make_loader(cfg, *opts):
    cfg = cfg.clone()
    cfg.merge_from_list(list(opts))
    return build_train_loader(cfg, CheckedDatasetMapper(cfg, is_train=True))


def take(loader, count):
    return list(itertools.islice(loader, count))


def image_ids(batches):
    return [[image["image_id"] for image in batch] for batch in batches]


def by_image(images):
    """Pixels and boxes by image id; images of one batch differ, as there are no repeats in it."""
    return {
        image["image_id"]: (image["image"], image["instances"].gt_boxes.tensor) for image in images
    }


@pytest.mark.parametrize(
    ("processes", "accumulate", "workers"),
    [(1, 1, 2), (1, 4, 0), (1, 2, 1), (2, 1, 0), (2, 2, 2), (4, 1, 0)],
)
def test_the_same_images_are_seen_whatever_loads_them(processes, accumulate, workers, loader_cfg):
    batches = 3
    expected = take(make_loader(loader_cfg), batches)
    loader = make_loader(
        loader_cfg, "DATALOADER.NUM_WORKERS", workers, "SOLVER.ACCUMULATE", accumulate
    )
    shares = []
    for rank in range(processes):
        with (
            patch.object(comm, "get_rank", return_value=rank),
            patch.object(comm, "get_world_size", return_value=processes),
        ):
            shares.append(take(loader, batches * accumulate))
    assert {len(micro) for share in shares for micro in share} == {BATCH // processes // accumulate}
    for number, batch in enumerate(expected):
        part = slice(number * accumulate, (number + 1) * accumulate)
        together = [image for share in shares for micro in share[part] for image in micro]
        assert len(together) == BATCH
        found = by_image(together)
        assert found.keys() == by_image(batch).keys()
        for image_id, tensors in by_image(batch).items():
            for a, b in zip(tensors, found[image_id], strict=True):
                assert torch.equal(a, b)


def test_augmentation_differs_from_epoch_to_epoch(loader_cfg):
    seen = {}
    for image in itertools.chain(*take(make_loader(loader_cfg), 12)):
        seen.setdefault(image["image_id"], []).append(image["image"].numpy().tobytes())
    assert all(len(set(versions)) > 1 for versions in seen.values())


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("sampler", ["TrainingSampler", "RepeatFactorTrainingSampler"])
def test_the_order_is_detectron2s(sampler, grouped, loader_cfg):
    """Of one process, and of images without objects, which are left out."""
    opts = ["DATALOADER.SAMPLER_TRAIN", sampler, "DATALOADER.ASPECT_RATIO_GROUPING", grouped]
    loader_cfg.merge_from_list([*opts, "DATALOADER.REPEAT_THRESHOLD", 0.9])
    mapper = CheckedDatasetMapper(loader_cfg, is_train=True)
    stock = build_detection_train_loader(loader_cfg, mapper=mapper)
    assert image_ids(take(make_loader(loader_cfg), 20)) == image_ids(take(stock, 20))


def test_images_without_objects_are_used_where_wanted(loader_cfg):
    batches = take(make_loader(loader_cfg, "DATALOADER.FILTER_EMPTY_ANNOTATIONS", False), 6)
    assert len(SIZES) - 1 in set(itertools.chain(*image_ids(batches)))


@pytest.mark.parametrize("sampler", TRAINING_CHOICES["DATALOADER.SAMPLER_TRAIN"])
@pytest.mark.parametrize("workers", [0, 2])
def test_going_on_after_n_batches_is_as_taking_n(sampler, workers, loader_cfg):
    """With a random seed, which travels in the state."""
    opts = ["SEED", -1, "DATALOADER.SAMPLER_TRAIN", sampler, "DATALOADER.NUM_WORKERS", workers]
    opts += ["SOLVER.ACCUMULATE", 2, "DATALOADER.RANDOM_SUBSET_RATIO", 0.7]
    opts += ["DATASETS.TRAIN_REPEAT_FACTOR", [[NAME, 1.5]], "DATALOADER.REPEAT_THRESHOLD", 0.9]
    first = make_loader(loader_cfg, *opts)
    expected = take(first, 10)
    np.random.seed(123)
    second = make_loader(loader_cfg, *opts)
    second.load_state_dict(first.state_dict(3))
    for a, b in zip(expected[6:], take(second, 4), strict=True):
        assert image_ids([a]) == image_ids([b])
        assert all(torch.equal(x["image"], y["image"]) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("factor", [3, 2.5, 0.5])
@pytest.mark.parametrize(
    ("sampler", "rare"), [("WeightedTrainingSampler", 1), ("WeightedCategoryTrainingSampler", 2)]
)
def test_data_sets_are_seen_as_often_as_their_factor_says(
    sampler, rare, factor, loader_cfg, records
):
    """And by category the first image twice, whose class half as many have as the threshold."""
    images = [
        {**record, "annotations": [{**record["annotations"][0], "category_id": int(index == 0)}]}
        for index, record in enumerate(records[:6])
    ]
    for name in (NAME, OTHER):
        DatasetCatalog.pop(name)
        DatasetCatalog.register(name, lambda: images)
    loader = make_loader(
        loader_cfg,
        *("DATASETS.TRAIN", (NAME, OTHER), "DATASETS.TRAIN_REPEAT_FACTOR", [[OTHER, factor]]),
        *("DATALOADER.REPEAT_THRESHOLD", 1 / 3, "DATALOADER.REPEAT_SQRT", False),
        *("DATALOADER.SAMPLER_TRAIN", sampler),
    )
    counts = Counter(itertools.islice(loader._sampler()._infinite_indices(), 20_000))
    for index in range(6):
        assert counts[6 + index] / counts[index] == pytest.approx(factor, rel=0.05)
    assert counts[0] / counts[1] == pytest.approx(rare, rel=0.05)


@pytest.mark.parametrize(
    ("opts", "expected"),
    [
        (
            ("RandomSubsetTrainingSampler", "DATALOADER.RANDOM_SUBSET_RATIO", 0.1),
            "RANDOM_SUBSET_RATIO 0.1 of 6 training images is none",
        ),
        (
            ("WeightedTrainingSampler", "DATASETS.TRAIN_REPEAT_FACTOR", [["else", 2.0]]),
            f"TRAIN_REPEAT_FACTOR names 'else', and the training data are {NAME}",
        ),
    ],
)
def test_what_a_sampler_cannot_use_is_named(opts, expected, loader_cfg):
    with pytest.raises(InputError, match=expected):
        make_loader(loader_cfg, "DATALOADER.SAMPLER_TRAIN", *opts)


def test_the_seed_is_the_configs_until_there_is_a_run_to_go_on(loader_cfg):
    first, second = make_loader(loader_cfg), make_loader(loader_cfg, "SEED", 8)
    assert (first.seed, second.seed) == (7, 8)
    second.load_state_dict(first.state_dict(2))
    assert second.seed == 7
    random_ones = {make_loader(loader_cfg, "SEED", -1).seed for _ in range(3)}
    assert len(random_ones) > 1 and min(random_ones) >= 0


def test_another_batch_size_goes_on_at_the_same_image(loader_cfg):
    first = make_loader(loader_cfg, "DATALOADER.ASPECT_RATIO_GROUPING", False)
    other = ("DATALOADER.ASPECT_RATIO_GROUPING", False, "SOLVER.IMS_PER_BATCH", 2)
    second = make_loader(loader_cfg, *other)
    second.load_state_dict(first.state_dict(3))
    third = make_loader(loader_cfg, *other)
    third.load_state_dict(second.state_dict(5))
    ids = list(itertools.chain(*image_ids(take(first, 5))))
    assert list(itertools.chain(*image_ids(take(second, 4)))) == ids[12:]
    assert list(itertools.chain(*image_ids(take(third, 2)))) == ids[16:]


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_leaves_the_generators_as_they_were(workers, loader_cfg):
    loader = make_loader(loader_cfg, "DATALOADER.NUM_WORKERS", workers)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    take(loader, 2)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert before == after


@given(
    shapes=st.lists(st.booleans(), min_size=1, max_size=12),
    processes=st.sampled_from([1, 2, 4]),
    micro_batches=st.sampled_from([1, 2, 3]),
    size=st.integers(1, 3),
    skipped=st.integers(0, 5),
    seed=st.integers(0, 2**31),
)
def test_shares_are_the_batch(shapes, processes, micro_batches, size, skipped, seed):
    stream = TrainingSampler(len(shapes), seed=seed)
    batch_size = processes * micro_batches * size

    def batches():
        return group_batches(stream._infinite_indices(), shapes, batch_size)

    wanted = list(itertools.islice(batches(), skipped, skipped + 3))
    shares = [
        share_out(
            itertools.islice(batches(), skipped, None),
            rank=rank,
            num_processes=processes,
            num_micro_batches=micro_batches,
        )
        for rank in range(processes)
    ]
    for batch in wanted:
        micro = [next(share) for _ in range(micro_batches) for share in shares]
        assert {len(part) for part in micro} == {size}
        assert sorted(itertools.chain(*micro)) == sorted(batch)


@given(
    shapes=st.lists(st.booleans(), min_size=1, max_size=12),
    batch_size=st.integers(1, 6),
    seed=st.integers(0, 2**31),
)
def test_a_batch_is_of_one_shape_and_none_is_lost_or_repeated(shapes, batch_size, seed):
    stream = list(
        itertools.islice(TrainingSampler(len(shapes), seed=seed)._infinite_indices(), 200)
    )
    batches = list(group_batches(stream, shapes, batch_size))
    positions = [position for batch in batches for position, _ in batch]
    assert len(set(positions)) == len(positions) > len(stream) - 2 * batch_size
    for batch in batches:
        assert len({shapes[index] for _, index in batch}) == 1
        assert all(stream[position] == index for position, index in batch)
    # Each shape keeps its order.
    for shape in (False, True):
        of_shape = [p for batch in batches for p, index in batch if shapes[index] is shape]
        assert of_shape == sorted(of_shape)


def test_a_long_way_is_short(loader_cfg, records):
    """100,000 iterations of 16 images: places alone are passed over, no image is opened."""
    DatasetCatalog.remove(NAME)
    DatasetCatalog.register(NAME, lambda: records * 1000)
    loader = make_loader(loader_cfg, "SOLVER.IMS_PER_BATCH", 16)
    loader.load_state_dict(loader.state_dict(100_000))
    with patch.object(
        CheckedDatasetMapper, "__call__", side_effect=lambda record: record
    ) as mapper:
        (batch,) = take(loader, 1)
    assert len(batch) == mapper.call_count == 16


def test_data_without_places_are_refused(loader_cfg):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([])

    DatasetCatalog.remove(NAME)
    DatasetCatalog.register(NAME, Stream)
    with pytest.raises(InputError, match=f"{NAME} is an IterableDataset"):
        make_loader(loader_cfg)


def test_an_unknown_sampler_is_refused(loader_cfg):
    loader = make_loader(loader_cfg, "DATALOADER.SAMPLER_TRAIN", "Sequential")
    with pytest.raises(InputError, match="SAMPLER_TRAIN 'Sequential' cannot be used: Unknown"):
        iter(loader)
