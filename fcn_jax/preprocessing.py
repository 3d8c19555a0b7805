"""Normalisation of images as in the encoder's training; weights files record which one they need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from fcn_jax.config import DataConfig
from fcn_jax.errors import InputError, unknown

# ImageNet RGB mean and standard deviation in [0, 1]: torchvision's VGG weights (models/vgg.py).
_IMAGENET_MEAN = np.array([0.485, 0.456, 0.406])
_IMAGENET_STD = np.array([0.229, 0.224, 0.225])
# BGR mean in [0, 255] of the FCN reference (voc_layers.py).
_CAFFE_BGR_MEAN = np.array([104.00699, 116.66877, 122.67892])


def _imagenet(images: jax.Array) -> jax.Array:
    return (images / 255.0 - jnp.asarray(_IMAGENET_MEAN, images.dtype)) / jnp.asarray(_IMAGENET_STD, images.dtype)


def _caffe(images: jax.Array) -> jax.Array:
    return images[..., ::-1] - jnp.asarray(_CAFFE_BGR_MEAN, images.dtype)


@dataclass(frozen=True)
class Standardize:
    """Subtract each channel's mean and divide by its standard deviation; for any number of channels and bits."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    bits: int = 8
    """Bits per sample of the images, 8 or 16."""

    def __call__(self, images: jax.Array) -> jax.Array:
        """Return the standardised images (b, h, w, channels)."""
        return (images - jnp.asarray(self.mean, images.dtype)) / jnp.asarray(self.std, images.dtype)


Preprocessing = str | Standardize
"""A key of ``PREPROCESSINGS``, or the statistics of images that are not 8-bit RGB."""

PREPROCESSINGS: dict[str, Callable[[jax.Array], jax.Array]] = {"imagenet": _imagenet, "caffe": _caffe}
MEAN_COLOURS: dict[str, tuple[int, int, int]] = {
    "imagenet": tuple(round(255 * value) for value in _IMAGENET_MEAN.tolist()),
    "caffe": tuple(round(value) for value in _CAFFE_BGR_MEAN[::-1].tolist()),
}
"""The 8-bit RGB colour nearest to zero after preprocessing, used for padding."""


def preprocessing_of(config: DataConfig) -> Preprocessing:
    """Return the preprocessing of a run's images."""
    if config.channels is None:
        return config.preprocessing
    return Standardize(config.mean or (), config.std or (), config.bits or 8)


def fill_color(preprocessing: Preprocessing) -> tuple[int, ...]:
    """Return the value of each channel that is nearest to zero after preprocessing, used for padding."""
    if isinstance(preprocessing, str):
        return MEAN_COLOURS[preprocessing]
    return tuple(round(value) for value in preprocessing.mean)


def normalize(images: jax.Array, preprocessing: Preprocessing, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """Normalise RGB images (b, h, w, 3) in 0 ... 255, or other images (b, h, w, c) by their statistics.

    Args:
        images: uint8, or floats in 0 ... 255, which interpolation may overshoot slightly. Under ``jax.jit`` the range
            is not checked.
        preprocessing: "imagenet" (RGB, mean and standard deviation of [0, 1] values), "caffe" (BGR minus its mean), or
            ``Standardize``, for which images are not checked.
        dtype: dtype of the result.

    Raises:
        InputError: unknown preprocessing, or images of another dtype or range.
    """
    if isinstance(preprocessing, Standardize):
        return preprocessing(images.astype(dtype))
    if preprocessing not in PREPROCESSINGS:
        raise unknown("preprocessing", preprocessing, PREPROCESSINGS)
    if not hasattr(images, "dtype") or images.dtype == bool:
        raise InputError(f"expected an array of images in 0 ... 255, got {getattr(images, 'dtype', type(images))}")
    if images.dtype != np.uint8 and images.size and not isinstance(images, jax.core.Tracer):
        low, mean, high = float(images.min()), float(images.mean()), float(images.max())
        # Cubic interpolation overshoots by up to a seventh of the range; normalised images have a mean near zero.
        if not (-40 <= low and high <= 295 and mean >= 0) or 0 < high <= 1:
            hint = "multiply images in 0 ... 1 by 255" if 0 <= low and high <= 1 else "give 8-bit RGB"
            raise InputError(f"expected images in 0 ... 255, got {images.dtype} in {low:.7g} ... {high:.7g}; {hint}")
    return PREPROCESSINGS[preprocessing](images.astype(dtype))
