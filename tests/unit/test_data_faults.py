"""Missing and damaged files: reported by name, or skipped and counted. Earlier prepared copies stay valid."""

import dataclasses
import json
import logging
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import trees

from fcn_jax.config import DataConfig
from fcn_jax.data import datasets, prepared
from fcn_jax.data.pipeline import make_eval_batches, make_train_iterator
from fcn_jax.errors import InputError, UnreadableError

COUNT = 12


@pytest.fixture
def config(tmp_path):
    trees.folder(tmp_path / "data", {"train": COUNT})
    return DataConfig(dir=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def skipping(config):
    return dataclasses.replace(config, unreadable="skip")


def _images(config):
    return Path(config.dir) / "train/images"


def _copies(config):
    return sorted((Path(config.cache_dir) / "folder").iterdir())


def _names(split):
    return [split.source[index]["name"] for index in range(len(split))]


def _cut(path):
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize(("file", "kind"), [("images/003.jpg", "image"), ("masks/003.png", "mask")])
def test_an_unreadable_file_is_an_error_or_skipped_and_counted(config, skipping, file, kind, caplog):
    _cut(Path(config.dir) / "train" / file)
    said = f"{file}: not a readable {kind}"
    with pytest.raises(UnreadableError, match=said):
        datasets.load("folder/train", config)
    assert not _copies(config)
    with caplog.at_level(logging.WARNING):
        split = datasets.load("folder/train", skipping)
    assert len(split) == COUNT - 1 and "003" not in _names(split)
    (note,) = [record.getMessage() for record in caplog.records]
    assert note.startswith(f"note: folder/train: 1 of {COUNT} images are skipped: ") and said in note


def test_a_second_run_logs_the_same_skipped_files(skipping, caplog):
    for name in ("001", "004", "005", "007", "009"):
        _cut(_images(skipping) / f"{name}.jpg")
    notes = []
    for _ in range(2):
        caplog.clear()
        assert len(datasets.load("folder/train", skipping).skipped) == 5
        notes.append([record.getMessage() for record in caplog.records])
    assert notes[0] == notes[1] and len(notes[0]) == 1
    assert f"5 of {COUNT} images" in notes[0][0] and "001.jpg" in notes[0][0] and "and 2 more" in notes[0][0]
    assert len(_copies(skipping)) == 1


def test_a_copy_with_skipped_files_is_not_used_when_they_are_errors(config, skipping):
    _cut(_images(config) / "003.jpg")
    assert len(datasets.load("folder/train", skipping)) == COUNT - 1
    with pytest.raises(UnreadableError, match="003.jpg"):
        datasets.load("folder/train", config)
    trees.write_image(_images(config) / "003.jpg", trees.picture(3))  # repaired, so it is included again
    assert len(datasets.load("folder/train", skipping)) == len(datasets.load("folder/train", config)) == COUNT


def test_an_iterator_state_of_other_examples_is_rejected(config, skipping):
    state = make_train_iterator(datasets.load("folder/train", skipping), skipping, 2, 0).get_state()
    _cut(_images(config) / "003.jpg")
    iterator = make_train_iterator(datasets.load("folder/train", skipping), skipping, 2, 0)
    with pytest.raises(InputError, match=f"saved with examples {COUNT}, this one has {COUNT - 1}"):
        iterator.set_state(state)


def test_a_data_set_without_readable_images_is_an_error(skipping):
    for path in _images(skipping).iterdir():
        _cut(path)
    with pytest.raises(InputError, match=f"none of its {COUNT} images can be read together with its mask, as in .*000"):
        datasets.load("folder/train", skipping)
    assert not _copies(skipping)


def test_a_missing_file_is_an_error_or_skipped(tmp_path):
    config = DataConfig(dir=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    names = [f"2007_{i:03d}" for i in range(4)]
    tree = trees.voc(tmp_path, "2012", {"train": names})
    (tree / "JPEGImages/2007_002.jpg").unlink()
    with pytest.raises(
        UnreadableError, match=r"2007_002\.jpg: voc/train lists '2007_002', but this file does not exist"
    ):
        datasets.load("voc/train", config)
    split = datasets.load("voc/train", dataclasses.replace(config, unreadable="skip"))
    assert _names(split) == ["2007_000", "2007_001", "2007_003"] and "2007_002.jpg: cannot be read" in split.skipped[0]


def test_a_file_deleted_during_preparation_is_named(config, monkeypatch):
    seen = prepared.fingerprint

    def then_remove(listing):
        digest = seen(listing)
        (_images(config) / "005.jpg").unlink()
        return digest

    monkeypatch.setattr(prepared, "fingerprint", then_remove)
    with pytest.raises(UnreadableError, match=r"images/005\.jpg: cannot be read \(No such file or directory\)"):
        datasets.load("folder/train", config)
    assert not _copies(config)


def _records(copy):
    (path,) = copy.glob("*.array_record*")
    return path


def _truncate(records):
    os.truncate(records, 1500)


def _flip(records):
    data = bytearray(records.read_bytes())
    for at in range(64, len(data) // 8, 97):
        data[at] ^= 0x10
    records.write_bytes(data)


def _take_all(iterator):
    try:
        for _ in range(200):  # prefetched batches come before the error
            next(iterator)
    finally:
        iterator.close()


@pytest.mark.parametrize("damage", [_truncate, _flip])  # tests/slow/test_data_processes.py repeats this with workers
def test_a_prepared_copy_damaged_during_an_epoch_is_named(config, damage):
    split = datasets.load("folder/train", config)
    (copy,) = _copies(config)
    iterator = make_train_iterator(split, config, 2, 0)
    next(iterator)
    damage(_records(copy))
    said = r": this prepared copy .* is damaged or gone \(.*; remove the folder, and the same command prepares"
    with pytest.raises(InputError, match=re.escape(str(copy)) + said) as caught:
        _take_all(iterator)
    assert "\n" not in str(caught.value)


def test_a_prepared_copy_deleted_while_in_use_can_still_be_read(config):
    iterator = make_train_iterator(datasets.load("folder/train", config), config, 2, 0)
    next(iterator)
    shutil.rmtree(_copies(config)[0])
    _take_all(iterator)


@pytest.mark.parametrize("damage", [_truncate, _flip, Path.unlink])
def test_the_remedy_in_the_error_message_works(config, damage):
    split = datasets.load("folder/train", config)
    before = [split.source[index] for index in range(len(split))]
    (copy,) = _copies(config)
    damage(_records(copy))
    with pytest.raises(InputError, match="remove the folder"):
        list(make_eval_batches(datasets.load("folder/train", config), config, 4))
    shutil.rmtree(copy)
    again = datasets.load("folder/train", config)
    assert [again.source[index] for index in range(len(again))] == before


def test_a_wrong_mask_is_an_error_even_when_unreadable_files_are_skipped(skipping):
    path = Path(skipping.dir) / "train/masks/003.png"
    trees.write_image(path, trees.picture(0))
    with pytest.raises(InputError, match="003.png: a mask with colour channels"):
        datasets.load("folder/train", skipping)
    trees.write_mask(path, np.full((12, 16), 17, np.uint8))
    with pytest.raises(InputError, match="003.png: class ids 17 are not among the 3 classes"):
        datasets.load("folder/train", skipping)


def test_a_prepared_copy_with_damaged_metadata_is_named(config):
    datasets.load("folder/train", config)
    (copy,) = _copies(config)
    for name in ("summary.json", "features.json", "dataset_info.json"):
        whole = (copy / name).read_bytes()
        for content in (b"", b"{", b"[]", b"null", b'{"image_size": 3}', b"[" * 100_000):
            (copy / name).write_bytes(content)
            with pytest.raises(InputError, match="this prepared copy of a data set is damaged or gone"):
                datasets.load("folder/train", config).source[0]
        (copy / name).write_bytes(whole)
    (copy / "summary.json").write_text(json.dumps({"examples": COUNT, "image_size": [12, 16]}))
    split = datasets.load("folder/train", config)  # a summary from an earlier version can still be read
    assert split.skipped == () and split.image_size == (12, 16)
    (copy / "summary.json").unlink()
    with pytest.raises(InputError, match="this prepared copy of a data set is damaged or gone .*not empty"):
        datasets.load("folder/train", config)
