"""Prepared copies: each split is checked once and written as ArrayRecord by TFDS, without TensorFlow."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import tensorflow_datasets as tfds

from fcn_jax.data.cache import SUMMARY, UNFINISHED, Summary, damaged, fingerprint, read_summary
from fcn_jax.data.io import Listing, decode_image, encode_label, path_of
from fcn_jax.errors import InputError, UnreadableError
from fcn_jax.losses import IGNORE

_log = logging.getLogger(__name__)
_SPLIT = "examples"


class Record(TypedDict):
    """One stored example: encoded image, encoded 8-bit grey label, name."""

    image: bytes
    label: bytes
    name: str


def check_example(image: np.ndarray, label: np.ndarray, num_classes: int, name: str) -> set[int]:
    """Return the ids in a label (h, w); an InputError for one that is undeclared, or an image of another size."""
    if image.shape[:2] != label.shape:
        (h, w), (mask_h, mask_w) = image.shape[:2], label.shape
        raise InputError(
            f"{name}: the image is {w} x {h} pixels, its mask {mask_w} x {mask_h}; they must be equal "
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
        """Look for nothing in TFDS's cloud store (the original leaves an empty folder in /tmp each time)."""


class Pairs(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """A TFDS builder of a listing's pairs, as encoded bytes: to encode an array, TFDS would import TensorFlow."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, listing: Listing, data_dir: str):
        """Build from ``listing`` into ``data_dir``/pairs/1.0.0."""
        self._listing = listing
        self._sizes: set[tuple[int, int]] = set()
        self._ids: set[int] = set()
        self._skipped: list[str] = []
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
                pixels = decode_image(image, str(entry.image or entry.name))
            except UnreadableError as error:
                if listing.unreadable == "error":
                    raise
                self._skipped.append(str(error).partition("; ")[0])
                continue
            self._ids |= check_example(pixels, label, len(listing.class_names), str(entry.label or entry.name))
            self._sizes.add(label.shape)
            yield index, {"image": image, "label": encode_label(label), "name": entry.name}
        if len(self._skipped) == len(listing.entries):
            raise InputError(
                f"{listing.spec}: none of its {len(self._skipped)} images can be read together with its mask, "
                f"as in {self._skipped[0]}; correct --data.dir or replace the files"
            )

    def summary(self) -> Summary:
        """Return the summary once prepared; an InputError where all labels are ignored."""
        if IGNORE in self._ids <= {0, IGNORE}:
            found = " and ".join(map(str, sorted(self._ids)))
            raise InputError(
                f"{self._listing.spec}: the masks hold only {found}, and {IGNORE} means ignore; "
                "write class ids: 0, 1, 2, ..."
            )
        first = self._listing.entries[0]
        files = [path.absolute() for path in (first.image, first.label) if path is not None]
        count = len(self._listing.entries) - len(self._skipped)
        image_size = next(iter(self._sizes)) if len(self._sizes) == 1 else None
        source = os.path.commonpath(files) if files else None
        return Summary(count, image_size, tuple(self._skipped), source, self._listing.unreadable)


class Examples:
    """Random access to the stored examples of a prepared copy; what is pickled is its folder alone."""

    def __init__(self, folder: str | os.PathLike[str]):
        """Open the prepared copy at ``folder``; an InputError where it is damaged or gone."""
        self._folder = os.fspath(folder)
        skip = {"image": tfds.decode.SkipDecoding(), "label": tfds.decode.SkipDecoding()}
        try:
            self._source: Any = tfds.builder_from_directory(self._folder).as_data_source(_SPLIT, decoders=skip)
        except Exception as error:  # a damaged copy fails anywhere in TFDS and ArrayRecord, with any exception
            raise damaged(self._folder, error) from error

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        """Return an example, in the order of the listing; an InputError where the copy is damaged or gone."""
        try:
            record = self._source[index]
            return {"image": record["image"], "label": record["label"], "name": record["name"].decode()}
        except Exception as error:  # as in __init__; a file cut short while it is open gives a record of None
            raise damaged(self._folder, error) from error

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the folder, so that each worker process opens the files itself."""
        return Examples, (self._folder,)


def prepare(listing: Listing, cache_dir: str) -> Path:
    """Return ``cache_dir``/DATASET/SPLIT-FINGERPRINT, a split's prepared copy; check and write it first if need be.

    It is written to a temporary folder and then moved, so that neither an interruption nor a second process leaves half
    a copy. A changed source has another fingerprint; the copy of what it was before is removed.

    Raises:
        InputError: a missing or unreadable file (unless the listing leaves those out), a wrong label, or a
            cache folder that cannot be written to.
    """
    parent = path_of(cache_dir, "--data.cache-dir") / listing.dataset
    final = parent / f"{listing.split}-{fingerprint(listing)}"
    if (final / SUMMARY).is_file():
        return final
    _log.info("preparing %s, %d images, in %s", listing.spec, len(listing.entries), final)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        work = tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=parent, ignore_cleanup_errors=True)
    except OSError as error:
        raise InputError(
            f"--data.cache-dir {cache_dir}: cannot be written to ({error.strerror}); choose another"
        ) from error
    with work:
        tfds.disable_progress_bar()
        builder = Pairs(listing, work.name)
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints "Downloading ..." of data that lie here already
            builder.download_and_prepare()
        summary = builder.summary()
        (Path(builder.data_dir) / SUMMARY).write_text(json.dumps(asdict(summary)))
        try:
            os.replace(builder.data_dir, final)
        except OSError as error:
            if not (final / SUMMARY).is_file():  # else another process was faster, with the same content
                raise damaged(final, error) from error
        for copy in parent.glob(f"{listing.split}-*"):
            with contextlib.suppress(InputError, OSError):
                before = read_summary(copy)
                same = before.source == summary.source is not None and before.unreadable == summary.unreadable
                if same and copy != final:
                    os.replace(copy, Path(work.name, copy.name))  # in one step: nobody finds half of it
    return final
