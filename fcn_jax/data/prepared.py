"""Prepared copies: each split is checked once and written as ArrayRecord by TFDS, without TensorFlow."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import registered

from fcn_jax.data.labels import IGNORE, check_label, check_pair, decode_image, encode_label
from fcn_jax.data.listing import Listing, fingerprint, path_of
from fcn_jax.errors import InputError, UnreadableError, first_line

__all__ = ["Examples", "Record", "Summary", "prepare", "read_summary"]

_log = logging.getLogger(__name__)
_SUMMARY = "summary.json"
_SPLIT = "examples"


class Record(TypedDict):
    """One stored example: encoded image, encoded 8-bit grey label, name."""

    image: bytes
    label: bytes
    name: str


class _Info(tfds.core.DatasetInfo):
    def initialize_from_bucket(self) -> None:
        """Look for nothing in TFDS's cloud store (the original leaves an empty folder in /tmp each time)."""


with registered.skip_registration():  # it is built here from a listing, never by its name

    class Pairs(tfds.core.GeneratorBasedBuilder):
        """A TFDS builder of image and label pairs, given by a listing.

        It yields encoded bytes, which TFDS stores as they are; for a NumPy array it would import TensorFlow to encode
        it.
        """

        VERSION = tfds.core.Version("1.0.0")

        def __init__(self, listing: Listing, data_dir: str):
            """Build from ``listing`` into ``data_dir``/pairs/1.0.0."""
            self._listing = listing
            self._sizes: set[tuple[int, int]] = set()
            self._ids = np.zeros(256, bool)
            self._skipped: list[str] = []
            super().__init__(data_dir=data_dir, file_format="array_record")

        def _info(self) -> tfds.core.DatasetInfo:
            return _Info(
                builder=self,
                description=f"{self._listing.dataset}/{self._listing.split}, prepared by fcn_jax",
                features=tfds.features.FeaturesDict(
                    {
                        "image": tfds.features.Image(),
                        "label": tfds.features.Image(shape=(None, None, 1), encoding_format="png"),
                        "name": tfds.features.Text(),
                    }
                ),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {_SPLIT: self._generate_examples()}

        def _generate_examples(self) -> Iterator[tuple[int, Record]]:
            listing = self._listing
            for index, entry in enumerate(listing.entries):
                where = str(entry.label or entry.name)
                try:
                    image, label = listing.read(entry)
                    pixels = decode_image(image, str(entry.image or entry.name))
                except UnreadableError as error:
                    if listing.unreadable == "error":
                        raise
                    self._skipped.append(str(error).partition("; ")[0])
                    continue
                check_pair(pixels, label, where)
                check_label(label, len(listing.class_names), where)
                self._sizes.add(label.shape)
                self._ids[np.unique(label)] = True
                yield index, {"image": image, "label": encode_label(label), "name": entry.name}
            if len(self._skipped) == len(listing.entries):
                raise InputError(
                    f"{listing.dataset}/{listing.split}: none of its {len(self._skipped)} images can be read together "
                    f"with its mask, as in {self._skipped[0]}; correct --data.dir or replace the files"
                )

        def summary(self) -> Summary:
            """Return what is known of the set once prepared; an InputError where its labels can teach nothing."""
            seen = set(np.flatnonzero(self._ids).tolist())
            if seen == {IGNORE}:
                raise InputError(
                    f"{self._listing.dataset}/{self._listing.split}: every pixel of every mask is 255, "
                    "which means ignore; label some"
                )
            if seen <= {0, IGNORE} and IGNORE in seen:
                raise InputError(
                    f"{self._listing.dataset}/{self._listing.split}: the masks hold only 0 and 255, "
                    "and 255 means ignore; write class ids: 0, 1, 2, ..."
                )
            size = next(iter(self._sizes)) if len(self._sizes) == 1 else None
            examples = len(self._listing.entries) - len(self._skipped)
            return {"examples": examples, "image_size": size, "skipped": self._skipped}


def _damaged(folder: str | os.PathLike[str], error: Exception) -> InputError:
    return InputError(
        f"{os.fspath(folder)}: this prepared copy of a data set is damaged or gone ({first_line(error)}); "
        "remove the folder, and the same command prepares it again"
    )


class Examples:
    """Random access to the stored examples of a prepared copy; what is pickled is its folder alone."""

    def __init__(self, folder: str | os.PathLike[str]):
        """Open the prepared copy at ``folder``; an InputError where it is damaged or gone."""
        self._folder = os.fspath(folder)
        skip = {"image": tfds.decode.SkipDecoding(), "label": tfds.decode.SkipDecoding()}
        try:
            builder: Any = tfds.builder_from_directory(self._folder)
            self._source: Any = builder.as_data_source(_SPLIT, decoders=skip)
        except Exception as error:  # a damaged copy fails anywhere in TFDS and ArrayRecord, with any exception
            raise _damaged(self._folder, error) from error

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        """Return example ``index``, in the order of the listing; an InputError where the copy is damaged or gone."""
        try:
            record = self._source[index]
            return {"image": record["image"], "label": record["label"], "name": record["name"].decode()}
        except Exception as error:  # as in __init__; a file cut short while it is open gives a record of None
            raise _damaged(self._folder, error) from error

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the folder, so that each worker process opens the files itself."""
        return Examples, (self._folder,)

    def __repr__(self) -> str:
        """Name the folder; grain prints it."""
        return f"Examples({self._folder!r})"


class Summary(TypedDict):
    """What ``prepare`` notes of a copy."""

    examples: int
    image_size: tuple[int, int] | None
    """Height and width; None where they differ."""
    skipped: list[str]
    """Why each entry that was left out could not be read."""


def read_summary(folder: Path) -> Summary:
    """Return what ``prepare`` noted of a copy; an InputError where it cannot be read."""
    try:
        content = json.loads((folder / _SUMMARY).read_text())
        size = content["image_size"]
        return {
            "examples": int(content["examples"]),
            "image_size": None if size is None else (int(size[0]), int(size[1])),
            "skipped": [str(reason) for reason in content.get("skipped", ())],
        }
    except Exception as error:  # what a damaged file holds may fail anywhere
        raise _damaged(folder, error) from error


def prepare(listing: Listing, cache_dir: str) -> Path:
    """Return the folder of a split's prepared copy; check and write it first where it is not there yet.

    It is written beside its place and then moved there whole, so that neither an interrupted preparation nor a second
    process leaves half a copy. A changed source has another fingerprint and so another folder.

    Args:
        listing: what to prepare.
        cache_dir: copies go to ``cache_dir``/DATASET/SPLIT-FINGERPRINT.

    Raises:
        InputError: no entries, a missing or unreadable file (unless the listing leaves those out), a wrong label, or a
            cache folder that cannot be written to.
    """
    if not listing.entries:
        raise InputError(f"{listing.dataset}/{listing.split} has no images; correct --data.dir or the split's list")
    parent = path_of(cache_dir, "--data.cache-dir") / listing.dataset
    final = parent / f"{listing.split}-{fingerprint(listing)}"
    if (final / _SUMMARY).is_file():
        return final
    _log.info("preparing %s/%s, %d images, in %s", listing.dataset, listing.split, len(listing.entries), final)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=parent))
    except OSError as error:
        raise InputError(
            f"--data.cache-dir {cache_dir}: cannot be written to ({error.strerror}); choose another"
        ) from error
    try:
        tfds.disable_progress_bar()
        builder = Pairs(listing, os.fspath(work))
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints "Downloading ..." of data that lie here already
            builder.download_and_prepare()
        written = Path(builder.data_dir)
        (written / _SUMMARY).write_text(json.dumps(builder.summary()))
        try:
            os.replace(written, final)
        except OSError as error:
            if not (final / _SUMMARY).is_file():  # else another process was faster, with the same content
                raise _damaged(final, error) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return final
