"""Upsampling: transposed convolution with bilinear initialisation, and bilinear interpolation.

Output pixels that share their *phase*, the remainder of their position by the stride s, use the same ceil(k / s) taps
of a kernel of side k per axis. A *cell* is an s x s block of output pixels, one of each phase. So a transposed
convolution is a convolution at stride 1 from input pixels to cells, without inserted zeros.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fcn_jax.models.kernels import Window, conv2d, cpu_kernels_enabled, multiply_phases
from fcn_jax.models.layers import Compute


def transposed_conv(
    x: jax.Array, kernel: jax.Array, stride: int, padding: int = 0, output_padding: int = 0, precision: Any = None
) -> jax.Array:
    """Transposed convolution, as ``torch.nn.functional.conv_transpose2d``.

    out[o] = sum over i of x[i] kernel[o + padding - i stride], per axis.

    Args:
        x: (b, h, w, c_in); the result has its dtype.
        kernel: (k, k, c_in, c_out), in the dtype of x or a wider one; products are computed in the dtype of kernel.
        stride: the factor s of the upsampling.
        padding: rows and columns cropped from every side of the full output.
        output_padding: rows and columns kept beyond that at the bottom and right.
        precision: precision of the products, see ``jax.lax.Precision``.

    Returns:
        (b, h', w', c_out) with h' = (h - 1) s - 2 padding + k + output_padding, and w' likewise.
    """
    _, h, w, c_in = x.shape
    k, c_out = kernel.shape[0], kernel.shape[3]
    out_h, out_w = ((n - 1) * stride - 2 * padding + k + output_padding for n in (h, w))
    if not cpu_kernels_enabled():
        if stride > 2:
            return _by_cells(x, kernel, stride, padding, (out_h, out_w), precision)
        margins = [(k - 1 - padding, k - 1 - padding + output_padding)] * 2
        return _conv(x, kernel[::-1, ::-1], margins, precision, (stride, stride))
    if stride == 2 and k % 2 and padding <= k - 2:
        return _doubled(x, kernel, padding, (out_h, out_w), precision)  # phases have different numbers of taps
    taps = -(-k // stride)
    short = taps * stride - k
    kernel = jnp.pad(kernel, ((0, short), (0, short), (0, 0), (0, 0)))
    kernel = kernel.reshape(taps, stride, taps, stride, c_in, c_out).transpose(1, 0, 2, 4, 3, 5)
    kernel = kernel.reshape(stride, taps * taps * c_in, stride * c_out)
    rows, columns = h + taps - 1, w + taps - 1
    margin = (taps - 1, taps - 1)
    x = jnp.pad(x, ((0, 0), margin, margin, (0, 0)))
    shifts = [x[:, i : i + rows, j : j + columns] for i in reversed(range(taps)) for j in reversed(range(taps))]
    return multiply_phases(jnp.concatenate(shifts, axis=-1), kernel, Window(padding, out_h, out_w), precision)


def _conv(x: jax.Array, kernel: jax.Array, margins: Any, precision: Any, dilation: Any = (1, 1)) -> jax.Array:
    y = conv2d(x.astype(kernel.dtype), kernel, (1, 1), margins, lhs_dilation=dilation, precision=precision)
    return y.astype(x.dtype)


def _by_cells(
    x: jax.Array, kernel: jax.Array, stride: int, padding: int, size: tuple[int, int], precision: Any
) -> jax.Array:
    """Compute all pixels of a cell by one convolution at stride 1, then rearrange them; ``size`` is h', w'.

    With p = d s + e: out[n s + r] = sum over t of x[n + d - t] kernel[t s + r + e], per axis. Where e > 0, t starts at
    -1, and the kernel gets s - e zeros in front.
    """
    (_, h, w, c_in), (k, _, _, c_out), s = x.shape, kernel.shape, stride
    front = -padding % s
    taps = -(-(front + k) // s)
    margin = (front, taps * s - front - k)
    kernel = jnp.pad(kernel, (margin, margin, (0, 0), (0, 0))).reshape(taps, s, taps, s, c_in, c_out)[::-1, :, ::-1]
    kernel = kernel.transpose(0, 2, 4, 1, 3, 5).reshape(taps, taps, c_in, s * s * c_out)
    shift = -(-padding // s)
    rows, columns = (-(-n // s) for n in size)
    margins = [(taps - 1 - shift, cells - n + shift) for cells, n in ((rows, h), (columns, w))]
    cells = _conv(x, kernel, margins, precision).reshape(-1, rows, columns, s, s, c_out)
    # A product with a 0-1 matrix, which is exact, puts the columns of a row in order. The TPU compiler then makes
    # columns the innermost axis in memory; with a transposition it is the few classes, padded to 128.
    order = jnp.eye(columns * s, dtype=x.dtype).reshape(-1, columns, s)
    y = jnp.einsum("Wwq,bhwrqc->bhrWc", order, cells, precision=jax.lax.Precision.HIGHEST)
    return y.reshape(-1, rows * s, columns * s, c_out)[:, : size[0], : size[1]]


def _doubled(x: jax.Array, kernel: jax.Array, padding: int, size: tuple[int, int], precision: Any) -> jax.Array:
    """Compute a transposed convolution of stride 2 with an odd kernel, one convolution per phase.

    out[2 n + q] = sum over t of x[n + d - t] kernel[2 t + r] with q + padding = 2 d + r, per axis: a convolution of x
    with the taps r, r + 2, ... in reverse. ``size`` is h', w'; padding is at most k - 2.
    """
    cells = [-(-n // 2) for n in size]

    def phase(row: int, column: int) -> jax.Array:
        (down, r), (right, s) = divmod(row + padding, 2), divmod(column + padding, 2)
        taps = kernel[r::2, s::2][::-1, ::-1]
        sides = zip(taps.shape, (down, right), cells, x.shape[1:], strict=False)
        margins = [(side - 1 - shift, new - n + shift) for side, shift, new, n in sides]
        return conv2d(x, taps, (1, 1), margins, precision=precision)

    full = jnp.stack([jnp.stack([phase(row, 0), phase(row, 1)], axis=3) for row in (0, 1)], axis=2)
    full = full.reshape(x.shape[0], 2 * cells[0], 2 * cells[1], kernel.shape[3])
    return full[:, : size[0], : size[1]]


def bilinear_kernel(k: int) -> np.ndarray:
    """Return the (k, k) float64 kernel with which a transposed convolution interpolates bilinearly.

    Source: Caffe's bilinear filler (``include/caffe/filler.hpp``).
    """
    factor = (k + 1) // 2
    centre = factor - 1 if k % 2 else factor - 0.5
    line = 1 - np.abs(np.arange(k) - centre) / factor
    return np.outer(line, line)


def bilinear_init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Initialise a (k, k, c, c) kernel to upsample each channel bilinearly on its own; ``key`` is not used."""
    del key
    kernel = bilinear_kernel(shape[0])[:, :, None, None] * np.eye(shape[2], shape[3])
    return jnp.asarray(kernel, dtype)


class TransposedConv(nn.Module):
    """A transposed convolution with PyTorch's geometry, initialised bilinearly or, without ``bilinear``, He normal."""

    features: int
    kernel_size: int
    stride: int
    compute: Compute
    padding: int = 0
    output_padding: int = 0
    use_bias: bool = False
    bilinear: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Upsample x (b, h, w, c), see ``transposed_conv``."""
        compute, k = self.compute, self.kernel_size
        init = bilinear_init if self.bilinear else nn.initializers.he_normal()
        kernel = self.param("kernel", init, (k, k, x.shape[-1], self.features), compute.param_dtype)
        x, kernel = x.astype(compute.dtype), kernel.astype(compute.product_dtype)
        y = transposed_conv(x, kernel, self.stride, self.padding, self.output_padding, compute.precision)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros_init(), (self.features,), compute.param_dtype)
            y = y + bias.astype(compute.product_dtype)
        return y.astype(compute.dtype)


def _interpolation(size: int, new_size: int, align_corners: bool) -> np.ndarray:
    """Return the (new_size, size) float64 matrix that interpolates linearly."""
    if align_corners:
        position = np.arange(new_size) * ((size - 1) / (new_size - 1) if new_size > 1 else 0.0)
    else:
        position = np.maximum((np.arange(new_size) + 0.5) * size / new_size - 0.5, 0.0)
    low = np.minimum(np.floor(position).astype(int), size - 1)
    high = np.minimum(low + 1, size - 1)
    matrix = np.zeros((new_size, size))
    np.add.at(matrix, (np.arange(new_size), low), 1 - (position - low))
    np.add.at(matrix, (np.arange(new_size), high), position - low)
    return matrix


def resize_bilinear(
    x: jax.Array, size: tuple[int, ...], precision: Any = None, align_corners: bool = True
) -> jax.Array:
    """Resize x (b, h, w, c) bilinearly to ``size`` (height, width), as two matrix products.

    Equal to ``torch.nn.functional.interpolate(mode="bilinear")``. With ``align_corners`` the centres of the corner
    pixels are aligned, otherwise the edges of the images.
    """
    rows = jnp.asarray(_interpolation(x.shape[1], size[0], align_corners), x.dtype)
    columns = jnp.asarray(_interpolation(x.shape[2], size[1], align_corners), x.dtype)
    x = jnp.einsum("Hh,bhwc->bHwc", rows, x, precision=precision)
    return jnp.einsum("Ww,bHwc->bHWc", columns, x, precision=precision)
