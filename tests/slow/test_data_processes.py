"""The input pipeline with several processes: damaged copies, errors in workers, concurrent preparation."""

import multiprocessing
import os
import shutil

import pytest
import trees

from fcn_jax.config import DataConfig
from fcn_jax.data import datasets
from fcn_jax.data.pipeline import make_train_iterator
from fcn_jax.errors import InputError


def _truncate(copy):
    (path,) = copy.glob("*.array_record*")
    os.truncate(path, 1500)


@pytest.fixture
def config(tmp_path):
    trees.folder(tmp_path / "data", {"train": 40})
    return DataConfig(dir=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"), workers=2)


@pytest.mark.parametrize("damage", [_truncate, shutil.rmtree])
def test_a_prepared_copy_damaged_while_workers_read_it_is_named(config, damage, tmp_path):
    iterator = make_train_iterator(datasets.load("folder/train", config), config, 2, 0)
    next(iterator)
    (copy,) = (tmp_path / "cache/folder").iterdir()
    damage(copy)
    iterator.set_state(iterator.get_state())  # restarts the workers; files already open could be read to the end
    with pytest.raises(InputError) as caught:
        for _ in range(200):  # prefetched batches come before the error
            next(iterator)
    iterator.close()
    message = str(caught.value)
    assert message.startswith(f"{copy}: this prepared copy of a data set is damaged or gone (") and "\n" not in message


class Broken:
    """Four records that cannot be decoded."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {"image": b"broken", "label": b"", "name": str(index)}


def test_an_error_in_a_worker_reaches_the_caller_unchanged():
    split = datasets.Split("made", "up", ("a", "b"), ((0, 0, 0), (1, 1, 1)), Broken(), (4, 6))
    iterator = make_train_iterator(split, DataConfig(workers=1), 2, 0)
    with pytest.raises(InputError, match=r"[0-3]: not a readable image"):
        next(iterator)
    iterator.close()


def _load_in_process(config, queue):
    split = datasets.load("folder/train", config)
    queue.put(sum(int(datasets.decode(split.source[i])["label"].sum()) for i in range(len(split))))


def test_two_processes_preparing_at_once_both_get_the_whole_data_set(config, tmp_path):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_load_in_process, args=(config, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    sums = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sums == [sum(int(trees.mask(i, 3).sum()) for i in range(40))] * 2
    assert len(list((tmp_path / "cache/folder").iterdir())) == 1  # no unfinished copy is left
