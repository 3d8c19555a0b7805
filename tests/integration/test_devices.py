"""The training step: what a batch gives does not depend on how many devices share it, nor on how they are driven."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fcn_jax
from fcn_jax.config import OptimConfig
from fcn_jax.losses import make_loss
from fcn_jax.optim import make_optimizer
from fcn_jax.step import make_train_step, new_state
from fcn_jax.training.devices import make_parallel

BATCH = 8
MODELS = {
    "fcn8s": {"encoder": "vgg11", "encoder_norm": "batch", "fc_features": 8, "fc6_kernel": 3},
    "fcn8s_resize": {"encoder": "vgg11", "aux_head": True, "dropout_rate": 0.5},
    "fcns_ladder": {"encoder": "vgg11"},
    "fcn16s": {"encoder": "vgg11", "fc_features": 8, "fc6_kernel": 1},
}
WITH_NORM = ("fcn8s", "fcn8s_resize", "fcns_ladder")


def _batch():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (BATCH, 37, 33, 3), dtype=np.uint8)
    label = rng.integers(0, 4, (BATCH, 37, 33)).astype(np.uint8)
    for i in range(BATCH):
        label[i, : 4 * i] = 255  # the devices get very unequal numbers of valid pixels
    return {"image": image, "label": label}


def _run(name, mode, devices, steps=2, **options):
    model = fcn_jax.create_model(name, 4, width=0.06, dtype=jnp.float64, param_dtype=jnp.float64, **MODELS[name])
    variables = fcn_jax.init_variables(model, jax.random.key(0))
    # nothing may be trivially zero: score layers start there
    noise = jax.random.split(jax.random.key(1), len(jax.tree.leaves(variables["params"])))
    leaves, tree = jax.tree.flatten(variables["params"])
    leaves = [x + 0.05 * jax.random.normal(k, x.shape, x.dtype) for x, k in zip(leaves, noise, strict=True)]
    variables["params"] = jax.tree.unflatten(tree, leaves)
    optimizer = make_optimizer(variables["params"], OptimConfig(lr=0.05, bias_lr=2.0, bias_decay=False), 10)
    loss = make_loss("softmax", np.array([1.0, 2.0, 0.5, 1.0]))

    def make_step(axis_name):
        return make_train_step(model, optimizer, loss, "imagenet", axis_name=axis_name, **options)

    parallel = make_parallel(mode, make_step, jax.devices()[:devices])
    start = new_state(variables, optimizer, seed=3)
    state, placed = parallel.place_state(jax.tree.map(jnp.copy, start)), parallel.place_batch(_batch())
    for _ in range(steps):
        state, sums = parallel.step(state, placed)
    pair = (state.params, state.batch_stats), (start.params, start.batch_stats)
    moved = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), *pair)
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(moved)]), jax.device_get(sums)


@pytest.fixture(scope="module")
def one_device():
    return {name: _run(name, "pmap", 1) for name in WITH_NORM}


@pytest.mark.parametrize(("mode", "devices"), [("pmap", 2), ("pmap", 8), ("mesh", 1), ("mesh", 2), ("mesh", 8)])
@pytest.mark.parametrize("name", WITH_NORM)
def test_every_number_of_devices_takes_the_same_step(one_device, name, mode, devices):
    expected, expected_sums = one_device[name]
    moved, sums = _run(name, mode, devices)
    # float64: the order of the sums over examples is all that differs
    assert np.linalg.norm(moved - expected) <= 1e-11 * np.linalg.norm(expected)
    np.testing.assert_allclose(sums, expected_sums, rtol=1e-11)
    assert np.linalg.norm(expected) > 0


def test_the_mean_is_over_the_valid_pixels_of_the_global_batch(one_device):
    _, sums = one_device["fcn8s"]
    labels = _batch()["label"]
    weights = np.array([1.0, 2.0, 0.5, 1.0])[np.where(labels == 255, 0, labels)] * (labels != 255)
    assert sums.pixels == pytest.approx(weights.sum(), rel=1e-14)


def test_the_sum_is_the_mean_times_its_weight():
    summed = _run("fcn8s", "pmap", 2, steps=1, reduction="sum")[1]
    mean = _run("fcn8s", "pmap", 2, steps=1)[1]
    assert summed.loss == pytest.approx(mean.loss * mean.pixels, rel=1e-12)
    assert summed.grad_norm == pytest.approx(mean.grad_norm * mean.pixels, rel=1e-12)


@pytest.mark.parametrize("devices", [1, 2])
def test_accumulated_parts_equal_the_whole_batch_without_batch_norm(devices):
    whole, whole_sums = _run("fcn16s", "pmap", devices)
    parts, parts_sums = _run("fcn16s", "pmap", devices, accumulate=4)
    assert np.linalg.norm(parts - whole) <= 1e-11 * np.linalg.norm(whole)
    np.testing.assert_allclose(parts_sums, whole_sums, rtol=1e-11)


def test_a_frozen_encoder_keeps_parameters_and_statistics_to_the_bit():
    model = fcn_jax.create_model("fcn8s", 4, width=0.06, freeze_encoder=True, **MODELS["fcn8s"])
    variables = fcn_jax.init_variables(model, jax.random.key(0))
    optimizer = make_optimizer(variables["params"], OptimConfig(lr=0.1), 10, freeze_encoder=True)
    state = new_state(variables, optimizer, 0)
    step = jax.jit(make_train_step(model, optimizer, make_loss("softmax"), "imagenet"))
    for _ in range(2):
        state, _ = step(state, _batch())
    jax.tree.map(np.testing.assert_array_equal, state.params["vgg"], variables["params"]["vgg"])
    jax.tree.map(np.testing.assert_array_equal, state.batch_stats, variables["batch_stats"])
    assert np.any(state.params["score_fr"]["kernel"] != 0)
