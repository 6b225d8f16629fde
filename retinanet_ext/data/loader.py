"""Training batches that depend only on the seed, the number of streams and the batch number.

Samples are dealt to streams in turn, as Detectron2 deals them to processes, and each stream is
grouped by aspect ratio on its own. A resumed run therefore sees the batches of an uninterrupted
one, and the batches do not depend on the number of processes, micro-batches and workers.
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
from dataclasses import dataclass
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
"""Position in the stream of samples, and the index of the image at that position."""


class TrainLoader(Iterable[list[dict[str, Any]]]):
    """Infinite training micro-batches of this process.

    Detectron2 loads and filters the data and its sampler gives the order. A batch of
    ``SOLVER.IMS_PER_BATCH`` images is divided among the processes, and each part into
    ``SOLVER.GRAD_ACCUM_STEPS`` micro-batches. With ``ASPECT_RATIO_GROUPING``, the images that a
    stream contributes to a batch are either all wide or all not. If ``SEED`` is below 0, the
    processes agree on a random seed.

    Attributes:
        seed: seed of the order of samples and of the mapper's randomness.
        num_streams: number of streams that the samples are dealt to.
        num_batches, num_images: batches and images of all processes before the first batch here.

    Raises:
        InputError: the sampler cannot be used, the data are an IterableDataset, or they differ
            between processes.
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
        _check_same_records(cfg, records)
        self.groups = bytes(len(records))
        if cfg.DATALOADER.ASPECT_RATIO_GROUPING:
            self.groups = bytes(record["width"] > record["height"] for record in records)
        if isinstance(records, list):
            records = DatasetFromList(records, copy=False)  # one tensor, which workers share
        self.records = records
        iter(self)  # for the errors of the sampler and of the workers' settings; starts no worker

    def state_dict(self, num_batches: int) -> dict[str, int]:
        """Return the state after ``num_batches`` batches since the start of the run."""
        more = (num_batches - self.num_batches) * self.cfg.SOLVER.IMS_PER_BATCH
        return {
            "seed": self.seed,
            "num_streams": self.num_streams,
            "num_batches": num_batches,
            "num_images": self.num_images + more,  # earlier parts may have had other batches
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue at a state, with its seed and streams instead of the config's."""
        if state["seed"] != self.seed:
            logger.info("Seed %d of the run goes on, and not %d", state["seed"], self.seed)
        self.seed = state["seed"]
        streams = state.get("num_streams", 1)  # earlier versions had one stream
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
        cfg = self.cfg
        batch_size = cfg.SOLVER.IMS_PER_BATCH
        # Without grouping, the mapper draws the turns.
        is_grouped = cfg.INPUT.QUARTER_TURNS and cfg.DATALOADER.ASPECT_RATIO_GROUPING
        is_turned = self._is_turned if is_grouped else None
        batches = batch_by_aspect_ratio(
            self._sampler()._infinite_indices(),
            self.groups,
            batch_size=batch_size,
            num_streams=self.num_streams,
            is_turned=is_turned,
        )
        batches = itertools.islice(batches, self.num_images // batch_size, None)
        micro_batches = shard_batch(
            batches,
            rank=comm.get_rank(),
            num_processes=comm.get_world_size(),
            num_micro_batches=cfg.SOLVER.GRAD_ACCUM_STEPS,
        )
        loader = DataLoader(
            _MappedSamples(self.records, self.mapper, self.seed, is_turned),
            batch_sampler=micro_batches,
            num_workers=cfg.DATALOADER.NUM_WORKERS,
            collate_fn=trivial_batch_collator,
            worker_init_fn=_ignore_foreign_sigterm,
            pin_memory=torch.device(cfg.MODEL.DEVICE).type == "cuda",
            generator=torch.Generator(),  # otherwise the global one is drawn from
        )
        return _batches(loader)

    def _is_turned(self, position: int) -> bool:
        """Tell whether a sample lies on its side: drawn here, because it decides on its batch."""
        sequence = np.random.SeedSequence(self.seed, spawn_key=(position, 1))
        return bool(sequence.generate_state(1)[0] & 1)

    def _sampler(self) -> Any:
        """Return Detectron2's sampler; its randomness depends only on the seed."""
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.SEED = self.seed
        try:
            with preserve_rng_state():
                seed_rngs(self.seed)  # some samplers take no seed and draw one
                parts = build_detection_train_loader.from_config(
                    cfg, self.mapper, dataset=self.records
                )
        except (AssertionError, ValueError) as error:
            raise InputError(
                f"DATALOADER.SAMPLER_TRAIN {cfg.DATALOADER.SAMPLER_TRAIN!r} cannot be used: "
                f"{str(error) or 'its keys leave no image'}"
            ) from error
        return parts["sampler"]


def _batches(loader: DataLoader) -> Iterator[list[dict[str, Any]]]:
    try:
        yield from loader
    except (EOFError, ConnectionError) as error:  # a worker ended while it sent a batch
        raise LostWorkerError from error


def _check_same_records(cfg: CfgNode, records: Sequence[dict[str, Any]]) -> None:
    """Refuse data that differ between processes, because their parts of a batch would not match."""
    digest = hashlib.sha1()
    for record in records if comm.get_world_size() > 1 else ():
        number = len(record.get("annotations", ()))
        digest.update(repr((record.get("image_id"), record["width"], number)).encode())
    (first, _), *_ = digests = comm.all_gather((len(records), digest.hexdigest()))
    for rank, (num_images, _) in enumerate(digests):
        if digests[rank] != digests[0]:
            raise InputError(
                f"DATASETS.TRAIN {', '.join(cfg.DATASETS.TRAIN)} are other data in process {rank} "
                f"({num_images} images) than in process 0 ({first} images); all machines need the "
                "same annotations and images"
            )


def batch_by_aspect_ratio(
    indices: Iterable[int],
    groups: Sequence[int],
    *,
    batch_size: int,
    num_streams: int,
    is_turned: Callable[[int], bool] | None = None,
) -> Iterator[list[Sample]]:
    """Yield batches to which each stream contributes equally, samples of one group.

    Args:
        indices: image indices, which are dealt to the streams in turn.
        groups: group of each image, 0 or 1.
        batch_size: samples per batch.
        num_streams: number of streams; a divisor of ``batch_size``.
        is_turned: whether the sample at a position is of the other group than its image.
    """
    share = batch_size // num_streams
    waiting: list[list[list[Sample]]] = [[[], []] for _ in range(num_streams)]
    full: list[deque[list[Sample]]] = [deque() for _ in range(num_streams)]
    for position, index in enumerate(indices):
        stream = position % num_streams
        group = groups[index] ^ (is_turned is not None and is_turned(position))
        samples = waiting[stream][group]
        samples.append((position, index))
        if len(samples) == share:
            full[stream].append(samples.copy())
            samples.clear()
            if all(full):  # only this stream had none before
                yield [sample for shares in full for sample in shares.popleft()]


def shard_batch(
    batches: Iterable[list[Sample]], *, rank: int, num_processes: int, num_micro_batches: int
) -> Iterator[list[Sample]]:
    """Yield the micro-batches of one process: its part of each batch, divided equally."""
    for batch in batches:
        size = len(batch) // num_processes // num_micro_batches
        for number in range(rank * num_micro_batches, (rank + 1) * num_micro_batches):
            yield batch[number * size : (number + 1) * size]


def seed_rngs(seed: int, *key: int) -> None:
    """Seed Python's, numpy's and torch's CPU generators from a seed and a key."""
    words = np.random.SeedSequence(seed, spawn_key=key).generate_state(3).tolist()
    random.seed(words[0])
    np.random.seed(words[1])
    torch.default_generator.manual_seed(words[2])


@contextmanager
def preserve_rng_state() -> Iterator[None]:
    """Restore the generators of :func:`seed_rngs` at the end of the block."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


@dataclass(frozen=True)
class _MappedSamples(Dataset[dict[str, Any]]):
    """Mapped images by sample; the mapper's randomness depends on the position in the stream."""

    records: Sequence[dict[str, Any]]
    mapper: Mapper
    seed: int
    is_turned: Callable[[int], bool] | None

    def __getitems__(self, samples: list[Sample]) -> list[dict[str, Any]]:
        with preserve_rng_state():
            return [self._load(position, index) for position, index in samples]

    def _load(self, position: int, index: int) -> dict[str, Any]:
        seed_rngs(self.seed, position)
        record = self.records[index]
        if self.is_turned is not None:
            record = {**record, "is_turned": self.is_turned(position)}
        return self.mapper(record)


def _ignore_foreign_sigterm(worker_id: int) -> None:
    """Ignore SIGTERM unless the parent process sent it.

    A scheduler sends SIGTERM to workers too, but the parent needs them for its last iteration.
    """
    if not hasattr(signal, "sigwaitinfo"):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait_for_the_parent() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait_for_the_parent, daemon=True).start()
