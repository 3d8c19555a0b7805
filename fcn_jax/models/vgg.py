"""VGG: the encoder of the networks, and the classifier that its published weights come from."""

from __future__ import annotations

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fcn_jax.models.kernels import max_pool
from fcn_jax.models.layers import BatchNorm, Compute, FullyConvolutionalHead, PooledConv, conv, scaled

# Convolutions per stage: configurations A, B, D, E of Simonyan & Zisserman 2015, Table 1.
ENCODERS: dict[str, tuple[int, ...]] = {
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}
STAGE_CHANNELS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """The encoder: five stages of 3x3 convolutions, optionally with batch norm, each ending in a 2x2 max pooling.

    Source: Simonyan & Zisserman 2015; the order conv, BN, ReLU is torchvision's (``models/vgg.py``).
    """

    convs: tuple[int, ...]
    compute: Compute
    norm: Literal["batch"] | None = None
    width: float = 1.0
    pool: Literal["ceil", "floor"] = "ceil"
    margin: int = 1
    """Padding of conv1_1 in pixels: 1 keeps the size, 100 is the FCN reference's."""
    remat: bool = False
    """Recompute the activations of a stage in the backward pass instead of keeping them."""
    freeze_stages: int = 0
    """See ``FCN``."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, ...]:
        """Encode x (b, h, w, 3); return pool1 ... pool5, at strides 2, 4, 8, 16, 32."""
        stage = nn.remat(VGG._stage, static_argnums=(2, 3)) if self.remat else VGG._stage
        pools = []
        for index in range(len(self.convs)):
            frozen = index < self.freeze_stages
            x = stage(self, x, index, train and not frozen)
            x = jax.lax.stop_gradient(x) if frozen else x
            pools.append(x)
        return tuple(pools)

    def _stage(self, x: jax.Array, index: int, train: bool) -> jax.Array:
        features = scaled(STAGE_CHANNELS[index], self.width)
        count = self.convs[index]
        for number in range(1, count + 1):
            name = f"{index + 1}_{number}"
            padding = self.margin if name == "1_1" else 1
            pooled = number == count and self.norm is None
            layer = conv(
                features, 3, self.compute, padding=padding, kind=PooledConv if pooled else None, name=f"conv{name}"
            )
            x = layer(x)
            if self.norm == "batch":
                x = BatchNorm(self.compute, name=f"bn{name}")(x, train)
            # The maximum of ReLUs is the ReLU of the maximum.
            x = nn.relu(layer.max_pool(x, self.pool) if pooled else x)
        return max_pool(x, self.pool) if self.norm == "batch" else x


def _bins(size: int, bins: int) -> np.ndarray:
    """Return the (bins, size) matrix of means: bin i covers floor(i size / bins) to ceil((i + 1) size / bins)."""
    start = np.arange(bins) * size // bins
    stop = -(-(np.arange(bins) + 1) * size // bins)
    inside = (np.arange(size) >= start[:, None]) & (np.arange(size) < stop[:, None])
    return inside / (stop - start)[:, None]


def adaptive_average_pool(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Average x (b, h, w, c) over bins to (b, *size, c); bins overlap or repeat pixels where sides do not divide.

    Source: ``torch.nn.AdaptiveAvgPool2d`` (``aten/native/AdaptiveAveragePooling.cpp``).
    """
    _, h, w, _ = x.shape
    if (h, w) == size:
        return x
    rows, columns = (jnp.asarray(_bins(n, m), x.dtype) for n, m in zip((h, w), size, strict=True))
    return jnp.einsum("ih,jw,bhwc->bijc", rows, columns, x, precision="highest")


class VGGClassifier(nn.Module):
    """VGG-11, 13, 16 or 19 with its three fully connected layers, on pool5 averaged to 7x7.

    Source: torchvision's ``models/vgg.py``. timm's computes the same at 224x224; elsewhere it slides fc6 over pool5 and
    averages afterwards.
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
        """Return the logits (b, num_classes) of normalised images (b, h, w, 3), with sides of at least 32."""
        compute = Compute(self.dtype, self.param_dtype, self.precision)
        vgg = VGG(ENCODERS[self.encoder], compute, self.encoder_norm, self.width, "floor", name="vgg")
        pool5 = adaptive_average_pool(vgg(images.astype(self.dtype), train)[-1], (7, 7))
        head = FullyConvolutionalHead(self.fc_features, 7, "VALID", self.dropout_rate, "element", compute, name="head")
        return conv(self.num_classes, 1, compute, name="fc8")(head(pool5, train, example_ids))[:, 0, 0]
