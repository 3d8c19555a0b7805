"""The data sets by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from fcn_jax.config import DataConfig
from fcn_jax.data import camvid, folder, sbd, shapes, voc
from fcn_jax.data.listing import Listing
from fcn_jax.errors import InputError, unknown

__all__ = ["DATASETS", "find"]

DATASETS: dict[str, tuple[tuple[str, ...], Callable[[str, DataConfig], Listing]]] = {
    "shapes": (shapes.SPLITS, shapes.listing),
    "camvid": (camvid.SPLITS, camvid.listing),
    "voc": (voc.SPLITS, voc.listing),
    "sbd": (sbd.SPLITS, sbd.listing),
    "folder": (folder.SPLITS, folder.listing),
}
"""Each data set's splits, and what lists one of them."""


def find(spec: str, config: DataConfig) -> Listing:
    """List a split's images and masks, not yet read.

    Args:
        spec: DATASET/SPLIT, as in ``camvid/train``.
        config: where the data lie, and whether files that cannot be read are left out.

    Raises:
        InputError: an unknown data set or split, or a missing folder or file.
    """
    dataset, slash, split = spec.partition("/")
    if not slash:
        raise InputError(f"expected DATASET/SPLIT, got {spec!r}; as in 'shapes/train'")
    if dataset not in DATASETS:
        raise unknown("data set", dataset, DATASETS)
    splits, listing_of = DATASETS[dataset]
    if split not in splits:
        raise unknown(f"split of {dataset}", split, splits)
    return replace(listing_of(split, config), unreadable=config.unreadable)
