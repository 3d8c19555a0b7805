"""Data sets that TFDS has prepared as ArrayRecord, opened from the folder that contains dataset_info.json.

The image is the feature ``image``. The mask is a single-channel image: the feature ``segmentation_mask``, ``mask`` or
``label``. The class names are read from ``--data.classes``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from fcn_jax.config import DataConfig
from fcn_jax.data.folder import read_classes
from fcn_jax.data.io import Entry, Listing, decode_label, folder_of
from fcn_jax.errors import InputError, UnreadableError, first_line
from fcn_jax.paths import to_path

SPLITS = ()
"""Empty, since any split of the data set is accepted."""
_MASKS = ("segmentation_mask", "mask", "label")


def _read(entry: Entry, source: Any, mask: str) -> tuple[bytes, np.ndarray]:
    try:
        record = source[int(entry.name)]
    except RuntimeError as error:  # ArrayRecord's
        way_out = "prepare the data set in --data.dir again"
        raise UnreadableError(f"example {entry.name} cannot be read ({first_line(error)}); {way_out}") from error
    return record["image"], decode_label(record[mask], f"example {entry.name}, {mask}")


def listing(split: str, config: DataConfig) -> Listing:
    """List a split of the prepared data set in ``--data.dir``.

    Raises:
        InputError: an unknown data set or split, another file format, or a missing image or mask feature.
    """
    root = folder_of(config, "tfds", "dataset_info.json and the ArrayRecord files")
    if config.classes is None:
        raise InputError("tfds needs class names: give a file with one name per line as --data.classes")
    classes = read_classes(to_path(config.classes, "--data.classes"))
    try:
        builder = tfds.builder_from_directory(root)
        features = builder.info.features
        mask = next((name for name in _MASKS if name in features), None)
        if "image" not in features or mask is None:
            raise InputError(f"{root}: expected features image and {' or '.join(_MASKS)}, got {', '.join(features)}")
        skip = {"image": tfds.decode.SkipDecoding(), mask: tfds.decode.SkipDecoding()}
        source = builder.as_data_source(split, decoders=skip)
        info = builder.info
    except InputError:
        raise
    except Exception as error:  # TFDS raises many exception types
        raise InputError(
            f"--data.dir {root}: split {split} cannot be opened with TFDS ({first_line(error)})"
        ) from error
    entries = tuple(Entry(f"{index:07d}") for index in range(len(source)))
    version = f"{root} {info.full_name} {info.splits[split].shard_lengths} {info.dataset_size}"
    read = partial(_read, source=source, mask=mask)
    return Listing("tfds", split, classes.names, classes.palette, entries, read, version=version)
