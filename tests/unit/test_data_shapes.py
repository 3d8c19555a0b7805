import dataclasses
import hashlib

import numpy as np
import pytest

from fcn_jax.config import DataConfig
from fcn_jax.data import datasets, shapes
from fcn_jax.errors import InputError

SIZE = (96, 96)


@pytest.fixture(scope="module")
def train():
    return [shapes.generate("train", i, SIZE) for i in range(500)]


@pytest.fixture(scope="module")
def val():
    return [shapes.generate("val", i, SIZE) for i in range(120)]


def test_images_depend_only_on_split_and_index_and_splits_share_none(train, val):
    for i in (4, 0):
        assert all(np.array_equal(a, b) for a, b in zip(shapes.generate("train", i, SIZE), train[i], strict=True))
    test = [shapes.generate("test", i, SIZE) for i in range(50)]
    digests = {hashlib.sha256(image.tobytes()).digest() for image, _ in [*train[:100], *val[:50], *test]}
    assert len(digests) == 200


def test_images_have_the_requested_size_and_declared_ids(val):
    image, label = shapes.generate("val", 0, (64, 80))
    assert image.shape == (64, 80, 3) and image.dtype == np.uint8
    assert label.shape == (64, 80) and label.dtype == np.uint8
    seen = set().union(*(np.unique(label).tolist() for _, label in val))
    assert seen == {0, 1, 2, 3, 4, 5, 255}


def test_a_void_border_separates_all_classes(train):
    for _, label in train[:50]:
        label = label.astype(int)
        for a, b in ((label[1:], label[:-1]), (label[:, 1:], label[:, :-1])):
            assert not ((a != b) & (a != 255) & (b != 255)).any()
        assert 0.005 < (label == 255).mean() < 0.15


def test_every_object_class_covers_some_of_the_pixels(train):
    labels = np.stack([label for _, label in train[:200]])
    shares = np.bincount(labels.ravel(), minlength=256) / labels.size
    assert (shares[1:6] > 0.025).all() and 0.5 < shares[0] < 0.8


def test_colour_does_not_predict_the_class(train, val):
    """A per-pixel colour classifier scores at most 0.25 mean IU on unseen images."""

    def codes(image):
        red, green, blue = np.moveaxis(image.astype(int) // 16, -1, 0)
        return (red * 16 + green) * 16 + blue

    def counts(pictures):
        for image, label in pictures:
            yield codes(image)[label != 255], label[label != 255]

    histogram = np.zeros((4096, 6), np.int64)
    for code, label in counts(train):
        np.add.at(histogram, (code, label), 1)
    priors = histogram.sum(0)
    for table in (
        histogram.argmax(1),
        (histogram / priors).argmax(1),
    ):  # most frequent class, and class of highest likelihood
        confusion = np.zeros((6, 6), np.int64)
        for code, label in counts(val):
            np.add.at(confusion, (label, table[code]), 1)
        iu = np.diag(confusion) / (confusion.sum(0) + confusion.sum(1) - np.diag(confusion))
        assert iu.mean() <= 0.25


def test_objects_and_background_have_the_same_mean_colour(train):
    """The mean colours of the classes differ by few standard errors."""
    means = {k: [] for k in range(6)}
    for image, label in train:
        for k in range(6):
            if (label == k).any():
                means[k].append(image[label == k].mean(0))
    overall = np.concatenate([np.array(m) for m in means.values()]).mean(0)
    for rows in map(np.array, means.values()):
        error = rows.std(0) / np.sqrt(len(rows))
        assert (np.abs(rows.mean(0) - overall) < 4 * error).all()  # 4 standard errors, as there are 18 comparisons


def test_the_first_colour_is_distributed_like_the_others():
    """Each colour is chosen far from the earlier ones. Without shuffling, later colours lie nearer to the corners."""
    drawn = np.stack([shapes._colours(np.random.default_rng(i), 5) for i in range(3000)])
    distance = np.linalg.norm(drawn - 127.5, axis=2)  # (image, position)
    error = distance.std() / np.sqrt(len(distance))
    assert (np.abs(distance.mean(0) - distance.mean()) < 4 * error).all()


def test_objects_differ_in_colour_from_the_background(train):
    for image, label in train[:50]:
        background = image[label == 0].mean(0)
        for k in set(np.unique(label)) - {0, 255}:
            assert np.linalg.norm(image[label == k].mean(0) - background) > 20


@pytest.fixture
def config(tmp_path):
    return DataConfig(cache_dir=str(tmp_path), shapes_size=(32, 48), shapes_count=5)


def test_the_data_set_has_the_configured_count_and_256_validation_images(config):
    train, val = datasets.load("shapes/train", config), datasets.load("shapes/val", config)
    assert (len(train), len(val)) == (5, 256) and train.image_size == (32, 48)
    assert train.class_names == shapes.CLASSES and train.num_classes == 6
    example = datasets.decode(train.source[3])
    image, label = shapes.generate("train", 3, (32, 48))
    assert np.array_equal(example["image"], image) and np.array_equal(example["label"], label)


def test_another_size_or_count_is_prepared_separately(config):
    assert datasets.load("shapes/train", config).image_size == (32, 48)
    assert datasets.load("shapes/train", dataclasses.replace(config, shapes_size=(40, 40))).image_size == (40, 40)
    assert len(datasets.load("shapes/train", dataclasses.replace(config, shapes_count=7))) == 7


def test_sizes_too_small_for_objects_are_rejected(config):
    with pytest.raises(InputError, match=r"--data\.shapes-size of at least 32 32"):
        datasets.load("shapes/train", dataclasses.replace(config, shapes_size=(16, 96)))
