"""The data sets by name, and the function that opens a split through its prepared copy."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from fcn_jax.config import DataConfig
from fcn_jax.data import camvid, folder, sbd, shapes, tfds_folder, voc
from fcn_jax.data.io import Listing, decode_image, decode_label
from fcn_jax.data.prepared import Examples, Record, Statistics, prepare, read_summary
from fcn_jax.errors import InputError, unknown

_log = logging.getLogger(__name__)
_SHOWN = 3  # number of skipped files that a note names

DATASETS: dict[str, tuple[tuple[str, ...], Callable[[str, DataConfig], Listing]]] = {
    "shapes": (shapes.SPLITS, shapes.listing),
    "camvid": (camvid.SPLITS, camvid.listing),
    "voc": (voc.SPLITS, voc.listing),
    "sbd": (sbd.SPLITS, sbd.listing),
    "folder": (folder.SPLITS, folder.listing),
    "tfds": (tfds_folder.SPLITS, tfds_folder.listing),
}
"""Splits of each data set, and the function that lists a split."""


class Source(Protocol):
    """Random access to encoded examples. It must be picklable for worker processes."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Record: ...


@dataclass(frozen=True)
class Split:
    """One split of a data set, ready to read."""

    dataset: str
    split: str
    class_names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    """RGB in [0, 255], one colour per class."""
    source: Source
    image_size: tuple[int, int] | None = None
    """Height and width if all images have the same size, else None."""
    skipped: tuple[str, ...] = ()
    """The reason for each skipped image."""
    statistics: Statistics | None = None
    """Channel statistics of images that are not 8-bit RGB."""

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.source)

    @property
    def num_classes(self) -> int:
        """Number of classes, without the ignore label."""
        return len(self.class_names)


def decode(record: Record) -> dict[str, Any]:
    """Decode a stored example to ``{"image": (h, w, channels), "label": uint8 (h, w), "name": str}``."""
    name = record["name"]
    image = decode_image(record["image"], name, verify=False)
    return {"image": image, "label": decode_label(record["label"], name, verify=False), "name": name}


def load(spec: str, config: DataConfig) -> Split:
    """Open DATASET/SPLIT and prepare its copy in ``config.cache_dir`` if necessary; log how many images are skipped.

    Raises:
        InputError: an unknown data set or split, a missing folder or file, or invalid files.
    """
    dataset, slash, split = spec.partition("/")
    if not slash:
        raise InputError(f"expected DATASET/SPLIT, such as 'shapes/train', got {spec!r}")
    if dataset not in DATASETS:
        raise unknown("data set", dataset, DATASETS)
    splits, listing_of = DATASETS[dataset]
    if splits and split not in splits:
        raise unknown(f"split of {dataset}", split, splits)
    if config.channels is not None and dataset != "folder":
        raise InputError(f"--data.channels {config.channels} applies only to folder; leave it out for {dataset}")
    listing = replace(listing_of(split, config), unreadable=config.unreadable, channels=config.channels)
    copy = prepare(listing, config.cache_dir)
    summary = read_summary(copy)
    if skipped := summary.skipped:
        more = f", and {len(skipped) - _SHOWN} more" if len(skipped) > _SHOWN else ""
        shown = "; ".join(skipped[:_SHOWN]) + more
        _log.warning("note: %s: %d of %d images are skipped: %s", spec, len(skipped), len(listing.entries), shown)
    names, palette = listing.class_names, listing.palette
    return Split(dataset, split, names, palette, Examples(copy), summary.image_size, skipped, summary.statistics)
