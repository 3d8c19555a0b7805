"""The CPU's kernels compute what plain JAX does, and other platforms get plain JAX alone."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_networks import make_network

from fcn_jax.models import kernels
from fcn_jax.models.kernels import conv2d, plain_kernels
from fcn_jax.models.upsample import transposed_conv

# (b, h, w, c_in), (k or k and k', c_out), padding: what the networks have, at odd sizes.
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
    "transposed": (lambda x, w, p: transposed_conv(x, w, 2, 1, 0, p), (2, 4, 3, 3), (4, 4, 3, 5)),
    "transposed, odd": (lambda x, w, p: transposed_conv(x, w, 2, 1, 1, p), (2, 4, 3, 3), (3, 3, 3, 5)),
}


def products(case):
    operation, *shapes = PRODUCTS[case]
    rng = np.random.default_rng(3)
    x, w = (jnp.asarray(rng.normal(size=shape)) for shape in shapes)
    return operation, x, w, jnp.asarray(rng.normal(size=jax.eval_shape(operation, x, w, None).shape))


@pytest.mark.parametrize("case", PRODUCTS)
def test_products_keep_bfloat16_and_are_rounded_once_and_precision_reaches_all(case):
    operation, x, w, dy = products(case)

    @functools.partial(jax.jit, static_argnums=3)
    def run(x, w, dy, precision=None):
        y, pullback = jax.vjp(lambda x, w: operation(x, w, precision), x, w)
        return y, *pullback(dy)

    for ours, exact in zip(run(*(a.astype(jnp.bfloat16) for a in (x, w, dy))), run(x, w, dy), strict=True):
        assert ours.dtype == jnp.bfloat16
        # Rounded once from 8 bits per operand; a carry in bfloat16 would stray farther with every block.
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
    # Another order of two terms.
    assert_equal([jax.jit(jax.grad(loss))(w, x, dy)], [expected], 1e-14)
    assert_equal([over_devices(w, x[:, None], dy[:, None])[0]], [expected], 1e-14)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("case", ["copies of x", "copies of dy", "product", "1x1"])
def test_other_platforms_get_the_convolutions_of_lax_and_nothing_else(case, platform):
    x, kernel, padding, dy = operands(case, jnp.float32)

    def program(conv):
        def run(x, kernel, dy):
            return output_and_gradients(conv, x, kernel, padding, dy)

        text = jax.jit(run).trace(x, kernel, dy).lower(lowering_platforms=(platform,)).as_text()
        operation = r"stablehlo\.(?!case|constant|return)\w+|dim_numbers = \S+ \S+ \S+ \S+"
        return sorted(re.findall(operation, text))

    assert program(our_conv) == program(lax_conv)
    assert program(our_conv).count("stablehlo.convolution") == 3


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

    def loops_and_products(platform):
        text = jax.jit(run).trace(x, w).lower(lowering_platforms=(platform,)).as_text()
        return text.count("stablehlo.while"), text.count("stablehlo.dot_general")

    assert loops_and_products("cuda") == loops_and_products("tpu") == (0, 3)
    whole = (2 * s - 2 * p + k) % s == 0
    assert (loops_and_products("cpu")[0] > 0) is whole
    ours = jax.jit(run)(x, w)
    with plain_kernels():
        plain = jax.jit(lambda x, w: run(x, w))(x, w)  # a new function: not traced before
    assert_equal(jax.tree.leaves(ours), jax.tree.leaves(plain), 1e-14)


def test_plain_kernels_leave_no_custom_derivative():
    model, variables = make_network("fcn8s")
    images = jnp.asarray(np.random.default_rng(0).normal(size=(1, 9, 9, 3)))

    def forward(images):
        return model.apply(variables, images)

    def program():
        jaxpr = jax.make_jaxpr(lambda images: forward(images))(images)  # a new function: not traced before
        return {name for name in ("custom_vjp", "platform_index") if name in str(jaxpr)}

    assert program() == {"custom_vjp", "platform_index"}
    with plain_kernels():
        assert program() == set()
        # In forward mode the derivative along a direction is what differences say.
        direction = jnp.ones_like(images)
        slope = jax.jit(lambda x: jax.jvp(forward, (x,), (direction,))[1])(images)
        difference = jax.jit(lambda x: forward(x + 1e-6 * direction) - forward(x - 1e-6 * direction))(images) / 2e-6
    np.testing.assert_allclose(slope, difference, rtol=1e-6, atol=1e-7 * float(jnp.abs(slope).max()))
