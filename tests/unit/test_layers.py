"""Pooling, batch norm and dropout where frameworks differ."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fcn_jax.models.kernels import cpu_kernels, max_pool
from fcn_jax.models.layers import BatchNorm, Compute, Dropout, conv, scaled

FLOAT64 = Compute(jnp.float64, jnp.float64)


@pytest.fixture(params=[False, True], ids=["plain", "cpu kernels"])
def kernels(request):
    with cpu_kernels(request.param):
        yield


def image(rows):
    return jnp.asarray(rows, jnp.float64)[None, :, :, None]


@pytest.mark.usefixtures("kernels")
def test_pooling_by_hand_at_an_odd_size():
    x = image([[1, 2, 9], [3, 4, 8], [7, 5, -6]])
    np.testing.assert_array_equal(max_pool(x, "ceil")[0, :, :, 0], [[4, 9], [7, -6]])
    np.testing.assert_array_equal(max_pool(x, "floor")[0, :, :, 0], [[4]])


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("mode", ["ceil", "floor"])
@pytest.mark.parametrize("size", [(2, 2), (5, 7), (6, 3)])
def test_pooling_and_its_gradient_equal_torch_with_many_ties(mode, size):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 3, size=(2, *size, 4)).astype(np.float64)
    tx = torch.from_numpy(x).permute(0, 3, 1, 2).contiguous().requires_grad_()
    ty = F.max_pool2d(tx, 2, 2, ceil_mode=mode == "ceil")
    y, pullback = jax.vjp(lambda x: max_pool(x, mode), jnp.asarray(x))
    np.testing.assert_array_equal(y, ty.detach().permute(0, 2, 3, 1))
    cotangent = rng.normal(size=y.shape)
    ty.backward(torch.from_numpy(cotangent).permute(0, 3, 1, 2))
    np.testing.assert_array_equal(pullback(jnp.asarray(cotangent))[0], tx.grad.permute(0, 2, 3, 1))


@pytest.mark.usefixtures("kernels")
def test_the_first_of_equal_maxima_gets_the_whole_gradient():
    gradient = jax.grad(lambda x: max_pool(x, "floor").sum())
    np.testing.assert_array_equal(gradient(image([[5, 5], [5, 5]]))[0, :, :, 0], [[1, 0], [0, 0]])
    np.testing.assert_array_equal(gradient(image([[1, 5], [5, 2]]))[0, :, :, 0], [[0, 1], [0, 0]])


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("size", [(1, 1), (1, 4), (3, 5)])
def test_pooling_gradient_of_minus_infinity_goes_to_the_first_pixel_not_the_padding(size):
    gradient = jax.grad(lambda x: max_pool(x, "ceil").sum())(jnp.full((1, *size, 2), -jnp.inf))
    expected = np.zeros((1, *size, 2))
    expected[:, ::2, ::2] = 1
    np.testing.assert_array_equal(gradient, expected)


def test_pooling_works_in_bfloat16_under_remat_scan_and_pmap():
    x = jnp.asarray(np.random.default_rng(3).integers(0, 3, size=(2, 3, 5, 4)), jnp.bfloat16)
    expected = jax.grad(lambda x: (max_pool(x, "ceil") ** 2).sum())(x)

    def gradient(x):
        body = jax.checkpoint(lambda total, x: (total + (max_pool(x[None], "ceil") ** 2).sum(), None))
        return jax.grad(lambda x: jax.lax.scan(body, jnp.zeros((), x.dtype), x)[0])(x)

    assert expected.dtype == jnp.bfloat16
    np.testing.assert_array_equal(jax.jit(gradient)(x), expected)
    np.testing.assert_array_equal(jax.pmap(gradient)(x[:, None])[:, 0], expected)


def test_pooling_propagates_nan_from_any_corner():
    for corner in range(4):
        x = np.zeros(4)
        x[corner] = np.nan
        assert np.isnan(max_pool(image(x.reshape(2, 2)), "ceil")).all()


def test_batch_norm_equals_torch_and_tracks_the_unbiased_variance():
    rng = np.random.default_rng(1)
    x, scale, bias, mean = rng.normal(size=(2, 3, 2, 4)) + 3, *rng.normal(size=(3, 4))
    var = rng.uniform(0.5, 2, size=4)
    norm = torch.nn.BatchNorm2d(4).double()
    state = {"weight": scale, "bias": bias, "running_mean": mean, "running_var": var, "num_batches_tracked": 0}
    norm.load_state_dict({name: torch.tensor(value) for name, value in state.items()})
    expected = norm(torch.from_numpy(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).detach().numpy()
    variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": {"mean": mean, "var": var}}
    y, updated = BatchNorm(FLOAT64).apply(variables, jnp.asarray(x), True, mutable=["batch_stats"])
    # One division and one square root in another order.
    np.testing.assert_allclose(y, expected, rtol=1e-12)
    np.testing.assert_allclose(updated["batch_stats"]["mean"], norm.running_mean, rtol=1e-13)
    np.testing.assert_allclose(updated["batch_stats"]["var"], norm.running_var, rtol=1e-13)
    # By hand, of 12 values: the unbiased variance divides by 11.
    by_hand = 0.9 * var + 0.1 * ((x - x.mean((0, 1, 2))) ** 2).sum((0, 1, 2)) / 11
    np.testing.assert_allclose(updated["batch_stats"]["var"], by_hand, rtol=1e-13)

    norm.eval()
    expected = norm(torch.from_numpy(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).detach().numpy()
    y = BatchNorm(FLOAT64).apply({**variables, **updated}, jnp.asarray(x), False)
    np.testing.assert_allclose(y, expected, rtol=1e-12)


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_gradients_of_batch_norm_equal_those_of_torch(offset):
    rng = np.random.default_rng(4)
    x, cotangent = rng.normal(size=(2, 2, 3, 5, 4)) + np.array([offset, 0]).reshape(2, 1, 1, 1, 1)
    scale, bias = rng.normal(size=(2, 4))
    tx = torch.from_numpy(x).permute(0, 3, 1, 2).requires_grad_()
    parameters = [torch.from_numpy(v).requires_grad_() for v in (scale, bias)]
    y = F.batch_norm(tx, None, None, *parameters, training=True)
    y.backward(torch.from_numpy(cotangent).permute(0, 3, 1, 2))
    stats = {"mean": jnp.zeros(4), "var": jnp.ones(4)}

    def loss(params, x):
        y, _ = BatchNorm(FLOAT64).apply({"params": params, "batch_stats": stats}, x, True, mutable=["batch_stats"])
        return jnp.vdot(y, cotangent)

    params, dx = jax.grad(loss, (0, 1))({"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}, jnp.asarray(x))
    # At a mean of 100, deviations have an absolute error of 1e-14.
    np.testing.assert_allclose(dx, tx.grad.permute(0, 2, 3, 1), rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(params["scale"], parameters[0].grad, rtol=1e-11)
    np.testing.assert_allclose(params["bias"], parameters[1].grad, rtol=1e-12)


def test_batch_norm_over_devices_equals_the_whole_batch():
    x = jnp.asarray(np.random.default_rng(2).normal(size=(4, 2, 3, 3, 5)))
    whole = BatchNorm(FLOAT64)
    variables = whole.init(jax.random.key(0), x[0], False)
    y, updated = whole.apply(variables, x.reshape(8, 3, 3, 5), True, mutable=["batch_stats"])
    split = BatchNorm(Compute(jnp.float64, jnp.float64, axis_name="devices"))
    run = jax.vmap(lambda x: split.apply(variables, x, True, mutable=["batch_stats"]), axis_name="devices")
    parts, updates = run(x)
    np.testing.assert_allclose(parts.reshape(y.shape), y, rtol=1e-10, atol=1e-12)  # the statistics are means of means
    for name in ("mean", "var"):
        for device in range(4):
            ours = updates["batch_stats"][name][device]
            np.testing.assert_allclose(ours, updated["batch_stats"][name], rtol=1e-12, atol=1e-15)


def drop(rate, unit, x, ids, key=0, train=True):
    return np.asarray(Dropout(rate, unit).apply({}, x, train, jnp.asarray(ids), rngs={"dropout": jax.random.key(key)}))


def test_element_dropout_has_the_given_rate_and_preserves_the_mean():
    y = drop(0.3, "element", jnp.ones((4, 32, 32, 16)), np.arange(4))
    assert set(np.unique(y)) == {0.0, 1 / 0.7}
    # The bound is five standard deviations: 0.0018 each for a share of 65,536 draws.
    assert abs((y == 0).mean() - 0.3) < 0.009


def test_channel_dropout_drops_whole_channels_per_example():
    y = drop(0.5, "channel", jnp.ones((8, 3, 5, 64)), np.arange(8))
    assert (y == y[:, :1, :1]).all()
    dropped = y[:, 0, 0] == 0
    # The bound is five standard deviations: 0.022 each for a share of 512 draws.
    assert abs(dropped.mean() - 0.5) < 0.11
    assert len({row.tobytes() for row in dropped}) == 8


@pytest.mark.parametrize("unit", ["element", "channel"])
def test_a_dropout_mask_depends_only_on_the_example_id(unit):
    x = jnp.ones((4, 3, 3, 16))
    whole = drop(0.5, unit, x, [4, 5, 6, 7])
    parts = [drop(0.5, unit, x[:2], ids) for ids in ([4, 5], [6, 7])]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    np.testing.assert_array_equal(drop(0.5, unit, x, [7, 6, 5, 4]), whole[::-1])
    assert (drop(0.5, unit, x, [4, 5, 6, 7], key=1) != whole).any()


def test_dropout_does_nothing_in_evaluation_or_at_rate_zero_and_keeps_the_dtype():
    x = jnp.ones((2, 2, 2, 3))
    for y in (drop(0.5, "element", x, [0, 1], train=False), drop(0.0, "element", x, [0, 1])):
        np.testing.assert_array_equal(y, x)
    assert drop(0.5, "element", x.astype(jnp.bfloat16), [0, 1]).dtype == jnp.bfloat16


def test_convolutions_have_he_initialisation_and_zero_bias():
    params = conv(512, 3, FLOAT64).init(jax.random.key(0), jnp.zeros((1, 4, 4, 64)))["params"]
    # The standard deviation of 295k draws has an error of 0.13 %.
    assert np.std(params["kernel"]) == pytest.approx(np.sqrt(2 / (9 * 64)), rel=0.01)
    assert not params["bias"].any()


def test_channel_counts_scale_with_width_and_are_at_least_one():
    assert [scaled(512, width) for width in (1.0, 0.25, 0.05, 0.0001)] == [512, 128, 26, 1]
