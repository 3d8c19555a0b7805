import dataclasses
import json
import os
import pickle
import re
import shutil
import time

import numpy as np
import pytest
import trees

from fcn_jax.cli import cache as command
from fcn_jax.config import DataConfig
from fcn_jax.data import datasets
from fcn_jax.data import prepared as cache
from fcn_jax.errors import InputError


@pytest.fixture
def root(tmp_path):
    return trees.folder(tmp_path / "data", {"train": 2})


@pytest.fixture
def config(root, tmp_path):
    return DataConfig(dir=str(root), cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def copies(tmp_path):
    return lambda: sorted((tmp_path / "cache/folder").iterdir())


def _labels(split):
    return [datasets.decode(split.source[i])["label"] for i in range(len(split))]


def test_a_prepared_copy_is_reused_until_its_source_changes(root, config, copies):
    datasets.load("folder/train", config)
    (first,) = copies()
    before = (first / "summary.json").stat().st_mtime_ns
    datasets.load("folder/train", config)
    assert copies() == [first] and (first / "summary.json").stat().st_mtime_ns == before

    path = root / "train/masks/000.png"
    stat = path.stat()
    trees.write_mask(path, trees.mask(55, 3))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert np.array_equal(_labels(datasets.load("folder/train", config))[0], trees.mask(55, 3))
    trees.folder(root, {"train": 3})
    assert len(datasets.load("folder/train", config)) == 3
    (root / "classes.txt").write_text("background\ncat\nhorse\n")
    assert datasets.load("folder/train", config).class_names[2] == "horse"
    (last,) = copies()  # copies of earlier states are removed
    assert last != first


def test_copies_of_other_sources_splits_and_options_are_not_removed(root, config, copies, tmp_path):
    trees.folder(root, {"train": 2, "val": 1})
    other = trees.folder(tmp_path / "other", {"train": 2})
    (tmp_path / "names.txt").write_text("nothing\nanimal\nplant\n")
    changes = ({"dir": str(other)}, {"unreadable": "skip"}, {"classes": str(tmp_path / "names.txt")})
    changed = [dataclasses.replace(config, **change) for change in changes]
    loads = [("folder/train", config), ("folder/val", config), *(("folder/train", given) for given in changed)]
    for spec, given in loads:
        datasets.load(spec, given)
    before = copies()
    old = before[0] / "summary.json"  # as an earlier version wrote it: without its source
    old.write_text(json.dumps({"examples": 2, "image_size": [12, 16]}))
    assert len(before) == 5
    for spec, given in loads:
        datasets.load(spec, given)
    assert copies() == before
    shapes = dataclasses.replace(config, shapes_size=(32, 32), shapes_count=2)
    for count in (2, 3):
        datasets.load("shapes/train", dataclasses.replace(shapes, shapes_count=count))
    assert len(list((tmp_path / "cache/shapes").iterdir())) == 2


def test_an_interrupted_preparation_is_not_used(root, config, copies):
    datasets.load("folder/train", config)
    (copy,) = copies()
    shutil.move(copy, copy.with_name(".unfinished-abc"))
    (copy.with_name(".unfinished-abc") / "summary.json").unlink()
    assert len(datasets.load("folder/train", config)) == 2
    assert json.loads((copy / "summary.json").read_text()) == {
        "examples": 2, "image_size": [12, 16], "skipped": [], "source": str(root / "train"), "unreadable": "error",
        "statistics": None, "options": "",
    }  # fmt: skip


def test_a_copy_finished_first_by_another_process_is_used(config, copies, tmp_path, monkeypatch):
    replace = os.replace

    def slower(source, target):
        if str(target).startswith(str(tmp_path / "cache/folder/train-")) and not os.path.exists(target):
            shutil.copytree(source, target)  # the other process finished first
        replace(source, target)

    monkeypatch.setattr(os, "replace", slower)
    assert len(datasets.load("folder/train", config)) == 2
    assert len(copies()) == 1


def test_an_unwritable_cache_error_names_the_flag(config, tmp_path):
    (tmp_path / "file").write_text("")
    for place, message in ((tmp_path / "file", "cannot be written to"), ("s3://a/b", "s3:// is not supported")):
        with pytest.raises(InputError, match=rf"--data\.cache-dir .*{message}"):
            datasets.load("folder/train", dataclasses.replace(config, cache_dir=str(place)))


def test_a_full_disk_is_reported_and_leaves_nothing(config, copies, monkeypatch):
    def fail(self):
        raise RuntimeError("Failed to finalize writing: No space left on device\nmore")

    monkeypatch.setattr(cache.Pairs, "download_and_prepare", fail)
    with pytest.raises(InputError, match=r"--data\.cache-dir .*cannot be written to \(Failed .* on device\); free"):
        datasets.load("folder/train", config)
    assert not copies()


def test_a_source_is_pickled_as_its_path(config):
    source = datasets.load("folder/train", config).source
    data = pickle.dumps(source)
    assert len(data) < 1000 and pickle.loads(data)[1] == source[1]


def test_the_cache_is_listed_and_emptied(config, copies, tmp_path, capsys):
    datasets.load("folder/train", config)
    place, compiled = tmp_path / "cache", tmp_path / "cache/compiled"
    compiled.mkdir()
    for name in ("jit_step-1a-cache", "jit_step-1a-atime", ".lockfile"):
        (compiled / name).write_bytes(bytes(1000))
    (place / "folder/.unfinished-abc").mkdir()
    (place / "folder/notes.txt").write_text("of somebody else")
    (place / "folder" / f"val-{'0' * 16}").mkdir()  # damaged: no summary
    rows = {row.name: row for row in cache.cached(str(place))}
    assert list(rows) == ["folder/train", "folder/val", "folder, unfinished", "compiled programs"]
    assert (rows["folder/train"].count, rows["folder/val"].count) == (2, 0)
    (copy,) = rows["folder/train"].paths
    assert rows["folder/train"].size == sum(file.stat().st_size for file in copy.iterdir())
    assert 0 <= time.time() - rows["folder/train"].changed < 600
    assert (rows["compiled programs"].count, rows["compiled programs"].size) == (1, 2000)

    assert command.main(["--cache-dir", str(place)]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"folder/train +│ +2 ", shown) and "total" in shown and copy.is_dir()
    assert command.main(["--cache-dir", str(place), "--empty"]) == 0
    assert "removed 4 entries" in capsys.readouterr().out
    left = {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()}
    assert left == {"folder/notes.txt", "compiled/.lockfile"} and cache.cached(str(place)) == []
    assert cache.cached(str(tmp_path / "nothing there")) == []
