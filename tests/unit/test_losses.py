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
from fcn_jax.training.config_checks import loss_terms
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
    # float64 sums in another order.
    assert value == pytest.approx(expected, rel=1e-14)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-16, rtol=1e-12)
    assert np.all(np.asarray(gradient)[0, :2] == 0)


def test_sigmoid_loss_is_the_mean_binary_cross_entropy_of_pixels_and_classes():
    sums = make_loss("sigmoid")(jnp.asarray(LOGITS), LABELS)
    valid = torch.from_numpy(LABELS != 255)
    one_hot = F.one_hot(torch.from_numpy(np.where(LABELS == 255, 0, LABELS).astype(np.int64)), 4).double()
    expected = F.binary_cross_entropy_with_logits(torch.from_numpy(LOGITS)[valid], one_hot[valid])
    assert float(sums.total / sums.weight) == pytest.approx(expected.item(), rel=1e-14)  # summed in another order


def per_image(loss):
    """Return (value, gradient) of torch's loss of each image, averaged by the images' valid pixels."""
    logits = torch.from_numpy(LOGITS).permute(0, 3, 1, 2).requires_grad_()
    valid = (LABELS != 255).sum((1, 2))
    losses = [loss(logits[i : i + 1], torch.from_numpy(LABELS[i : i + 1].astype(np.int64))) for i in range(2)]
    value = sum(each * int(n) for each, n in zip(losses, valid, strict=True)) / valid.sum()
    value.backward()
    return value.item(), logits.grad.permute(0, 2, 3, 1).numpy()


def focal_of_monai(logits, labels):
    from monai.losses import FocalLoss

    one_hot = F.one_hot(torch.where(labels == 255, 0, labels), 4).movedim(-1, 1)
    each = FocalLoss(use_softmax=True, gamma=2.0, reduction="none")(logits, one_hot.double()).sum(1)
    return each[labels != 255].mean()


def dice_of_smp(logits, labels):
    return smp_losses().DiceLoss("multiclass", ignore_index=255, eps=1e-12)(logits, labels)


def lovasz_of_smp(logits, labels):
    return smp_losses().LovaszLoss("multiclass", ignore_index=255)(logits, labels)


def smp_losses():
    import torchvision_import  # noqa: F401  (segmentation_models_pytorch imports torchvision)
    from segmentation_models_pytorch import losses

    return losses


OTHERS = {"focal": focal_of_monai, "dice": dice_of_smp, "lovasz": lovasz_of_smp}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.filterwarnings("ignore")  # from imports of the other libraries
def test_losses_and_gradients_equal_those_of_monai_and_smp(kind, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # both libraries convert to float32

    def mean(logits):
        sums = make_loss(kind)(logits, LABELS)
        return sums.total / sums.weight

    # The libraries treat absent classes differently.
    assert all(set(np.unique(labels)) >= set(range(4)) for labels in LABELS)
    value, gradient = jax.value_and_grad(mean)(jnp.asarray(LOGITS))
    expected, expected_gradient = per_image(OTHERS[kind])
    assert value == pytest.approx(expected, rel=1e-9)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-6, atol=1e-12)
    assert np.all(np.asarray(gradient)[0, :2] == 0)


def test_region_losses_by_hand_cover_only_classes_in_the_labels():
    # One image with softmax (3/4, 1/4, 0) at each pixel. Two labels are class 0, one is class 1, one is ignored.
    logits = jnp.log(jnp.array([0.75, 0.25, 1e-300]))[None, None, None] + jnp.zeros((1, 2, 2, 1))
    labels = np.array([[[0, 0], [1, 255]]], np.uint8)
    dice = [1 - 2 * 1.5 / (2.25 + 2), 1 - 2 * 0.25 / (0.75 + 1)]
    total, weight = make_loss("dice")(logits, labels)
    assert (total, weight) == (pytest.approx(3 * np.mean(dice)), 3)
    weights = np.array([1.0, 3.0, 5.0])
    total, weight = make_loss("dice", weights)(logits, labels)
    assert (total, weight) == (pytest.approx(5 * (dice[0] + 3 * dice[1]) / 4), 5)
    # Errors of class 0 are 3/4 at the pixel of class 1, then 1/4 twice. 1 - IoU rises to 1/3, 2/3 and 1 with them.
    # Errors of class 1 are 3/4 at its own pixel, then 1/4 twice. 1 - IoU is 1 from the first error on.
    lovasz = [0.75 / 3 + 0.25 / 3 + 0.25 / 3, 0.75]
    total, _ = make_loss("lovasz")(logits, labels)
    assert total == pytest.approx(3 * np.mean(lovasz))
    ignored = make_loss({"dice": 1, "lovasz": 1})(logits, np.full((1, 2, 2), 255, np.uint8))
    assert ignored.total == ignored.weight == 0


def test_terms_are_added_with_their_factors():
    parts = {name: make_loss(name, WEIGHTS)(jnp.asarray(LOGITS), LABELS) for name in ("softmax", "dice", "lovasz")}
    whole = make_loss({"softmax": 1, "dice": 0.5, "lovasz": 2}, WEIGHTS)(jnp.asarray(LOGITS), LABELS)
    expected = parts["softmax"].total + 0.5 * parts["dice"].total + 2 * parts["lovasz"].total
    assert float(whole.total) == pytest.approx(float(expected), rel=1e-14)  # rounding of float64
    assert whole.weight == parts["dice"].weight == parts["softmax"].weight
    assert loss_terms(LossConfig(terms=("softmax:1", "dice:.5"))) == {"softmax": 1, "dice": 0.5}
    assert loss_terms(LossConfig(terms=("focal:1e-1",))) == {"focal": 0.1}
    for terms in (("dice",), ("dice:x",), ("dice:0",), ("dice:1", "dice:2")):
        with pytest.raises(InputError, match="--loss.terms"):
            loss_terms(LossConfig(terms=terms))


@pytest.mark.parametrize(("kind", "fraction"), [("softmax", 0.5), ({"focal": 1, "dice": 1, "lovasz": 1}, 1)])
def test_losses_of_parts_of_a_batch_add_up_to_the_whole(kind, fraction):
    loss = make_loss(kind, WEIGHTS, hard_fraction=fraction)
    whole = loss(jnp.asarray(LOGITS), LABELS)
    parts = [loss(jnp.asarray(LOGITS[i : i + 1]), LABELS[i : i + 1]) for i in range(2)]
    # float64 sums in another order.
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
    assert float(sums.total) == pytest.approx(expected, rel=1e-13)  # summed in another order
    assert float(sums.weight) == np.ceil(0.25 * 18) + np.ceil(0.25 * 30)


def test_a_batch_of_ignored_pixels_has_zero_loss_and_gradient():
    loss = make_loss("softmax")
    sums, gradient = jax.value_and_grad(lambda z: loss(z, np.full_like(LABELS, 255)).total)(jnp.asarray(LOGITS))
    assert float(sums) == 0.0 and np.all(np.asarray(gradient) == 0)


def test_bfloat16_logits_are_summed_in_float32():
    assert make_loss("softmax")(jnp.asarray(LOGITS, jnp.bfloat16), LABELS).total.dtype == jnp.float32


@pytest.mark.parametrize(("power", "weights"), [(1.0, (0.5, 2.0, 1.0, 0.0)), (0.5, (0.5**0.5, 2.0**0.5, 1.0, 0.0))])
def test_class_weights_of_a_run_follow_from_label_counts_and_power(power, weights, monkeypatch):
    counts = np.array([[60, 15, 30, 0], [100, 100, 100, 0]])  # frequencies 0.6, 0.15, 0.3
    monkeypatch.setattr(trainer, "class_frequencies", lambda split: counts)
    split = SimpleNamespace(dataset="made", num_classes=4)
    followed = run_loss(Config(loss=LossConfig(class_weights="median", weight_power=power)), split)
    given = run_loss(Config(loss=LossConfig(class_weights=weights)), split)
    for found, expected in zip(followed(jnp.asarray(LOGITS), LABELS), given(jnp.asarray(LOGITS), LABELS), strict=True):
        assert float(found) == pytest.approx(float(expected), rel=1e-12)  # rounding of float64
    with pytest.raises(InputError, match="expected 3 class weights for made, got 4"):
        run_loss(Config(loss=LossConfig(class_weights=weights)), SimpleNamespace(dataset="made", num_classes=3))


@pytest.mark.parametrize(
    ("config", "arguments"),
    [
        (LossConfig(kind="sigmoid"), ("sigmoid",)),
        (LossConfig(terms=("softmax:1", "dice:0.5")), ({"softmax": 1.0, "dice": 0.5},)),
        (LossConfig(hard_fraction=0.25), ("softmax", None, 0.25)),
    ],
)
def test_a_run_uses_the_loss_of_its_config(config, arguments):
    split, logits = SimpleNamespace(dataset="made", num_classes=4), jnp.asarray(LOGITS)
    total = run_loss(Config(loss=config), split)(logits, LABELS).total
    assert total == make_loss(*arguments)(logits, LABELS).total != make_loss("softmax")(logits, LABELS).total


def test_a_run_adds_the_loss_of_the_auxiliary_head_with_its_weight():
    split, logits = SimpleNamespace(dataset="made", num_classes=4), jnp.asarray(LOGITS)
    main, aux = (float(make_loss("softmax")(x, LABELS).total) for x in (logits, 2 * logits))
    found = run_loss(Config(loss=LossConfig(aux_weight=0.7)), split)((logits, 2 * logits), LABELS)
    assert float(found.total) == pytest.approx(main + 0.7 * aux, rel=1e-12)


def test_median_frequency_weights_by_hand():
    # Pixels of the class, of all in images with it: 60 of 100, 10 of 50, 30 of 100. Class 3 does not occur.
    weights = median_frequency_weights(np.array([60, 10, 30, 0]), np.array([100, 50, 100, 0]))
    np.testing.assert_allclose(weights, [0.3 / 0.6, 0.3 / 0.2, 1.0, 0.0], rtol=1e-14)  # rounding of float64


def test_unknown_losses_and_invalid_fractions_are_named():
    with pytest.raises(InputError, match="softmax, sigmoid"):
        make_loss("hinge")
    with pytest.raises(InputError, match="hard_fraction"):
        make_loss("softmax", hard_fraction=0.0)
    with pytest.raises(InputError, match="needs a single pixel loss, got dice"):
        make_loss("dice", hard_fraction=0.5)
