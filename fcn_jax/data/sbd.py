"""SBD, the Semantic Boundaries Dataset (Hariharan et al. 2011): masks of the 21 VOC classes for 11355 VOC images.

Expected under ``--data.dir``: ``benchmark_RELEASE/dataset`` with ``img/NAME.jpg``, ``cls/NAME.mat``, ``train.txt``
(8498 names) and ``val.txt`` (2857); ``--data.dir`` may also be one of these two folders, or one beside them. The
masks are GTcls.Segmentation as it is: unlike VOC's they have no ignored border (GTcls.Boundaries is not used).
Source: benchmark_RELEASE/dataset/README of the release.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fcn_jax.config import DataConfig
from fcn_jax.data.download import ARCHIVES, fetch
from fcn_jax.data.labels import VOC_CLASSES, palette_for
from fcn_jax.data.listing import Entry, Listing, folder_of, names_in, read_bytes
from fcn_jax.data.matfile import read_field
from fcn_jax.errors import InputError, UnreadableError, first_line

__all__ = ["SPLITS", "find", "listing", "read_segmentation"]

SPLITS = ("train", "val", "trainval")


def find(folder: Path) -> Path | None:
    """Return SBD's ``dataset`` folder in, at or beside ``folder``, or None."""
    places = (folder, folder / "dataset", folder / "benchmark_RELEASE/dataset")
    beside = tuple(
        up / "benchmark_RELEASE/dataset" for up in folder.absolute().parents[:3]
    )  # of ROOT/TrainVal/VOCdevkit/VOC2011
    return next((p for p in (*places, *beside) if (p / "cls").is_dir() and (p / "img").is_dir()), None)


def read_segmentation(path: Path) -> np.ndarray:
    """Return GTcls.Segmentation of an SBD ``cls`` file as uint8 (h, w), or raise UnreadableError."""
    data = read_bytes(path)
    try:
        label = read_field(data, "GTcls", "Segmentation")
        if label.ndim != 2 or not label.size:
            raise ValueError(f"Segmentation is {label.dtype} of shape {label.shape}")
        if not np.isin(label, np.arange(256)).all():
            raise ValueError("Segmentation holds numbers that are no class ids")
    except ValueError as error:
        raise UnreadableError(
            f"{path}: not an SBD mask, a .mat file with GTcls.Segmentation ({first_line(error)}); fetch it again"
        ) from error
    return label.astype(np.uint8)


def _read(entry: Entry) -> tuple[bytes, np.ndarray]:
    assert entry.image is not None and entry.label is not None
    return read_bytes(entry.image), read_segmentation(entry.label)


def listing(split: str, config: DataConfig) -> Listing:
    """List a split of SBD by its own train.txt and val.txt."""
    folder = folder_of(config, "sbd", "benchmark_RELEASE")
    root = find(folder)
    if root is None and config.download:
        root = fetch(ARCHIVES["sbd"], folder) / "dataset"
    if root is None:
        raise InputError(
            f"--data.dir {folder}: holds no benchmark_RELEASE/dataset with img/ and cls/; "
            f"unpack {ARCHIVES['sbd'].name} there or give --data.download"
        )
    parts = ("train", "val") if split == "trainval" else (split,)
    names = [name for part in parts for name in names_in(root / f"{part}.txt")]
    entries = tuple(Entry(name, root / "img" / f"{name}.jpg", root / "cls" / f"{name}.mat") for name in names)
    return Listing("sbd", split, VOC_CLASSES, palette_for(len(VOC_CLASSES)), entries, _read)
