"""Class maps of single images of any size: whole where they fit, else tile by tile with the same logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fcn_jax.models.fcn import FCN, ResizeFCN, ScoreFCN
from fcn_jax.models.vgg import ENCODERS
from fcn_jax.preprocessing import normalize

__all__ = ["TILE", "WHOLE_PIXELS", "context", "make_image_predictor"]

WHOLE_PIXELS = 1_500_000
"""Images of more pixels are cut into tiles: at width 1 each map of the first stage takes 256 bytes a pixel."""
TILE = 1024
"""Side of a tile's own pixels; a multiple of 32, so that pooling windows fall as in the whole image."""

ImagePredictor = Callable[[Mapping[str, Any], np.ndarray], np.ndarray]


class _Window(NamedTuple):
    """A stretch of one axis: start and stop of what the network sees, first and last + 1 of what is kept of it."""

    start: int
    stop: int
    first: int
    last: int


def context(model: FCN) -> int:
    """Return how many pixels around a tile can change its logits, rounded up to a multiple of 32.

    A 3x3 convolution at stride s reaches s pixels further, a pooling as well, fc6 half its kernel at stride 32, and
    the way back up at most two cells of stride 32 on either side.
    """
    reach = sum((convs + 1) * 2**stage for stage, convs in enumerate(ENCODERS[model.encoder]))
    if isinstance(model, ScoreFCN):
        reach += model.fc6_kernel // 2 * 32
    return -(-(reach + 4 * 32) // 32) * 32


def _windows(size: int, tile: int, margin: int) -> Iterator[_Window]:
    """Cut an axis into tiles, each with its margin, that start at multiples of 32.

    All windows but those at the end have one length, and these are at most 31 pixels longer, so that few shapes are
    compiled: where a margin would stick out of the image, the window moves inwards.
    """
    length = tile + 2 * margin
    if size <= length:
        yield _Window(0, size, 0, size)
        return
    end = (size - length) // 32 * 32
    for first in range(0, size, tile):
        start = min(max(0, first - margin), end)
        yield _Window(start, size if start == end else start + length, first, min(size, first + tile))


def _tiles(image: np.ndarray, tile: int, margin: int) -> Iterator[tuple[_Window, _Window, np.ndarray]]:
    for row in _windows(image.shape[0], tile, margin):
        for column in _windows(image.shape[1], tile, margin):
            yield row, column, image[None, row.start : row.stop, column.start : column.stop]


def _inner(window: _Window, stride: int = 1) -> tuple[slice, slice]:
    """Return where a window's kept part lies in its own output and in the whole one, in cells of a stride."""
    whole = slice(window.first // stride, -(-window.last // stride))
    offset = window.start // stride
    return slice(whole.start - offset, whole.stop - offset), whole


def make_image_predictor(
    model: FCN, preprocessing: str, *, whole_pixels: int = WHOLE_PIXELS, tile: int = TILE
) -> ImagePredictor:
    """Make the function from one image to its class map.

    Tiles see enough around them that their logits are the whole image's up to rounding. The `resize` family
    interpolates over the whole image, so there the score maps are computed by tiles and merged whole.

    Args:
        model: the network.
        preprocessing: what its weights expect.
        whole_pixels: larger images go by tiles.
        tile: side of a tile in pixels, a multiple of 32.

    Returns:
        (variables, RGB image uint8 (h, w, 3)) -> classes uint8 (h, w).
    """

    def prepared(images: jax.Array) -> jax.Array:
        return normalize(images, preprocessing, model.param_dtype)

    @jax.jit
    def classes(variables: Mapping[str, Any], images: jax.Array) -> jax.Array:
        logits: Any = model.apply(variables, prepared(images), train=False)
        return jnp.argmax(logits, axis=-1).astype(jnp.uint8)

    @jax.jit
    def scores(variables: Mapping[str, Any], images: jax.Array) -> Any:
        return model.apply(variables, prepared(images), method="scores")

    def by_tiles(variables: Mapping[str, Any], image: np.ndarray) -> np.ndarray:
        out = np.empty(image.shape[:2], np.uint8)
        for row, column, part in _tiles(image, tile, context(model)):
            (rows, whole_rows), (columns, whole_columns) = _inner(row), _inner(column)
            out[whole_rows, whole_columns] = np.asarray(classes(variables, part))[0, rows, columns]
        return out

    def merged(variables: Mapping[str, Any], image: np.ndarray, network: ResizeFCN) -> np.ndarray:
        h, w = image.shape[:2]
        strides = [stride for stride in (32, 16, 8) if stride >= network.stride]
        maps = [np.empty((1, h // s, w // s, network.num_classes), np.float32) for s in strides]
        for row, column, part in _tiles(image, tile, context(network)):
            parts, _ = scores(variables, part)
            for stride, whole, piece in zip(strides, maps, parts, strict=True):
                (rows, whole_rows), (columns, whole_columns) = _inner(row, stride), _inner(column, stride)
                whole[:, whole_rows, whole_columns] = np.asarray(piece, np.float32)[:, rows, columns]
        merge = jax.jit(lambda maps: jnp.argmax(network.merge(maps, (h, w)), axis=-1).astype(jnp.uint8))
        return np.asarray(merge(tuple(maps)))[0]

    def predict(variables: Mapping[str, Any], image: np.ndarray) -> np.ndarray:
        if image.shape[0] * image.shape[1] <= whole_pixels:
            return np.asarray(classes(variables, image[None]))[0]
        if isinstance(model, ResizeFCN) and min(image.shape[:2]) >= 32:
            return merged(variables, image, model)
        return by_tiles(variables, image)

    return predict
