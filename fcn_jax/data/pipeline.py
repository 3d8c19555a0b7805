"""Batches: an endless, shuffled stream for training that can be resumed anywhere, and a finite one for evaluation."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NotRequired, TypedDict

import grain
import numpy as np
from absl import flags

from fcn_jax.config import DataConfig
from fcn_jax.data.datasets import Split, decode
from fcn_jax.data.io import decode_label
from fcn_jax.data.transforms import augment, augmented_size, pad, resize_image
from fcn_jax.errors import InputError, first_line
from fcn_jax.losses import IGNORE
from fcn_jax.preprocessing import fill_color, preprocessing_of

_THREADS = 2  # decoding threads in each process; OpenCV releases the GIL
_WAITING = 4  # evaluation buffers up to this many batches to group images by size


class TrainBatch(TypedDict):
    """Examples of one training step: image uint8 (b, h, w, 3) RGB, label uint8 (b, h, w), 255 = ignore, and names."""

    image: np.ndarray
    label: np.ndarray
    name: tuple[str, ...]


class EvalBatch(TrainBatch):
    """Images uint8 (b, h, w, 3), labels (b, H, W) at their original size; rows with ``valid`` False are padding."""

    valid: np.ndarray
    extent: NotRequired[np.ndarray]
    """int32 (b, 2), height and width of each image before padding at the bottom and right."""


def _stack(examples: Sequence[Mapping[str, Any]]) -> Any:
    """Stack examples of equal size into a batch."""
    arrays = {key: np.stack([example[key] for example in examples]) for key in examples[0] if key != "name"}
    return {**arrays, "name": tuple(example["name"] for example in examples)}


def _augmented(record: Any, rng: np.random.Generator, config: DataConfig) -> dict[str, Any]:
    return {**(example := decode(record)), **augment(example, rng, config)}


def _start_worker(_index: int, _count: int) -> None:
    """Ignore signals, which the parent process handles, and exit when the parent ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # sent to every process of a job
        signal.signal(number, signal.SIG_IGN)

    def follow() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _iterate(dataset: Any, buffer: int, workers: int = 0) -> Any:
    """Iterate over a grain dataset, prefetching ``buffer`` elements in threads or worker processes."""
    options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=buffer)
    stream = dataset.to_iter_dataset(options)
    if workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain reads absl flags to start workers, and nothing parses them here
        processes = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=buffer)
        stream = stream.mp_prefetch(processes, _start_worker)
    return iter(stream)


class TrainIterator(Iterator[TrainBatch]):
    """An endless iterator over training batches; each batch depends only on the seed and its index.

    The state is JSON, encoded as bytes, and does not depend on the number of workers.
    """

    def __init__(self, batches: Any, identity: dict[str, int], workers: int, step: int):
        """Iterate over ``batches``, an endless grain dataset, from batch ``step``; use ``make_train_iterator``."""
        self._batches, self._identity, self._workers = batches, identity, workers
        self._step = step
        self._stream: Any = None

    def __next__(self) -> TrainBatch:
        """Return the next batch; raise InputError if a worker process has ended."""
        if self._stream is None:
            self._stream = _iterate(self._batches[self._step :], 2, self._workers)
        try:
            batch = next(self._stream)
        except RuntimeError as error:  # grain's error for a worker that died
            if "terminated unexpectedly" not in str(error):
                raise
            raise InputError(
                f"a data worker ended ({first_line(error)}), probably for lack of memory: reduce --data.workers, "
                "and the same command resumes the run"
            ) from error
        self._step += 1
        return batch

    def get_state(self) -> bytes:
        """Return the position, with the seed, number of examples and batch size that it belongs to."""
        return json.dumps({"step": self._step, **self._identity}).encode()

    def set_state(self, state: bytes) -> None:
        """Go to a saved position; raise InputError if its number of examples, seed or batch size differs."""
        saved = json.loads(state)
        for key, value in self._identity.items():
            if saved.get(key) != value:
                raise InputError(
                    f"the run was saved with {key} {saved.get(key)}, this one has {value}; resume with the same value"
                )
        self.close()
        self._step = saved["step"]

    def close(self) -> None:
        """Stop the workers; the next call for a batch starts them again."""
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

    Each epoch has a different order. Batches cross epoch boundaries, so that no example is dropped. The rows of all
    processes, concatenated, are those of a single process.

    Args:
        split: the split to train on.
        config: the augmentation and the number of workers.
        batch_size: global batch size, divided among the processes.
        seed: random seed of order and augmentation.
        process_index: index of this process.
        process_count: number of processes; it must divide ``batch_size``.
        start_step: number of batches to skip.

    Raises:
        InputError: a batch size that ``process_count`` does not divide, or images of different sizes without a crop.
    """
    if batch_size < 1 or batch_size % process_count:
        raise InputError(
            f"--train.batch-size {batch_size}: expected a positive multiple of the {process_count} processes"
        )
    if batch_size > 1 and augmented_size(config, split.image_size) is None:
        raise InputError(
            "images of different sizes cannot share a batch: set --data.crop-size HEIGHT WIDTH (or --data.input-size), "
            "or --train.batch-size 1"
        )
    records = grain.MapDataset.source(split.source).seed(seed).shuffle().repeat()
    examples = records.random_map(partial(_augmented, config=config))
    # Global batch k is parts k x process_count ... (k + 1) x process_count - 1. An endless stream leaves no remainder,
    # but without drop_remainder grain computes its length as a float, which overflows.
    parts = examples.batch(batch_size // process_count, drop_remainder=True, batch_fn=_stack)
    identity = {"seed": seed, "examples": len(split), "batch_size": batch_size}
    return TrainIterator(parts[process_index::process_count], identity, config.workers, start_step)


def _eval_example(record: Any, config: DataConfig, multiple: int) -> dict[str, Any]:
    """Decode an example; resize its image to ``input_size``, or pad its sides to a multiple."""
    out = decode(record)
    if config.input_size is not None:
        out["image"] = resize_image(out["image"], config.input_size)
    elif multiple > 1:
        out["extent"] = np.array(out["label"].shape, np.int32)
        height, width = (-(-n // multiple) * multiple for n in out["label"].shape)
        out = pad(out, (height, width), fill_color(preprocessing_of(config)))
    return out


def _fill(examples: Sequence[Mapping[str, Any]], batch_size: int) -> EvalBatch:
    """Stack examples of equal size into a batch; fill it up with copies of the last, whose labels are ignored."""
    missing = batch_size - len(examples)
    filler = {**examples[-1], "label": np.full_like(examples[-1]["label"], IGNORE)}
    batch: EvalBatch = _stack([*examples, *[filler] * missing])
    batch["valid"] = np.arange(batch_size) < len(examples)
    return batch


def make_eval_batches(
    split: Split,
    config: DataConfig,
    batch_size: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
    divisor: int = 1,
) -> Iterator[EvalBatch]:
    """Yield every example once, in batches of equal image and label sizes; labels are not resized.

    A bounded buffer groups examples by size. An incomplete batch is filled with copies of its last row, with ``valid``
    False and every label ``IGNORE``, so that each size is compiled only once.

    Args:
        split: the split to evaluate.
        config: images are resized to ``input_size``; without it they are padded to ``eval_multiple`` if sizes differ.
        batch_size: global batch size; each process yields its share, rounded up.
        process_index: index of this process; it reads every ``process_count``-th example.
        process_count: number of processes.
        divisor: unless images are resized, sides are also padded to multiples of this, as ``devices.height_unit`` of a
            mesh requires.
    """
    batch_size = -(-batch_size // process_count)
    if process_index >= len(split):
        return
    waiting: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    multiple = math.lcm(config.eval_multiple if split.image_size is None else 1, divisor)
    decoding = partial(_eval_example, config=config, multiple=multiple)
    dataset = grain.MapDataset.source(split.source).map(decoding)
    for example in _iterate(dataset[process_index::process_count], 2 * batch_size):
        size = (*example["image"].shape, *example["label"].shape)
        waiting.setdefault(size, []).append(example)
        if len(waiting[size]) == batch_size:
            yield _fill(waiting.pop(size), batch_size)
        elif sum(map(len, waiting.values())) > _WAITING * batch_size:
            yield _fill(waiting.pop(next(iter(waiting))), batch_size)  # the size that has waited longest
    for examples in waiting.values():
        yield _fill(examples, batch_size)


def class_frequencies(split: Split) -> np.ndarray:
    """Count a split's pixels for median-frequency balancing (Eigen and Fergus 2015, section 6.3.2): int64 (2, classes).

    Row 0 counts the pixels of each class, row 1 the valid pixels of the images that contain it. Their quotient is the
    frequency of the class. The weight of a class is the median frequency divided by its frequency.
    """
    counts = np.zeros((2, split.num_classes), np.int64)
    for index in range(len(split)):
        record = split.source[index]
        label = decode_label(record["label"], record["name"], verify=False)
        pixels = np.bincount(label.ravel(), minlength=256)[: split.num_classes]
        counts += np.stack([pixels, np.where(pixels > 0, pixels.sum(), 0)])
    return counts
