"""Batches from memory: what an epoch holds, what decides it, and that evaluation sees what the pipeline gives."""

import dataclasses
import itertools

import numpy as np
import pytest
import trees

from fcn_jax.config import DataConfig
from fcn_jax.data import datasets, memory
from fcn_jax.data.batches import count_classes
from fcn_jax.data.pipeline import class_frequencies, make_eval_batches
from fcn_jax.errors import InputError

PLAIN = DataConfig(flip=False)
RANDOM = DataConfig(scale=(0.5, 2.0), crop_size=(5, 5), jitter=0.4)


def _split(count=10, sizes=None):
    """Image i is filled with its number i, and its name is i."""
    sizes = sizes or [(4, 6)] * count
    examples = [
        {"image": np.full((*size, 3), i, np.uint8), "label": np.full(size, i % 3, np.uint8), "name": str(i)}
        for i, size in enumerate(sizes)
    ]
    return memory.MemorySplit("made", "up", ("a", "b", "c"), ((0, 0, 0),) * 3, tuple(examples))


def _take(split, config, batch_size, seed, count):
    return list(itertools.islice(memory.train_batches(split, config, batch_size, seed), count))


def _same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def test_every_epoch_has_each_example_once_in_another_order_and_batches_run_across():
    batches = _take(_split(10), PLAIN, 4, 0, 10)
    names = [int(name) for batch in batches for name in batch["name"]]
    assert [int(n) for batch in batches for n in batch["image"][:, 0, 0, 0]] == names
    epochs = [tuple(names[i : i + 10]) for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and len(set(epochs)) == 4


def test_the_seed_decides_whatever_the_threads():
    batches = _take(_split(), dataclasses.replace(RANDOM, workers=1), 4, 0, 6)
    _same(batches, _take(_split(), dataclasses.replace(RANDOM, workers=3), 4, 0, 6))
    other = _take(_split(), RANDOM, 4, 1, 6)
    assert any(a["name"] != b["name"] for a, b in zip(batches, other, strict=True))


def test_an_example_is_augmented_anew_each_time():
    split = _split(1)
    split.examples[0]["image"][:] = trees.picture(0, (4, 6))
    assert len({batch["image"].tobytes() for batch in _take(split, RANDOM, 1, 0, 8)}) == 8


def test_images_of_different_sizes_share_no_batch_without_a_crop():
    with pytest.raises(InputError, match="crop-size"):
        _take(_split(sizes=[(4, 6), (5, 6)]), PLAIN, 2, 0, 1)
    with pytest.raises(InputError, match="crop-size"):
        _take(_split(), DataConfig(scale=(0.5, 2.0)), 2, 0, 1)
    assert len(_take(_split(sizes=[(4, 6), (5, 6)]), RANDOM, 2, 0, 3)) == 3


@pytest.mark.parametrize("config", [PLAIN, DataConfig(input_size=(8, 8))])
def test_a_split_is_read_and_evaluated_as_from_its_prepared_copy(tmp_path, config):
    trees.camvid(tmp_path / "data", {"train": 1, "val": 5})
    config = dataclasses.replace(config, dir=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"))
    held, stored = memory.read("camvid/val", config), datasets.load("camvid/val", config)
    assert (held.class_names, held.palette, len(held)) == (stored.class_names, stored.palette, len(stored))
    _same(list(memory.eval_batches(held, config, 2)), list(make_eval_batches(stored, config, 2)))
    labels = [example["label"] for example in held.examples]
    np.testing.assert_array_equal(count_classes(labels, held.num_classes), class_frequencies(stored))


def test_images_of_many_sizes_are_padded_and_each_comes_once():
    split = _split(sizes=[(4, 6), (70, 6), (5, 7), (80, 9), (4, 6)])
    batches = list(memory.eval_batches(split, DataConfig(), 2))
    assert {batch["image"].shape for batch in batches} == {(2, 64, 64, 3), (2, 128, 64, 3)}
    names = [name for b in batches for name, valid in zip(b["name"], b["valid"], strict=True) if valid]
    assert sorted(names) == list("01234")
    for batch in batches:
        for name, extent in zip(batch["name"], batch["extent"], strict=True):
            assert tuple(extent) == split.examples[int(name)]["label"].shape


def test_what_cannot_be_read_is_named(tmp_path):
    root = trees.camvid(tmp_path / "data", {"train": 2})
    config = DataConfig(dir=str(root))
    with pytest.raises(InputError, match="no such folder"):
        memory.read("camvid/val", config)
    trees.write_mask(root / "trainannot/train_001.png", np.full((12, 16), 17, np.uint8))
    with pytest.raises(InputError, match="train_001.*17"):
        memory.read("camvid/train", config)
    (root / "train/train_000.png").write_bytes(b"nothing")
    with pytest.raises(InputError, match="train_000"):
        memory.read("camvid/train", config)
