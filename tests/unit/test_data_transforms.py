import dataclasses

import numpy as np
import pytest
import trees

from fcn_jax.config import DataConfig
from fcn_jax.data import transforms


def _example(seed=0, size=(12, 16), num_classes=5):
    return {"image": trees.picture(seed, size), "label": trees.mask(seed, num_classes, size)}


def _rng(seed=0):
    return np.random.default_rng(seed)


PLAIN = DataConfig(flip=False)


def test_without_augmentation_an_example_is_unchanged():
    example = _example()
    out = transforms.augment(example, _rng(), PLAIN)
    assert np.array_equal(out["image"], example["image"]) and np.array_equal(out["label"], example["label"])


def test_flip_mirrors_image_and_label_together_half_of_the_time():
    example = _example()
    flipped = 0
    for seed in range(200):
        out = transforms.augment(example, _rng(seed), DataConfig())
        mirrored = np.array_equal(out["label"], example["label"][:, ::-1])
        assert mirrored or np.array_equal(out["label"], example["label"])
        assert np.array_equal(out["image"], example["image"][:, ::-1] if mirrored else example["image"])
        flipped += mirrored
    assert 70 < flipped < 130  # 100 +- 4 standard deviations of 7.1


def test_a_crop_is_one_window_of_image_and_label_at_any_position():
    label = np.arange(6 * 7, dtype=np.uint8).reshape(6, 7)
    example = {"image": np.repeat(label[..., None], 3, axis=2), "label": label}
    corners = set()
    for seed in range(300):
        out = transforms.crop(example, _rng(seed), (4, 5), (1, 2, 3))
        top, left = divmod(int(out["label"][0, 0]), 7)
        assert np.array_equal(out["label"], label[top : top + 4, left : left + 5])
        assert np.array_equal(out["image"][..., 2], out["label"])
        corners.add((top, left))
    assert corners == {(t, x) for t in range(3) for x in range(3)}


@pytest.mark.parametrize(("kind", "fill"), [("imagenet", (124, 116, 104)), ("caffe", (123, 117, 104))])
def test_a_small_image_is_padded_with_the_mean_colour_and_its_label_with_ignore(kind, fill):
    example = _example()
    out = transforms.augment(example, _rng(), DataConfig(flip=False, crop_size=(20, 18), preprocessing=kind))
    jittered = transforms.augment(example, _rng(), DataConfig(crop_size=(20, 18), preprocessing=kind, jitter=0.9))
    assert (jittered["image"][12:] == fill).all()
    assert out["image"].shape == (20, 18, 3) and out["label"].shape == (20, 18)
    assert np.array_equal(out["image"][:12, :16], example["image"])
    assert np.array_equal(out["label"][:12, :16], example["label"])
    assert (out["image"][12:] == fill).all() and (out["image"][:, 16:] == fill).all()
    assert (out["label"][12:] == 255).all() and (out["label"][:, 16:] == 255).all()


def test_an_image_small_in_one_direction_is_cropped_in_the_other():
    out = transforms.augment(_example(), _rng(), DataConfig(flip=False, crop_size=(20, 8)))
    assert out["label"].shape == (20, 8) and (out["label"][12:] == 255).all() and (out["label"][1:12] != 255).all()


def test_labels_are_resized_by_nearest_neighbour():
    label = np.array([[0, 7], [3, 255]], np.uint8)
    assert transforms.resize_label(label, (4, 4)).tolist() == [[0, 0, 7, 7]] * 2 + [[3, 3, 255, 255]] * 2
    row = np.arange(9, dtype=np.uint8)[None]
    # Pixel centres; INTER_NEAREST would give 0, 3, 6.
    assert transforms.resize_label(row, (1, 3)).tolist() == [[1, 4, 7]]


def test_shrinking_an_image_averages_areas():
    image = np.array([[[0], [100]], [[20], [40]]], np.uint8).repeat(3, axis=2)
    assert transforms.resize_image(image, (1, 1)).tolist() == [[[40, 40, 40]]]


def test_input_size_is_the_output_size_with_and_without_scaling():
    config = dataclasses.replace(PLAIN, input_size=(6, 8))
    assert transforms.augment(_example(), _rng(), config)["image"].shape == (6, 8, 3)
    scaled = dataclasses.replace(config, scale=(0.5, 2.0))
    assert {transforms.augment(_example(), _rng(s), scaled)["label"].shape for s in range(20)} == {(6, 8)}


def test_the_size_of_augmented_examples_is_known_where_they_share_one():
    for change, expected in [
        ({}, (10, 20)), ({"crop_size": (3, 5)}, (3, 5)), ({"input_size": (6, 8)}, (6, 8)), ({"scale": (0.5, 2)}, None),
        ({"scale": (0.5, 0.5)}, (5, 10)), ({"base_size": 5, "scale": (2, 2)}, (10, 20)), ({"base_size": 30}, (30, 60)),
    ]:  # fmt: skip
        config = dataclasses.replace(PLAIN, **change)
        assert transforms.augmented_size(config, (10, 20)) == expected
        if expected is not None:
            assert transforms.augment(_example(size=(10, 20)), _rng(), config)["label"].shape == expected
    assert transforms.augmented_size(PLAIN, None) is None


def test_scale_stays_within_its_bounds_and_preserves_the_aspect_ratio():
    heights = set()
    for seed in range(200):
        out = transforms.scale(_example(size=(100, 200)), _rng(seed), (0.5, 2.0))
        height, width = out["label"].shape
        assert 50 <= height <= 200 and abs(width - 2 * height) <= 1  # both sides are rounded
        assert out["image"].shape == (height, width, 3)
        heights.add(height)
    assert min(heights) < 60 and max(heights) > 185


def test_base_size_sets_the_shorter_side_before_scaling():
    config = dataclasses.replace(PLAIN, base_size=24)
    assert transforms.augment(_example(), _rng(), config)["image"].shape == (24, 32, 3)
    shorter = {transforms.scale(_example(size=(40, 30)), _rng(s), (0.5, 2.0), 24)["label"].shape[1] for s in range(100)}
    assert 12 <= min(shorter) < 15 and 45 < max(shorter) <= 48
    doubled = dataclasses.replace(config, scale=(2.0, 2.0))
    assert transforms.augment(_example(), _rng(), doubled)["label"].shape == (48, 64)


def test_jitter_scales_brightness_by_the_drawn_factor():
    class Fixed:
        def uniform(self, low, high, size):
            assert (low, high, size) == (-1, 1, 3)
            return np.array(self.draws)

    rng, image = Fixed(), np.full((2, 2, 3), 100, np.uint8)
    image[0] = (60, 80, 120)
    rng.draws = (0.5, 0, 0)
    assert transforms.jitter(image, rng, 0.4)[0, 0].tolist() == [72, 96, 144]  # x 1.2
    rng.draws = (0, 0, -1)
    grey = transforms.jitter(image, rng, 1.0)  # saturation 0: grey, 0.299 R + 0.587 G + 0.114 B
    assert grey[0, 0].tolist() == [79, 79, 79]  # 17.94 + 46.96 + 13.68 = 78.58
    rng.draws = (0, -1, 0)
    flat = transforms.jitter(image, rng, 1.0)  # contrast 0: the mean grey, (78.58 + 100) / 2
    assert (flat == 89).all()
    rng.draws = (1, 0, 0)
    assert transforms.jitter(np.full((1, 1, 3), 200, np.uint8), rng, 1.0).max() == 255  # clipped, not wrapped


def test_jitter_changes_no_labels_and_at_zero_strength_no_images():
    example = _example()
    out = transforms.augment(example, _rng(), dataclasses.replace(PLAIN, jitter=0.5))
    assert np.array_equal(out["label"], example["label"]) and not np.array_equal(out["image"], example["image"])
    assert np.array_equal(transforms.jitter(example["image"], _rng(), 0.0), example["image"])


def test_augmentation_is_determined_by_the_random_generator():
    config = DataConfig(scale=(0.5, 2.0), crop_size=(10, 10), jitter=0.3)
    first, second = (transforms.augment(_example(), _rng(3), config) for _ in range(2))
    other = transforms.augment(_example(), _rng(4), config)
    assert np.array_equal(first["image"], second["image"]) and not np.array_equal(first["image"], other["image"])


def test_augment_does_not_modify_its_input():
    example = _example()
    before = {k: v.copy() for k, v in example.items()}
    for seed in range(5):
        transforms.augment(example, _rng(seed), DataConfig(crop_size=(20, 20), jitter=0.5, scale=(0.5, 1.5)))
    assert all(np.array_equal(example[k], before[k]) for k in before)
