"""A user's own images and masks.

Expected under ``--data.dir`` (either of the two, or neither level for a single set called ``all``)::

    DIR/train/images/a.jpg   DIR/train/masks/a.png        DIR/images/train/a.jpg   DIR/masks/train/a.png
    DIR/classes.txt          one class name per line; the first line is class 0

Masks hold class ids in one 8-bit channel (or as palette indices); 255 marks pixels to ignore.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from fcn_jax.config import DataConfig
from fcn_jax.data.io import IMAGE_SUFFIXES, Listing, folder_of, lines_in, pairs_by_name, palette, read_files
from fcn_jax.errors import InputError
from fcn_jax.losses import IGNORE
from fcn_jax.paths import to_path

SPLITS = ("train", "val", "test", "all")
_MASKS = (".png", ".bmp", ".gif", ".tif", ".tiff")


def read_classes(path: Path) -> tuple[str, ...]:
    """Read class names, one per line, the first for id 0, blank lines left out; an InputError for an unusable list."""
    if not path.is_file():
        raise InputError(
            f"{path}: not there; write one class name per line (the first is class 0), or give --data.classes"
        )
    names = tuple(lines_in(path, "class name"))
    if twice := sorted(name for name, count in Counter(names).items() if count > 1):
        raise InputError(f"{path}: lists {twice[0]!r} twice; each class has one line")
    if not 2 <= len(names) < IGNORE:
        raise InputError(
            f"{path}: lists {len(names)} classes; expected 2 to {IGNORE - 1} (count the background as one)"
        )
    return names


def _folders(root: Path, split: str) -> tuple[Path, Path]:
    if split == "all":
        return root / "images", root / "masks"
    for images, masks in ((f"images/{split}", f"masks/{split}"), (f"{split}/images", f"{split}/masks")):
        if (root / images).is_dir():
            return root / images, root / masks
    raise InputError(
        f"{root}: holds neither {split}/images nor images/{split}; put images there and masks in {split}/masks or "
        f"masks/{split}, or use folder/all for a folder with images/ and masks/ alone"
    )


def listing(split: str, config: DataConfig) -> Listing:
    """List a split of the folder; image and mask are paired by their names without suffix."""
    root = folder_of(config, "folder", "images, masks and classes.txt")
    names = read_classes(to_path(config.classes, "--data.classes") if config.classes else root / "classes.txt")
    entries = pairs_by_name(*_folders(root, split), IMAGE_SUFFIXES, _MASKS)
    return Listing("folder", split, names, palette(len(names)), entries, read_files)
