"""Training samples: the same whatever processes, micro-batches and workers load them."""

import itertools
import random
from collections import Counter
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, build_detection_train_loader
from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.data.samplers import TrainingSampler
from detectron2.structures import BoxMode
from detectron2.utils import comm
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from retinanet_ext.data import CheckedDatasetMapper
from retinanet_ext.data.loader import TrainLoader, batch_by_aspect_ratio, shard_batch
from retinanet_ext.errors import InputError

SAMPLERS = (
    "TrainingSampler",
    "RepeatFactorTrainingSampler",
    "RandomSubsetTrainingSampler",
    "WeightedTrainingSampler",
    "WeightedCategoryTrainingSampler",
)
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
    return TrainLoader(cfg, CheckedDatasetMapper(cfg, is_train=True))


def take(loader, count):
    return list(itertools.islice(loader, count))


def image_ids(batches):
    return [[image["image_id"] for image in batch] for batch in batches]


def by_image(images):
    """Pixels and boxes by image id; images of one batch differ, as there are no repeats in it."""
    return {
        image["image_id"]: (image["image"], image["instances"].gt_boxes.tensor) for image in images
    }


@contextmanager
def process(rank, num_processes):
    """Be one of several processes, as far as their number decides."""
    with (
        patch.object(comm, "get_rank", return_value=rank),
        patch.object(comm, "get_world_size", return_value=num_processes),
        patch("detectron2.data.build.get_world_size", return_value=num_processes),
    ):
        yield


@pytest.mark.parametrize(
    ("processes", "accumulate", "workers", "streams"),
    [
        *((1, 1, 2, 1), (1, 1, 2, 4), (1, 4, 0, 1), (1, 4, 0, 4), (1, 2, 1, 2), (2, 1, 0, 1)),
        *((2, 1, 0, 2), (2, 2, 2, 2), (2, 2, 2, 4), (4, 1, 0, 1), (4, 1, 0, 4)),
    ],
)
def test_the_same_images_are_seen_whatever_loads_them(
    processes, accumulate, workers, streams, loader_cfg
):
    """As many streams as micro-batches need not be given."""
    batches = 3
    expected = take(make_loader(loader_cfg, "DATALOADER.ASPECT_RATIO_STREAMS", streams), batches)
    is_default = streams == processes * accumulate
    opts = ["DATALOADER.ASPECT_RATIO_STREAMS", 0 if is_default else streams]
    opts += ["DATALOADER.NUM_WORKERS", workers, "SOLVER.GRAD_ACCUM_STEPS", accumulate]
    shares = []
    for rank in range(processes):
        with patch("retinanet_ext.data.loader._check_same_records"), process(rank, processes):
            shares.append(take(make_loader(loader_cfg, *opts), batches * accumulate))
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


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("sampler", ["TrainingSampler", "RepeatFactorTrainingSampler"])
def test_the_order_is_detectron2s(sampler, grouped, processes, loader_cfg):
    """In each process, and without the images that have no objects."""
    opts = ["DATALOADER.SAMPLER_TRAIN", sampler, "DATALOADER.ASPECT_RATIO_GROUPING", grouped]
    loader_cfg.merge_from_list([*opts, "DATALOADER.REPEAT_THRESHOLD", 0.9])
    for rank in range(processes):
        with patch("retinanet_ext.data.loader._check_same_records"), process(rank, processes):
            mapper = CheckedDatasetMapper(loader_cfg, is_train=True)
            stock = build_detection_train_loader(loader_cfg, mapper=mapper)
            assert image_ids(take(make_loader(loader_cfg), 20)) == image_ids(take(stock, 20))


def composition(batches):
    """The shares of wide batches, of mixed ones and of those without a wide image, in percent."""
    kinds = Counter(len({*batch}) + any(batch) for batch in batches)  # 2 kinds of image: 3
    return [round(100 * kinds[kind] / len(batches)) for kind in (2, 3, 1)]


@pytest.mark.parametrize(
    ("processes", "expected"), [(8, [10, 90, 0]), (2, [57, 36, 7]), (1, [75, 0, 25])]
)
def test_batches_are_mixed_as_detectron2s(processes, expected):
    """Of 16 images, three in four wide: its grouping in each process, over all processes."""
    is_wide = [index % 4 != 0 for index in range(4000)]
    records = [{"width": 3 if wide else 1, "height": 2} for wide in is_wide]
    streams = []
    for rank in range(processes):
        with process(rank, processes):
            sampler = TrainingSampler(len(records), seed=1)
        samples = (records[index] for index in sampler)
        streams.append(iter(AspectRatioGroupedDataset(samples, 16 // processes)))
    theirs = [[image["width"] == 3 for s in streams for image in next(s)] for _ in range(4000)]
    indices = TrainingSampler(len(records), seed=1)._infinite_indices()
    grouped = batch_by_aspect_ratio(indices, is_wide, batch_size=16, num_streams=processes)
    ours = [[is_wide[index] for _, index in batch] for batch in itertools.islice(grouped, 4000)]
    assert composition(ours) == composition(theirs) == pytest.approx(expected, abs=2)


def test_a_run_keeps_its_streams_on_another_number_of_processes(loader_cfg):
    with patch("retinanet_ext.data.loader._check_same_records"), process(0, 4):
        first = make_loader(loader_cfg)
    expected = take(make_loader(loader_cfg, "DATALOADER.ASPECT_RATIO_STREAMS", 4), 5)
    second = make_loader(loader_cfg)
    second.load_state_dict(first.state_dict(3))
    assert image_ids(take(second, 2)) == image_ids(expected[3:])
    # Where the batch is no multiple of them, it gets others; a state without them is of one.
    third = make_loader(loader_cfg, "SOLVER.IMS_PER_BATCH", 6)
    third.load_state_dict(first.state_dict(3))
    assert third.num_streams == 1
    second.load_state_dict({"seed": 7, "num_batches": 1, "num_images": 4})
    assert second.num_streams == 1


def test_images_without_objects_are_used_where_wanted(loader_cfg):
    batches = take(make_loader(loader_cfg, "DATALOADER.FILTER_EMPTY_ANNOTATIONS", False), 6)
    assert len(SIZES) - 1 in set(itertools.chain(*image_ids(batches)))


@pytest.mark.parametrize(
    ("sampler", "workers"), [("TrainingSampler", 2), *((sampler, 0) for sampler in SAMPLERS)]
)
def test_going_on_after_n_batches_is_as_taking_n(sampler, workers, loader_cfg):
    """With a random seed, which travels in the state."""
    opts = ["SEED", -1, "DATALOADER.SAMPLER_TRAIN", sampler, "DATALOADER.NUM_WORKERS", workers]
    opts += ["SOLVER.GRAD_ACCUM_STEPS", 2, "DATALOADER.RANDOM_SUBSET_RATIO", 0.7]
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
    ("sampler", "opts", "expected"),
    [
        ("Sequential", (), "Unknown training sampler"),
        ("RandomSubsetTrainingSampler", ("DATALOADER.RANDOM_SUBSET_RATIO", 0.1), "no image"),
        ("WeightedTrainingSampler", ("DATASETS.TRAIN_REPEAT_FACTOR", [["x", 2.0]]), "datasets"),
    ],
)
def test_a_sampler_that_cannot_be_used_is_refused(sampler, opts, expected, loader_cfg):
    with pytest.raises(InputError, match=f"SAMPLER_TRAIN '{sampler}' cannot be used: .*{expected}"):
        make_loader(loader_cfg, "DATALOADER.SAMPLER_TRAIN", sampler, *opts)


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
    streams=st.integers(1, 6),
    skipped=st.integers(0, 5),
    seed=st.integers(0, 2**31),
)
def test_shares_are_the_batch(shapes, processes, micro_batches, size, streams, skipped, seed):
    sampler = TrainingSampler(len(shapes), seed=seed)
    batch_size = processes * micro_batches * size * streams

    def batches():
        indices = sampler._infinite_indices()
        return batch_by_aspect_ratio(indices, shapes, batch_size=batch_size, num_streams=streams)

    wanted = list(itertools.islice(batches(), skipped, skipped + 3))
    shares = [
        shard_batch(
            itertools.islice(batches(), skipped, None),
            rank=rank,
            num_processes=processes,
            num_micro_batches=micro_batches,
        )
        for rank in range(processes)
    ]
    for batch in wanted:
        micro = [next(share) for _ in range(micro_batches) for share in shares]
        assert {len(part) for part in micro} == {size * streams}
        assert sorted(itertools.chain(*micro)) == sorted(batch)


@given(
    shapes=st.lists(st.booleans(), min_size=1, max_size=12),
    share=st.integers(1, 6),
    streams=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_a_streams_share_is_of_one_shape_and_none_is_lost_or_repeated(shapes, share, streams, seed):
    indices = list(
        itertools.islice(TrainingSampler(len(shapes), seed=seed)._infinite_indices(), 200)
    )
    size = share * streams
    batches = list(batch_by_aspect_ratio(indices, shapes, batch_size=size, num_streams=streams))
    positions = [position for batch in batches for position, _ in batch]
    assert len(set(positions)) == len(positions) > len(indices) - 3 * size
    for number in range(streams):
        shares = [batch[number * share : (number + 1) * share] for batch in batches]
        for samples in shares:
            assert len({shapes[index] for _, index in samples}) == 1
            assert {position % streams for position, _ in samples} == {number}
            assert all(indices[position] == index for position, index in samples)
        # Each shape keeps its order.
        for shape in (False, True):
            of_shape = [p for samples in shares for p, index in samples if shapes[index] is shape]
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
