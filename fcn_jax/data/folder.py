"""A user's own images and masks.

Expected under ``--data.dir``: one of these two layouts, or only ``images`` and ``masks`` for a single split ``all``::

    DIR/train/images/a.jpg   DIR/train/masks/a.png        DIR/images/train/a.jpg   DIR/masks/train/a.png
    DIR/classes.txt          one class name per line, with an optional colour: road #804080

With ``--data.val-fraction`` train and val are drawn from ``all``. Masks contain class ids (line 1 is class 0) in one
8-bit channel or as palette indices, with 255 for ignored pixels. ``--data.mask-values`` maps other values to classes.
Masks may also use the colours of classes.txt; there, a line "ignore #RRGGBB" gives the colour of ignored pixels.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from fcn_jax.config import DataConfig
from fcn_jax.data.io import (
    IMAGE_SUFFIXES,
    Entry,
    Listing,
    decode_colors,
    decode_label,
    folder_of,
    lines_in,
    pairs_by_name,
    palette,
    read_bytes,
)
from fcn_jax.errors import InputError
from fcn_jax.losses import IGNORE
from fcn_jax.paths import absolute, to_path

SPLITS = ("train", "val", "test", "all")
_MASKS = (".png", ".bmp", ".gif", ".tif", ".tiff")

Color = tuple[int, int, int]


@dataclass(frozen=True)
class ClassList:
    """The classes in a file such as classes.txt."""

    names: tuple[str, ...]
    colors: tuple[Color | None, ...]
    """RGB colour of each class; None if the file gives no colour."""
    ignored: Color | None = None
    """RGB colour of ignored pixels in colour masks."""

    @property
    def palette(self) -> tuple[Color, ...]:
        """The colours, with VOC's for classes that have none."""
        return tuple(own or voc for own, voc in zip(self.colors, palette(len(self.names)), strict=True))


def read_classes(path: Path) -> ClassList:
    """Read class names, one per line with an optional #RRGGBB; the first has id 0, and blank lines are skipped.

    Raises:
        InputError: a missing file, a duplicate name or colour, or a number of classes outside 2 to 254.
    """
    if not path.is_file():
        raise InputError(
            f"{path}: file not found; write one class name per line (the first is class 0), or give --data.classes"
        )
    found: list[tuple[str, Color | None]] = []
    for line in lines_in(path, "class name"):
        match = re.fullmatch(r"(.*?)(?:\s+#([0-9a-fA-F]{6}))?", line)
        if match is None or "#" in match[1]:
            raise InputError(f"{path}: {line!r} is not a class; expected NAME or NAME #RRGGBB, as in road #804080")
        name, color = match.groups()
        found.append((name, None if color is None else tuple(bytes.fromhex(color))))  # type: ignore[arg-type]
    for shown in ([name for name, _ in found], [f"#{bytes(color).hex()}" for _, color in found if color]):
        if twice := [value for value, count in Counter(shown).items() if count > 1]:
            raise InputError(f"{path}: lists {twice[0]!r} twice; each class needs a distinct name and colour")
    ignored = next((color for name, color in found if name == "ignore" and color), None)
    classes = [(name, color) for name, color in found if not (name == "ignore" and color)]
    if not 2 <= len(classes) < IGNORE:
        raise InputError(
            f"{path}: lists {len(classes)} classes; expected 2 to {IGNORE - 1} (count the background as one)"
        )
    return ClassList(tuple(name for name, _ in classes), tuple(color for _, color in classes), ignored)


def _folders(root: Path, split: str) -> tuple[Path, Path]:
    if split == "all":
        return root / "images", root / "masks"
    for images, masks in ((f"images/{split}", f"masks/{split}"), (f"{split}/images", f"{split}/masks")):
        if (root / images).is_dir():
            return root / images, root / masks
    raise InputError(
        f"{root}: contains neither {split}/images nor images/{split}; put images there and masks in {split}/masks or "
        f"masks/{split}. For a folder with only images/ and masks/, give --data.val-fraction 0.2 or use folder/all"
    )


def _drawn(entries: tuple[Entry, ...], split: str, fraction: float, seed: int) -> tuple[Entry, ...]:
    """Return the entries of a split, chosen by a hash of their names so that adding images moves few others."""
    order = sorted(entries, key=lambda entry: hashlib.sha256(f"{seed}/{entry.name}".encode()).digest())
    count = min(max(1, round(fraction * len(order))), len(order) - 1)
    part = {entry.name for entry in (order[:count] if split == "val" else order[count:])}
    return tuple(entry for entry in entries if entry.name in part)


def _by_value(label: np.ndarray, values: tuple[int, ...], name: str) -> np.ndarray:
    table = np.full(256, 256)
    table[IGNORE] = IGNORE
    table[list(values)] = np.arange(len(values))
    ids = table[label]
    if wrong := sorted(set(label[ids == 256].tolist())):
        listed = " ".join(map(str, values))
        raise InputError(
            f"{name}: mask value {wrong[0]} is not among --data.mask-values {listed}; add it, or correct the mask"
        )
    return ids.astype(np.uint8)


def _by_color(pixels: np.ndarray, indices: np.ndarray | None, classes: ClassList, name: str) -> np.ndarray:
    """Return the class of each pixel's colour, or the palette's ``indices`` if no colour contradicts them."""
    packed = pixels.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1])
    label = np.full(packed.shape, -1)
    for index, color in [*enumerate(classes.colors), (IGNORE, classes.ignored)]:
        if color is not None:
            label[packed == int.from_bytes(bytes(color))] = index
    if indices is not None and not np.any((label >= 0) & (label != indices)):
        return indices  # the palette agrees with them
    if (label < 0).any():
        row, column = np.argwhere(label < 0)[0]
        shown = "#" + bytes(pixels[row, column].tolist()).hex()
        raise InputError(
            f"{name}: colour {shown} at row {row}, column {column} belongs to no class; add it to the list of classes "
            f"(or as 'ignore {shown}'), or correct the mask"
        )
    return label.astype(np.uint8)


def _read(entry: Entry, classes: ClassList, values: tuple[int, ...] | None) -> tuple[bytes, np.ndarray]:
    assert entry.image is not None and entry.label is not None
    data, name = read_bytes(entry.label), str(entry.label)
    # Given values, the colours of the classes are only for figures.
    if values is None and any(classes.colors) and (pixels := decode_colors(data, name)) is not None:
        return read_bytes(entry.image), _by_color(*pixels, classes, name)
    label = decode_label(data, name)
    return read_bytes(entry.image), label if values is None else _by_value(label, values, name)


def listing(split: str, config: DataConfig) -> Listing:
    """List a split of the folder; images and masks are paired by file name without suffix."""
    root = folder_of(config, "folder", "images, masks and classes.txt")
    classes = read_classes(to_path(config.classes, "--data.classes") if config.classes else root / "classes.txt")
    values = config.mask_values
    if values is not None and len(values) != len(classes.names):
        raise InputError(
            f"expected --data.mask-values with a value for each of {len(classes.names)} classes, got {len(values)}"
        )
    draws = config.val_fraction is not None and split in ("train", "val")
    if draws and any((root / folder).is_dir() for folder in ("train", "images/train")):
        raise InputError(f"{root} is split already; leave out --data.val-fraction")
    suffixes = IMAGE_SUFFIXES + ((".npy",) if config.channels else ())
    entries = pairs_by_name(*_folders(root, "all" if draws else split), suffixes, _MASKS)
    if draws and config.val_fraction is not None:
        if len(entries) < 2:
            raise InputError(f"{root}: contains one image, but train and val need one each; add more")
        entries = _drawn(entries, split, config.val_fraction, config.split_seed)
    drawn = (config.val_fraction, config.split_seed) if draws else ()
    masks = values or (classes if any(classes.colors) else "")
    version = f"{masks} {drawn}" if masks or draws else ""
    if config.classes:  # copies for two lists of classes stay side by side
        version += f" {absolute(to_path(config.classes, '--data.classes'))}"
    read = partial(_read, classes=classes, values=values)
    return Listing("folder", split, classes.names, classes.palette, entries, read, version=version)
