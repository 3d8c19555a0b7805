"""Images of many sizes in arrays of few, with the logits that each has alone.

Every new shape is compiled anew, and a set may have hundreds. Here an image lies in the top left of a larger array, and
what a layer computes beyond the image's own edge is set to zero before the next one reads it, which is what its padding
would have been.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fcn_jax.models.fcn import FCN, LadderFCN, Pad100FCN, ResizeFCN, ScoreFCN
from fcn_jax.models.layers import BatchNorm
from fcn_jax.models.upsample import TransposedConv

__all__ = ["MULTIPLE", "padded_logits"]

MULTIPLE = 32
"""Sides of the arrays are multiples of this, so that every map of theirs tells its stride by its size."""


def padded_logits(model: FCN, variables: Mapping[str, Any], images: jax.Array, extents: jax.Array) -> jax.Array:
    """Return logits that equal, within each image, those of the image alone, up to rounding.

    Args:
        model: any network; eval mode.
        variables: its variables.
        images: normalised (b, h, w, 3), h and w multiples of ``MULTIPLE``; what lies outside of an image is not read.
        extents: int32 (b, 2), height and width of each image, which starts at the top left.

    Returns:
        (b, h, w, num_classes); without meaning outside of the images.
    """
    _, h, w, _ = images.shape
    conv_rows, up_rows = _edges(model, h, extents[:, 0])
    conv_columns, up_columns = _edges(model, w, extents[:, 1])

    def intercept(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        if isinstance(context.module, TransposedConv):
            return call(_cut(args[0], up_rows, up_columns), *args[1:], **kwargs)
        if isinstance(context.module, nn.Conv):
            # Floor pooling leaves a cell behind the edge that holds half of what is there.
            return _cut(call(_cut(args[0], conv_rows, conv_columns)), conv_rows, conv_columns)
        y = call(*args, **kwargs)
        return _cut(y, conv_rows, conv_columns) if isinstance(context.module, BatchNorm) else y

    own = jnp.arange(h)[:, None] < extents[:, 0, None, None]
    own &= jnp.arange(w) < extents[:, 1, None, None]
    images = jnp.where(own[..., None], images, 0)
    with nn.intercept_methods(intercept):
        if not isinstance(model, ResizeFCN):
            return model.apply(variables, images, train=False)  # type: ignore[return-value]
        maps, _ = model.apply(variables, images, method="scores")  # type: ignore[misc]
    return _merge(maps, (conv_rows, conv_columns), (h, w), model.precision)


def _edges(model: FCN, n: int, extents: jax.Array) -> tuple[dict[int, jax.Array], dict[int, jax.Array]]:
    """Return what maps of the images measure, (b,), by what those of the whole array do; see ``map_sizes``."""
    whole, own = map_sizes(model, n), map_sizes(model, extents)
    return dict(zip(whole[0], own[0], strict=True)), dict(zip(whole[1], own[1], strict=True))


def _cut(x: jax.Array, rows: dict[int, jax.Array], columns: dict[int, jax.Array]) -> jax.Array:
    """Zero x (b, h, w, c) beyond the edges; the image itself, which a margin goes around, is as it should be."""
    _, h, w, _ = x.shape
    if h not in rows:
        return x
    inside = (jnp.arange(h) < rows[h][:, None])[:, :, None] & (jnp.arange(w) < columns[w][:, None])[:, None]
    return jnp.where(inside[..., None], x, 0)


def map_sizes(model: FCN, n: Any) -> tuple[list[Any], list[Any]]:
    """List one side of a network's maps for images of side n, an int or an array of them, finest first.

    Returns:
        What convolutions read and write, and what transposed convolutions read.
    """
    ceil = isinstance(model, ScoreFCN) and model.pool == "ceil"
    if isinstance(model, LadderFCN):
        n = -(-n // 32) * 32
    if isinstance(model, ResizeFCN):
        n = n + (32 - n) * (n < 32)
    maps = [n + 198 if isinstance(model, Pad100FCN) else n]
    for _ in range(5):
        maps.append((maps[-1] + ceil) // 2)
    if not isinstance(model, Pad100FCN):
        return maps, maps
    scores = maps[-1] - (model.fc6_kernel - 1)
    fused = 2 * scores + 2
    return [*maps, scores], [2 * fused + 2, fused, scores]


def _merge(maps: Any, edges: Any, size: tuple[int, int], precision: Any) -> jax.Array:
    """``ResizeFCN.merge``, from the corners of each image's own maps to those of the next."""

    def resize(x: jax.Array, to: tuple[int, int]) -> jax.Array:
        for axis, letters in ((0, "bHh,bhwc->bHwc"), (1, "bWw,bhwc->bhWc")):
            side = x.shape[1 + axis]
            weights = _interpolation(edges[axis][side], edges[axis][to[axis]], side, to[axis])
            x = jnp.einsum(letters, weights.astype(x.dtype), x, precision=precision)
        return x

    x = maps[0]
    for skip in maps[1:]:
        x = resize(x, skip.shape[1:3]) + skip
    return resize(x, size)


def _interpolation(n: jax.Array, new_n: jax.Array, size: int, new_size: int) -> jax.Array:
    """Return (b, new_size, size) matrices that interpolate n cells to new_n, corners aligned; further rows are zero."""
    i, gaps = jnp.arange(new_size), jnp.maximum(new_n - 1, 1)[:, None]
    at = i * (n - 1)[:, None]  # in integers: a rounded position would be off in the last bits of every logit
    low, share = at // gaps, (at % gaps / gaps)[..., None]
    low, cells = low[..., None], jnp.arange(size)
    weights = (cells == low) * (1 - share) + (cells == low + 1) * share
    return jnp.where((i < new_n[:, None])[..., None], weights, 0)
