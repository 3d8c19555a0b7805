"""Checks of padded and tiled inference against the network applied to the image alone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from small_networks import make_network

from fcn_jax.evaluation.padding import padded_logits
from fcn_jax.evaluation.predict import context, make_image_predictor
from fcn_jax.preprocessing import normalize


def check_padding(name: str, sizes: Any, array: tuple[int, int] = (96, 128), **options: Any) -> None:
    """Assert that padding images of ``sizes`` to the height and width ``array`` does not change their logits."""
    model, variables = make_network(name, width=0.03, **options)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(len(sizes), *array, 3))  # noise beyond the edges, which must not be read
    padded = jax.jit(lambda v, x, e: padded_logits(model, v, x, e))(variables, images, jnp.asarray(sizes, jnp.int32))
    apply = jax.jit(model.apply)  # a program per size, not one per operation and size
    for row, (h, w) in enumerate(sizes):
        alone = np.asarray(apply(variables, images[row : row + 1, :h, :w]))[0]
        found = np.asarray(padded)[row, :h, :w]
        # The same sums in other blocks. Positions of `resize` are float32 on one side and float64 on the other.
        assert np.linalg.norm(found - alone) <= 1e-12 * np.linalg.norm(alone), (h, w)


def color_blocks(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Draw an image of blocks of colour, so that the classes differ from place to place."""
    blocks = np.random.default_rng(seed).integers(0, 256, (height // 40 + 1, width // 40 + 1, 3), np.uint8)
    return blocks.repeat(40, 0).repeat(40, 1)[:height, :width]


def check_tiles(name: str, width: int) -> None:
    """Assert that tiled prediction equals that of the whole image, at this width."""
    model, variables = make_network(name, 8, biases=False, **({"head_features": 64} if "resize" in name else {}))
    image = color_blocks(2 * context(model) + 210, width)
    images = normalize(image[None], "imagenet", jnp.float64)
    whole = np.asarray(jnp.argmax(jax.jit(model.apply)(variables, images), -1))[0]
    tiled = make_image_predictor(model, "imagenet", whole_pixels=0, tile=96)(variables, image)
    assert len(np.unique(whole)) > 1
    # float64: classes could differ only where two logits agree to 1e-12.
    np.testing.assert_array_equal(tiled, whole)
