"""Class maps of single images of any size, padded to a few shapes: whole, or in tiles with the same logits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from fcn_jax.evaluation.evaluate import PLAIN, Output, Views, at_least_float32, make_predictor, reduce_scores
from fcn_jax.evaluation.padding import merge_padded_maps, padded_maps
from fcn_jax.models.fcn import FCN, DilatedFCN, InterpolatedFCN, ScoreFCN, check_size, serves
from fcn_jax.models.kernels import cpu_kernels
from fcn_jax.models.resnet import RESNETS
from fcn_jax.models.vgg import ENCODERS
from fcn_jax.preprocessing import Preprocessing, normalize

WHOLE_PIXELS = 1_500_000
"""Images with more pixels are cut into tiles: at width 1 each map of the first stage takes 256 bytes per pixel."""
TILE = 1024
"""Side of a tile without margins; a multiple of 32, so that pooling windows align with the whole image's."""
MULTIPLE = 64
"""Sides of whole images are padded to multiples of this, like ``DataConfig.eval_multiple`` in evaluation."""

ImagePredictor = Callable[[Mapping[str, Any], np.ndarray], np.ndarray]


class _Window(NamedTuple):
    """A tile on one axis: start of the network's input, and first and last + 1 of the pixels that are used."""

    start: int
    first: int
    last: int

    def kept(self, stride: int = 1) -> tuple[slice, slice]:
        """Return slices of the used part: in the whole image's map at a stride, and in the tile's map."""
        start, first, last = (-(-n // stride) for n in self)
        return slice(first, last), slice(first - start, last - start)


def context(model: FCN) -> int:
    """Return how many pixels around a tile can change its logits, rounded up to a multiple of 32."""
    if isinstance(model, DilatedFCN):
        # In pixels: 3 for the 7x7 convolution and 2 for the pooling, then the dilation times the stride of each 3x3
        # convolution; the scores are interpolated over the whole image.
        two, three, four = RESNETS[model.encoder][1:]
        reach = 3 + 2 + 4 * RESNETS[model.encoder][0] + 4 + 8 * (two - 1) + 8 + 16 * (three - 1) + 16 + 32 * (four - 1)
        return -(-(reach + 8) // 32) * 32
    # Each 3x3 convolution or pooling at stride s adds s pixels, and fc6 half its kernel at stride 32. Upsampling adds
    # at most two cells of stride 32 on either side.
    reach = sum((convs + 1) * 2**stage for stage, convs in enumerate(ENCODERS[model.encoder]))
    if isinstance(model, ScoreFCN):
        reach += model.fc6_kernel // 2 * 32
    return -(-(reach + 4 * 32) // 32) * 32


def _round_up(size: int, multiple: int = MULTIPLE) -> int:
    return -(-size // multiple) * multiple


def _windows(size: int, tile: int, margin: int, multiple: int = MULTIPLE) -> tuple[int, list[_Window]]:
    """Cut an axis into tiles with margins that start at multiples of 32; return the arrays' side and the windows.

    Windows stay within the image, except for at most 31 pixels of the last one.
    """
    side = tile + 2 * margin
    if size <= side:
        return _round_up(size, multiple), [_Window(0, 0, size)]
    end = _round_up(size - side, 32)
    firsts = range(0, size, tile)
    return side, [_Window(min(max(0, first - margin), end), first, min(size, first + tile)) for first in firsts]


def make_image_predictor(
    model: FCN,
    preprocessing: Preprocessing,
    *,
    output: Output = "classes",
    views: Views = PLAIN,
    mesh: Mesh | None = None,
    whole_pixels: int = WHOLE_PIXELS,
    tile: int = TILE,
) -> ImagePredictor:
    """Return a function from one image to its class map.

    Tiles have enough context that their logits equal the whole image's up to rounding. Networks that interpolate do so
    over the whole image, from score maps merged from all tiles. Views are averaged tile by tile: each tile is scaled
    separately.

    Args:
        model: the network.
        preprocessing: the preprocessing that its weights expect.
        output: what to return for each pixel.
        views: the variants of an image over which the softmax is averaged.
        mesh: splits the height of whole images over its axis ``space``; by default one device.
        whole_pixels: images with more pixels for each device of ``space``, in any view, are cut into tiles.
        tile: side of a tile in pixels, a multiple of 32.

    Returns:
        (variables, image (h, w, channels)) -> classes uint8 (h, w), or floats (h, w, num_classes) or (h, w, 2). It
        raises InputError for an unsupported size.
    """
    network: Any = model
    plain = views == PLAIN
    predictor = make_predictor(model, preprocessing, mesh, views, output)
    space = 1 if mesh is None else mesh.shape["space"]

    def classes_of(variables: Mapping[str, Any], images: np.ndarray, extents: np.ndarray) -> list[np.ndarray]:
        return [predictor(variables, images, images.shape[1:3], extents if plain else None)]

    @jax.jit
    @cpu_kernels(jax.default_backend() == "cpu")
    def maps_of(variables: Mapping[str, Any], images: jax.Array, extents: jax.Array) -> list[jax.Array]:
        return padded_maps(network, variables, normalize(images, preprocessing, model.param_dtype), extents)

    @jax.jit
    def merge(maps: list[jax.Array], extents: jax.Array) -> jax.Array:
        return reduce_scores(at_least_float32(merge_padded_maps(network, maps, extents)), output)

    def predict(variables: Mapping[str, Any], image: np.ndarray) -> np.ndarray:
        h, w = image.shape[:2]
        check_size(model, (h, w))
        margin = _round_up(math.ceil(context(model) / min(views.scales)), 32)
        enlarged = max(1.0, *views.scales)
        side = max(32, int(tile / enlarged) // 32 * 32)
        whole = h * w * enlarged**2 <= whole_pixels * space
        least = 32 if plain or whole else 1  # a side below 32 also has one cell of stride 32; views are not padded
        (height, rows), (width, columns) = (
            _windows(n, n, 0, m if plain else 1) if whole else _windows(n, side, margin, MULTIPLE if plain else 1)
            for n, m in ((max(h, least), math.lcm(MULTIPLE, 32 * space)), (max(w, least), MULTIPLE))
        )
        tiles = list(itertools.product(rows, columns))
        if len(tiles) == 1 and not (plain and serves(model, height) and serves(model, width)):
            return predictor(variables, image[None], (h, w))[0]  # unusual crops after floor pooling

        by_maps = isinstance(model, InterpolatedFCN) and len(tiles) > 1 and plain
        strides = [s for s in (32, 16, 8) if network.coarsest >= s >= model.stride] if by_maps else [1]
        channels = {"classes": (), "probabilities": (model.num_classes,), "confidence": (2,)}[output]
        pixel = (channels, np.uint8 if output == "classes" else np.float32)
        cell, dtype = ((model.num_classes,), model.dtype) if by_maps else pixel
        wholes = [np.zeros((1, _round_up(h) // s, _round_up(w) // s, *cell), dtype) for s in strides]
        for row, column in tiles:
            part = image[row.start : row.start + height, column.start : column.start + width]
            extents = np.array([part.shape[:2]], np.int32)
            if plain:  # padding would break flipped views
                part = np.pad(part, ((0, height - part.shape[0]), (0, width - part.shape[1]), (0, 0)))
            found = (maps_of if by_maps else classes_of)(variables, part[None], extents)
            for stride, to, piece in zip(strides, wholes, found, strict=True):
                (to_rows, own_rows), (to_columns, own_columns) = row.kept(stride), column.kept(stride)
                to[:, to_rows, to_columns] = np.asarray(piece)[:, own_rows, own_columns]
        classes = np.asarray(merge(wholes, np.array([[h, w]], np.int32))) if by_maps else wholes[0]
        return classes[0, :h, :w]

    return predict
