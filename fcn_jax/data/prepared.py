"""Prepared copies of splits, checked once and written as ArrayRecord by TFDS without TensorFlow, and their cache."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
import tensorflow_datasets as tfds

from fcn_jax.data.io import Listing, decode_channels, decode_image, encode_array, encode_label
from fcn_jax.errors import InputError, UnreadableError, check_local, first_line
from fcn_jax.losses import IGNORE
from fcn_jax.paths import absolute, is_remote, state_of, to_path, upload

_log = logging.getLogger(__name__)
_SPLIT = "examples"
SUMMARY = "summary.json"
UNFINISHED = ".unfinished-"  # prefix of a copy that is being written or was interrupted
_FORMAT = 1  # increase it to invalidate existing prepared copies


Statistics = tuple[tuple[float, ...], tuple[float, ...], int]
"""Mean and standard deviation of each channel, and the bits per sample."""


class Record(TypedDict):
    """One stored example: encoded image, encoded 8-bit grey label, name."""

    image: bytes
    label: bytes
    name: str


def check_example(image: np.ndarray, label: np.ndarray, num_classes: int, name: str) -> set[int]:
    """Return the ids in a label (h, w); raise InputError for an undeclared id or an image of another size."""
    if image.shape[:2] != label.shape:
        (h, w), (mask_h, mask_w) = image.shape[:2], label.shape
        raise InputError(
            f"{name}: the image is {w} x {h} pixels, its mask {mask_w} x {mask_h}; the sizes must match "
            "(an EXIF orientation is applied to the image)"
        )
    ids = set(np.unique(label).tolist())
    if wrong := sorted(ids - {*range(num_classes), IGNORE}):
        shown = ", ".join(map(str, wrong[:8])) + (", ..." if len(wrong) > 8 else "")
        raise InputError(
            f"{name}: class ids {shown} are not among the {num_classes} classes "
            f"(0..{num_classes - 1}, {IGNORE} = ignore); correct the mask or the list of classes"
        )
    return ids


class _Info(tfds.core.DatasetInfo):
    def initialize_from_bucket(self) -> None:
        """Skip TFDS's cloud store; the original method leaves an empty folder in /tmp each time."""


class Pairs(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """A TFDS builder for a listing's pairs as encoded bytes; to encode arrays, TFDS would import TensorFlow."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, listing: Listing, data_dir: str):
        """Build from ``listing`` into ``data_dir``/pairs/1.0.0."""
        self._listing = listing
        self._sizes: set[tuple[int, int]] = set()
        self._ids: set[int] = set()
        self._skipped: list[str] = []
        self._dtype: np.dtype | None = None
        self._sums = np.zeros((3, listing.channels or 3))
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        label = tfds.features.Image(shape=(None, None, 1), encoding_format="png")
        parts = {"image": tfds.features.Image(), "label": label, "name": tfds.features.Text()}
        text, features = f"{self._listing.spec}, prepared by fcn_jax", tfds.features.FeaturesDict(parts)
        return _Info(builder=self, description=text, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {_SPLIT: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, Record]]:
        listing = self._listing
        for index, entry in enumerate(listing.entries):
            try:
                image, label = listing.read(entry)
                pixels = self._pixels(image, str(entry.image or entry.name))
            except UnreadableError as error:
                if listing.unreadable == "error":
                    raise
                self._skipped.append(str(error).partition("; ")[0])
                continue
            self._ids |= check_example(pixels, label, len(listing.class_names), str(entry.label or entry.name))
            self._sizes.add(label.shape)
            if listing.channels is not None:
                image = encode_array(pixels)
            yield index, {"image": image, "label": encode_label(label), "name": entry.name}
        if len(self._skipped) == len(listing.entries):
            raise InputError(
                f"{listing.spec}: none of its {len(self._skipped)} images can be read together with its mask, "
                f"as in {self._skipped[0]}; correct --data.dir or replace the files"
            )

    def _pixels(self, image: bytes, name: str) -> np.ndarray:
        """Decode an image; if it is not 8-bit RGB, also update the sums for the statistics."""
        channels = self._listing.channels
        if channels is None:
            return decode_image(image, name)
        pixels = decode_channels(image, name, channels)
        if self._dtype not in (None, pixels.dtype):
            raise InputError(f"{name}: {pixels.dtype}, but earlier images are {self._dtype}; use one dtype for all")
        self._dtype = pixels.dtype
        values = pixels.reshape(-1, channels).astype(np.float64)
        self._sums += [np.full(channels, len(values)), values.sum(0), np.square(values).sum(0)]
        return pixels

    def _statistics(self) -> Statistics | None:
        if self._dtype is None:
            return None
        count, total, squares = self._sums
        mean = total / count
        std = np.sqrt(np.maximum(squares / count - mean**2, 0))
        return tuple(mean.tolist()), tuple(np.where(std > 0, std, 1).tolist()), 8 * self._dtype.itemsize

    def summary(self) -> Summary:
        """Return the summary after preparation; raise InputError if the masks contain only 255, or only 0 and 255."""
        if IGNORE in self._ids <= {0, IGNORE}:
            found = " and ".join(map(str, sorted(self._ids)))
            raise InputError(
                f"{self._listing.spec}: the masks contain only {found}, and {IGNORE} means ignore; "
                "write class ids (0, 1, 2, ...), or give --data.mask-values with the value of each class, as in 0 255"
            )
        first = self._listing.entries[0]
        files = [absolute(path) for path in (first.image, first.label) if path is not None]
        count = len(self._listing.entries) - len(self._skipped)
        image_size = next(iter(self._sizes)) if len(self._sizes) == 1 else None
        source = os.path.commonpath(files) if files else None
        options = f"{self._listing.version} {self._listing.channels or ''}".strip()
        return Summary(
            count, image_size, tuple(self._skipped), source, self._listing.unreadable, self._statistics(), options
        )


class Examples:
    """Random access to the examples of a prepared copy; only its folder is pickled."""

    def __init__(self, folder: str | os.PathLike[str]):
        """Open the prepared copy at ``folder``; raise InputError if it is damaged or gone."""
        self._folder = os.fspath(folder)
        skip = {"image": tfds.decode.SkipDecoding(), "label": tfds.decode.SkipDecoding()}
        try:
            self._source: Any = tfds.builder_from_directory(self._folder).as_data_source(_SPLIT, decoders=skip)
        except Exception as error:  # TFDS and ArrayRecord may raise anything for a damaged copy
            raise damaged(self._folder, error) from error

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        """Return an example, in the order of the listing; raise InputError if the copy is damaged or gone."""
        try:
            record = self._source[index]
            return {"image": record["image"], "label": record["label"], "name": record["name"].decode()}
        except Exception as error:  # as in __init__; a file truncated while it is open gives a record of None
            raise damaged(self._folder, error) from error

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the folder, so that each worker process opens the files itself."""
        return Examples, (self._folder,)


def prepare(listing: Listing, cache_dir: str) -> Path:
    """Return a split's prepared copy, ``cache_dir``/DATASET/SPLIT-FINGERPRINT; check and write it if it is missing.

    The copy is written to a temporary folder and then moved, so that an interruption or a second process never leaves a
    partial copy. For an object store, it is uploaded from this machine, its summary last. A changed source has a new
    fingerprint, and its previous copy is removed.

    Raises:
        InputError: a missing or unreadable file (unless the listing skips those), an invalid label, or a
            cache folder that cannot be written to.
    """
    parent = to_path(cache_dir, "--data.cache-dir") / listing.dataset
    final = parent / f"{listing.split}-{fingerprint(listing)}"
    if (final / SUMMARY).is_file():
        return final
    _log.info("preparing %s, %d images, in %s", listing.spec, len(listing.entries), final)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        place = None if is_remote(parent) else parent
        work = tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=place, ignore_cleanup_errors=True)
    except OSError as error:
        raise InputError(
            f"--data.cache-dir {cache_dir}: cannot be written to ({error.strerror}); choose another"
        ) from error
    with work:
        tfds.disable_progress_bar()
        builder = Pairs(listing, work.name)
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints "Downloading ..." for local data too
                builder.download_and_prepare()
        except RuntimeError as error:  # ArrayRecord's, of a full disk
            reason = f"cannot be written to ({first_line(error)}); free some space or choose another"
            raise InputError(f"--data.cache-dir {cache_dir}: {reason}") from error
        summary = builder.summary()
        (Path(builder.data_dir) / SUMMARY).write_text(json.dumps(asdict(summary)))
        try:
            if is_remote(final):
                for file in sorted(Path(builder.data_dir).iterdir(), key=lambda file: file.name == SUMMARY):
                    upload(file, final / file.name)
            else:
                os.replace(builder.data_dir, final)
        except OSError as error:
            if not (final / SUMMARY).is_file():  # else another process has written the same copy
                raise damaged(final, error) from error
        for copy in parent.glob(f"{listing.split}-*"):
            with contextlib.suppress(InputError, OSError):
                before = read_summary(copy)
                same = before.source == summary.source is not None and before.options == summary.options
                same &= before.unreadable == summary.unreadable
                if same and copy != final and is_remote(copy):
                    copy.rmtree()  # type: ignore[attr-defined]  # epath
                elif same and copy != final:
                    os.replace(copy, Path(work.name, copy.name))  # atomic: no process sees a partial copy
    return final


# --- the cache folder


@dataclass(frozen=True)
class Summary:
    """The contents of a prepared copy."""

    examples: int
    image_size: tuple[int, int] | None
    """Height and width of all images; None if they differ."""
    skipped: tuple[str, ...] = ()
    """The reason for each skipped entry."""
    source: str | None = None
    """The folder of the source files; None if they were generated."""
    unreadable: Literal["error", "skip"] = "error"
    statistics: Statistics | None = None
    """Channel statistics of images that are not 8-bit RGB."""
    options: str = ""
    """``Listing.version`` and the number of channels."""


@dataclass(frozen=True)
class Cached:
    """A prepared copy, the remains of an interrupted preparation, or the compiled programs."""

    name: str
    count: int
    """Number of images or programs."""
    paths: tuple[Path, ...]
    size: int
    """Size in bytes."""
    changed: float
    """Time of the last change, in seconds since the epoch."""


def damaged(folder: str | os.PathLike[str], error: Exception) -> InputError:
    """Return the error for a prepared copy that cannot be read."""
    return InputError(
        f"{os.fspath(folder)}: this prepared copy of a data set is damaged or gone ({first_line(error)}); "
        "remove the folder, and the same command prepares it again"
    )


def read_summary(folder: Path) -> Summary:
    """Return the summary of a prepared copy; raise InputError if it cannot be read."""
    try:
        content: Any = json.loads((folder / SUMMARY).read_text())
        size = content["image_size"]
        image_size = None if size is None else (int(size[0]), int(size[1]))
        skipped = tuple(map(str, content.get("skipped", ())))
        source, unreadable = content.get("source"), content.get("unreadable", "error")
        found = content.get("statistics")
        statistics = found and (*(tuple(map(float, values)) for values in found[:2]), int(found[2]))
        options = str(content.get("options", ""))
        return Summary(int(content["examples"]), image_size, skipped, source, unreadable, statistics, options)
    except Exception as error:  # a damaged file may raise anything
        raise damaged(folder, error) from error


def fingerprint(listing: Listing) -> str:
    """Return a hash, 16 hex digits, of a split's files (path, size, mtime), classes, version and options.

    Raises:
        UnreadableError: a listed file is missing and must not be skipped.
    """
    parts = [_FORMAT, listing.dataset, listing.split, listing.version, listing.class_names]
    skips = listing.unreadable == "skip"
    parts += ["skip"] * skips + [f"{listing.channels} channels"] * (listing.channels is not None)
    digest = hashlib.sha256(json.dumps(parts).encode())
    for entry in listing.entries:
        digest.update(entry.name.encode())
        for path in (entry.image, entry.label):
            if path is None:
                continue
            try:
                digest.update(f"{absolute(path)}\0{state_of(path)}\0".encode())
            except (OSError, ValueError) as error:  # ValueError: an invalid file name
                if not skips:
                    raise UnreadableError(
                        f"{path}: {listing.spec} lists {entry.name!r}, but this file does not "
                        "exist; add it or remove the name from the list"
                    ) from error
                digest.update(f"{path!r}\0gone\0".encode())
    return digest.hexdigest()[:16]


def _cached(name: str, count: int, *paths: Path) -> Cached:
    states = [file.stat() for path in paths for file in (path, *path.rglob("*")) if file.is_file()]
    size, changed = sum(state.st_size for state in states), max((state.st_mtime for state in states), default=0.0)
    return Cached(name, count, paths, size, changed)


def cached(cache_dir: str) -> list[Cached]:
    """List a cache folder: prepared copies, remains of interrupted preparations, and compiled programs."""
    check_local(cache_dir, "--cache-dir")
    root = to_path(cache_dir, "--cache-dir")
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
    """Remove everything that ``cached`` lists."""
    for path in (path for row in cached(cache_dir) for path in row.paths):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
