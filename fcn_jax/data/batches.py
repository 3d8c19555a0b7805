"""What a batch is, and how examples become one; the same for every way of reading them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NotRequired, TypedDict

import numpy as np

from fcn_jax.config import DataConfig
from fcn_jax.data.labels import IGNORE
from fcn_jax.data.transforms import pad, resize_image
from fcn_jax.errors import InputError
from fcn_jax.preprocessing import MEAN_COLOURS

__all__ = ["EvalBatch", "TrainBatch", "count_classes", "eval_example", "fill", "sizes_differ", "stack"]


class TrainBatch(TypedDict):
    """One training step's rows: image uint8 (b, h, w, 3) RGB, label uint8 (b, h, w) with 255 = ignore, and names."""

    image: np.ndarray
    label: np.ndarray
    name: tuple[str, ...]


class EvalBatch(TypedDict):
    """Images of one size, uint8 (b, h, w, 3), and labels (b, H, W) at their own; rows with ``valid`` False fill up."""

    image: np.ndarray
    label: np.ndarray
    name: tuple[str, ...]
    valid: np.ndarray
    extent: NotRequired[np.ndarray]
    """int32 (b, 2), height and width of each image, where it is padded at the bottom and right."""


def sizes_differ() -> InputError:
    """Return the error for training images that no array holds together."""
    return InputError(
        "images of different sizes cannot share a batch: set --data.crop-size HEIGHT WIDTH (or --data.input-size), "
        "or --train.batch-size 1"
    )


def stack(examples: Sequence[Mapping[str, Any]]) -> TrainBatch:
    """Lay augmented examples into one batch; an InputError where their sizes differ."""
    if len({example["label"].shape for example in examples}) > 1:
        raise sizes_differ()
    image, label = (np.stack([example[key] for example in examples]) for key in ("image", "label"))
    return {"image": image, "label": label, "name": tuple(example["name"] for example in examples)}


def eval_example(example: Mapping[str, Any], config: DataConfig, many_sizes: bool) -> dict[str, Any]:
    """Return an example as evaluation wants it: resized to ``input_size``, or padded to ``eval_multiple``.

    Args:
        example: a decoded one; its label keeps its size, or is padded along with the image.
        config: the two fields named.
        many_sizes: whether the split has images of several sizes; otherwise none is padded.
    """
    out = dict(example)
    if config.input_size is not None:
        out["image"] = resize_image(out["image"], config.input_size)
    elif many_sizes and config.eval_multiple > 1:
        out["extent"] = np.array(out["label"].shape, np.int32)
        height, width = (-(-n // config.eval_multiple) * config.eval_multiple for n in out["label"].shape)
        out = pad(out, (height, width), MEAN_COLOURS[config.preprocessing])
    return out


def fill(examples: Sequence[Mapping[str, Any]], batch_size: int) -> EvalBatch:
    """Lay examples of one size into a batch; copies of the last, with no label, make up for those that are missing."""
    short = batch_size - len(examples)
    rows = [*examples, *[{**examples[-1], "label": np.full_like(examples[-1]["label"], IGNORE)}] * short]
    batch: EvalBatch = {
        "image": np.stack([row["image"] for row in rows]),
        "label": np.stack([row["label"] for row in rows]),
        "name": tuple(row["name"] for row in rows),
        "valid": np.arange(batch_size) < len(examples),
    }
    if "extent" in rows[0]:
        batch["extent"] = np.stack([row["extent"] for row in rows])
    return batch


def count_classes(labels: Iterable[np.ndarray], num_classes: int) -> np.ndarray:
    """Count pixels per class, for median-frequency balancing.

    Row 0 counts the pixels of each class c over all labels (h, w), row 1 the valid pixels of the images in which c
    occurs; the frequency of c is row 0 / row 1, its weight the median frequency over its own.

    Returns:
        int64 (2, num_classes).

    Source: Eigen and Fergus 2015, section 6.3.2; the ignored pixels do not count.
    """
    counts = np.zeros((2, num_classes), np.int64)
    for label in labels:
        pixels = np.bincount(label.ravel(), minlength=256)[:num_classes]
        counts += np.stack([pixels, np.where(pixels > 0, pixels.sum(), 0)])
    return counts
