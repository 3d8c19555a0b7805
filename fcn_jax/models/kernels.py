"""Kernels that are faster than XLA's own on the CPU, behind one switch: ``cpu_kernels``.

The default on every platform is plain JAX. The kernels compute the same sums in another order, and define their own
gradients, in reverse mode only. Dimensions are b h w c; a kernel's height and width are k and k'.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Padding = tuple[tuple[int, int], ...]

# Part of the key of jit's cache: a function traced within the context is traced again outside of it.
_CPU_KERNELS: Any = jax.make_user_context(default_value=None)


@contextmanager
def cpu_kernels(enabled: bool = True) -> Iterator[None]:
    """Use the CPU kernels in what is traced within this context: faster, and differentiable once, in reverse mode.

    Only for programs that are compiled for the CPU. It also works as a decorator. Within ``cpu_kernels(False)`` they
    stay off, even in a nested ``cpu_kernels(True)``.
    """
    with _CPU_KERNELS(enabled and _CPU_KERNELS.value is not False):
        yield


def cpu_kernels_enabled() -> bool:
    """Return whether the CPU kernels are enabled for what is traced now."""
    return bool(_CPU_KERNELS.value)


def _with_cpu_kernels(
    plain: Callable[..., jax.Array], forward: Callable[..., jax.Array], gradients: Callable[..., Any]
) -> Callable[..., jax.Array]:
    """Return an operation that runs ``plain`` or, within ``cpu_kernels``, ``forward`` and ``gradients``.

    ``plain`` and ``forward``: (x, kernel, geometry, precision) -> y, the last two hashable; ``gradients``:
    (x, kernel, dy, geometry, precision) -> (dx, dkernel).
    """
    run = jax.custom_vjp(forward, nondiff_argnums=(2, 3))

    def run_forward(x: jax.Array, kernel: jax.Array, *fixed: Any) -> Any:
        return forward(x, kernel, *fixed), (x, kernel)

    def run_backward(geometry: Any, precision: Any, saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> Any:
        return gradients(*saved, dy, geometry, precision)

    run.defvjp(run_forward, run_backward)
    return lambda *arguments: (run if cpu_kernels_enabled() else plain)(*arguments)


# Convolution at stride 1

# Pixels per block in the gradient of the kernel: with 64 channels a block fits into a core's cache.
_BLOCK_PIXELS = 4096
_NHWC = ("NHWC", "HWIO", "NHWC")


def conv2d(
    x: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    *,
    lhs_dilation: Sequence[int] = (1, 1),
    rhs_dilation: Sequence[int] = (1, 1),
    feature_group_count: int = 1,
    dimension_numbers: Any = _NHWC,
    precision: Any = None,
) -> jax.Array:
    """Convolve as ``jax.lax.conv_general_dilated``, with the same signature.

    Args:
        x: (b, h, w, c_in).
        kernel: (k, k', c_in / groups, c_out).
        strides: of the output. Strides, dilations or groups other than 1 always run plain JAX.
        padding: "SAME", "VALID", or ((top, bottom), (left, right)).
        lhs_dilation: dilation of x.
        rhs_dilation: dilation of the kernel.
        feature_group_count: number of groups.
        dimension_numbers: NHWC, HWIO, NHWC, as lax or Flax write them.
        precision: precision of the products, see ``jax.lax.Precision``.

    Returns:
        (b, h', w', c_out); at stride 1 y[p, q] = sum over i, j of x[p + i - top, q + j - left] kernel[i, j].
    """
    special = {*strides, *lhs_dilation, *rhs_dilation, feature_group_count} != {1}
    if special or not cpu_kernels_enabled():
        geometry = (strides, padding, lhs_dilation, rhs_dilation, dimension_numbers, feature_group_count)
        return jax.lax.conv_general_dilated(x, kernel, *geometry, precision=precision)
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
    return _conv(x, kernel, tuple((int(low), int(high)) for low, high in padding), precision)


def _conv_plain(x: jax.Array, kernel: jax.Array, padding: Padding, precision: Any) -> jax.Array:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=_NHWC, precision=precision)


def _conv_product(x: jax.Array, kernel: jax.Array, padding: Padding, precision: Any) -> jax.Array:
    """Convolve as one matrix product of all patches (b h' w', k k' c_in) with the kernel (k k' c_in, c_out)."""
    rows, columns, _, c_out = kernel.shape
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    b, h, w = x.shape[0], x.shape[1] - rows + 1, x.shape[2] - columns + 1
    patches = jnp.concatenate([x[:, i : i + h, j : j + w] for i in range(rows) for j in range(columns)], axis=-1)
    y = jnp.matmul(patches.reshape(b * h * w, -1), kernel.reshape(-1, c_out), precision=precision)
    return y.reshape(b, h, w, c_out)


def _has_few_pixels(y: Any, kernel: jax.Array, share: float) -> bool:
    """Return whether the patches have at most ``share`` of the kernel's elements, or need no copy (1x1)."""
    b, h, w, c_out = y.shape
    return kernel.shape[:2] == (1, 1) or b * h * w <= share * c_out


def _conv_cpu(x: jax.Array, kernel: jax.Array, padding: Padding, precision: Any) -> jax.Array:
    y = jax.eval_shape(functools.partial(_conv_plain, padding=padding, precision=precision), x, kernel)
    return (_conv_product if _has_few_pixels(y, kernel, 1 / 4) else _conv_plain)(x, kernel, padding, precision)


def _conv_gradients_cpu(x: jax.Array, kernel: jax.Array, dy: jax.Array, padding: Padding, precision: Any) -> Any:
    # Up to this size use the product: it reads the kernel as it is, and a convolution has to flip and transpose it.
    conv = _conv_product if _has_few_pixels(dy, kernel, 4) else _conv_plain
    (dx,) = jax.vjp(lambda x: conv(x, kernel, padding, precision), x)[1](dy)
    if _has_few_pixels(dy, kernel, 1 / 4):
        (dkernel,) = jax.vjp(lambda kernel: _conv_product(x, kernel, padding, precision), kernel)[1](dy)
    else:
        dkernel = _gradient_kernel_by_rows(x, dy, kernel.shape[:2], padding, precision).astype(kernel.dtype)
    return dx, dkernel


def _shifted(x: jax.Array, axis: int, margins: list[tuple[int, int]], along: int) -> jax.Array:
    """Return copies of x, each padded (cropped if negative) by its margins on one axis, concatenated along another."""

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

    ``sides`` are k and k'. The result (k, k', c_in, c_out) is in float32 or better.
    """
    b, h, w, c_out = dy.shape
    (k, taps), c_in = sides, x.shape[-1]
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    rows = min(h, max(4, _BLOCK_PIXELS // max(1, b * w)))
    blocks = -(-h // rows)
    (top, bottom), (left, right) = padding
    x = jnp.pad(x, ((0, 0), (top, bottom + blocks * rows - h), (0, 0), (0, 0)))
    dy = jnp.pad(dy, ((0, 0), (0, blocks * rows - h), (0, 0), (0, 0)))
    shift_x = c_in < c_out

    def add_block(total: jax.Array, block: jax.Array) -> tuple[jax.Array, None]:
        xs = jax.lax.dynamic_slice_in_dim(x, block * rows, rows + k - 1, axis=1)
        dys = jax.lax.dynamic_slice_in_dim(dy, block * rows, rows, axis=1).transpose(1, 0, 2, 3)
        # The barriers keep XLA from fusing the copies into their consumers, which would recompute each element.
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


_conv = _with_cpu_kernels(_conv_plain, _conv_cpu, _conv_gradients_cpu)


# The products of a transposed convolution. All cells at once are as large as the output. One row phase at a time stays
# in the cache, and its product is already rows of the output.


class Window(NamedTuple):
    """The part of all cells' pixels that is the output: it starts after ``padding`` rows and columns."""

    padding: int
    height: int
    width: int


def multiply_phases(patches: jax.Array, kernel: jax.Array, window: Window, precision: Any) -> jax.Array:
    """Multiply patches by the phases of a kernel and arrange the products as pixels; see ``upsample.transposed_conv``.

    Args:
        patches: (b, rows, columns, n), for each cell the input pixels that contribute to it.
        kernel: (s, n, s c), for each row phase the taps of all column phases.
        window: of the output (b, height, width, c).
        precision: precision of the products.
    """
    return _phases(patches, kernel, window, precision)


def _phases_plain(patches: jax.Array, kernel: jax.Array, window: Window, precision: Any) -> jax.Array:
    b, rows, columns, _ = patches.shape
    s, c = kernel.shape[0], kernel.shape[2] // kernel.shape[0]
    full = jnp.einsum("bhwi,rio->bhrwo", patches, kernel, precision=precision).reshape(b, rows * s, columns * s, c)
    # Output padding may reach past the last whole cell, where no input pixel arrives.
    padding, height, width = window
    below, beside = max(0, padding + height - rows * s), max(0, padding + width - columns * s)
    full = jnp.pad(full, ((0, 0), (0, below), (0, beside), (0, 0)))
    return full[:, padding : padding + height, padding : padding + width]


def _has_whole_cells(patches: jax.Array, kernel: jax.Array, window: Window) -> bool:
    """Return whether the output has equally many rows of each phase and lies within the cells, as for k = 2s."""
    _, rows, columns, _ = patches.shape
    s = kernel.shape[0]
    padding, height, width = window
    within = padding // s * s + height + (s if padding % s else 0) <= rows * s and padding + width <= columns * s
    return height % s == 0 and within


def _row_phases(s: int, padding: int) -> Iterator[tuple[int, np.ndarray, slice]]:
    """Yield, for the one or two cells that s rows of the output lie in: which cell, which rows, which row phases."""
    cell, first = divmod(padding, s)
    yield cell, np.arange(s - first), slice(first, s)
    if first:
        yield cell + 1, np.arange(s - first, s), slice(0, first)


def _phases_by_row(patches: jax.Array, kernel: jax.Array, window: Window, precision: Any) -> jax.Array:
    if not _has_whole_cells(patches, kernel, window):
        return _phases_plain(patches, kernel, window, precision)
    b, _, columns, n = patches.shape
    s, c = kernel.shape[0], kernel.shape[2] // kernel.shape[0]
    padding, height, width = window
    count = height // s
    out = jnp.zeros((b, count, s, width * c), jnp.result_type(patches, kernel))
    for cell, rows, phases in _row_phases(s, padding):
        of_cells = patches[:, cell : cell + count].reshape(b * count * columns, n)

        def write(out: jax.Array, row: Any, of_cells: jax.Array = of_cells) -> tuple[jax.Array, None]:
            index, taps = row
            # The barrier keeps XLA from fusing the product into the copy, element by element.
            pixels = jax.lax.optimization_barrier(jnp.matmul(of_cells, taps, precision=precision))
            pixels = pixels.reshape(b, count, columns * s * c)[:, :, padding * c : (padding + width) * c]
            return jax.lax.dynamic_update_slice_in_dim(out, pixels[:, :, None], index, axis=2), None

        out, _ = jax.lax.scan(write, out, (rows, kernel[phases]))
    return out.reshape(b, height, width, c)


def _phases_gradients_by_row(
    patches: jax.Array, kernel: jax.Array, dy: jax.Array, window: Window, precision: Any
) -> tuple[jax.Array, jax.Array]:
    if not _has_whole_cells(patches, kernel, window):
        return jax.vjp(functools.partial(_phases_plain, window=window, precision=precision), patches, kernel)[1](dy)
    b, _, columns, n = patches.shape
    s, c = kernel.shape[0], kernel.shape[2] // kernel.shape[0]
    padding, height, width = window
    count = height // s
    dtype = jnp.promote_types(patches.dtype, jnp.float32)
    dy = dy.reshape(b, count, s, width * c)
    margin = (padding * c, (columns * s - padding - width) * c)
    dpatches = jnp.zeros(patches.shape, dtype)
    dkernel: list[jax.Array] = []
    for cell, rows, phases in _row_phases(s, padding):
        transposed = jax.lax.optimization_barrier(patches[:, cell : cell + count].reshape(b * count * columns, n).T)

        def add(total: jax.Array, row: Any, transposed: jax.Array = transposed) -> tuple[jax.Array, jax.Array]:
            index, taps = row
            pixels = jax.lax.dynamic_slice_in_dim(dy, index, 1, axis=2)[:, :, 0]
            pixels = jnp.pad(pixels, ((0, 0), (0, 0), margin)).reshape(b * count * columns, s * c)
            # Both products read this copy; without the barrier each would make its own.
            pixels = jax.lax.optimization_barrier(pixels)
            part = jnp.matmul(pixels, taps.T, precision=precision, preferred_element_type=dtype)
            return total + part, jnp.matmul(transposed, pixels, precision=precision)

        total, parts = jax.lax.scan(add, jnp.zeros((b * count * columns, n), dtype), (rows, kernel[phases]))
        dpatches = dpatches.at[:, cell : cell + count].add(total.reshape(b, count, columns, n))
        dkernel.insert(0, parts)  # the second cell has the first row phases
    return dpatches.astype(patches.dtype), jnp.concatenate(dkernel)


_phases = _with_cpu_kernels(_phases_plain, _phases_by_row, _phases_gradients_by_row)


# Max pooling


def max_pool(x: jax.Array, mode: Literal["ceil", "floor"]) -> jax.Array:
    """Take the maximum of 2x2 windows of x (b, h, w, c) at stride 2; NaN wins.

    Of equal maxima the first in row-major order takes the gradient, as in PyTorch
    (``aten/native/cpu/MaxPoolKernel.cpp``); ``jnp.maximum`` would split it. An odd last row or column has a window of
    its own ("ceil", Caffe) or is dropped ("floor").
    """
    if not cpu_kernels_enabled():
        return nn.max_pool(x, window_shape=(2, 2), strides=(2, 2), padding="SAME" if mode == "ceil" else "VALID")
    _, h, w, _ = x.shape
    if mode == "ceil":
        x = jnp.pad(x, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)), constant_values=-np.inf)
    return _max_pool(x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2])


def _corners(x: jax.Array) -> list[jax.Array]:
    """Return the four pixels of every 2x2 window, in row-major order, each (b, h / 2, w / 2, c)."""
    return [x[:, row::2, column::2] for row in (0, 1) for column in (0, 1)]


@jax.custom_vjp
def _max_pool(x: jax.Array) -> jax.Array:
    return functools.reduce(jnp.maximum, _corners(x))


def _max_pool_forward(x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    y = _max_pool(x)
    return y, (x, y)


def _max_pool_backward(saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array]:
    """Give each window's gradient to its first corner that equals the maximum, by one selection over the whole map.

    On the CPU, XLA's own gradient of a pooling, select-and-scatter, is several times slower.
    """
    x, y = saved
    a, b, c, _ = _corners(x)
    first = jnp.where(a == y, 0, jnp.where(b == y, 1, jnp.where(c == y, 2, 3)))
    position = jnp.arange(4).reshape(2, 1, 2, 1)
    dx = jnp.where(first[:, :, None, :, None] == position, dy[:, :, None, :, None], 0)
    return (dx.reshape(x.shape),)


_max_pool.defvjp(_max_pool_forward, _max_pool_backward)
