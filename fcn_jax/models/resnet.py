"""ResNet-50 and 101 with dilation in place of the last two strides: the encoder of the `dilated` family.

Source: torchvision's ``models/resnet.py``, ``resnet50(replace_stride_with_dilation=[False, True, True])``.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from fcn_jax.models.layers import BatchNorm, Compute, conv, scaled

# Blocks per stage: He, Zhang, Ren & Sun 2016, Table 1.
RESNETS: dict[str, tuple[int, ...]] = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}
# Of each stage's 3x3 convolutions: stride and dilation in the first block, and dilation in the others.
GEOMETRY = ((1, 1, 1), (2, 1, 1), (1, 1, 2), (1, 2, 4))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with batch norm around a shortcut, to four times ``features`` channels."""

    features: int
    stride: int
    dilation: int
    shortcut: bool
    """Whether the input is projected before it is added: in the first block of a stage."""
    compute: Compute

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map x (b, h, w, c) to (b, h / stride, w / stride, 4 features), sides rounded up."""
        features, compute = self.features, self.compute
        y = conv(features, 1, compute, bias=False, name="conv1")(x)
        y = nn.relu(BatchNorm(compute, name="bn1")(y, train))
        y = conv(
            features, 3, compute, padding=self.dilation, stride=self.stride, dilation=self.dilation, bias=False,
            name="conv2",
        )(y)  # fmt: skip
        y = nn.relu(BatchNorm(compute, name="bn2")(y, train))
        y = conv(4 * features, 1, compute, bias=False, name="conv3")(y)
        y = BatchNorm(compute, name="bn3")(y, train)
        if self.shortcut:
            x = conv(4 * features, 1, compute, padding=0, stride=self.stride, bias=False, name="downsample_conv")(x)
            x = BatchNorm(compute, name="downsample_bn")(x, train)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """The encoder: a 7x7 convolution and a 3x3 pooling of stride 2 each, then four stages of bottlenecks."""

    blocks: tuple[int, ...]
    compute: Compute
    width: float = 1.0
    remat: bool = False
    """Recompute the activations of a block in the backward pass instead of keeping them."""
    freeze_stages: int = 0
    """See ``FCN``; stage 1 is the 7x7 convolution."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, jax.Array]:
        """Encode x (b, h, w, 3); return layer3 and layer4, both at stride 8."""
        block = nn.remat(Bottleneck, static_argnums=(2,)) if self.remat else Bottleneck
        frozen = self.freeze_stages >= 1
        x = conv(scaled(64, self.width), 7, self.compute, padding=3, stride=2, bias=False, name="conv1")(x)
        x = nn.relu(BatchNorm(self.compute, name="bn1")(x, train and not frozen))
        # XLA folds the padding into the pooling; jax2onnx takes none but "SAME" and "VALID", by keyword.
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
        x = nn.max_pool(x, window_shape=(3, 3), strides=(2, 2), padding="VALID")
        x = jax.lax.stop_gradient(x) if frozen else x
        maps = []
        for layer, (count, (stride, dilation, dilations)) in enumerate(zip(self.blocks, GEOMETRY, strict=True), 1):
            frozen = self.freeze_stages > layer
            features = scaled(64 * 2 ** (layer - 1), self.width)
            for index in range(count):
                first = index == 0
                x = block(
                    features, stride if first else 1, dilation if first else dilations, first, self.compute,
                    name=f"layer{layer}_{index}",
                )(x, train and not frozen)  # fmt: skip
            x = jax.lax.stop_gradient(x) if frozen else x
            maps.append(x)
        return maps[-2], maps[-1]
