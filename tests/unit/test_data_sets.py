import dataclasses
import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import trees

from fcn_jax.config import DataConfig
from fcn_jax.data import datasets
from fcn_jax.data.labels import CAMVID_CLASSES, VOC_CLASSES
from fcn_jax.errors import InputError


@pytest.fixture
def config(tmp_path):
    return DataConfig(dir=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path):
    return tmp_path / "data"


def _decoded(split):
    return [datasets.decode(split.source[i]) for i in range(len(split))]


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_camvid_is_read_with_its_void_as_ignore(root, config, suffix):
    trees.camvid(root, {"train": 3, "val": 2, "test": 1}, suffix)
    split = datasets.load("camvid/train", config)
    assert split.class_names == CAMVID_CLASSES and split.num_classes == len(split.palette) == 11
    assert len(split) == 3 and split.image_size == (12, 16)
    for i, example in enumerate(_decoded(split)):
        assert example["name"] == f"train_{i:03d}"
        assert np.array_equal(example["label"], trees.mask(i, 11))
        if suffix == ".png":
            assert np.array_equal(example["image"], trees.picture(i))
    assert [e["name"] for e in _decoded(datasets.load("camvid/trainval", config))] == [
        "train_000", "train_001", "train_002", "val_000", "val_001"
    ]  # fmt: skip


def test_images_are_stored_as_the_bytes_they_are(root, config):
    trees.camvid(root, {"train": 1}, ".jpg")
    record = datasets.load("camvid/train", config).source[0]
    assert record["image"] == (root / "train/train_000.jpg").read_bytes()


@pytest.mark.parametrize("inside", [".", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_voc_is_found_at_each_level_and_read_in_the_order_of_its_list(root, config, inside):
    trees.voc(root, "2012", {"train": ["2007_002", "2007_001"], "val": ["2008_003"]})
    split = datasets.load("voc/train", dataclasses.replace(config, dir=str(root / inside)))
    examples = _decoded(split)
    assert split.class_names == VOC_CLASSES
    assert [e["name"] for e in examples] == ["2007_002", "2007_001"]
    assert np.array_equal(examples[0]["label"], trees.mask(2, 21)) and np.array_equal(
        examples[1]["label"], trees.mask(1, 21)
    )
    assert split.palette[1] == (128, 0, 0) and split.palette[20] == (0, 64, 128)


@pytest.mark.parametrize("inside", [".", "benchmark_RELEASE", "benchmark_RELEASE/dataset", "VOCdevkit/VOC2012"])
def test_sbd_masks_are_read_from_mat_files(root, config, inside):
    trees.voc(root, "2012", {"train": ["2007_009"]})
    trees.sbd(root, {"train": ["2008_001", "2008_002"], "val": ["2008_003"]})
    split = datasets.load("sbd/train", dataclasses.replace(config, dir=str(root / inside)))
    for seed, example in enumerate(_decoded(split), 1):
        assert np.array_equal(example["label"], trees.mask(seed, 21, ignore=0))
    assert len(datasets.load("sbd/trainval", config)) == 3


def test_seg11valid_is_made_of_voc2011_less_the_training_images_of_sbd(root, config):
    trees.voc(root, "2011", {"val": ["2008_001", "2008_002", "2008_003"]})
    trees.sbd(root, {"train": ["2008_002", "2008_009"], "val": ["2008_003"]})
    for inside in (".", "VOCdevkit", "VOCdevkit/VOC2011"):
        split = datasets.load("voc/seg11valid", dataclasses.replace(config, dir=str(root / inside)))
        assert [e["name"] for e in _decoded(split)] == ["2008_001", "2008_003"]


def test_a_seg11valid_list_in_the_tree_of_2012_is_taken_as_it_is(root, config):
    trees.voc(root, "2012", {"train": ["2008_001"], "seg11valid": ["2008_005", "2008_004"]})
    assert [e["name"] for e in _decoded(datasets.load("voc/seg11valid", config))] == ["2008_005", "2008_004"]


def test_without_list_or_sbd_seg11valid_says_what_is_missing(root, config):
    trees.voc(root, "2011", {"val": ["2008_001"]})
    with pytest.raises(
        InputError, match=r"seg11valid needs .*seg11valid\.txt .* or VOCdevkit/VOC2011 and benchmark_RELEASE"
    ):
        datasets.load("voc/seg11valid", config)


@pytest.mark.parametrize("flat", [False, True])
def test_a_folder_is_read_in_both_layouts(root, config, flat):
    trees.folder(root, {"train": 2, "val": 1}, flat=flat)
    split = datasets.load("folder/train", config)
    assert split.class_names == ("background", "cat", "dog") and split.palette[2] == (0, 128, 0)
    assert [e["name"] for e in _decoded(split)] == ["000", "001"]
    assert np.array_equal(datasets.decode(split.source[1])["label"], trees.mask(1, 3))
    assert np.array_equal(datasets.decode(datasets.load("folder/val", config).source[0])["label"], trees.mask(100, 3))


def test_a_folder_without_splits_is_folder_all(root, config):
    trees.folder(root, {".": 2})
    assert len(datasets.load("folder/all", config)) == 2


def test_a_list_of_classes_may_lie_elsewhere(root, config, tmp_path):
    trees.folder(root, {"train": 1})
    (root / "classes.txt").rename(tmp_path / "names.txt")
    with pytest.raises(InputError, match=r"classes\.txt: not there; .* --data\.classes"):
        datasets.load("folder/train", config)
    assert (
        datasets.load("folder/train", dataclasses.replace(config, classes=str(tmp_path / "names.txt"))).num_classes == 3
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("one\n", "lists 1 classes"),
        ("a\nb\na\n", "lists 'a' twice"),
        ("\n\n", "lists 0 classes"),
        (b"\xff\xfe\x00", "UTF-8"),
    ],
)
def test_a_bad_list_of_classes_is_named(root, config, text, message):
    trees.folder(root, {"train": 1})
    (root / "classes.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=rf"classes\.txt: .*{message}"):
        datasets.load("folder/train", config)


def test_unknown_names_list_the_known_ones(config):
    with pytest.raises(InputError, match=r"unknown data set 'coco'; choose one of: shapes, camvid, voc, sbd, folder"):
        datasets.load("coco/train", config)
    with pytest.raises(
        InputError, match=r"unknown split of voc 'tset'; choose one of: train, val, trainval, seg11valid"
    ):
        datasets.load("voc/tset", config)
    with pytest.raises(InputError, match=r"expected DATASET/SPLIT, got 'voc'"):
        datasets.load("voc", config)


@pytest.mark.parametrize("name", ["camvid", "voc", "sbd", "folder"])
def test_a_missing_folder_names_the_flag(name, config):
    with pytest.raises(InputError, match=rf"{name} needs the folder .* --data\.dir"):
        datasets.load(f"{name}/train", dataclasses.replace(config, dir=None))
    with pytest.raises(InputError, match=r"--data\.dir .*no such folder"):
        datasets.load(f"{name}/train", config)


@pytest.mark.parametrize("name", ["camvid", "voc", "sbd", "folder"])
def test_an_empty_folder_is_refused(name, root, config):
    root.mkdir()
    (root / "classes.txt").write_text("a\nb\n")
    with pytest.raises(InputError, match=str(root)):
        datasets.load(f"{name}/train", config)


def _undeclared(root):
    trees.write_mask(root / "train/masks/001.png", np.full((12, 16), 3, np.uint8))


def _coloured(root):
    trees.write_image(root / "train/masks/001.png", trees.picture(0))


def _smaller(root):
    trees.write_mask(root / "train/masks/001.png", np.zeros((12, 15), np.uint8))


def _no_mask(root):
    (root / "train/masks/001.png").unlink()


def _no_image(root):
    (root / "train/images/001.jpg").unlink()


def _no_images(root):
    shutil.rmtree(root / "train/images")
    (root / "train/images").mkdir()


def _cut_image(root):
    path = root / "train/images/001.jpg"
    path.write_bytes(path.read_bytes()[:-50])


def _cut_mask(root):
    path = root / "train/masks/001.png"
    path.write_bytes(path.read_bytes()[:60])


def _two_of_a_name(root):
    trees.write_image(root / "train/images/001.png", trees.picture(0))


def _black_and_white(root):
    for path in (root / "train/masks").iterdir():
        trees.write_mask(path, (trees.mask(0, 2) > 0).astype(np.uint8) * np.uint8(255))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_undeclared, r"masks/001\.png: class ids 3 are not among the 3 classes"),
        (_coloured, r"masks/001\.png: a mask with colour channels"),
        (_smaller, r"masks/001\.png: the image is 16 x 12 pixels, its mask 15 x 12"),
        (_no_mask, r"train/images: '001' has no mask in .*train/masks \(1 such\)"),
        (_no_image, r"train/masks: '001' has no image in .*train/images \(1 such\)"),
        (_no_images, r"train/images: holds no files of type \.jpg"),
        (_cut_image, r"images/001\.jpg: not a readable image"),
        (_cut_mask, r"masks/001\.png: not a readable mask"),
        (_two_of_a_name, r"train/images: 001\.jpg and 001\.png share a name"),
        (_black_and_white, r"folder/train: the masks hold only 0 and 255, and 255 means ignore"),
    ],
)
def test_bad_files_are_refused_by_name_and_nothing_is_left(root, config, damage, message, tmp_path):
    trees.folder(root, {"train": 3})
    damage(root)
    with pytest.raises(InputError, match=message) as caught:
        datasets.load("folder/train", config)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache").glob("folder/*")) == []


def test_files_that_a_list_names_but_are_missing_are_named(root, config):
    tree = trees.voc(root, "2012", {"train": ["2007_001"]})
    (tree / "SegmentationClass/2007_001.png").unlink()
    with pytest.raises(
        InputError, match=r"SegmentationClass/2007_001\.png: voc/train lists '2007_001', but this file is not there"
    ):
        datasets.load("voc/train", config)


def test_missing_or_empty_lists_are_named(root, config):
    tree = trees.voc(root, "2012", {"train": ["2007_001"]})
    with pytest.raises(InputError, match=r"Segmentation/val\.txt: cannot be read"):
        datasets.load("voc/val", config)
    (tree / "ImageSets/Segmentation/val.txt").write_text("\n")
    with pytest.raises(InputError, match=r"val\.txt: lists no images"):
        datasets.load("voc/val", config)


@pytest.mark.parametrize("content", [b"", b"not a mat file at all", None])
def test_a_damaged_mat_file_is_named(root, config, content):
    tree = trees.sbd(root, {"train": ["2008_001"]})
    path = tree / "cls/2008_001.mat"
    path.write_bytes(path.read_bytes()[:-30] if content is None else content)
    with pytest.raises(InputError, match=r"2008_001\.mat: not an SBD mask"):
        datasets.load("sbd/train", config)


def _copies(tmp_path):
    return sorted(p.name for p in (tmp_path / "cache/folder").iterdir())


def test_a_prepared_copy_is_used_again_until_the_folder_changes(root, config, tmp_path):
    trees.folder(root, {"train": 2})
    datasets.load("folder/train", config)
    (first,) = _copies(tmp_path)
    before = (tmp_path / "cache/folder" / first / "summary.json").stat().st_mtime_ns
    datasets.load("folder/train", config)
    assert _copies(tmp_path) == [first]
    assert (tmp_path / "cache/folder" / first / "summary.json").stat().st_mtime_ns == before

    path = root / "train/masks/000.png"
    stat = path.stat()
    trees.write_mask(path, trees.mask(55, 3))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert np.array_equal(datasets.decode(datasets.load("folder/train", config).source[0])["label"], trees.mask(55, 3))
    trees.folder(root, {"train": 3})
    assert len(datasets.load("folder/train", config)) == 3
    (root / "classes.txt").write_text("background\ncat\nhorse\n")
    assert datasets.load("folder/train", config).class_names[2] == "horse"
    assert len(_copies(tmp_path)) == 4


def test_an_interrupted_preparation_is_not_taken_for_a_finished_one(root, config, tmp_path):
    trees.folder(root, {"train": 2})
    datasets.load("folder/train", config)
    (name,) = _copies(tmp_path)
    copy = tmp_path / "cache/folder" / name
    shutil.move(copy, copy.with_name(".unfinished-abc"))
    (copy.with_name(".unfinished-abc") / "summary.json").unlink()
    assert len(datasets.load("folder/train", config)) == 2
    assert json.loads((copy / "summary.json").read_text()) == {"examples": 2, "image_size": [12, 16], "skipped": []}


def _load_in_process(config, queue):
    split = datasets.load("folder/train", config)
    queue.put(sum(int(e["label"].sum()) for e in _decoded(split)))


def test_two_processes_preparing_at_once_both_get_the_whole_set(root, config, tmp_path):
    trees.folder(root, {"train": 40})
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_load_in_process, args=(config, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    sums = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sums == [sum(int(trees.mask(i, 3).sum()) for i in range(40))] * 2
    assert len(_copies(tmp_path)) == 1  # nothing unfinished is left either


def test_losing_the_race_to_another_process_uses_its_copy(root, config, tmp_path, monkeypatch):
    trees.folder(root, {"train": 2})
    replace = os.replace

    def slower(source, target):
        if str(target).startswith(str(tmp_path / "cache/folder/train-")) and not os.path.exists(target):
            shutil.copytree(source, target)  # the other process has just put its own there
        replace(source, target)

    monkeypatch.setattr(os, "replace", slower)
    assert len(datasets.load("folder/train", config)) == 2
    assert len(_copies(tmp_path)) == 1


def test_a_cache_that_cannot_be_written_names_the_flag(root, config, tmp_path):
    trees.folder(root, {"train": 1})
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--data\.cache-dir .*cannot be written to"):
        datasets.load("folder/train", dataclasses.replace(config, cache_dir=str(tmp_path / "file")))


def test_images_of_several_sizes_have_no_common_size(root, config):
    trees.folder(root, {"train": 2})
    trees.write_image(root / "train/images/001.jpg", trees.picture(1, (10, 10)))
    trees.write_mask(root / "train/masks/001.png", trees.mask(1, 3, (10, 10)))
    assert datasets.load("folder/train", config).image_size is None


def test_a_source_is_pickled_as_its_folder(root, config):
    trees.folder(root, {"train": 2})
    source = datasets.load("folder/train", config).source
    data = pickle.dumps(source)
    assert len(data) < 1000 and pickle.loads(data)[1] == source[1]


def test_preparing_and_reading_import_no_tensorflow_and_print_nothing(root, config):
    trees.camvid(root, {"train": 2})
    code = (
        "import sys; from fcn_jax.config import DataConfig; from fcn_jax.data import datasets, pipeline\n"
        f"split = datasets.load('camvid/train', DataConfig(dir={config.dir!r}, cache_dir={config.cache_dir!r}))\n"
        "batch = next(pipeline.make_train_iterator(split, DataConfig(), 2, 0))\n"
        "assert batch['image'].shape == (2, 12, 16, 3); assert 'tensorflow' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
