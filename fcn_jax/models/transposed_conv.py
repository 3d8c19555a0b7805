"""Transposed convolution in its polyphase form: no zeros inserted, dense products forward and backward.

Dimensions are b h w c; the kernel's side is k, the stride s. Output pixels that share their *phase*, the remainder of
their padded position by the stride, meet the same ceil(k / s) taps per axis. A *cell* is the s x s block of output
pixels, one of each phase, that meet the same input pixels.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fcn_jax.models.conv_cpu import conv2d
from fcn_jax.models.platform import by_platform

__all__ = ["transposed_conv"]


class _Window(NamedTuple):
    """The part of all cells' pixels that is the output."""

    padding: int
    """Rows and columns before it."""
    height: int
    width: int


def transposed_conv(
    x: jax.Array, kernel: jax.Array, stride: int, padding: int = 0, output_padding: int = 0, precision: Any = None
) -> jax.Array:
    """Convolve with the stride on the output side.

    out[o] = sum over i of x[i] kernel[o + padding - i stride], per axis: a product of the shifted inputs with the
    kernel cut into stride x stride phases. An odd kernel, whose phases differ in their taps, is convolved phase by
    phase at stride 2. Equal to ``torch.nn.functional.conv_transpose2d`` with the kernel's axes in the order
    k, k, in, out. Differentiable in reverse mode.

    Args:
        x: (b, h, w, c_in).
        kernel: (k, k, c_in, c_out).
        stride: the factor s of the upsampling.
        padding: rows and columns cut from every side of the full output.
        output_padding: rows and columns kept beyond that at the bottom and right.
        precision: of the products, see ``jax.lax.Precision``.

    Returns:
        (b, h', w', c_out) with h' = (h - 1) s - 2 padding + k + output_padding, and w' likewise.
    """
    _, h, w, c_in = x.shape
    k, c_out = kernel.shape[0], kernel.shape[3]
    out_h, out_w = ((n - 1) * stride - 2 * padding + k + output_padding for n in (h, w))
    if stride == 2 and k % 2 and padding <= k - 2:
        return _doubled(x, kernel, padding, (out_h, out_w), precision)
    taps = -(-k // stride)
    short = taps * stride - k
    kernel = jnp.pad(kernel, ((0, short), (0, short), (0, 0), (0, 0)))
    kernel = kernel.reshape(taps, stride, taps, stride, c_in, c_out).transpose(1, 0, 2, 4, 3, 5)
    kernel = kernel.reshape(stride, taps * taps * c_in, stride * c_out)
    rows, columns = h + taps - 1, w + taps - 1
    margin = (taps - 1, taps - 1)
    x = jnp.pad(x, ((0, 0), margin, margin, (0, 0)))
    shifts = [
        x[:, taps - 1 - i : taps - 1 - i + rows, taps - 1 - j : taps - 1 - j + columns]
        for i in range(taps)
        for j in range(taps)
    ]
    return _phases(jnp.concatenate(shifts, axis=-1), kernel, _Window(padding, out_h, out_w), precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _phases(patches: jax.Array, kernel: jax.Array, window: _Window, precision: Any) -> jax.Array:
    """Multiply patches by the phases of a kernel, and lay the products out as pixels.

    Args:
        patches: (b, rows, columns, n), of every cell the input pixels that it meets.
        kernel: (s, n, s c), of every row phase the taps for all column phases.
        window: of the pixels of all cells, which is the output.
        precision: of the products.

    Returns:
        (b, height, width, c).
    """
    by_row = _phases_by_row if _has_whole_cells(patches, kernel, window) else _phases_at_once
    return by_platform(
        patches,
        kernel,
        cpu=functools.partial(by_row, window=window, precision=precision),
        plain=functools.partial(_phases_at_once, window=window, precision=precision),
    )


def _phases_fwd(patches: jax.Array, kernel: jax.Array, window: _Window, precision: Any) -> Any:
    return _phases(patches, kernel, window, precision), (patches, kernel)


def _phases_bwd(window: _Window, precision: Any, saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> Any:
    def at_once(patches: jax.Array, kernel: jax.Array, dy: jax.Array) -> Any:
        return jax.vjp(functools.partial(_phases_at_once, window=window, precision=precision), patches, kernel)[1](dy)

    def by_row(patches: jax.Array, kernel: jax.Array, dy: jax.Array) -> Any:
        return _gradient_by_row(patches, kernel, dy, window, precision)

    cpu = by_row if _has_whole_cells(*saved, window) else at_once
    return by_platform(*saved, dy, cpu=cpu, plain=at_once)


_phases.defvjp(_phases_fwd, _phases_bwd)


def _phases_at_once(patches: jax.Array, kernel: jax.Array, window: _Window, precision: Any) -> jax.Array:
    b, rows, columns, _ = patches.shape
    s, c = kernel.shape[0], kernel.shape[2] // kernel.shape[0]
    full = jnp.einsum("bhwi,rio->bhrwo", patches, kernel, precision=precision).reshape(b, rows * s, columns * s, c)
    # Output padding may reach past the last whole cell, where no input pixel arrives.
    padding, height, width = window
    below, beside = max(0, padding + height - rows * s), max(0, padding + width - columns * s)
    full = jnp.pad(full, ((0, 0), (0, below), (0, beside), (0, 0)))
    return full[:, padding : padding + height, padding : padding + width]


# The CPU's form. All cells at once are as large as the output, and go through memory twice more to be put in their
# places. One row phase at a time stays in the cache, and comes out of the product as rows of the output.


def _has_whole_cells(patches: jax.Array, kernel: jax.Array, window: _Window) -> bool:
    """Tell whether the output has equally many rows of every phase and lies within the cells; so it is for k = 2s."""
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


def _phases_by_row(patches: jax.Array, kernel: jax.Array, window: _Window, precision: Any) -> jax.Array:
    b, _, columns, n = patches.shape
    s, c = kernel.shape[0], kernel.shape[2] // kernel.shape[0]
    padding, height, width = window
    count = height // s
    out = jnp.zeros((b, count, s, width * c), jnp.result_type(patches, kernel))
    for cell, rows, phases in _row_phases(s, padding):
        of_cells = patches[:, cell : cell + count].reshape(b * count * columns, n)

        def write(out: jax.Array, row: Any, of_cells: jax.Array = of_cells) -> tuple[jax.Array, None]:
            index, taps = row
            # The barrier keeps XLA from working the product into the copy, element by element.
            pixels = jax.lax.optimization_barrier(jnp.matmul(of_cells, taps, precision=precision))
            pixels = pixels.reshape(b, count, columns * s * c)[:, :, padding * c : (padding + width) * c]
            return jax.lax.dynamic_update_slice_in_dim(out, pixels[:, :, None], index, axis=2), None

        out, _ = jax.lax.scan(write, out, (rows, kernel[phases]))
    return out.reshape(b, height, width, c)


def _gradient_by_row(
    patches: jax.Array, kernel: jax.Array, dy: jax.Array, window: _Window, precision: Any
) -> tuple[jax.Array, jax.Array]:
    """Return the gradients of patches and kernel."""
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
            # Both products read this copy; without the barrier each makes its own.
            pixels = jax.lax.optimization_barrier(pixels)
            part = jnp.matmul(pixels, taps.T, precision=precision, preferred_element_type=dtype)
            return total + part, jnp.matmul(transposed, pixels, precision=precision)

        total, parts = jax.lax.scan(add, jnp.zeros((b * count * columns, n), dtype), (rows, kernel[phases]))
        dpatches = dpatches.at[:, cell : cell + count].add(total.reshape(b, count, columns, n))
        dkernel.insert(0, parts)  # the second cell has the first row phases
    return dpatches.astype(patches.dtype), jnp.concatenate(dkernel)


def _doubled(x: jax.Array, kernel: jax.Array, padding: int, size: tuple[int, int], precision: Any) -> jax.Array:
    """Convolve with stride 2 on the output side and an odd kernel, each phase by itself.

    out[2 n + q] = sum over t of x[n + d - t] kernel[2 t + r] with q + padding = 2 d + r, per axis: a convolution of x
    with the taps r, r + 2, ... in reverse. The four phases have k k taps between them, where one product for all has
    (k + 1)(k + 1).

    Args:
        x: (b, h, w, c_in).
        kernel: (k, k, c_in, c_out) with an odd k.
        padding: at most k - 2.
        size: h' and w' of the result.
        precision: of the products.

    Returns:
        (b, h', w', c_out).
    """
    cells = [-(-n // 2) for n in size]

    def phase(row: int, column: int) -> jax.Array:
        (down, r), (right, s) = divmod(row + padding, 2), divmod(column + padding, 2)
        taps = kernel[r::2, s::2][::-1, ::-1]
        rows, columns, _, _ = taps.shape
        margins = (
            (rows - 1 - down, cells[0] - x.shape[1] + down),
            (columns - 1 - right, cells[1] - x.shape[2] + right),
        )
        return conv2d(x, taps, (1, 1), margins, precision=precision)

    full = jnp.stack([jnp.stack([phase(row, 0), phase(row, 1)], axis=3) for row in (0, 1)], axis=2)
    full = full.reshape(x.shape[0], 2 * cells[0], 2 * cells[1], kernel.shape[3])
    return full[:, : size[0], : size[1]]
