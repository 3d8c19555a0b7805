"""VGG as the classifier that its published weights were trained as, so that a port can be checked on its logits."""

from __future__ import annotations

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fcn_jax.models.layers import Compute, FullyConvolutionalHead, conv
from fcn_jax.models.vgg import ENCODERS, VGG


def _bins(size: int, bins: int) -> np.ndarray:
    """Return the (bins, size) matrix of means: bin i covers floor(i size / bins) to ceil((i + 1) size / bins)."""
    start = np.arange(bins) * size // bins
    stop = -(-(np.arange(bins) + 1) * size // bins)
    inside = (np.arange(size) >= start[:, None]) & (np.arange(size) < stop[:, None])
    return inside / (stop - start)[:, None]


def adaptive_average_pool(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Average x (b, h, w, c) over bins to (b, *size, c); bins overlap where sides do not divide, or repeat pixels.

    Source: ``torch.nn.AdaptiveAvgPool2d`` (``aten/native/AdaptiveAveragePooling.cpp``).
    """
    _, h, w, _ = x.shape
    if (h, w) == size:
        return x
    rows, columns = (jnp.asarray(_bins(n, m), x.dtype) for n, m in zip((h, w), size, strict=True))
    return jnp.einsum("ih,jw,bhwc->bijc", rows, columns, x, precision="highest")


class VGGClassifier(nn.Module):
    """VGG-11, 13, 16 or 19 with its three fully connected layers.

    pool5 is averaged to 7x7, which at 224x224 it has already, then fc6, fc7 and fc8; the first two with ReLU and
    dropout. Source: torchvision's ``models/vgg.py``; timm's ``models/vgg.py`` computes the same at 224x224 (elsewhere
    it slides fc6 over pool5 and averages afterwards).
    """

    num_classes: int = 1000
    encoder: str = "vgg16"
    encoder_norm: Literal["batch"] | None = None
    width: float = 1.0
    fc_features: int = 4096
    dropout_rate: float = 0.5
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    precision: Any = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False, example_ids: jax.Array | None = None) -> jax.Array:
        """Return the logits (b, num_classes) of normalised images (b, h, w, 3) of sides from 32 up."""
        compute = Compute(self.dtype, self.param_dtype, self.precision)
        vgg = VGG(ENCODERS[self.encoder], compute, self.encoder_norm, self.width, "floor", name="vgg")
        pool5 = adaptive_average_pool(vgg(images.astype(self.dtype), train)[-1], (7, 7))
        head = FullyConvolutionalHead(self.fc_features, 7, "VALID", self.dropout_rate, "element", compute, name="head")
        return conv(self.num_classes, 1, compute, name="fc8")(head(pool5, train, example_ids))[:, 0, 0]
