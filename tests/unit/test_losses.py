from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fcn_jax.config import Config, LossConfig
from fcn_jax.errors import InputError
from fcn_jax.losses import make_loss, median_frequency_weights
from fcn_jax.training import trainer
from fcn_jax.training.trainer import run_loss

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(2, 5, 6, 4))
LABELS = RNG.integers(0, 4, (2, 5, 6)).astype(np.uint8)
LABELS[0, :2] = 255
WEIGHTS = np.array([0.5, 2.0, 0.0, 1.0])


def _torch(weight=None):
    logits = torch.from_numpy(LOGITS).permute(0, 3, 1, 2).requires_grad_()
    weight = None if weight is None else torch.from_numpy(weight)
    loss = F.cross_entropy(logits, torch.from_numpy(LABELS.astype(np.int64)), weight, ignore_index=255)
    loss.backward()
    assert logits.grad is not None
    return loss.item(), logits.grad.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("weight", [None, WEIGHTS])
def test_softmax_mean_and_gradient_equal_torch_with_ignored_pixels(weight):
    loss = make_loss("softmax", weight)

    def mean(logits):
        sums = loss(logits, LABELS)
        return sums.total / sums.weight

    value, gradient = jax.value_and_grad(mean)(jnp.asarray(LOGITS))
    expected, expected_gradient = _torch(weight)
    assert value == pytest.approx(expected, rel=1e-14)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-16, rtol=1e-12)
    assert np.all(np.asarray(gradient)[0, :2] == 0)


def test_sigmoid_is_the_mean_over_pixels_and_classes_of_binary_cross_entropy():
    sums = make_loss("sigmoid")(jnp.asarray(LOGITS), LABELS)
    valid = torch.from_numpy(LABELS != 255)
    one_hot = F.one_hot(torch.from_numpy(np.where(LABELS == 255, 0, LABELS).astype(np.int64)), 4).double()
    expected = F.binary_cross_entropy_with_logits(torch.from_numpy(LOGITS)[valid], one_hot[valid])
    assert float(sums.total / sums.weight) == pytest.approx(expected.item(), rel=1e-14)


def test_sums_of_parts_add_up_to_the_whole():
    loss = make_loss("softmax", WEIGHTS, hard_fraction=0.5)
    whole = loss(jnp.asarray(LOGITS), LABELS)
    parts = [loss(jnp.asarray(LOGITS[i : i + 1]), LABELS[i : i + 1]) for i in range(2)]
    assert float(whole.total) == pytest.approx(float(parts[0].total + parts[1].total), rel=1e-14)
    assert float(whole.weight) == pytest.approx(float(parts[0].weight + parts[1].weight), rel=1e-14)


def test_hard_pixels_are_the_largest_losses_of_each_image():
    sums = make_loss("softmax", hard_fraction=0.25)(jnp.asarray(LOGITS), LABELS)
    logits, labels = torch.from_numpy(LOGITS).permute(0, 3, 1, 2), torch.from_numpy(LABELS.astype(np.int64))
    all_losses = F.cross_entropy(logits, labels, ignore_index=255, reduction="none").numpy()
    expected = 0.0
    for image in range(2):
        losses = np.sort(all_losses[image][LABELS[image] != 255])[::-1]
        expected += losses[: int(np.ceil(0.25 * len(losses)))].sum()
    assert float(sums.total) == pytest.approx(expected, rel=1e-13)
    assert float(sums.weight) == np.ceil(0.25 * 18) + np.ceil(0.25 * 30)


def test_a_batch_of_ignored_pixels_is_zero_and_finite():
    loss = make_loss("softmax")
    sums, gradient = jax.value_and_grad(lambda z: loss(z, np.full_like(LABELS, 255)).total)(jnp.asarray(LOGITS))
    assert float(sums) == 0.0 and np.all(np.asarray(gradient) == 0)


def test_bfloat16_logits_are_summed_in_float32():
    assert make_loss("softmax")(jnp.asarray(LOGITS, jnp.bfloat16), LABELS).total.dtype == jnp.float32


@pytest.mark.parametrize(("power", "weights"), [(1.0, (0.5, 2.0, 1.0, 0.0)), (0.5, (0.5**0.5, 2.0**0.5, 1.0, 0.0))])
def test_a_runs_weights_follow_from_its_labels_and_the_power(power, weights, monkeypatch):
    counts = np.array([[60, 15, 30, 0], [100, 100, 100, 0]])  # frequencies 0.6, 0.15, 0.3
    monkeypatch.setattr(trainer, "class_frequencies", lambda split: counts)
    split = SimpleNamespace(dataset="made", num_classes=4)
    followed = run_loss(Config(loss=LossConfig(class_weights="median", weight_power=power)), split)
    given = run_loss(Config(loss=LossConfig(class_weights=weights)), split)
    for found, expected in zip(followed(jnp.asarray(LOGITS), LABELS), given(jnp.asarray(LOGITS), LABELS), strict=True):
        assert float(found) == pytest.approx(float(expected), rel=1e-12)
    with pytest.raises(InputError, match="expected 3 class weights for made, got 4"):
        run_loss(Config(loss=LossConfig(class_weights=weights)), SimpleNamespace(dataset="made", num_classes=3))


def test_median_frequency_weights_by_hand():
    # class 0: 60 of 100 pixels in images with it, class 1: 10 of 50, class 2: 30 of 100, class 3 never occurs
    weights = median_frequency_weights(np.array([60, 10, 30, 0]), np.array([100, 50, 100, 0]))
    np.testing.assert_allclose(weights, [0.3 / 0.6, 0.3 / 0.2, 1.0, 0.0], rtol=1e-14)


def test_unknown_loss_and_fraction_are_named():
    with pytest.raises(InputError, match="softmax, sigmoid"):
        make_loss("hinge")
    with pytest.raises(InputError, match="hard_fraction"):
        make_loss("softmax", hard_fraction=0.0)
