"""The VGG encoder: five stages of 3x3 convolutions, each closed by a 2x2 max pooling."""

from __future__ import annotations

from typing import Literal

import flax.linen as nn
import jax

from fcn_jax.models.layers import BatchNorm, Compute, conv, max_pool, scaled

# Convolutions per stage: configurations A, B, D, E of Simonyan & Zisserman 2015, Table 1.
ENCODERS: dict[str, tuple[int, ...]] = {
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}
STAGE_CHANNELS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """The convolutional part of VGG-11, 13, 16 or 19, plain or with batch norm after every convolution.

    Layers are named as in the Caffe reference: ``conv1_1`` ... ``conv5_3``, and ``bn1_1`` ... where there is a norm.
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

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, ...]:
        """Encode x (b, h, w, 3); return pool1 ... pool5, at strides 2, 4, 8, 16, 32."""
        stage = nn.remat(VGG._stage, static_argnums=(2, 3)) if self.remat else VGG._stage
        pools = []
        for index in range(len(self.convs)):
            x = stage(self, x, index, train)
            pools.append(x)
        return tuple(pools)

    def _stage(self, x: jax.Array, index: int, train: bool) -> jax.Array:
        features = scaled(STAGE_CHANNELS[index], self.width)
        for layer in range(1, self.convs[index] + 1):
            name = f"{index + 1}_{layer}"
            padding = self.margin if name == "1_1" else 1
            x = conv(features, 3, self.compute, padding=padding, name=f"conv{name}")(x)
            if self.norm == "batch":
                x = BatchNorm(self.compute, name=f"bn{name}")(x, train)
            x = nn.relu(x)
        return max_pool(x, self.pool)
