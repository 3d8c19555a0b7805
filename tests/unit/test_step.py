"""The public training step with external models and under JAX transformations, and the range of its images."""

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from small_networks import make_network

import fcn_jax
from fcn_jax.errors import InputError

OPTIMIZER = optax.sgd(0.1, momentum=0.9)
LOSS = fcn_jax.losses.make_loss("softmax")


class Foreign(nn.Module):
    """A network from outside the package, with flax's own batch norm and dropout."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Conv(8, (3, 3))(x))
        return nn.Conv(3, (1, 1))(nn.Dropout(0.2, deterministic=not train)(nn.relu(x)))


def make_batch(count=4):
    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, (count, 8, 8))
    label[0, :2] = 255
    return {"image": jnp.asarray(rng.normal(size=(count, 8, 8, 3)), jnp.float32), "label": jnp.asarray(label)}


@pytest.fixture(scope="module")
def foreign():
    """Return the training step of an external network, its state and a batch."""
    model, batch = Foreign(), make_batch()
    variables = model.init(jax.random.key(0), batch["image"])
    return fcn_jax.make_train_step(model.apply, OPTIMIZER, LOSS), fcn_jax.new_state(variables, OPTIMIZER), batch


def test_an_external_linen_model_trains_the_same_under_scan(foreign):
    train_step, state, batch = foreign
    scanned, sums = jax.jit(lambda state: jax.lax.scan(lambda s, _: train_step(s, batch), state, length=20))(state)
    assert sums.loss[-1] < 0.8 * sums.loss[0] and int(scanned.step) == 20
    single = jax.jit(train_step)
    for _ in range(20):
        state, _ = single(state, batch)
    # Rounding over 20 steps in float32.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), scanned, state)
    assert np.any(state.batch_stats["BatchNorm_0"]["mean"] != 0)


def test_the_step_can_be_vmapped_over_seeds(foreign):
    train_step, state, batch = foreign
    states = [
        fcn_jax.new_state({"params": state.params, "batch_stats": state.batch_stats}, OPTIMIZER, s) for s in (0, 1)
    ]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *states)
    _, sums = jax.jit(jax.vmap(train_step, in_axes=(0, None)))(stacked, batch)
    each = [jax.jit(train_step)(state, batch)[1].loss for state in states]
    np.testing.assert_allclose(sums.loss, each, rtol=1e-5)  # float32
    assert each[0] != each[1]  # the seeds give different dropout masks


def test_a_network_works_within_nnx():
    model, variables = make_network("fcn8s", encoder_norm="batch")
    images = jnp.asarray(np.random.default_rng(0).normal(size=(1, 32, 32, 3)))
    module = nnx.bridge.ToNNX(model, rngs=nnx.Rngs(0)).lazy_init(images)
    own = {
        "params": nnx.to_pure_dict(nnx.state(module, nnx.Param)),
        "batch_stats": nnx.to_pure_dict(nnx.state(module, nnx.BatchStat)),
    }
    assert jax.tree.structure(own) == jax.tree.structure(variables)
    np.testing.assert_allclose(module(images), model.apply(own, images), rtol=1e-12)  # rounding of float64


def test_training_mode_without_mutable_statistics_raises_the_flax_error():
    model, variables = make_network("fcn8s", encoder_norm="batch")
    with pytest.raises(flax.errors.ModifyScopeVariableError):
        model.apply(variables, jnp.zeros((1, 32, 32, 3)), train=True, rngs={"dropout": jax.random.key(0)})


@pytest.mark.parametrize(
    ("images", "named"),
    [
        (np.full((1, 2, 2, 3), 0.5), "by 255"), (np.ones((1, 2, 2, 3), bool), "bool"),
        (np.full((1, 2, 2, 3), np.nan), "nan"), ([[0, 255]], "list"), (jnp.zeros((1, 2, 2, 3), bool), "bool"),
        (np.full((1, 2, 2, 3), 300, np.uint16), "300"), (np.full((1, 2, 2, 3), -1.5, np.float32), "-1.5"),
    ],
)  # fmt: skip
def test_images_of_another_range_are_rejected(images, named):
    with pytest.raises(InputError, match="images in 0 ... 255") as error:
        fcn_jax.normalize(images, "imagenet")
    assert named in str(error.value)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32])
def test_images_of_other_dtypes_are_normalised_the_same(dtype):
    images = np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3) * 20
    expected = fcn_jax.normalize(images, "caffe")
    np.testing.assert_array_equal(fcn_jax.normalize(images.astype(dtype), "caffe"), expected)
    overshot = np.linspace(-30, 284, 12).reshape(1, 2, 2, 3)  # cubic interpolation may overshoot 0 ... 255
    assert np.isfinite(fcn_jax.normalize(overshot, "caffe")).all()
    black = fcn_jax.normalize(np.zeros_like(images, dtype), "caffe")
    assert float(black[0, 0, 0, 0]) == pytest.approx(-104.00699)
