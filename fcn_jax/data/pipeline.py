"""Batches: an endless, shuffled stream for training that can be taken up anywhere, and a finite one for evaluation."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import grain
import numpy as np
from absl import flags

from fcn_jax.config import DataConfig
from fcn_jax.data.batches import EvalBatch, TrainBatch, count_classes, eval_example, fill, sizes_differ, stack
from fcn_jax.data.datasets import Split, decode
from fcn_jax.data.labels import decode_label
from fcn_jax.data.transforms import augment, output_size
from fcn_jax.errors import InputError, first_line

__all__ = ["TrainIterator", "class_frequencies", "make_eval_batches", "make_train_iterator"]

_THREADS = 2
"""Threads that decode in one process; OpenCV leaves the interpreter free meanwhile."""
_WAITING = 4
"""Evaluation holds back at most so many batches' worth of images to fill batches of one size."""


def _augmented(record: Any, rng: np.random.Generator, config: DataConfig) -> dict[str, Any]:
    example = decode(record)
    return {**augment(example, rng, config), "name": example["name"]}


def _start_worker(index: int, count: int) -> None:
    """Leave signals to the process that started this one, and end with it, however it ends."""
    del index, count
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # sent to all processes of a job, by who stops it
        signal.signal(number, signal.SIG_IGN)

    def follow() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _iterate(dataset: Any, buffer: int, workers: int = 0) -> Any:
    """Iterate over a grain dataset, ``buffer`` elements ahead, in threads or in worker processes."""
    options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=buffer)
    stream = dataset.to_iter_dataset(options)
    if workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain reads its own flags to start workers, and nobody parses them here
        stream = stream.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=buffer), _start_worker
        )
    return iter(stream)


class TrainIterator(Iterator[TrainBatch]):
    """An endless iterator over training batches whose position is the number of batches taken.

    Every batch depends on the seed and its number alone, so that a state saved with any number of workers is taken up
    by any other. ``get_state`` and ``set_state`` speak bytes (JSON), as grain's checkpoint handler for orbax expects.
    """

    def __init__(self, batches: Any, identity: dict[str, int], workers: int, step: int):
        """Iterate over ``batches``, a grain dataset without end, from batch ``step``; use ``make_train_iterator``."""
        self._batches, self._identity, self._workers = batches, identity, workers
        self._step = step
        self._stream: Any = None

    def __next__(self) -> TrainBatch:
        """Return the next batch; an InputError where its images differ in size or a worker is gone."""
        if self._stream is None:
            self._stream = _iterate(self._batches[self._step :], 2, self._workers)
        batch = self._take()
        self._step += 1
        return batch

    def _take(self) -> TrainBatch:
        try:
            return next(self._stream)
        except RuntimeError as error:  # grain's, of a worker that is gone
            if "terminated unexpectedly" not in str(error):
                raise
            raise InputError(
                f"a data worker ended ({first_line(error)}), mostly for want of memory: give --data.workers a smaller "
                "number, and the same command goes on"
            ) from error

    def get_state(self) -> bytes:
        """Return the position, and what it is a position in."""
        return json.dumps({"step": self._step, **self._identity}).encode()

    def set_state(self, state: bytes) -> None:
        """Go to a saved position; an InputError where it belongs to other data, another seed or another batch size."""
        saved = json.loads(state)
        for key, value in self._identity.items():
            if saved.get(key) != value:
                raise InputError(
                    f"the run was saved with {key} {saved.get(key)}, this one has {value}; resume with the same"
                )
        self.close()
        self._step = saved["step"]

    def start_prefetch(self) -> None:
        """Do nothing: called after a restore, reading begins with the first batch asked for."""

    def close(self) -> None:
        """Stop the workers; the next batch asked for starts them again."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def make_train_iterator(
    split: Split,
    config: DataConfig,
    batch_size: int,
    seed: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
    start_step: int = 0,
) -> TrainIterator:
    """Return an endless iterator over shuffled, augmented batches.

    Each epoch has its own order; batches run across its end, so that nothing is dropped. Seed and position decide
    everything: the batches are the same for any number of workers, and the rows of all processes, one after the
    other, are the rows of one.

    Args:
        split: what to train on.
        config: the augmentation and the number of workers.
        batch_size: rows over all processes; a process yields ``batch_size // process_count``, its part of the global
            batch.
        seed: of order and augmentation.
        process_index: which process this is.
        process_count: number of processes; it divides ``batch_size``.
        start_step: number of batches to leave out.

    Raises:
        InputError: a batch size that the processes cannot share, or images of different sizes without a crop.
    """
    if batch_size < 1 or batch_size % process_count:
        raise InputError(
            f"--train.batch-size {batch_size}: expected a positive multiple of the {process_count} processes"
        )
    keeps_sizes = config.scale == (1.0, 1.0) and split.image_size is not None
    if batch_size > 1 and output_size(config) is None and not keeps_sizes:
        raise sizes_differ()
    examples = (
        grain.MapDataset.source(split.source)
        .seed(seed)
        .shuffle()
        .repeat()
        .random_map(partial(_augmented, config=config))
    )
    # Global batch k is parts k x process_count ... (k + 1) x process_count - 1. An endless stream leaves no remainder,
    # but without drop_remainder grain takes its length through a float, which overflows.
    parts = examples.batch(batch_size // process_count, drop_remainder=True, batch_fn=stack)
    identity = {"seed": seed, "examples": len(split), "batch_size": batch_size}
    return TrainIterator(parts[process_index::process_count], identity, config.workers, start_step)


def _eval_example(record: Any, config: DataConfig, many_sizes: bool) -> dict[str, Any]:
    return eval_example(decode(record), config, many_sizes)


def make_eval_batches(
    split: Split, config: DataConfig, batch_size: int, *, process_index: int = 0, process_count: int = 1
) -> Iterator[EvalBatch]:
    """Yield every example once, in batches of equal size; labels keep their own size.

    The images and the labels of a batch have one size each. Examples are taken in order; one whose size is rare
    waits, for a bounded while, until others of its size fill its batch. A batch that comes out short is filled with
    copies of its last row, with ``valid`` False and the label all ``IGNORE``, so that each size is compiled for once.

    Args:
        split: what to evaluate on.
        config: ``input_size`` is what images are resized to; without it they are padded to ``eval_multiple``.
        batch_size: rows in each batch, over all processes; a process yields its part of them, rounded up.
        process_index: which process this is; it has every ``process_count``-th example.
        process_count: number of processes.
    """
    batch_size = -(-batch_size // process_count)
    if process_index >= len(split):
        return
    waiting: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    dataset = grain.MapDataset.source(split.source).map(
        partial(_eval_example, config=config, many_sizes=split.image_size is None)
    )
    for example in _iterate(dataset[process_index::process_count], 2 * batch_size):
        size = (*example["image"].shape, *example["label"].shape)
        waiting.setdefault(size, []).append(example)
        if len(waiting[size]) == batch_size:
            yield fill(waiting.pop(size), batch_size)
        elif sum(map(len, waiting.values())) > _WAITING * batch_size:
            yield fill(waiting.pop(next(iter(waiting))), batch_size)  # the size that has waited longest
    for examples in waiting.values():
        yield fill(examples, batch_size)


def class_frequencies(split: Split) -> np.ndarray:
    """Count a split's pixels per class, int64 (2, num_classes): ``batches.count_classes``."""
    records = (split.source[index] for index in range(len(split)))
    return count_classes((decode_label(record["label"], record["name"]) for record in records), split.num_classes)
