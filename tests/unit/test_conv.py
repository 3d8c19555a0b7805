"""The convolution and the forms that the CPU computes it in, against the convolution of jax.lax."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fcn_jax.models import conv_cpu
from fcn_jax.models.conv_cpu import conv2d

# (b, h, w, c_in), (k or k and k', c_out), padding: what the networks have, at odd sizes.
CASES = {
    "copies of x": ((2, 9, 7, 3), (3, 8), "SAME"),
    "copies of dy": ((2, 9, 7, 8), (3, 8), "SAME"),
    "margin": ((1, 5, 4, 3), (3, 4), ((100, 100), (100, 100))),
    "one pixel": ((1, 1, 1, 4), (3, 3), "SAME"),
    "one row": ((3, 1, 11, 4), (3, 3), ((1, 1), (1, 1))),
    "valid": ((2, 8, 9, 5), (3, 4), "VALID"),
    "even kernel": ((2, 6, 5, 3), (4, 4), "SAME"),
    "lopsided": ((2, 6, 5, 4), (3, 3), ((0, 2), (3, 1))),
    "1x1": ((2, 5, 3, 8), (1, 4), "SAME"),
    "1x2": ((2, 5, 3, 8), ((1, 2), 4), ((0, 0), (0, 1))),
    "2x1": ((2, 5, 3, 4), ((2, 1), 8), ((0, 1), (0, 0))),
    "2x3 product": ((1, 2, 3, 5), ((2, 3), 64), "SAME"),
    "product": ((1, 2, 3, 5), (7, 64), "SAME"),
    "valid product": ((2, 8, 7, 3), (7, 64), "VALID"),
}


def lax_conv(x, kernel, padding, precision=None):
    dimensions = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=dimensions, precision=precision)


def our_conv(x, kernel, padding, precision=None):
    return conv2d(x, kernel, (1, 1), padding, precision=precision)


def operands(case, dtype=jnp.float64):
    shape, (k, c_out), padding = CASES[case]
    rng = np.random.default_rng(0)
    sides = k if isinstance(k, tuple) else (k, k)
    x, kernel = rng.normal(size=shape), rng.normal(size=(*sides, shape[-1], c_out))
    x, kernel = jnp.asarray(x, dtype), jnp.asarray(kernel, dtype)
    shape = jax.eval_shape(lambda x, kernel: lax_conv(x, kernel, padding), x, kernel).shape
    return x, kernel, padding, jnp.asarray(rng.normal(size=shape), dtype)


def output_and_gradients(conv, x, kernel, padding, dy, precision=None):
    y, pullback = jax.vjp(lambda x, kernel: conv(x, kernel, padding, precision), x, kernel)
    return y, *pullback(dy)


def assert_equal(ours, theirs, tolerance):
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


@pytest.mark.parametrize("block_pixels", [1, 10**6])
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_equal_those_of_lax(case, block_pixels, monkeypatch):
    monkeypatch.setattr(conv_cpu, "_BLOCK_PIXELS", block_pixels)  # blocks of four rows, or one block
    run = jax.jit(output_and_gradients, static_argnums=(0, 3))
    args = operands(case)
    assert_equal(run(our_conv, *args), run(lax_conv, *args), 1e-14)  # sums of at most 1e5 terms in another order


@pytest.mark.parametrize("case", ["copies of x", "copies of dy", "product"])
def test_bfloat16_keeps_its_dtype_and_is_as_close_as_it_can_be(case):
    ours = output_and_gradients(our_conv, *operands(case, jnp.bfloat16))
    exact = output_and_gradients(lax_conv, *operands(case))
    for a, b in zip(ours, exact, strict=True):
        assert a.dtype == jnp.bfloat16
        # Rounded once from 8 bits per operand; a carry in bfloat16 would stray farther with every block.
        assert np.linalg.norm(np.asarray(a, np.float64) - b) <= 2.0**-7 * np.linalg.norm(b)


def test_precision_reaches_every_product():
    for case in ("copies of x", "copies of dy", "product"):
        x, kernel, padding, dy = operands(case, jnp.float32)
        jaxpr = jax.make_jaxpr(
            lambda x, kernel, dy: output_and_gradients(our_conv, x, kernel, padding, dy, "highest")  # noqa: B023
        )(x, kernel, dy)
        text = str(jaxpr)
        assert "HIGHEST" in text and "precision=None" not in text


def test_it_works_recomputed_in_a_loop_and_over_devices():
    x, kernel, padding, dy = operands("copies of dy")
    expected = output_and_gradients(lax_conv, x, kernel, padding, dy)[2]

    def loss(kernel, x, dy):
        body = jax.checkpoint(
            lambda total, example: (total + jnp.vdot(our_conv(example[0], kernel, padding), example[1]), None)
        )
        return jax.lax.scan(body, jnp.zeros(()), (x[:, None], dy[:, None]))[0]

    assert_equal([jax.jit(jax.grad(loss))(kernel, x, dy)], [expected], 1e-14)
    over_devices = jax.pmap(
        lambda kernel, x, dy: jax.lax.psum(jax.grad(loss)(kernel, x, dy), "batch"), "batch", in_axes=(None, 0, 0)
    )
    assert_equal([over_devices(kernel, x[:, None], dy[:, None])[0]], [expected], 1e-14)


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
