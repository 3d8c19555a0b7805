"""A split decoded into memory and its batches, made in threads: no prepared copy, neither TFDS nor grain.

For sets of some hundred images, and machines that have little beside JAX. ``datasets`` and ``pipeline`` are the way for
sets of any size.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import numpy as np

from fcn_jax.config import DataConfig
from fcn_jax.data.batches import EvalBatch, TrainBatch, eval_example, fill, sizes_differ, stack
from fcn_jax.data.catalog import find
from fcn_jax.data.labels import check_label, check_pair, decode_image
from fcn_jax.data.listing import Entry, Listing
from fcn_jax.data.transforms import augment, output_size
from fcn_jax.errors import InputError, UnreadableError

__all__ = ["MemorySplit", "eval_batches", "read", "train_batches"]

_LEAST_AHEAD = 3
"""Batches that are being made while one is trained on, or more where they would not keep all threads busy."""


@dataclass(frozen=True)
class MemorySplit:
    """A split, read; an example is ``{"image": uint8 (h, w, 3) RGB, "label": uint8 (h, w), "name": str}``."""

    dataset: str
    split: str
    class_names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    """RGB in [0, 255], one colour per class."""
    examples: tuple[dict[str, Any], ...]
    skipped: tuple[str, ...] = ()
    """Why each image that was left out could not be read."""

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.examples)

    @property
    def num_classes(self) -> int:
        """Number of classes, the ignore label not counted."""
        return len(self.class_names)

    @property
    def many_sizes(self) -> bool:
        """Whether its images are of more than one size."""
        return len({example["label"].shape for example in self.examples}) > 1


def _threads(config: DataConfig) -> int:
    if config.workers:
        return config.workers
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _read(listing: Listing, entry: Entry) -> dict[str, Any] | UnreadableError:
    try:
        encoded, label = listing.read(entry)
        image = decode_image(encoded, str(entry.image or entry.name))
    except UnreadableError as error:
        if listing.unreadable == "error":
            raise
        return error
    where = str(entry.label or entry.name)
    check_pair(image, label, where)
    check_label(label, len(listing.class_names), where)
    return {"image": image, "label": label, "name": entry.name}


def read(spec: str, config: DataConfig) -> MemorySplit:
    """Read and check a whole split, 4 bytes a pixel.

    Args:
        spec: DATASET/SPLIT, as in ``camvid/train``.
        config: where the data lie, and whether images that cannot be read are left out.

    Raises:
        InputError: an unknown data set or split, no images, or a file that is missing or not what it should be.
    """
    listing = find(spec, config)
    with ThreadPoolExecutor(_threads(config)) as pool:
        found = list(pool.map(lambda entry: _read(listing, entry), listing.entries))
    examples = tuple(each for each in found if isinstance(each, dict))
    skipped = tuple(str(each).partition("; ")[0] for each in found if isinstance(each, UnreadableError))
    if not examples:
        why = f", as in {skipped[0]}" if skipped else ""
        raise InputError(f"{spec} has no images that can be read{why}; correct --data.dir or the split's list")
    return MemorySplit(listing.dataset, listing.split, listing.class_names, listing.palette, examples, skipped)


def _example_at(split: MemorySplit, position: int, order: np.ndarray, config: DataConfig, seed: int) -> dict[str, Any]:
    example = split.examples[order[position % len(split)]]
    rng = np.random.default_rng((seed, 1, position))
    return {**augment(example, rng, config), "name": example["name"]}


def train_batches(
    split: MemorySplit, config: DataConfig, batch_size: int, seed: int
) -> Generator[TrainBatch, None, None]:
    """Yield shuffled, augmented batches without end.

    Each epoch has its own order, and batches run across its end. Seed and position decide each example, whatever the
    number of threads. (The batches are not those of ``pipeline.make_train_iterator``, whose order is grain's.)

    Args:
        split: what to train on.
        config: the augmentation; ``workers`` is the number of threads, 0: one for each core that may be used.
        batch_size: rows in each batch.
        seed: of order and augmentation.

    Raises:
        InputError: images of different sizes without a crop.
    """
    if batch_size > 1 and output_size(config) is None and (split.many_sizes or config.scale != (1.0, 1.0)):
        raise sizes_differ()

    def submit(pool: ThreadPoolExecutor) -> Iterator[list[Future[dict[str, Any]]]]:
        order = np.empty(0, int)
        for first in count(0, batch_size):
            futures = []
            for position in range(first, first + batch_size):
                if position % len(split) == 0:
                    order = np.random.default_rng((seed, 0, position // len(split))).permutation(len(split))
                futures.append(pool.submit(_example_at, split, position, order, config, seed))
            yield futures

    threads = _threads(config)
    with ThreadPoolExecutor(threads) as pool:
        batches = submit(pool)
        waiting = deque(islice(batches, max(_LEAST_AHEAD, 2 * threads // batch_size)))
        try:
            while True:
                yield stack([future.result() for future in waiting.popleft()])
                waiting.append(next(batches))
        finally:
            pool.shutdown(cancel_futures=True)


def eval_batches(split: MemorySplit, config: DataConfig, batch_size: int) -> Iterator[EvalBatch]:
    """Yield every example once, as ``pipeline.make_eval_batches`` does; one waits until its size fills a batch."""
    waiting: dict[tuple[int, ...], list[dict[str, Any]]] = {}
    many_sizes = split.many_sizes
    for example in split.examples:
        prepared = eval_example(example, config, many_sizes)
        size = (*prepared["image"].shape, *prepared["label"].shape)
        waiting.setdefault(size, []).append(prepared)
        if len(waiting[size]) == batch_size:
            yield fill(waiting.pop(size), batch_size)
    for examples in waiting.values():
        yield fill(examples, batch_size)
