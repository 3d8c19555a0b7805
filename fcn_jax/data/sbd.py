"""SBD, the Semantic Boundaries Dataset (Hariharan et al. 2011): masks of the 21 VOC classes for 11355 VOC images.

Expected under ``--data.dir``: ``benchmark_RELEASE/dataset`` with ``img/NAME.jpg``, ``cls/NAME.mat``, ``train.txt``
(8498 names) and ``val.txt`` (2857); ``--data.dir`` may also be one of these two folders, or one next to them. The
masks are GTcls.Segmentation, unchanged; unlike VOC's, they have no ignored border.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from fcn_jax.config import DataConfig
from fcn_jax.data import voc
from fcn_jax.data.download import ARCHIVES, fetch
from fcn_jax.data.io import Entry, Listing, folder_of, names_in, palette, read_bytes
from fcn_jax.errors import UnreadableError, first_line

SPLITS = ("train", "val", "trainval")


def read_segmentation(path: Path) -> np.ndarray:
    """Return GTcls.Segmentation of an SBD ``cls`` file as uint8 (h, w), or raise UnreadableError.

    Use it only for the checksummed release: SciPy may allocate any amount of memory for a malicious file.
    """
    from scipy.io import loadmat  # slow to import, and needed only for SBD

    data = read_bytes(path)
    try:
        label = np.asarray(loadmat(io.BytesIO(data), variable_names="GTcls")["GTcls"]["Segmentation"].item())
        if label.ndim != 2 or not label.size or not np.isin(label, np.arange(256)).all():
            raise ValueError(f"Segmentation, {label.dtype} of shape {label.shape}, does not contain class ids")
    except Exception as error:  # SciPy raises many exception types for damaged files
        raise UnreadableError(
            f"{path}: not an SBD mask, a .mat file with GTcls.Segmentation ({first_line(error)}); fetch it again"
        ) from error
    return label.astype(np.uint8)


def _read(entry: Entry) -> tuple[bytes, np.ndarray]:
    assert entry.image is not None and entry.label is not None
    return read_bytes(entry.image), read_segmentation(entry.label)


def listing(split: str, config: DataConfig) -> Listing:
    """List a split of SBD from SBD's train.txt and val.txt."""
    folder = folder_of(config, "sbd", "benchmark_RELEASE")
    root = voc.find_sbd(folder) or fetch(ARCHIVES["sbd"], folder, config.download) / "dataset"
    parts = ("train", "val") if split == "trainval" else (split,)
    names = [name for part in parts for name in names_in(root / f"{part}.txt")]
    entries = tuple(Entry(name, root / "img" / f"{name}.jpg", root / "cls" / f"{name}.mat") for name in names)
    return Listing("sbd", split, voc.CLASSES, palette(len(voc.CLASSES)), entries, _read)
