"""Upsampling layers: transposed convolution with its bilinear start, and bilinear interpolation."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fcn_jax.models.layers import Compute
from fcn_jax.models.transposed_conv import transposed_conv

__all__ = ["TransposedConv", "bilinear_init", "bilinear_kernel", "resize_bilinear"]


def bilinear_kernel(k: int) -> np.ndarray:
    """Return the (k, k) float64 kernel with which a transposed convolution interpolates bilinearly.

    Source: the bilinear filler of Caffe (``include/caffe/filler.hpp``), and ``surgery.py`` of the FCN reference.
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
    """A transposed convolution with PyTorch's geometry, bilinear at the start or, without ``bilinear``, He normal."""

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
        y = transposed_conv(
            x.astype(compute.dtype),
            kernel.astype(compute.dtype),
            self.stride,
            self.padding,
            self.output_padding,
            compute.precision,
        )
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros_init(), (self.features,), compute.param_dtype)
            y = y + bias.astype(compute.dtype)
        return y


def _interpolation(size: int, new_size: int) -> np.ndarray:
    """Return the (new_size, size) float64 matrix that interpolates linearly between aligned corners."""
    position = np.arange(new_size) * ((size - 1) / (new_size - 1) if new_size > 1 else 0.0)
    low = np.minimum(np.floor(position).astype(int), size - 1)
    high = np.minimum(low + 1, size - 1)
    matrix = np.zeros((new_size, size))
    np.add.at(matrix, (np.arange(new_size), low), 1 - (position - low))
    np.add.at(matrix, (np.arange(new_size), high), position - low)
    return matrix


def resize_bilinear(x: jax.Array, size: tuple[int, int], precision: Any = None) -> jax.Array:
    """Resize bilinearly with corners aligned, as two matrix products.

    Equal to ``torch.nn.functional.interpolate(mode="bilinear", align_corners=True)``, at any size.

    Args:
        x: (b, h, w, c).
        size: the new height and width.
        precision: of the products.

    Returns:
        (b, height, width, c).
    """
    rows = jnp.asarray(_interpolation(x.shape[1], size[0]), x.dtype)
    columns = jnp.asarray(_interpolation(x.shape[2], size[1]), x.dtype)
    x = jnp.einsum("Hh,bhwc->bHwc", rows, x, precision=precision)
    return jnp.einsum("Ww,bHwc->bHWc", columns, x, precision=precision)
