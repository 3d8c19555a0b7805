"""What a data set file returns: which images and masks a split has and how to read them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from fcn_jax.config import DataConfig
from fcn_jax.data.labels import decode_label
from fcn_jax.errors import InputError, UnreadableError, first_line

__all__ = [
    "Entry",
    "Listing",
    "fingerprint",
    "folder_of",
    "names_in",
    "pairs_by_name",
    "path_of",
    "read_bytes",
    "read_files",
    "read_text",
]

FORMAT = 1
"""Raise it when prepared copies of an older kind must not be used any more."""


@dataclass(frozen=True)
class Entry:
    """One example: a name for messages and figures, and its files (None where it is generated)."""

    name: str
    image: Path | None = None
    label: Path | None = None


@dataclass(frozen=True)
class Listing:
    """One split of a data set, not yet read."""

    dataset: str
    split: str
    class_names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    entries: tuple[Entry, ...]
    read: Callable[[Entry], tuple[bytes, np.ndarray]]
    """Returns the encoded image and the label, uint8 (h, w), of class ids with 255 = ignore."""
    unreadable: Literal["error", "skip"] = "error"
    """Whether a file that cannot be read is an error, or its entry is left out."""
    version: str = ""
    """All that decides what ``read`` returns beside the files: the generator's or converter's version and options."""


def read_bytes(path: Path) -> bytes:
    """Return a file's bytes; an UnreadableError where it cannot be read."""
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: the system takes no such name
        reason = error.strerror if isinstance(error, OSError) else first_line(error)
        raise UnreadableError(f"{path}: cannot be read ({reason}); put the file there or correct --data.dir") from error


def read_text(path: Path, what: str) -> str:
    """Return the text of a file that lists a ``what`` in each line; an InputError where it is none."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a UTF-8 text file; write one {what} per line") from error


def read_files(entry: Entry) -> tuple[bytes, np.ndarray]:
    """Read an entry whose mask is an image file of class ids."""
    assert entry.image is not None and entry.label is not None  # every data set of files gives both
    return read_bytes(entry.image), decode_label(read_bytes(entry.label), str(entry.label))


def path_of(name: str, flag: str) -> Path:
    """Return the path that a user named, ``~`` expanded; an InputError where the system takes no such name."""
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, ValueError, RuntimeError) as error:  # too long; with a zero byte; a ~user who is not there
        raise InputError(f"{flag} {name!r}: no usable path ({first_line(error)}); give another") from error
    return path


def folder_of(config: DataConfig, dataset: str, content: str) -> Path:
    """Return ``config.dir``; an InputError where it is not given, or not there and nothing is to be fetched."""
    if config.dir is None:
        raise InputError(f"{dataset} needs the folder that holds {content}: give it with --data.dir")
    folder = path_of(config.dir, "--data.dir")
    if not folder.is_dir() and not config.download:
        raise InputError(f"--data.dir {folder}: no such folder; give the one that holds {content}")
    return folder


def names_in(path: Path) -> tuple[str, ...]:
    """Return the names in a list file, one in each line; an InputError where the file is missing or lists nothing."""
    names = tuple(line.split()[0] for line in read_text(path, "name").splitlines() if line.strip())
    if not names:
        raise InputError(f"{path}: lists no images; put one name in each line")
    return names


def pairs_by_name(
    images: Path, masks: Path, image_suffixes: tuple[str, ...], mask_suffixes: tuple[str, ...]
) -> tuple[Entry, ...]:
    """Pair the files of two folders by their names without suffix, in the order of the names.

    Raises:
        InputError: a folder is missing or holds no images, two files share a name, or an image and a mask have no
            partner.
    """
    image_of, label_of = _by_stem(images, image_suffixes), _by_stem(masks, mask_suffixes)
    for alone, there, kind in (
        (sorted(image_of.keys() - label_of.keys()), images, f"mask in {masks}"),
        (sorted(label_of.keys() - image_of.keys()), masks, f"image in {images}"),
    ):
        if alone:
            raise InputError(
                f"{there}: {alone[0]!r} has no {kind} ({len(alone)} such); an image and its mask have one name, "
                "as in a.jpg and a.png"
            )
    return tuple(Entry(stem, image_of[stem], label_of[stem]) for stem in sorted(image_of))


def _by_stem(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; create it or correct --data.dir")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in suffixes and not path.name.startswith("."):
            if not path.name.isprintable():  # names are stored and printed; bytes that are no UTF-8 can be neither
                raise InputError(f"{folder}: {ascii(path.name)} cannot be printed; rename it")
            if path.stem in found:
                raise InputError(f"{folder}: {found[path.stem].name} and {path.name} share a name; remove one of them")
            found[path.stem] = path
    if not found:
        raise InputError(f"{folder}: holds no files of type {' '.join(suffixes)}; put them there or correct --data.dir")
    return found


def fingerprint(listing: Listing) -> str:
    """Return 16 hex digits that change with the split's files (path, size, time of change), its classes or its version.

    A copy that may leave entries out has another fingerprint than one that may not, so that neither is used for the
    other. A file that may be left out counts as one without size and time where it is not there.

    Raises:
        UnreadableError: a listed file is not there, and that is an error.
    """
    parts = [FORMAT, listing.dataset, listing.split, listing.version, listing.class_names]
    skips = listing.unreadable == "skip"
    digest = hashlib.sha256(json.dumps([*parts, "skip"] if skips else parts).encode())
    for entry in listing.entries:
        digest.update(entry.name.encode())
        for path in (entry.image, entry.label):
            if path is not None:
                try:
                    state = path.stat()
                    digest.update(f"{path.absolute()}\0{state.st_size}\0{state.st_mtime_ns}\0".encode())
                except (OSError, ValueError) as error:  # ValueError: the system takes no such name
                    if not skips:
                        raise UnreadableError(
                            f"{path}: {listing.dataset}/{listing.split} lists {entry.name!r}, but this file is not "
                            "there; put it there or take the name off the list"
                        ) from error
                    digest.update(f"{path!r}\0gone\0".encode())
    return digest.hexdigest()[:16]
