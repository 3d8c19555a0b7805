import dataclasses
import shutil
import subprocess
import sys

import numpy as np
import pytest
import trees
from PIL import Image
from scipy.io import savemat

from fcn_jax.config import DataConfig
from fcn_jax.data import camvid, datasets, folder, sbd, voc
from fcn_jax.data.prepared import prepare
from fcn_jax.errors import InputError, UnreadableError


@pytest.fixture
def config(tmp_path):
    return DataConfig(dir=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path):
    return tmp_path / "data"


def _decoded(split):
    return [datasets.decode(split.source[i]) for i in range(len(split))]


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_camvid_is_read_with_void_as_ignore(root, config, suffix):
    trees.camvid(root, {"train": 3, "val": 2, "test": 1}, suffix)
    split = datasets.load("camvid/train", config)
    assert split.class_names == camvid.CLASSES and split.num_classes == len(split.palette) == 11
    assert len(split) == 3 and split.image_size == (12, 16)
    for i, example in enumerate(_decoded(split)):
        assert example["name"] == f"train_{i:03d}"
        assert np.array_equal(example["label"], trees.mask(i, 11))
        if suffix == ".png":
            assert np.array_equal(example["image"], trees.picture(i))
    assert [e["name"] for e in _decoded(datasets.load("camvid/trainval", config))] == [
        "train_000", "train_001", "train_002", "val_000", "val_001"
    ]  # fmt: skip


def test_images_are_stored_without_reencoding(root, config):
    trees.camvid(root, {"train": 1}, ".jpg")
    record = datasets.load("camvid/train", config).source[0]
    assert record["image"] == (root / "train/train_000.jpg").read_bytes()


@pytest.mark.parametrize("inside", [".", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_voc_is_found_at_each_folder_level_and_read_in_list_order(root, config, inside):
    trees.voc(root, "2012", {"train": ["2007_002", "2007_001"], "val": ["2008_003"]})
    split = datasets.load("voc/train", dataclasses.replace(config, dir=str(root / inside)))
    assert split.class_names == voc.CLASSES
    for example, name, seed in zip(_decoded(split), ["2007_002", "2007_001"], (2, 1), strict=True):
        assert example["name"] == name and np.array_equal(example["label"], trees.mask(seed, 21))
    assert split.palette[1] == (128, 0, 0) and split.palette[20] == (0, 64, 128)


@pytest.mark.parametrize("inside", [".", "benchmark_RELEASE", "benchmark_RELEASE/dataset", "VOCdevkit/VOC2012"])
def test_sbd_masks_are_read_from_mat_files(root, config, inside):
    trees.voc(root, "2012", {"train": ["2007_009"]})
    trees.sbd(root, {"train": ["2008_001", "2008_002"], "val": ["2008_003"]})
    split = datasets.load("sbd/train", dataclasses.replace(config, dir=str(root / inside)))
    for seed, example in enumerate(_decoded(split), 1):
        assert np.array_equal(example["label"], trees.mask(seed, 21, ignore=0))
    assert len(datasets.load("sbd/trainval", config)) == 3


def test_seg11valid_is_voc2011_val_without_sbd_training_images(root, config):
    trees.voc(root, "2011", {"val": ["2008_001", "2008_002", "2008_003"]})
    trees.sbd(root, {"train": ["2008_002", "2008_009"], "val": ["2008_003"]})
    for inside in (".", "VOCdevkit", "VOCdevkit/VOC2011"):
        split = datasets.load("voc/seg11valid", dataclasses.replace(config, dir=str(root / inside)))
        assert [e["name"] for e in _decoded(split)] == ["2008_001", "2008_003"]


def test_a_seg11valid_list_in_the_voc2012_folder_is_used_unchanged(root, config):
    trees.voc(root, "2012", {"train": ["2008_001"], "seg11valid": ["2008_005", "2008_004"]})
    assert [e["name"] for e in _decoded(datasets.load("voc/seg11valid", config))] == ["2008_005", "2008_004"]


def test_seg11valid_without_list_or_sbd_names_what_is_missing(root, config):
    trees.voc(root, "2011", {"val": ["2008_001"]})
    message = r"seg11valid needs .*seg11valid\.txt .* or VOCdevkit/VOC2011 and benchmark_RELEASE"
    with pytest.raises(InputError, match=message):
        datasets.load("voc/seg11valid", config)


@pytest.mark.parametrize("flat", [False, True])
def test_a_folder_is_read_in_both_layouts(root, config, flat):
    trees.folder(root, {"train": 2, "val": 1}, flat=flat)
    split = datasets.load("folder/train", config)
    assert split.class_names == ("background", "cat", "dog") and split.palette[2] == (0, 128, 0)
    assert [e["name"] for e in _decoded(split)] == ["000", "001"]
    assert np.array_equal(datasets.decode(split.source[1])["label"], trees.mask(1, 3))
    assert np.array_equal(datasets.decode(datasets.load("folder/val", config).source[0])["label"], trees.mask(100, 3))


def test_a_folder_without_splits_is_loaded_as_folder_all(root, config):
    trees.folder(root, {".": 2})
    assert len(datasets.load("folder/all", config)) == 2


def test_the_class_list_may_be_in_another_folder(root, config, tmp_path):
    trees.folder(root, {"train": 1})
    (root / "classes.txt").rename(tmp_path / "names.txt")
    with pytest.raises(InputError, match=r"classes\.txt: file not found; .* --data\.classes"):
        datasets.load("folder/train", config)
    elsewhere = dataclasses.replace(config, classes=str(tmp_path / "names.txt"))
    assert datasets.load("folder/train", elsewhere).num_classes == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [(b"one\n", "lists 1 classes"), (b"a\nb\na\n", "lists 'a' twice"), (b"\n\n", "lists 0 classes")]
    + [(b"a #000000\nb #000000\n", "lists '#000000' twice"), (b"a #12345\nb\n", "'a #12345' is not a class")]
    + [(b"\xff\xfe\x00", "UTF-8")],
)
def test_an_invalid_class_list_is_rejected(root, config, text, message):
    trees.folder(root, {"train": 1})
    (root / "classes.txt").write_bytes(text)
    with pytest.raises(InputError, match=rf"classes\.txt: .*{message}"):
        datasets.load("folder/train", config)


def test_mask_values_map_0_and_255_to_class_ids(root, config):
    trees.folder(root, {"train": 2}, ("background", "object"))
    for path in (root / "train/masks").iterdir():
        trees.write_mask(path, np.where(trees.mask(int(path.stem), 2, ignore=0) == 1, 255, 0).astype(np.uint8))
    with pytest.raises(InputError, match="--data.mask-values .* as in 0 255"):
        datasets.load("folder/train", config)
    mapped = dataclasses.replace(config, mask_values=(0, 255))
    for i, example in enumerate(_decoded(datasets.load("folder/train", mapped))):
        np.testing.assert_array_equal(example["label"], trees.mask(i, 2, ignore=0))
    picture = Image.fromarray(trees.mask(0, 2, ignore=0))
    picture.putpalette([1, 2, 3, 0, 0, 0])
    picture.save(root / "train/masks/000.png")
    (root / "classes.txt").write_text("background #000000\nobject #010203\n")  # colours of figures, in another order
    swapped = _decoded(datasets.load("folder/train", dataclasses.replace(config, mask_values=(1, 0))))
    np.testing.assert_array_equal(swapped[0]["label"], 1 - trees.mask(0, 2, ignore=0))
    with pytest.raises(InputError, match=r"000\.png: mask value 0 is not among --data.mask-values 7 255"):
        datasets.load("folder/train", dataclasses.replace(config, mask_values=(7, 255)))
    with pytest.raises(InputError, match="a value for each of 2 classes, got 3"):
        datasets.load("folder/train", dataclasses.replace(config, mask_values=(0, 1, 2)))


def test_colour_masks_are_mapped_by_the_colours_in_the_class_list(root, config):
    trees.folder(root, {"train": 1}, ("sky", "road", "tree house"))
    colors = np.array([[0, 128, 255], [128, 64, 128], [1, 2, 3], [224, 224, 192]], np.uint8)
    label = trees.mask(0, 3)
    trees.write_image(root / "train/masks/000.png", colors[np.where(label == 255, 3, label)])
    with pytest.raises(InputError, match=r"give the colours in classes\.txt \(NAME #RRGGBB\)"):
        datasets.load("folder/train", config)
    listed = "sky #0080ff\nroad #804080\ntree house #010203\n"
    (root / "classes.txt").write_text(listed)
    with pytest.raises(InputError, match="colour #e0e0c0 at row .* 'ignore #e0e0c0'"):
        datasets.load("folder/train", config)
    (root / "classes.txt").write_text(listed + "ignore #E0E0C0\n")
    split = datasets.load("folder/train", config)
    assert split.class_names == ("sky", "road", "tree house") and split.palette == tuple(
        map(tuple, colors[:3].tolist())
    )
    np.testing.assert_array_equal(_decoded(split)[0]["label"], label)
    trees.write_mask(root / "train/masks/000.png", label)  # masks of class ids still work
    np.testing.assert_array_equal(_decoded(datasets.load("folder/train", config))[0]["label"], label)


def test_palette_colours_take_precedence_over_indices_if_they_are_class_colours(root, config):
    trees.folder(root, {"train": 1}, ("background #000000", "road #804080"))
    indices = trees.mask(0, 2, ignore=0)
    path = root / "train/masks/000.png"
    for colors, expected in (
        (((0, 0, 0), (128, 64, 128)), indices),
        (((128, 64, 128), (0, 0, 0)), 1 - indices),  # as from a tool that orders the palette itself
        (((9, 9, 9), (8, 8, 8)), indices),  # colours of no class: the indices count
    ):
        picture = Image.fromarray(indices)
        picture.putpalette([value for color in colors for value in color])
        picture.save(path)
        np.testing.assert_array_equal(_decoded(datasets.load("folder/train", config))[0]["label"], expected)
    picture.putpalette([9, 9, 9, 0, 0, 0])  # index 1 has the colour of class 0
    picture.save(path)
    with pytest.raises(InputError, match="colour #090909"):
        datasets.load("folder/train", config)
    trees.write_image(path, np.repeat(indices[..., None], 3, axis=2) * 255)  # three equal channels
    (root / "classes.txt").write_text("background\nroad\n")
    grey = dataclasses.replace(config, mask_values=(0, 255))
    np.testing.assert_array_equal(_decoded(datasets.load("folder/train", grey))[0]["label"], indices)


def test_prepared_copies_with_other_options_are_not_removed(root, config):
    trees.folder(root, {".": 8})
    drawn = dataclasses.replace(config, val_fraction=0.25)
    first = datasets.load("folder/train", drawn)
    datasets.load("folder/train", dataclasses.replace(drawn, split_seed=1))
    datasets.load("folder/all", config)
    assert first.source[0]["name"]
    trees.folder(root, {"train": 2})
    with pytest.raises(InputError, match="split already; leave out --data.val-fraction"):
        datasets.load("folder/train", drawn)


def test_train_and_val_are_drawn_by_fraction_and_seed(root, config):
    trees.folder(root, {".": 20})
    drawn = dataclasses.replace(config, val_fraction=0.25)

    def names(split, **changes):
        changed = dataclasses.replace(drawn, **changes)
        return {example["name"] for example in _decoded(datasets.load(f"folder/{split}", changed))}

    train, val = names("train"), names("val")
    assert (len(train), len(val)) == (15, 5) and not train & val
    assert names("val") == val != names("val", split_seed=1)
    trees.write_image(root / "images/more.jpg", trees.picture(50))
    trees.write_mask(root / "masks/more.png", trees.mask(50, 3))
    assert len(names("val") & val) >= 4
    with pytest.raises(InputError, match="--data.val-fraction"):
        datasets.load("folder/train", config)


def test_a_data_set_prepared_by_tfds_is_read_from_its_folder(root, config, tmp_path):
    trees.folder(root, {"train": 3})
    copy = prepare(folder.listing("train", config), str(tmp_path / "prepared"))
    given = dataclasses.replace(config, dir=str(copy), classes=str(root / "classes.txt"))
    with pytest.raises(InputError, match="split train cannot be opened with TFDS"):
        datasets.load("tfds/train", given)
    # Our prepared copies name their split "examples".
    for path in copy.iterdir():
        path.rename(path.with_name(path.name.replace("examples", "train")))
    info = copy / "dataset_info.json"
    info.write_text(info.read_text().replace('"examples"', '"train"'))
    expected, found = _decoded(datasets.load("folder/train", config)), _decoded(datasets.load("tfds/train", given))
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_array_equal(one["image"], other["image"])
        np.testing.assert_array_equal(one["label"], other["label"])
    with pytest.raises(InputError, match="--data.classes"):
        datasets.load("tfds/train", dataclasses.replace(given, classes=None))
    (shard,) = copy.glob("*.array_record*")
    shard.write_bytes(shard.read_bytes().replace(b"IDAT", b"IDOT"))
    with pytest.raises(InputError, match="example .* cannot be read .*; prepare the data set in --data.dir again"):
        datasets.load("tfds/train", dataclasses.replace(given, cache_dir=str(tmp_path / "empty")))


def test_unknown_data_sets_and_splits_list_the_known_ones(config):
    for spec, message in (
        ("coco/train", "unknown data set 'coco'; choose one of: shapes, camvid, voc, sbd, folder, tfds"),
        ("voc/tset", "unknown split of voc 'tset'; choose one of: train, val, trainval, seg11valid"),
        ("voc", "expected DATASET/SPLIT, such as 'shapes/train', got 'voc'"),
    ):
        with pytest.raises(InputError, match=message):
            datasets.load(spec, config)


@pytest.mark.parametrize("name", ["camvid", "voc", "sbd", "folder"])
def test_a_missing_folder_error_names_the_flag(name, config):
    with pytest.raises(InputError, match=rf"{name} needs the folder .* --data\.dir"):
        datasets.load(f"{name}/train", dataclasses.replace(config, dir=None))
    with pytest.raises(InputError, match=r"--data\.dir .*no such folder"):
        datasets.load(f"{name}/train", config)


def test_s3_urls_are_rejected_for_every_path_option(root, config):
    trees.folder(root, {"train": 1})
    for field, flag in (("dir", "dir"), ("classes", "classes"), ("cache_dir", "cache-dir")):
        with pytest.raises(InputError, match=f"--data.{flag} s3://bucket/x: s3:// is not supported"):
            datasets.load("folder/train", dataclasses.replace(config, **{field: "s3://bucket/x"}))


@pytest.mark.parametrize("name", ["camvid", "voc", "sbd", "folder"])
def test_an_empty_folder_is_rejected(name, root, config):
    root.mkdir()
    (root / "classes.txt").write_text("a\nb\n")
    with pytest.raises(InputError, match=str(root)):
        datasets.load(f"{name}/train", config)


def _mask(root, value, width=16):
    trees.write_mask(root / "train/masks/001.png", np.full((12, width), value, np.uint8))


def _without(file):
    return lambda root: (root / "train" / file).unlink()


def _no_images(root):
    shutil.rmtree(root / "train/images")
    (root / "train/images").mkdir()


def _two_of_a_name(root):
    trees.write_image(root / "train/images/001.png", trees.picture(0))


def _masks(root, label):
    for path in (root / "train/masks").iterdir():
        trees.write_mask(path, label)


ALL_IGNORED = np.full((12, 16), 255, np.uint8)
BLACK_AND_WHITE = np.triu(ALL_IGNORED)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: _mask(root, 3), r"masks/001\.png: class ids 3 are not among the 3 classes"),
        (lambda root: _mask(root, 0, 15), r"masks/001\.png: the image is 16 x 12 pixels, its mask 15 x 12"),
        (_without("masks/001.png"), r"train/images: '001' has no mask in .*train/masks \(1 in total\)"),
        (_without("images/001.jpg"), r"train/masks: '001' has no image in .*train/images \(1 in total\)"),
        (_no_images, r"train/images: contains no \.jpg"),
        (_two_of_a_name, r"train/images: 001\.jpg and 001\.png share a name"),
        (lambda root: _masks(root, BLACK_AND_WHITE), r"train: the masks contain only 0 and 255, and 255 means ignore"),
        (lambda root: _masks(root, ALL_IGNORED), r"folder/train: the masks contain only 255, and 255 means ignore"),
    ],
)
def test_invalid_files_are_rejected_by_name_and_leave_no_copy(root, config, damage, message, tmp_path):
    trees.folder(root, {"train": 3})
    damage(root)
    with pytest.raises(InputError, match=message) as caught:
        datasets.load("folder/train", config)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache").glob("folder/*")) == []


def test_missing_or_empty_split_lists_are_named(root, config):
    tree = trees.voc(root, "2012", {"train": ["2007_001"]})
    with pytest.raises(InputError, match=r"Segmentation/val\.txt: cannot be read"):
        datasets.load("voc/val", config)
    (tree / "ImageSets/Segmentation/val.txt").write_text("\n")
    with pytest.raises(InputError, match=r"val\.txt: lists no images"):
        datasets.load("voc/val", config)


def test_images_of_several_sizes_have_no_common_size(root, config):
    trees.folder(root, {"train": 2})
    trees.write_image(root / "train/images/001.jpg", trees.picture(1, (10, 10)))
    trees.write_mask(root / "train/masks/001.png", trees.mask(1, 3, (10, 10)))
    assert datasets.load("folder/train", config).image_size is None


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


def _mat(path, value, **options):
    savemat(path, {"other": 1.0, "GTcls": value}, **options)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["u1", "i2", "f8"])
def test_sbd_masks_of_any_number_type_are_read(tmp_path, kind, packed):
    label = np.arange(6 * 7).reshape(6, 7).astype(kind)
    value = {"Boundaries": trees.boundaries((6, 7)), "Segmentation": label, "A": "text"}
    _mat(tmp_path / "a.mat", value, do_compression=packed)
    read = sbd.read_segmentation(tmp_path / "a.mat")
    assert read.dtype == np.uint8 and np.array_equal(read, label)


@pytest.mark.parametrize("value", [[[300.0]], [[np.nan]], [[-1]], [["a"]], [[]], None])
def test_an_sbd_mask_with_invalid_class_ids_is_rejected(tmp_path, value):
    _mat(tmp_path / "a.mat", np.eye(4) if value is None else {"Segmentation": np.array(value)})
    with pytest.raises(UnreadableError, match=r"a\.mat: not an SBD mask, a \.mat file with GTcls\.Segmentation"):
        sbd.read_segmentation(tmp_path / "a.mat")


@pytest.mark.parametrize("content", [b"", b"not a mat file at all", None])
def test_a_damaged_mat_file_is_named(root, config, content):
    path = trees.sbd(root, {"train": ["2008_001"]}) / "cls/2008_001.mat"
    path.write_bytes(path.read_bytes()[:-30] if content is None else content)
    with pytest.raises(UnreadableError, match=r"2008_001\.mat: not an SBD mask") as caught:
        datasets.load("sbd/train", config)
    assert "\n" not in str(caught.value)
