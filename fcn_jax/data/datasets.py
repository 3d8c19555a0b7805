"""A split of a data set and the one function that opens it, through its prepared copy."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Protocol

from fcn_jax.config import DataConfig
from fcn_jax.data.catalog import find
from fcn_jax.data.labels import decode_image, decode_label
from fcn_jax.data.prepared import Examples, Record, prepare, read_summary

_log = logging.getLogger(__name__)
_SHOWN = 3
"""Files that were left out, named in a note."""

__all__ = ["Source", "Split", "decode", "load"]


class Source(Protocol):
    """Random access to encoded examples; workers need it picklable."""

    def __len__(self) -> int:
        """Return the number of examples."""
        ...

    def __getitem__(self, index: int) -> Record:
        """Return one example."""
        ...


@dataclass(frozen=True)
class Split:
    """One split of a data set, ready to be read."""

    dataset: str
    split: str
    class_names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    """RGB in [0, 255], one colour per class."""
    source: Source
    image_size: tuple[int, int] | None = None
    """Height and width where all images share them, else None."""
    skipped: tuple[str, ...] = ()
    """Why each image that was left out could not be read."""

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.source)

    @property
    def num_classes(self) -> int:
        """Number of classes, the ignore label not counted."""
        return len(self.class_names)


def decode(record: Record) -> dict[str, Any]:
    """Decode a stored example to ``{"image": uint8 (h, w, 3) RGB, "label": uint8 (h, w), "name": str}``."""
    name = record["name"]
    return {"image": decode_image(record["image"], name), "label": decode_label(record["label"], name), "name": name}


def load(spec: str, config: DataConfig) -> Split:
    """Open a split, preparing its copy in ``config.cache_dir`` if need be; say how many images were left out, if any.

    Args:
        spec: DATASET/SPLIT, as in ``camvid/train``.
        config: where the data lie; ``dir``, ``classes``, ``download``, ``unreadable``, ``cache_dir`` and the
            ``shapes_*`` fields are read.

    Raises:
        InputError: an unknown data set or split, a missing folder or file, or files that are not what they should be.
    """
    listing = find(spec, config)
    copy = prepare(listing, config.cache_dir)
    summary = read_summary(copy)
    if skipped := summary["skipped"]:
        more = f", and {len(skipped) - _SHOWN} more" if len(skipped) > _SHOWN else ""
        _log.warning(
            "note: %s: %d of %d images are left out: %s%s",
            spec,
            len(skipped),
            len(listing.entries),
            "; ".join(skipped[:_SHOWN]),
            more,
        )
    return Split(
        dataset=listing.dataset,
        split=listing.split,
        class_names=listing.class_names,
        palette=listing.palette,
        source=Examples(copy),
        image_size=summary["image_size"],
        skipped=tuple(skipped),
    )
