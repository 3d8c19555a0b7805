"""Images padded to a few array sizes, to avoid recompilation, with the same logits as without padding.

An image occupies the top left of a larger array. Values that a layer computes beyond the image's edge are set to zero
before the next layer reads them, like the zero padding of the image alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fcn_jax.models.fcn import FCN, InterpolatedFCN, map_sides
from fcn_jax.models.layers import BatchNorm
from fcn_jax.models.upsample import TransposedConv

MULTIPLE = 32
"""Sides of the arrays are multiples of this, so that the size of a feature map determines its stride."""

_Edges = dict[int, jax.Array]
"""Side of a padded array's feature map -> side of each unpadded image's feature map (b,)."""


def padded_logits(model: FCN, variables: Mapping[str, Any], images: jax.Array, extents: jax.Array) -> jax.Array:
    """Return logits (b, h, w, num_classes) that equal, within each image, its logits without padding, up to rounding.

    Args:
        model: any network, run in eval mode.
        variables: its variables.
        images: normalised (b, h, w, 3), h and w multiples of ``MULTIPLE``; values outside an image are not read.
        extents: int32 (b, 2), height and width of each image.
    """
    if isinstance(model, InterpolatedFCN):
        return merge_padded_maps(model, padded_maps(model, variables, images, extents), extents)
    return _apply(model, variables, images, extents)


def padded_maps(
    model: InterpolatedFCN, variables: Mapping[str, Any], images: jax.Array, extents: jax.Array
) -> list[jax.Array]:
    """Return the score maps, one for each stride down to the model's; same arguments as ``padded_logits``."""
    return _apply(model, variables, images, extents, merge=False)


def merge_padded_maps(model: InterpolatedFCN, maps: Sequence[jax.Array], extents: jax.Array) -> jax.Array:
    """Return the logits of score maps (b, h / s, w / s, c), interpolated within each image."""
    h, w = (model.coarsest * n for n in maps[0].shape[1:3])
    edges = _edges(model, h, extents[:, 0])[0], _edges(model, w, extents[:, 1])[0]

    def resize(x: jax.Array, to: tuple[int, ...]) -> jax.Array:
        for axis, letters in ((0, "bHh,bhwc->bHwc"), (1, "bWw,bhwc->bhWc")):
            side = x.shape[1 + axis]
            ends = edges[axis][side], edges[axis][to[axis]]
            weights = _interpolation(*ends, side, to[axis], model.align_corners)
            x = jnp.einsum(letters, weights.astype(x.dtype), x, precision=model.precision)
        return x

    x = maps[0]
    for skip in maps[1:]:
        x = resize(x, skip.shape[1:3]) + skip
    return resize(x, (h, w))


def _apply(model: FCN, variables: Mapping[str, Any], images: jax.Array, extents: jax.Array, **options: Any) -> Any:
    _, h, w, _ = images.shape
    conv_rows, up_rows = _edges(model, h, extents[:, 0])
    conv_columns, up_columns = _edges(model, w, extents[:, 1])

    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        if isinstance(context.module, TransposedConv):
            return call(_cut(args[0], up_rows, up_columns), *args[1:], **kwargs)
        if isinstance(context.module, nn.Conv):
            # With floor pooling, the cell beyond the edge contains pixels that the unpadded image drops.
            return _cut(call(_cut(args[0], conv_rows, conv_columns)), conv_rows, conv_columns)
        y = call(*args, **kwargs)
        return _cut(y, conv_rows, conv_columns) if isinstance(context.module, BatchNorm) else y

    own = jnp.arange(h)[:, None] < extents[:, 0, None, None]
    own &= jnp.arange(w) < extents[:, 1, None, None]
    with nn.intercept_methods(intercept):
        return model.apply(variables, jnp.where(own[..., None], images, 0), train=False, **options)


def _edges(model: FCN, n: int, extents: jax.Array) -> tuple[_Edges, _Edges]:
    """Return the edges of the inputs and outputs of convolutions, and of the inputs of transposed convolutions."""
    whole, own = map_sides(model, n), map_sides(model, extents)
    return dict(zip(whole[0], own[0], strict=True)), dict(zip(whole[1], own[1], strict=True))


def _cut(x: jax.Array, rows: _Edges, columns: _Edges) -> jax.Array:
    """Set x (b, h, w, c) to zero beyond the edges; the input image, which has a margin, is left unchanged."""
    _, h, w, _ = x.shape
    if h not in rows:
        return x
    inside = (jnp.arange(h) < rows[h][:, None])[:, :, None] & (jnp.arange(w) < columns[w][:, None])[:, None]
    return jnp.where(inside[..., None], x, 0)


def _interpolation(n: jax.Array, new_n: jax.Array, size: int, new_size: int, align_corners: bool) -> jax.Array:
    """Return (b, new_size, size) matrices that interpolate n cells to new_n; the remaining rows are zero."""
    i, cells = jnp.arange(new_size), jnp.arange(size)
    # Positions are quotients of integers: rounding them would change the last bits of every logit.
    if align_corners:
        at, unit = i * (n - 1)[:, None], jnp.maximum(new_n - 1, 1)[:, None]
    else:
        at, unit = jnp.maximum((2 * i + 1) * n[:, None] - new_n[:, None], 0), 2 * new_n[:, None]
    low, share = (at // unit)[..., None], (at % unit / unit)[..., None]
    high = jnp.minimum(low + 1, n[:, None, None] - 1)
    weights = (cells == low) * (1 - share) + (cells == high) * share
    return jnp.where((i < new_n[:, None])[..., None], weights, 0)
