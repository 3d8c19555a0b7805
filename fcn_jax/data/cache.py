"""The cache folder: which prepared copy belongs to a split, what is cached, and its removal."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fcn_jax.data.io import Listing, path_of
from fcn_jax.errors import InputError, UnreadableError, first_line

SUMMARY = "summary.json"
UNFINISHED = ".unfinished-"  # prefix of a copy that is being written, or was when its process ended
_FORMAT = 1  # raise it when prepared copies of an older kind must not be used any more


@dataclass(frozen=True)
class Summary:
    """The contents of a prepared copy."""

    examples: int
    image_size: tuple[int, int] | None
    """Height and width; None where they differ."""
    skipped: tuple[str, ...] = ()
    """Why each entry that was left out could not be read."""
    source: str | None = None
    """The folder that the files came from; None where they were generated."""
    unreadable: Literal["error", "skip"] = "error"


@dataclass(frozen=True)
class Cached:
    """A prepared copy, what an interrupted preparation left, or the compiled programs."""

    name: str
    count: int
    """Images, or programs."""
    paths: tuple[Path, ...]
    size: int
    """Bytes."""
    changed: float
    """Time of the last change, in seconds since the epoch."""


def damaged(folder: str | os.PathLike[str], error: Exception) -> InputError:
    """Return the error for a prepared copy that cannot be read."""
    return InputError(
        f"{os.fspath(folder)}: this prepared copy of a data set is damaged or gone ({first_line(error)}); "
        "remove the folder, and the same command prepares it again"
    )


def read_summary(folder: Path) -> Summary:
    """Return the summary of a prepared copy; an InputError where it cannot be read."""
    try:
        content: Any = json.loads((folder / SUMMARY).read_text())
        size = content["image_size"]
        image_size = None if size is None else (int(size[0]), int(size[1]))
        skipped = tuple(map(str, content.get("skipped", ())))
        source, unreadable = content.get("source"), content.get("unreadable", "error")
        return Summary(int(content["examples"]), image_size, skipped, source, unreadable)
    except Exception as error:  # what a damaged file holds may fail anywhere
        raise damaged(folder, error) from error


def fingerprint(listing: Listing) -> str:
    """Return 16 hex digits of a split's files (path, size, time of change), classes, version, and treatment of errors.

    Raises:
        UnreadableError: a listed file is missing, and may not be left out.
    """
    parts = [_FORMAT, listing.dataset, listing.split, listing.version, listing.class_names]
    skips = listing.unreadable == "skip"
    digest = hashlib.sha256(json.dumps([*parts, "skip"] if skips else parts).encode())
    for entry in listing.entries:
        digest.update(entry.name.encode())
        for path in (entry.image, entry.label):
            if path is None:
                continue
            try:
                state = path.stat()
                digest.update(f"{path.absolute()}\0{state.st_size}\0{state.st_mtime_ns}\0".encode())
            except (OSError, ValueError) as error:  # ValueError: the system takes no such name
                if not skips:
                    raise UnreadableError(
                        f"{path}: {listing.spec} lists {entry.name!r}, but this file is not "
                        "there; put it there or take the name off the list"
                    ) from error
                digest.update(f"{path!r}\0gone\0".encode())
    return digest.hexdigest()[:16]


def _cached(name: str, count: int, *paths: Path) -> Cached:
    states = [file.stat() for path in paths for file in (path, *path.rglob("*")) if file.is_file()]
    size, changed = sum(state.st_size for state in states), max((state.st_mtime for state in states), default=0.0)
    return Cached(name, count, paths, size, changed)


def cached(cache_dir: str) -> list[Cached]:
    """List a cache folder: each prepared copy, what interrupted preparations left, the compiled programs."""
    root = path_of(cache_dir, "--cache-dir")
    rows = []
    for copy in sorted(root.glob("*/*-" + 16 * "[0-9a-f]")):
        try:
            examples = read_summary(copy).examples
        except InputError:
            examples = 0
        rows.append(_cached(f"{copy.parent.name}/{copy.name.rpartition('-')[0]}", examples, copy))
    rows += [_cached(f"{path.parent.name}, unfinished", 0, path) for path in sorted(root.glob(f"*/{UNFINISHED}*"))]
    if programs := sorted((root / "compiled").glob("*-cache")):
        rows.append(_cached("compiled programs", len(programs), *programs, *(root / "compiled").glob("*-atime")))
    return rows


def empty(cache_dir: str) -> None:
    """Remove all that ``cached`` lists."""
    for path in (path for row in cached(cache_dir) for path in row.paths):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
