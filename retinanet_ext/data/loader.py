"""Training batches as a function of the seed, the number of streams and the place in them alone.

Samples are dealt to streams in turn, as Detectron2 deals them to processes, and each stream is
grouped by aspect ratio by itself. A resumed run sees what the uninterrupted one would have seen,
and any numbers of processes, micro-batches and workers see the same batches of the same streams.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import random
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetFromList,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.build import trivial_batch_collator
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, IterableDataset

from retinanet_ext.errors import InputError, LostWorkerError

logger = logging.getLogger(__name__)

Mapper = Callable[[dict[str, Any]], dict[str, Any]]

Sample = tuple[int, int]
"""A place in the stream of samples, and the index of the image that stands there."""


def build_train_loader(cfg: CfgNode, mapper: Mapper) -> TrainLoader:
    """Return the batches that ``DATASETS.TRAIN`` and the keys of ``DATALOADER`` describe.

    Detectron2 reads and filters the data and gives the order of samples. A batch of
    ``SOLVER.IMS_PER_BATCH`` images is shared out to the processes, and each share to
    ``SOLVER.GRAD_ACCUM_STEPS`` micro-batches. With ``ASPECT_RATIO_GROUPING`` the images that a
    stream gives to a batch are all wide, or none is; there are ``ASPECT_RATIO_STREAMS`` streams, or
    one per micro-batch and process. With a ``SEED`` below 0 the processes agree on a random one.

    Raises:
        InputError: the sampler is unknown, or the data have no order to go on in
    """
    return TrainLoader(cfg, mapper)


class TrainLoader(Iterable[list[dict[str, Any]]]):
    """Micro-batches of this process without end, see :func:`build_train_loader`.

    Attributes:
        seed: of the order of samples and of the mapper's randomness
        num_streams: how many streams the samples are dealt to
        num_batches, num_images: those of all processes that lie before the first batch
    """

    def __init__(self, cfg: CfgNode, mapper: Mapper) -> None:
        self.cfg = cfg
        self.mapper = mapper
        self.seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        self.num_batches, self.num_images = 0, 0
        num_passes = comm.get_world_size() * cfg.SOLVER.GRAD_ACCUM_STEPS
        self.num_streams = cfg.DATALOADER.ASPECT_RATIO_STREAMS or num_passes
        records = get_detection_dataset_dicts(
            cfg.DATASETS.TRAIN, filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
        )
        if isinstance(records, IterableDataset):
            raise InputError(
                f"DATASETS.TRAIN {', '.join(cfg.DATASETS.TRAIN)} is an IterableDataset, in which a "
                "resumed run cannot find its place; register a function that returns a list"
            )
        _check_sampler(cfg, len(records))
        _check_same_records(cfg, records)
        self.groups = bytes(len(records))
        if cfg.DATALOADER.ASPECT_RATIO_GROUPING:
            self.groups = bytes(record["width"] > record["height"] for record in records)
        if isinstance(records, list):
            records = DatasetFromList(records, copy=False)  # one tensor, which workers share
        self.records = records

    def state_dict(self, num_batches: int) -> dict[str, int]:
        """Return the state after that many batches of all processes since the run's start."""
        more = (num_batches - self.num_batches) * self.cfg.SOLVER.IMS_PER_BATCH
        num_images = self.num_images + more  # earlier parts of a run may have had other batches
        return {
            "seed": self.seed,
            "num_streams": self.num_streams,
            "num_batches": num_batches,
            "num_images": num_images,
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on there, with that seed and those streams, whatever the config's are by now."""
        if state["seed"] != self.seed:
            logger.info("Seed %d of the run goes on, and not %d", state["seed"], self.seed)
        self.seed = state["seed"]
        streams = state.get("num_streams", 1)  # as of a version that grouped all samples together
        if self.cfg.SOLVER.IMS_PER_BATCH % streams:
            logger.warning(
                "The run's batches came from %d streams, by which SOLVER.IMS_PER_BATCH %d cannot "
                "be divided: they go on from %d, in another order",
                *(streams, self.cfg.SOLVER.IMS_PER_BATCH, self.num_streams),
            )
        else:
            self.num_streams = streams
        self.num_batches, self.num_images = state["num_batches"], state["num_images"]

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        batch_size = self.cfg.SOLVER.IMS_PER_BATCH
        batches = batch_by_aspect_ratio(
            self._sampler()._infinite_indices(),
            self.groups,
            batch_size=batch_size,
            num_streams=self.num_streams,
        )
        batches = itertools.islice(batches, self.num_images // batch_size, None)
        workers = self.cfg.DATALOADER.NUM_WORKERS
        loader = DataLoader(
            _MappedSamples(self.records, self.mapper, self.seed),
            batch_sampler=shard_batch(
                batches,
                rank=comm.get_rank(),
                num_processes=comm.get_world_size(),
                num_micro_batches=self.cfg.SOLVER.GRAD_ACCUM_STEPS,
            ),
            num_workers=workers,
            collate_fn=trivial_batch_collator,
            worker_init_fn=_end_with_the_parent_alone,
            pin_memory=torch.device(self.cfg.MODEL.DEVICE).type == "cuda",
            generator=torch.Generator(),  # its draw is not to move the generator of the training
        )
        return _batches(loader)

    def _sampler(self) -> Any:
        """Return Detectron2's sampler; all its randomness is the seed's."""
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.SEED = self.seed
        try:
            with preserve_rng_state():
                seed_rngs(self.seed)  # where it takes no seed, Detectron2 draws one
                parts = build_detection_train_loader.from_config(
                    cfg, self.mapper, dataset=self.records
                )
        except (AssertionError, ValueError) as error:
            raise InputError(
                f"DATALOADER.SAMPLER_TRAIN {cfg.DATALOADER.SAMPLER_TRAIN!r} cannot be used: "
                f"{error or type(error).__name__}"
            ) from error
        return parts["sampler"]


def _batches(loader: DataLoader) -> Iterator[list[dict[str, Any]]]:
    try:
        yield from loader
    except (EOFError, ConnectionError) as error:  # in the middle of what a worker hands over
        raise LostWorkerError from error


def _check_sampler(cfg: CfgNode, num_images: int) -> None:
    """Refuse what Detectron2's samplers only assert, once they are made."""
    sampler, ratio = cfg.DATALOADER.SAMPLER_TRAIN, cfg.DATALOADER.RANDOM_SUBSET_RATIO
    if sampler == "RandomSubsetTrainingSampler" and int(num_images * ratio) < 1:
        raise InputError(
            f"DATALOADER.RANDOM_SUBSET_RATIO {ratio} of {num_images} training images is none; it "
            f"must be at least 1/{num_images}"
        )
    factors = cfg.DATASETS.TRAIN_REPEAT_FACTOR if sampler.startswith("Weighted") else []
    for name, _ in factors:
        if name not in cfg.DATASETS.TRAIN:
            raise InputError(
                f"DATASETS.TRAIN_REPEAT_FACTOR names {name!r}, and the training data are "
                f"{', '.join(cfg.DATASETS.TRAIN)}"
            )


def _check_same_records(cfg: CfgNode, records: Sequence[dict[str, Any]]) -> None:
    """Refuse machines whose data differ: the shares of a batch would be of different batches."""
    digest = hashlib.sha1()
    for record in records if comm.get_world_size() > 1 else ():
        number = len(record.get("annotations", ()))
        digest.update(repr((record.get("image_id"), record["width"], number)).encode())
    digests = comm.all_gather((len(records), digest.hexdigest()))
    other = next((rank for rank, found in enumerate(digests) if found != digests[0]), None)
    if other is not None:
        raise InputError(
            f"DATASETS.TRAIN {', '.join(cfg.DATASETS.TRAIN)} are other data in process {other} "
            f"({digests[other][0]} images) than in process 0 ({digests[0][0]} images); all "
            "machines need the same annotations and images"
        )


def batch_by_aspect_ratio(
    indices: Iterable[int], groups: Sequence[int], *, batch_size: int, num_streams: int
) -> Iterator[list[Sample]]:
    """Yield batches to which each stream gives as many samples, of one group, as they fill up.

    Args:
        indices: the samples, indices of images, that are dealt to the streams in turn
        groups: the group of each image
        batch_size: samples of a batch, those of one stream after those of another
        num_streams: a divisor of it
    """
    share = batch_size // num_streams
    waiting: list[list[list[Sample]]] = [
        [[] for _ in range(max(groups) + 1)] for _ in range(num_streams)
    ]
    full: list[deque[list[Sample]]] = [deque() for _ in range(num_streams)]
    for position, index in enumerate(indices):
        stream = position % num_streams
        samples = waiting[stream][groups[index]]
        samples.append((position, index))
        if len(samples) == share:
            full[stream].append(samples.copy())
            samples.clear()
            if all(full):  # at most once: this stream had none before
                yield [sample for shares in full for sample in shares.popleft()]


def shard_batch(
    batches: Iterable[list[Sample]], *, rank: int, num_processes: int, num_micro_batches: int
) -> Iterator[list[Sample]]:
    """Yield the micro-batches of one process: its share of each batch, in equal parts."""
    for batch in batches:
        size = len(batch) // num_processes // num_micro_batches
        for number in range(rank * num_micro_batches, (rank + 1) * num_micro_batches):
            yield batch[number * size : (number + 1) * size]


def seed_rngs(seed: int, *key: int) -> None:
    """Seed Python's, numpy's and torch's generators on the CPU with a function of seed and key."""
    words = np.random.SeedSequence(seed, spawn_key=key).generate_state(3).tolist()
    random.seed(words[0])
    np.random.seed(words[1])
    torch.default_generator.manual_seed(words[2])


@contextmanager
def preserve_rng_state() -> Iterator[None]:
    """Leave the generators of :func:`seed_rngs` as they were."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class _MappedSamples(Dataset[dict[str, Any]]):
    """Images by sample: the mapper's randomness comes from the place in the stream."""

    def __init__(self, records: Sequence[dict[str, Any]], mapper: Mapper, seed: int) -> None:
        self.records = records
        self.mapper = mapper
        self.seed = seed

    def __getitems__(self, samples: list[Sample]) -> list[dict[str, Any]]:
        with preserve_rng_state():
            return [self._load(position, index) for position, index in samples]

    def _load(self, position: int, index: int) -> dict[str, Any]:
        seed_rngs(self.seed, position)
        return self.mapper(self.records[index])


def _end_with_the_parent_alone(worker_id: int) -> None:
    """Leave it to the parent to end this worker.

    A scheduler's SIGTERM reaches workers too, and the parent needs them for its last iteration.
    """
    if not hasattr(signal, "sigwaitinfo"):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait_for_the_parent() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait_for_the_parent, daemon=True).start()
