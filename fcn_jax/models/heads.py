"""What stands on pool5: VGG's own classifier as convolutions, or the small head of the `resize` family."""

from __future__ import annotations

from typing import Literal

import flax.linen as nn
import jax

from fcn_jax.models.layers import BatchNorm, Compute, Dropout, conv

__all__ = ["FullyConvolutionalHead", "SmallHead"]


class FullyConvolutionalHead(nn.Module):
    """fc6 and fc7, the fully connected layers of VGG read as convolutions, each with ReLU and dropout.

    Source: Long, Shelhamer & Darrell 2015, section 3.1; ``voc-fcn32s/net.py`` of the reference.
    """

    features: int
    kernel_size: int
    padding: Literal["SAME", "VALID"]
    dropout_rate: float
    dropout: Literal["element", "channel"]
    compute: Compute

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, example_ids: jax.Array) -> jax.Array:
        """Map pool5 (b, h, w, c) to features (b, h', w', features)."""
        x = nn.relu(conv(self.features, self.kernel_size, self.compute, padding=self.padding, name="fc6")(x))
        x = Dropout(self.dropout_rate, self.dropout, name="drop6")(x, train, example_ids)
        x = nn.relu(conv(self.features, 1, self.compute, name="fc7")(x))
        return Dropout(self.dropout_rate, self.dropout, name="drop7")(x, train, example_ids)


class SmallHead(nn.Module):
    """3x3 convolution without bias, BN, ReLU, dropout, and a 1x1 score layer.

    Source: ``_FCNHead`` of awesome-semantic-segmentation-pytorch (``core/models/fcn.py``).
    """

    features: int
    num_classes: int
    dropout_rate: float
    dropout: Literal["element", "channel"]
    compute: Compute

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, example_ids: jax.Array) -> jax.Array:
        """Map pool5 (b, h, w, c) to scores (b, h, w, num_classes)."""
        x = conv(self.features, 3, self.compute, padding=1, bias=False, name="conv")(x)
        x = nn.relu(BatchNorm(self.compute, name="bn")(x, train))
        x = Dropout(self.dropout_rate, self.dropout, name="drop")(x, train, example_ids)
        return conv(self.num_classes, 1, self.compute, zero=True, name="score")(x)
