import dataclasses
import itertools
import json
import multiprocessing

import numpy as np
import pytest
import trees

from fcn_jax.config import DataConfig
from fcn_jax.data import datasets
from fcn_jax.data.io import encode_label, palette
from fcn_jax.data.pipeline import class_frequencies, make_eval_batches, make_train_iterator
from fcn_jax.errors import InputError


class Listed:
    """A source in memory; image i is filled with its number i and its name is i."""

    def __init__(self, sizes, labels=None):
        self.records = []
        for i, size in enumerate(sizes):
            image = np.full((*size, 3), i, np.uint8)
            label = np.full(size, i % 3, np.uint8) if labels is None else labels[i]
            self.records.append({"image": encode_label(image), "label": encode_label(label), "name": str(i)})

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        return self.records[index]


def _split(count=10, size=(4, 6), sizes=None, labels=None):
    source = Listed(sizes or [size] * count, labels)
    return datasets.Split("made", "up", ("a", "b", "c"), palette(3), source, None if sizes else size)


CONFIG = DataConfig()
EXACT = DataConfig(eval_multiple=1)
RANDOM = DataConfig(scale=(0.5, 2.0), crop_size=(5, 5), jitter=0.4)


def _take(iterator, count):
    return list(itertools.islice(iterator, count))


def _numbers(batches):
    return [int(n) for batch in batches for n in batch["image"][:, 0, 0, 0]]


def _same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def test_batches_have_the_documented_shapes_and_types():
    batch = next(make_train_iterator(_split(), RANDOM, 4, 0))
    assert batch["image"].shape == (4, 5, 5, 3) and batch["image"].dtype == np.uint8
    assert batch["label"].shape == (4, 5, 5) and batch["label"].dtype == np.uint8


def test_every_epoch_shuffles_all_examples_and_batches_span_epochs():
    numbers = _numbers(_take(make_train_iterator(_split(10), CONFIG, 4, 0), 10))  # 40 rows, four epochs
    epochs = [numbers[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    split = _split(1)
    split.source.records[0]["image"] = encode_label(trees.picture(0, (4, 6)))
    batches = _take(make_train_iterator(split, RANDOM, 1, 0), 8)
    assert len({batch["image"].tobytes() for batch in batches}) == 8  # each epoch has its own augmentation


def test_a_batch_may_be_larger_than_the_data_set():
    assert sorted(_numbers([next(make_train_iterator(_split(2), CONFIG, 6, 0))])) == [0, 0, 0, 1, 1, 1]
    assert _numbers(_take(make_train_iterator(_split(1), CONFIG, 2, 0), 3)) == [0] * 6


def test_the_seed_determines_order_and_augmentation():
    first, again, other = (_take(make_train_iterator(_split(), RANDOM, 4, seed), 5) for seed in (0, 0, 1))
    _same(first, again)
    assert any(not np.array_equal(a["image"], b["image"]) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("count", [2, 4])
def test_processes_together_read_the_batches_of_a_single_process(count):
    split = _split(10)
    whole = _take(make_train_iterator(split, RANDOM, 8, 3), 6)

    def take(config, batch_size, seed, steps, index, count):
        given = {"process_index": index, "process_count": count}
        return _take(make_train_iterator(split, config, batch_size, seed, **given), steps)

    parts = [take(RANDOM, 8, 3, 6, index, count) for index in range(count)]
    steps = zip(*parts, strict=True)
    _same(whole, [{k: np.concatenate([part[k] for part in step]) for k in whole[0]} for step in steps])
    mine = [_numbers(take(CONFIG, 20, 0, 1, index, 2)) for index in (0, 1)]
    assert len(mine[0]) == 10 and sorted(mine[0] + mine[1]) == sorted([*range(10)] * 2)


def test_a_batch_size_not_divisible_by_the_processes_is_rejected():
    with pytest.raises(InputError, match=r"--train\.batch-size 3: expected a positive multiple of the 2 processes"):
        make_train_iterator(_split(), CONFIG, 3, 0, process_count=2)
    with pytest.raises(InputError, match=r"--train\.batch-size 0"):
        make_train_iterator(_split(), CONFIG, 0, 0)


@pytest.mark.parametrize("taken", [0, 1, 7])
def test_a_saved_iterator_state_is_restored_bit_for_bit(taken):
    iterator = make_train_iterator(_split(), RANDOM, 4, 0)
    _take(iterator, taken)
    state = iterator.get_state()
    assert isinstance(state, bytes) and json.loads(state)["step"] == taken
    rest = _take(iterator, 6)
    fresh = make_train_iterator(_split(), RANDOM, 4, 0)
    fresh.set_state(state)
    assert fresh.get_state() == state
    _same(rest, _take(fresh, 6))
    _same(rest, _take(make_train_iterator(_split(), RANDOM, 4, 0, start_step=taken), 6))


def test_an_iterator_state_of_another_setup_is_rejected():
    state = make_train_iterator(_split(10), CONFIG, 4, 0).get_state()
    for count, batch_size, seed, what in ((11, 4, 0, "examples 10"), (10, 2, 0, "batch_size 4"), (10, 4, 1, "seed 0")):
        with pytest.raises(InputError, match=f"saved with {what}, this one has"):
            make_train_iterator(_split(count), CONFIG, batch_size, seed).set_state(state)


def test_different_sizes_without_a_crop_are_rejected_before_the_first_batch():
    mixed = _split(sizes=[(4, 6), (6, 4)])
    message = r"set --data\.crop-size HEIGHT WIDTH .* or --train\.batch-size 1"
    with pytest.raises(InputError, match=message):
        make_train_iterator(mixed, CONFIG, 2, 0)
    with pytest.raises(InputError, match=message):  # one size, but scaled by different factors
        make_train_iterator(_split(), DataConfig(scale=(0.5, 2.0)), 2, 0)
    assert {b["label"].shape for b in _take(make_train_iterator(mixed, CONFIG, 1, 0), 2)} == {(1, 4, 6), (1, 6, 4)}
    for given in ({"crop_size": (5, 5)}, {"input_size": (5, 5)}, {"input_size": (5, 5), "scale": (0.5, 2.0)}):
        config = DataConfig(**given)
        assert {b["image"].shape for b in _take(make_train_iterator(mixed, config, 2, 0), 4)} == {(2, 5, 5, 3)}


def test_worker_processes_give_the_same_batches_and_a_killed_one_is_reported(tmp_path):
    config = dataclasses.replace(RANDOM, cache_dir=str(tmp_path / "cache"), dir=str(tmp_path / "data"))
    trees.folder(tmp_path / "data", {"train": 7})
    split = datasets.load("folder/train", config)
    iterator = make_train_iterator(split, dataclasses.replace(config, workers=2), 3, 5)
    batches = _take(iterator, 4)
    state = iterator.get_state()
    for process in multiprocessing.active_children():
        process.kill()
    with pytest.raises(InputError, match="a data worker ended .* the same command resumes the run"):
        _take(iterator, 1000)  # prefetched batches come first
    iterator.set_state(state)
    batches += _take(iterator, 3)  # the workers are restarted
    iterator.close()
    _same(batches, _take(make_train_iterator(split, config, 3, 5), 7))


def test_a_read_error_reaches_the_caller_unchanged():
    split = _split(4)
    split.source.records[2]["image"] = b"broken"
    with pytest.raises(InputError, match=r"2: not a readable image"):
        _take(make_train_iterator(split, DataConfig(), 2, 0), 2)


def test_evaluation_yields_each_example_once_in_order_and_pads_the_last_batch():
    batches = list(make_eval_batches(_split(7), CONFIG, 3))
    assert [b["name"][: b["valid"].sum()] for b in batches] == [("0", "1", "2"), ("3", "4", "5"), ("6",)]
    assert [b["image"].shape for b in batches] == [(3, 4, 6, 3)] * 3
    last = batches[-1]
    assert last["valid"].tolist() == [True, False, False]
    assert (last["image"] == 6).all() and (last["label"][0] == 0).all() and (last["label"][1:] == 255).all()


def test_evaluation_groups_images_of_equal_size():
    sizes = [(4, 6), (6, 4), (4, 6), (6, 4), (5, 5)]
    batches = list(make_eval_batches(_split(sizes=sizes), EXACT, 2))
    assert [b["name"] for b in batches] == [("0", "2"), ("1", "3"), ("4", "4")]
    assert [b["label"].shape for b in batches] == [(2, 4, 6), (2, 6, 4), (2, 5, 5)]
    assert [b["valid"].tolist() for b in batches] == [[True, True], [True, True], [True, False]]


def test_evaluation_buffers_a_bounded_number_of_images():
    sizes = [(4, 4 + i) for i in range(30)]
    taken = []

    class Watched(Listed):
        def __getitem__(self, index):
            taken.append(index)
            return super().__getitem__(index)

    split = dataclasses.replace(_split(sizes=sizes), source=Watched(sizes))
    next(batches := make_eval_batches(split, EXACT, 2))
    assert len(taken) < 9 + 4 + 4 + 2  # nine waiting, the prefetched ones, and those in the two threads
    assert sorted(int(b["name"][0]) for b in batches) == list(range(1, 30))


def test_evaluation_pads_images_of_one_size_to_a_divisor():
    (batch,) = make_eval_batches(_split(2), CONFIG, 2, divisor=5)
    assert batch["image"].shape == (2, 5, 10, 3) and batch["extent"].tolist() == [[4, 6]] * 2
    (batch,) = make_eval_batches(_split(2), CONFIG, 2)
    assert batch["image"].shape == (2, 4, 6, 3) and "extent" not in batch


def test_evaluation_resizes_images_but_not_labels():
    batches = list(make_eval_batches(_split(3), DataConfig(input_size=(8, 12)), 2))
    assert [b["image"].shape for b in batches] == [(2, 8, 12, 3)] * 2
    assert [b["label"].shape for b in batches] == [(2, 4, 6)] * 2


def test_class_frequencies_by_hand():
    first = np.array([[0, 0, 1], [255, 1, 1]], np.uint8)
    second = np.array([[0, 0, 0], [0, 255, 255]], np.uint8)
    frequencies = class_frequencies(_split(sizes=[(2, 3)] * 2, labels=[first, second]))
    assert frequencies.dtype == np.int64
    assert frequencies.tolist() == [[6, 3, 0], [5 + 4, 5, 0]]


def test_padding_to_a_multiple_gives_few_sizes_and_preserves_every_pixel():
    sizes = [(20, 33), (31, 48), (16, 40), (32, 34)]
    exact = list(make_eval_batches(_split(sizes=sizes), EXACT, 2))
    padded = list(make_eval_batches(_split(sizes=sizes), dataclasses.replace(CONFIG, eval_multiple=16), 2))
    assert {batch["label"].shape[1:] for batch in padded} == {(32, 48), (16, 48)}
    assert len({batch["label"].shape[1:] for batch in exact}) == 4

    def by_name(batches, *keys):
        rows = (row for batch in batches for row in zip(*(batch[k] for k in ("name", "valid", *keys)), strict=True))
        return {name: values for name, valid, *values in rows if valid}

    extents = {name: tuple(size) for name, (size,) in by_name(padded, "extent").items()}
    assert [extents[str(i)] for i in range(4)] == sizes and not any("extent" in batch for batch in exact)
    kept, wide = (by_name(batches, "image", "label") for batches in (exact, padded))
    assert kept.keys() == wide.keys()
    for name, (image, label) in kept.items():
        h, w = label.shape
        np.testing.assert_array_equal(wide[name][0][:h, :w], image)
        np.testing.assert_array_equal(wide[name][1][:h, :w], label)
        outside = np.ones(wide[name][1].shape, bool)
        outside[:h, :w] = False
        assert (wide[name][1][outside] == 255).all()
        np.testing.assert_array_equal(wide[name][0][outside], np.broadcast_to((124, 116, 104), (outside.sum(), 3)))
