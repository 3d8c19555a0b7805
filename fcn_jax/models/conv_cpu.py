"""The stride-1 convolution of the networks, with the forms in which the CPU computes it and its gradients fastest.

On other platforms it is ``jax.lax.conv_general_dilated`` and nothing else. On the CPU the same sums are arranged
otherwise where XLA is slow: small maps under large kernels (fc6, fc7) as one matrix product, and the gradient of the
kernel as one-dimensional convolutions over blocks of rows. Dimensions are b h w c; the kernel's height and width are
k and k'.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fcn_jax.models.platform import by_platform

__all__ = ["conv2d"]

Padding = tuple[tuple[int, int], ...]
_DIMENSIONS = ("NHWC", "HWIO", "NHWC")
# Pixels of a block in the gradient of the kernel: 64 channels of it stay in a core's cache.
_BLOCK_PIXELS = 4096


def conv2d(
    x: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    *,
    precision: Any = None,
    **fixed: Any,
) -> jax.Array:
    """Convolve at stride 1: y[p, q] = sum over i, j of x[p + i - top, q + j - left] kernel[i, j].

    Its signature is what ``flax.linen.Conv`` calls; differentiable in reverse mode.

    Args:
        x: (b, h, w, c_in).
        kernel: (k, k', c_in, c_out).
        strides: 1, 1.
        padding: "SAME", "VALID", or ((top, bottom), (left, right)).
        precision: of the products, see ``jax.lax.Precision``.
        fixed: dilations and groups of ``flax.linen.Conv``, all of them 1, and its order of dimensions.

    Returns:
        (b, h', w', c_out) with h' = h + top + bottom - k + 1, and w' likewise with k'.
    """
    del fixed
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
    return _conv(x, kernel, tuple((int(low), int(high)) for low, high in padding), precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv(x: jax.Array, kernel: jax.Array, padding: Padding, precision: Any) -> jax.Array:
    return by_platform(
        x,
        kernel,
        cpu=lambda x, kernel: _conv_cpu(x, kernel, padding, precision),
        plain=lambda x, kernel: _conv_lax(x, kernel, padding, precision),
    )


def _conv_fwd(x: jax.Array, kernel: jax.Array, padding: Padding, precision: Any) -> Any:
    return _conv(x, kernel, padding, precision), (x, kernel)


def _conv_bwd(padding: Padding, precision: Any, saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> Any:
    def gradient_x(conv: Any) -> Any:
        return lambda x, kernel, dy: jax.vjp(lambda x: conv(x, kernel, padding, precision), x)[1](dy)[0]

    def gradient_kernel(conv: Any) -> Any:
        return lambda x, kernel, dy: jax.vjp(lambda kernel: conv(x, kernel, padding, precision), kernel)[1](dy)[0]

    def gradient_kernel_cpu(x: jax.Array, kernel: jax.Array, dy: jax.Array) -> jax.Array:
        if _has_few_pixels(dy, kernel, 1 / 4):
            return gradient_kernel(_product)(x, kernel, dy)
        return _gradient_kernel_by_rows(x, dy, kernel.shape[:2], padding, precision).astype(kernel.dtype)

    # Up to here the product reads the kernel as it is, where a convolution needs it flipped and transposed.
    gradient_x_cpu = gradient_x(_product if _has_few_pixels(dy, saved[1], 4) else _conv_lax)
    # Two dispatches, so that one whose result nobody needs (of the image, of a frozen layer) is dropped.
    dx = by_platform(*saved, dy, cpu=gradient_x_cpu, plain=gradient_x(_conv_lax))
    dkernel = by_platform(*saved, dy, cpu=gradient_kernel_cpu, plain=gradient_kernel(_conv_lax))
    return dx, dkernel


_conv.defvjp(_conv_fwd, _conv_bwd)


def _conv_lax(x: jax.Array, kernel: jax.Array, padding: Padding, precision: Any) -> jax.Array:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=_DIMENSIONS, precision=precision)


def _conv_cpu(x: jax.Array, kernel: jax.Array, padding: Padding, precision: Any) -> jax.Array:
    y = jax.eval_shape(functools.partial(_conv_lax, padding=padding, precision=precision), x, kernel)
    return (_product if _has_few_pixels(y, kernel, 1 / 4) else _conv_lax)(x, kernel, padding, precision)


def _has_few_pixels(y: Any, kernel: jax.Array, share: float) -> bool:
    """Tell whether all patches under the kernel are at most ``share`` of the kernel's size, or need no copy (1x1)."""
    b, h, w, c_out = y.shape
    return kernel.shape[:2] == (1, 1) or b * h * w <= share * c_out


def _product(x: jax.Array, kernel: jax.Array, padding: Padding, precision: Any) -> jax.Array:
    """Convolve as one matrix product of all patches (b h' w', k k' c_in) with the kernel (k k' c_in, c_out)."""
    rows, columns, _, c_out = kernel.shape
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    b, h, w = x.shape[0], x.shape[1] - rows + 1, x.shape[2] - columns + 1
    patches = jnp.concatenate([x[:, i : i + h, j : j + w] for i in range(rows) for j in range(columns)], axis=-1)
    y = jnp.matmul(patches.reshape(b * h * w, -1), kernel.reshape(-1, c_out), precision=precision)
    return y.reshape(b, h, w, c_out)


def _shifted(x: jax.Array, axis: int, margins: list[tuple[int, int]], along: int) -> jax.Array:
    """Return copies of x, each padded by its margins (below zero: cut) on one axis, side by side along another."""

    def pad(low: int, high: int) -> jax.Array:
        config = [(low, high, 0) if a == axis else (0, 0, 0) for a in range(x.ndim)]
        return jax.lax.pad(x, jnp.zeros((), x.dtype), config)

    return jax.lax.optimization_barrier(jnp.concatenate([pad(*margin) for margin in margins], along))


def _gradient_kernel_by_rows(
    x: jax.Array, dy: jax.Array, sides: tuple[int, ...], padding: Padding, precision: Any
) -> jax.Array:
    """Return the gradient of the kernel, added up over blocks of rows of the output.

    dkernel[i, j] = sum over b, p, q of x[b, p + i - top, q + j - left] dy[b, p, q]. In a block, the sum over p is a
    one-dimensional convolution whose spatial axis is the rows, whose contracted channels are the images' columns
    (b q), whose batch is c_in and whose output channels are c_out: its k outputs are the taps i. The taps j are
    copies, shifted by a column each, of x or of dy, whichever has fewer channels.

    Args:
        x: (b, h, w, c_in).
        dy: (b, h', w', c_out).
        sides: height k and width k' of the kernel.
        padding: of the convolution.
        precision: of the products.

    Returns:
        (k, k', c_in, c_out), in float32 or better.
    """
    b, h, w, c_out = dy.shape
    (k, taps), c_in = sides, x.shape[-1]
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    rows = min(h, max(4, _BLOCK_PIXELS // (b * w)))
    blocks = -(-h // rows)
    (top, bottom), (left, right) = padding
    x = jnp.pad(x, ((0, 0), (top, bottom + blocks * rows - h), (0, 0), (0, 0)))
    dy = jnp.pad(dy, ((0, 0), (0, blocks * rows - h), (0, 0), (0, 0)))
    shift_x = c_in < c_out

    def add_block(total: jax.Array, block: jax.Array) -> tuple[jax.Array, None]:
        xs = jax.lax.dynamic_slice_in_dim(x, block * rows, rows + k - 1, axis=1)
        dys = jax.lax.dynamic_slice_in_dim(dy, block * rows, rows, axis=1).transpose(1, 0, 2, 3)
        # The barriers keep XLA from computing the copies anew, element by element, inside of what reads them.
        xs = jax.lax.optimization_barrier(xs.transpose(3, 1, 0, 2))
        if shift_x:
            xs = _shifted(xs, 3, [(left - j, right - (taps - 1 - j)) for j in range(taps)], 0)
        else:
            dys = jax.lax.optimization_barrier(dys)
            dys = _shifted(dys, 2, [(j - left, taps - 1 - j - right) for j in range(taps)], 3)
        part = jax.lax.conv_general_dilated(
            xs.reshape(*xs.shape[:2], -1),
            dys.reshape(rows, -1, dys.shape[-1]),
            (1,),
            "VALID",
            dimension_numbers=("NHC", "HIO", "NHC"),
            precision=precision,
            preferred_element_type=dtype,
        )
        return total + part, None

    shape = (taps * c_in, k, c_out) if shift_x else (c_in, k, taps * c_out)
    total, _ = jax.lax.scan(add_block, jnp.zeros(shape, dtype), jnp.arange(blocks))
    if shift_x:
        return total.reshape(taps, c_in, k, c_out).transpose(2, 0, 1, 3)
    return total.reshape(c_in, k, taps, c_out).transpose(1, 2, 0, 3)
