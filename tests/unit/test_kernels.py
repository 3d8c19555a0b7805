"""The CPU kernels equal plain JAX. Outside their context only plain JAX is used."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_networks import make_network

from fcn_jax.models import kernels
from fcn_jax.models.kernels import conv2d, cpu_kernels
from fcn_jax.models.upsample import transposed_conv

# (b, h, w, c_in), (k or k and k', c_out), padding: as in the networks, at odd sizes.
CASES = {
    "copies of x": ((2, 9, 7, 3), (3, 8), "SAME"), "copies of dy": ((2, 9, 7, 8), (3, 8), "SAME"),
    "margin": ((1, 5, 4, 3), (3, 4), ((100, 100), (100, 100))), "one pixel": ((1, 1, 1, 4), (3, 3), "SAME"),
    "one row": ((3, 1, 11, 4), (3, 3), ((1, 1), (1, 1))), "valid": ((2, 8, 9, 5), (3, 4), "VALID"),
    "even kernel": ((2, 6, 5, 3), (4, 4), "SAME"), "uneven": ((2, 6, 5, 4), (3, 3), ((0, 2), (3, 1))),
    "1x1": ((2, 5, 3, 8), (1, 4), "SAME"), "1x2": ((2, 5, 3, 8), ((1, 2), 4), ((0, 0), (0, 1))),
    "2x1": ((2, 5, 3, 4), ((2, 1), 8), ((0, 1), (0, 0))), "2x3 product": ((1, 2, 3, 5), ((2, 3), 64), "SAME"),
    "product": ((1, 2, 3, 5), (7, 64), "SAME"), "valid product": ((2, 8, 7, 3), (7, 64), "VALID"),
}  # fmt: skip


def lax_conv(x, kernel, padding):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


@cpu_kernels()
def our_conv(x, kernel, padding, precision=None):
    return conv2d(x, kernel, (1, 1), padding, precision=precision)


def operands(case, dtype=jnp.float64):
    """Return x, kernel, padding and the gradient of the output."""
    shape, (k, c_out), padding = CASES[case]
    rng = np.random.default_rng(0)
    sides = k if isinstance(k, tuple) else (k, k)
    x, kernel = rng.normal(size=shape), rng.normal(size=(*sides, shape[-1], c_out))
    x, kernel = jnp.asarray(x, dtype), jnp.asarray(kernel, dtype)
    shape = jax.eval_shape(lambda x, kernel: lax_conv(x, kernel, padding), x, kernel).shape
    return x, kernel, padding, jnp.asarray(rng.normal(size=shape), dtype)


def output_and_gradients(conv, x, kernel, padding, dy):
    y, pullback = jax.vjp(lambda x, kernel: conv(x, kernel, padding), x, kernel)
    return y, *pullback(dy)


def assert_equal(ours, theirs, tolerance):
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


@pytest.mark.parametrize("case", CASES)
def test_convolution_and_gradients_equal_those_of_lax(case, monkeypatch):
    x, kernel, padding, dy = operands(case)

    @jax.jit
    def run(x, kernel, dy):
        found = []
        for block_pixels in (1, 10**6):  # blocks of four rows, or one block
            monkeypatch.setattr(kernels, "_BLOCK_PIXELS", block_pixels)
            found.append(output_and_gradients(our_conv, x, kernel, padding, dy))
        return found, output_and_gradients(lax_conv, x, kernel, padding, dy)

    ours, expected = run(x, kernel, dy)
    for found in ours:
        assert_equal(found, expected, 1e-14)  # sums of at most 1e5 terms in another order


# (x, w, precision) -> y, shape of x, shape of w
PRODUCTS = {
    "copies of x": (lambda x, w, p: our_conv(x, w, "SAME", p), (2, 9, 7, 3), (3, 3, 3, 8)),
    "copies of dy": (lambda x, w, p: our_conv(x, w, "SAME", p), (2, 9, 7, 8), (3, 3, 8, 8)),
    "product": (lambda x, w, p: our_conv(x, w, "SAME", p), (2, 2, 3, 5), (7, 7, 5, 64)),
    "transposed": (cpu_kernels()(lambda x, w, p: transposed_conv(x, w, 2, 1, 0, p)), (2, 4, 3, 3), (4, 4, 3, 5)),
    "transposed, odd": (cpu_kernels()(lambda x, w, p: transposed_conv(x, w, 2, 1, 1, p)), (2, 4, 3, 3), (3, 3, 3, 5)),
}


def products(case):
    operation, *shapes = PRODUCTS[case]
    rng = np.random.default_rng(3)
    x, w = (jnp.asarray(rng.normal(size=shape)) for shape in shapes)
    return operation, x, w, jnp.asarray(rng.normal(size=jax.eval_shape(operation, x, w, None).shape))


@pytest.mark.parametrize("case", PRODUCTS)
def test_bfloat16_products_are_rounded_once_and_use_the_given_precision(case):
    operation, x, w, dy = products(case)

    @functools.partial(jax.jit, static_argnums=3)
    def run(x, w, dy, precision=None):
        y, pullback = jax.vjp(lambda x, w: operation(x, w, precision), x, w)
        return y, *pullback(dy)

    for ours, exact in zip(run(*(a.astype(jnp.bfloat16) for a in (x, w, dy))), run(x, w, dy), strict=True):
        assert ours.dtype == jnp.bfloat16
        # Operands have 8 bits and the result is rounded once. Sums in bfloat16 would lose more with every block.
        assert np.linalg.norm(np.asarray(ours, np.float64) - exact) <= 2.0**-7 * np.linalg.norm(exact)
    text = str(jax.make_jaxpr(lambda x, w, dy: run(x, w, dy, "highest"))(x, w, dy))
    assert "HIGHEST" in text and "precision=None" not in text


@pytest.mark.parametrize("case", PRODUCTS)
def test_products_work_under_remat_scan_and_pmap(case):
    operation, x, w, dy = products(case)
    expected = jax.jit(jax.grad(lambda w: jnp.vdot(operation(x, w, None), dy)))(w)

    def loss(w, x, dy):
        def body(total, example):
            return total + jnp.vdot(operation(example[0][None], w, None), example[1]), None

        return jax.lax.scan(jax.checkpoint(body), jnp.zeros(()), (x, dy))[0]

    over_devices = jax.pmap(
        lambda w, x, dy: jax.lax.psum(jax.grad(loss)(w, x, dy), "batch"), "batch", in_axes=(None, 0, 0)
    )
    # Two terms are added in another order.
    assert_equal([jax.jit(jax.grad(loss))(w, x, dy)], [expected], 1e-14)
    assert_equal([over_devices(w, x[:, None], dy[:, None])[0]], [expected], 1e-14)


OPTIONS = {
    "stride": ({"strides": (2, 2)}, 3), "dilated kernel": ({"rhs_dilation": (2, 2)}, 3),
    "dilated input": ({"lhs_dilation": (1, 2)}, 3), "groups": ({"feature_group_count": 3}, 1),
}  # fmt: skip


@pytest.mark.parametrize("case", OPTIONS)
def test_strides_dilations_and_groups_are_left_to_lax(case):
    options, c_in = OPTIONS[case]
    rng = np.random.default_rng(0)
    x, kernel = jnp.asarray(rng.normal(size=(1, 7, 9, 3))), jnp.asarray(rng.normal(size=(3, 3, c_in, 6)))
    layer = nn.Conv(
        6, (3, 3), options.get("strides", 1), ((1, 1), (1, 1)), use_bias=False, conv_general_dilated=conv2d,
        input_dilation=options.get("lhs_dilation", 1), kernel_dilation=options.get("rhs_dilation", 1),
        feature_group_count=options.get("feature_group_count", 1),
    )  # fmt: skip
    with cpu_kernels():
        ours = layer.apply({"params": {"kernel": kernel}}, x)
        plain = jax.jvp(lambda x: layer.apply({"params": {"kernel": kernel}}, x), (x,), (x,))[1]
    theirs = layer.clone(conv_general_dilated=None).apply({"params": {"kernel": kernel}}, x)
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(plain, theirs)  # forward mode: along x, a linear function is its own derivative


def test_large_maps_are_never_unrolled_into_patches():
    x, kernel = jnp.zeros((1, 64, 64, 8)), jnp.zeros((7, 7, 8, 64))
    text = jax.jit(lambda x, kernel: our_conv(x, kernel, "SAME")).lower(x, kernel).as_text()
    assert "stablehlo.convolution" in text and "dot_general" not in text


@pytest.mark.parametrize(("k", "s", "p"), [(4, 2, 1), (16, 8, 4), (16, 8, 0), (6, 2, 2), (5, 3, 1)])
def test_a_transposed_convolution_by_rows_equals_the_plain_one(k, s, p):
    rng = np.random.default_rng(2)
    x, w = jnp.asarray(rng.normal(size=(2, 3, 4, 3))), jnp.asarray(rng.normal(size=(k, k, 3, 5)))

    def run(x, w):
        def value(x, w):
            y = transposed_conv(x, w, s, p)
            return (y**2).sum(), y

        return jax.value_and_grad(value, (0, 1), has_aux=True)(x, w)

    by_rows = cpu_kernels()(run)
    assert "stablehlo.while" not in jax.jit(run).lower(x, w).as_text()
    whole = (2 * s - 2 * p + k) % s == 0
    assert ("stablehlo.while" in jax.jit(by_rows).lower(x, w).as_text()) is whole
    # float64 sums in another order.
    assert_equal(jax.tree.leaves(jax.jit(by_rows)(x, w)), jax.tree.leaves(jax.jit(run)(x, w)), 1e-14)


def test_a_function_jitted_in_the_context_is_retraced_outside():
    model, variables = make_network("fcn8s")
    images = jnp.asarray(np.random.default_rng(0).normal(size=(1, 9, 9, 3)))
    forward = jax.jit(lambda images: model.apply(variables, images))

    def has_custom_derivatives():
        return "custom_vjp" in str(jax.make_jaxpr(forward)(images))

    with cpu_kernels():
        forward(images)
        assert has_custom_derivatives()
        with pytest.raises(TypeError, match="forward-mode"):
            jax.jvp(forward, (images,), (images,))
        with cpu_kernels(False), cpu_kernels():
            assert not has_custom_derivatives()
    assert not has_custom_derivatives()
    jax.jvp(forward, (images,), (images,))
