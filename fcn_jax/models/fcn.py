"""The five families of fully convolutional networks, from images to logits of the images' own size.

They differ in encoder, padding and head, and in how coarse scores are upsampled and fused with finer ones.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from fcn_jax.errors import InputError
from fcn_jax.models.layers import BatchNorm, Compute, FullyConvolutionalHead, SmallHead, conv, scaled
from fcn_jax.models.resnet import RESNETS, ResNet
from fcn_jax.models.upsample import TransposedConv, resize_bilinear
from fcn_jax.models.vgg import ENCODERS, VGG

ENCODER_SCOPES = ("vgg", "resnet")
"""The encoder's name in the tree of parameters."""


def encoder_stage(names: Sequence[str]) -> int:
    """Return the stage of an encoder's layer, from 1, by its path: ``("vgg", "conv3_1", ...)`` is in stage 3."""
    if names[0] == "vgg":
        return int(names[1].partition("_")[0][-1])
    return 1 + int(names[1][len("layer")]) if names[1].startswith("layer") else 1


class FCN(nn.Module):
    """Base class of all families: the encoder, and how to compute.

    Every family maps normalised images (b, h, w, 3) to logits (b, h, w, num_classes), and raises InputError for an
    image size that its options do not support. With ``train``, batch norm uses the batch's statistics, and dropout
    needs a "dropout" key and ``example_ids`` (b,), positions in the global batch, by default 0 ... b - 1.
    """

    num_classes: int
    stride: int
    """Stride of the finest map that is fused: 32 (none), 16 (pool4), 8 (pool3)."""
    encoder: str = "vgg16"
    encoder_norm: Literal["batch"] | None = None
    width: float = 1.0
    freeze_stages: int = 0
    """Number of encoder stages to freeze, from the first: no gradient, and batch norm uses running statistics."""
    remat: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    precision: Any = None
    axis_name: str | tuple[str, ...] | None = None
    whole_gradients: bool = False
    """See ``layers.Compute``."""

    @property
    def compute(self) -> Compute:
        """How the layers compute."""
        return Compute(self.dtype, self.param_dtype, self.precision, self.axis_name, self.whole_gradients)

    def encode(
        self, images: jax.Array, train: bool, pool: Literal["ceil", "floor"], margin: int = 1
    ) -> tuple[jax.Array, ...]:
        """Return pool1 ... pool5 of a VGG."""
        vgg = VGG(
            ENCODERS[self.encoder], self.compute, self.encoder_norm, self.width, pool, margin, self.remat,
            self.freeze_stages, name="vgg",
        )  # fmt: skip
        return vgg(images.astype(self.dtype), train)


class ScoreFCN(FCN):
    """The networks of the paper: 1x1 score layers on fc7, pool4 and pool3, transposed convolutions of kernel 2s."""

    fc_features: int = 4096
    fc6_kernel: int = 7
    pool: Literal["ceil", "floor"] = "ceil"
    dropout: Literal["element", "channel"] = "channel"
    dropout_rate: float = 0.5
    skip_scales: tuple[float, float] = (1.0, 1.0)
    skip_bias: bool = True
    upsample_bias: bool = True

    def make_head(self, padding: Literal["SAME", "VALID"]) -> FullyConvolutionalHead:
        """Make fc6 and fc7."""
        features, kernel, compute = self.fc_features, self.fc6_kernel, self.compute
        return FullyConvolutionalHead(features, kernel, padding, self.dropout_rate, self.dropout, compute, name="head")

    def make_score(self, name: str, bias: bool = True) -> nn.Conv:
        """Make a 1x1 score layer."""
        return conv(self.num_classes, 1, self.compute, bias=bias, zero=True, name=name)

    def make_upsampling(self, name: str, factor: int, padding: int = 0) -> TransposedConv:
        """Make a transposed convolution of kernel 2s at stride s = ``factor``."""
        n, bias = self.num_classes, self.upsample_bias
        return TransposedConv(n, 2 * factor, factor, self.compute, padding=padding, use_bias=bias, name=name)


class SameFCN(ScoreFCN):
    """Family `same`: SAME padding, so that upsampled maps are at least as large as the skips they are added to.

    Sources: the paper without the reference's margin of 100; with ``fc6_kernel=1`` the Boostcamp notes.
    """

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False, example_ids: jax.Array | None = None) -> jax.Array:
        """Return the logits (b, h, w, num_classes); see ``FCN``."""
        _, h, w, _ = images.shape
        check_size(self, (h, w))
        _, _, pool3, pool4, pool5 = self.encode(images, train, self.pool)
        x = self.make_head("SAME")(pool5, train, example_ids)
        x = self.make_score("score_fr")(x)
        if self.stride <= 16:
            x = self.make_upsampling("upscore2", 2, padding=1)(x)
            skip = self.make_score("score_pool4", self.skip_bias)(pool4 * self.skip_scales[0])
            x = x[:, : skip.shape[1], : skip.shape[2]] + skip
        if self.stride <= 8:
            x = self.make_upsampling("upscore_pool4", 2, padding=1)(x)
            skip = self.make_score("score_pool3", self.skip_bias)(pool3 * self.skip_scales[1])
            x = x[:, : skip.shape[1], : skip.shape[2]] + skip
        x = self.make_upsampling(f"upscore{self.stride}", self.stride, padding=self.stride // 2)(x)
        return x[:, :h, :w]


class Pad100FCN(ScoreFCN):
    """Family `pad100`: the Caffe reference. conv1_1 pads by 100 pixels, fc6 is VALID, and crops align the maps.

    Sources: ``voc-fcn8s/net.py`` of the reference and pytorch-fcn; with ``pool="floor"`` Fanrencli's "FCN (2015)".
    """

    crop: tuple[int, int, int] = (5, 9, 31)
    """Offsets in pixels of the map at pool4, at pool3 and at the output."""
    upsample_bias: bool = False
    dropout: Literal["element", "channel"] = "element"

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False, example_ids: jax.Array | None = None) -> jax.Array:
        """Return the logits (b, h, w, num_classes); see ``FCN``."""
        _, h, w, _ = images.shape
        check_size(self, (h, w))
        at_pool4, at_pool3, at_output = self.crop
        _, _, pool3, pool4, pool5 = self.encode(images, train, self.pool, margin=100)
        x = self.make_head("VALID")(pool5, train, example_ids)
        x = self.make_score("score_fr")(x)
        if self.stride <= 16:
            x = self.make_upsampling("upscore2", 2)(x)
            skip = self.make_score("score_pool4", self.skip_bias)(pool4 * self.skip_scales[0])
            x = x + _crop(skip, at_pool4, x.shape[1:3])
        if self.stride <= 8:
            x = self.make_upsampling("upscore_pool4", 2)(x)
            skip = self.make_score("score_pool3", self.skip_bias)(pool3 * self.skip_scales[1])
            x = x + _crop(skip, at_pool3, x.shape[1:3])
        x = self.make_upsampling(f"upscore{self.stride}", self.stride)(x)
        return _crop(x, at_output, (h, w))


class LadderFCN(FCN):
    """Family `ladder`: five 3x3 stride-2 transposed convolutions from pool5 to full size, then a 1x1 classifier.

    ReLU and batch norm follow each transposed convolution. In 32s, 16s and 8s a skip is added between the two; in FCNs
    (stride 2, skips from pool4 to pool1) after batch norm. Images are zero-padded at the bottom and right to multiples
    of 32, and the logits are cropped back.
    Sources: pochih's FCN-pytorch and the FCN1 notes, which run at multiples of 32.
    """

    skip_after_norm: bool = False

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False, example_ids: jax.Array | None = None) -> jax.Array:
        """Return the logits (b, h, w, num_classes); see ``FCN``."""
        _, h, w, _ = images.shape
        *pools, x = self.encode(_pad_to(images, -(-h // 32) * 32, -(-w // 32) * 32), train, "floor")
        for rung, channels in enumerate((512, 256, 128, 64, 32), start=1):
            up = TransposedConv(
                scaled(channels, self.width), 3, 2, self.compute, 1, 1, use_bias=True, bilinear=False,
                name=f"deconv{rung}",
            )  # fmt: skip
            x = nn.relu(up(x))
            has_skip = 32 >> rung >= self.stride
            if has_skip and not self.skip_after_norm:
                x = x + pools[-rung]
            x = BatchNorm(self.compute, name=f"bn{rung}")(x, train)
            if has_skip and self.skip_after_norm:
                x = x + pools[-rung]
        x = conv(self.num_classes, 1, self.compute, zero=True, name="classifier")(x)
        return x[:, :h, :w]


class InterpolatedFCN(FCN):
    """Networks that interpolate scores bilinearly: a small head and, optionally in training, an auxiliary one."""

    head_features: int = 128
    dropout: Literal["element", "channel"] = "element"
    dropout_rate: float = 0.1
    aux_head: bool = False
    # Constants of the family, not options: the stride of the coarsest score map, and how interpolation aligns pixels.
    coarsest = 32
    align_corners = True


class ResizeFCN(InterpolatedFCN):
    """Family `resize`: a small head on pool5, interpolated bilinearly to the exact size of each finer map.

    Corners are aligned. Images with a side below 32 are zero-padded to 32, and the logits are cropped back.
    Source: ``core/models/fcn.py`` of awesome-semantic-segmentation-pytorch (Tramac).
    """

    @nn.compact
    def __call__(
        self, images: jax.Array, train: bool = False, example_ids: jax.Array | None = None, merge: bool = True
    ) -> Any:
        """Return the logits (b, h, w, num_classes); see ``FCN``.

        With ``aux_head``, training returns (logits, auxiliary logits), both of the image's size. Without ``merge`` the
        result is the list of score maps, before interpolation, at those of the strides 32, 16 and 8 that it has.
        """
        _, h, w, _ = images.shape
        size = max(h, 32), max(w, 32)
        score = functools.partial(conv, self.num_classes, 1, self.compute, zero=True)
        head = functools.partial(
            SmallHead, self.head_features, self.num_classes, self.dropout_rate, self.dropout, self.compute
        )
        _, _, pool3, pool4, pool5 = self.encode(_pad_to(images, *size), train, "floor")
        maps = [head(name="head")(pool5, train, example_ids)]
        if self.stride <= 16:
            maps.append(score(name="score_pool4")(pool4))
        if self.stride <= 8:
            maps.append(score(name="score_pool3")(pool3))
        if not merge:
            return maps
        x = maps[0]
        for skip in maps[1:]:
            x = resize_bilinear(x, skip.shape[1:3], self.precision) + skip
        logits = resize_bilinear(x, size, self.precision)[:, :h, :w]
        if self.aux_head and (train or self.is_initializing()):
            aux = head(name="aux")(pool5, train, example_ids)
            aux = resize_bilinear(aux, size, self.precision)[:, :h, :w]
            return (logits, aux) if train else logits
        return logits


class DilatedFCN(InterpolatedFCN):
    """Family `dilated`: a ResNet dilated to stride 8, a small head on its last stage, interpolated to the image's size.

    Corners are not aligned; the auxiliary head is on the third stage.
    Source: torchvision's ``models/segmentation/fcn.py`` and ``_utils.py``.
    """

    encoder: str = "resnet50"
    encoder_norm: Literal["batch"] | None = "batch"
    coarsest = 8
    align_corners = False

    @nn.compact
    def __call__(
        self, images: jax.Array, train: bool = False, example_ids: jax.Array | None = None, merge: bool = True
    ) -> Any:
        """Return the logits (b, h, w, num_classes); see ``ResizeFCN``; the only score map has stride 8."""
        _, h, w, _ = images.shape
        resnet = ResNet(RESNETS[self.encoder], self.compute, self.width, self.remat, self.freeze_stages, name="resnet")
        layer3, layer4 = resnet(images.astype(self.dtype), train)

        def head(x: jax.Array, features: int, name: str) -> jax.Array:
            layers = SmallHead(features, self.num_classes, self.dropout_rate, self.dropout, self.compute, name=name)
            return layers(x, train, example_ids)

        scores = head(layer4, self.head_features, "head")
        if not merge:
            return [scores]
        logits = resize_bilinear(scores, (h, w), self.precision, align_corners=False)
        if self.aux_head and (train or self.is_initializing()):
            aux = head(layer3, max(1, self.head_features // 2), "aux")
            aux = resize_bilinear(aux, (h, w), self.precision, align_corners=False)
            return (logits, aux) if train else logits
        return logits


def _pad_to(images: jax.Array, height: int, width: int) -> jax.Array:
    """Pad with zeros at the bottom and right."""
    return jnp.pad(images, ((0, 0), (0, height - images.shape[1]), (0, width - images.shape[2]), (0, 0)))


def _crop(x: jax.Array, offset: int, size: tuple[int, ...]) -> jax.Array:
    """Cut x (b, h, w, c) to ``size`` from one offset in both directions."""
    return x[:, offset : offset + size[0], offset : offset + size[1]]


def map_sides(model: FCN, n: Any) -> tuple[list[Any], list[Any]]:
    """Return the sides of the feature maps, finest first, for images of side n (int or array).

    Returns:
        Sides of the maps that convolutions read and write, and of those that transposed convolutions read.
    """
    ceil = isinstance(model, ScoreFCN) and model.pool == "ceil"
    if isinstance(model, DilatedFCN):
        maps = [-(-n // stride) for stride in (1, 2, 4, 8)]
        return maps, maps
    if isinstance(model, LadderFCN):
        n = -(-n // 32) * 32
    if isinstance(model, ResizeFCN):
        n = n + (32 - n) * (n < 32)
    maps = [n + 198 if isinstance(model, Pad100FCN) else n]
    for _ in range(5):
        maps.append((maps[-1] + ceil) // 2)
    if not isinstance(model, Pad100FCN):
        return maps, maps
    scores = maps[-1] - (model.fc6_kernel - 1)
    at_pool4 = 2 * scores + 2
    return [*maps, scores], [2 * at_pool4 + 2, at_pool4, scores]


def serves(model: FCN, n: int) -> bool:
    """Return whether a network supports images with a side of n pixels."""
    if isinstance(model, SameFCN) and model.pool == "floor":
        return n > 0 and n % 32 == 0
    if not isinstance(model, Pad100FCN):
        return True
    (_, _, _, pool3, pool4, _, _), (at_pool3, at_pool4, scores) = map_sides(model, n)
    fused = {32: scores, 16: at_pool4, 8: at_pool3}[model.stride]
    return (
        n > 0
        and scores > 0
        and (model.stride > 16 or model.crop[0] + at_pool4 <= pool4)
        and (model.stride > 8 or model.crop[1] + at_pool3 <= pool3)
        and model.crop[2] + n <= (fused + 1) * model.stride
    )


def check_size(model: FCN, size: tuple[int, int]) -> None:
    """Raise InputError if a network does not support this (height, width); the message names sizes that work."""
    for what, n in zip(("height", "width"), size, strict=True):
        if serves(model, n):
            continue
        if not isinstance(model, Pad100FCN):
            raise InputError(
                f"expected height and width to be multiples of 32 with pool='floor', got {size[0]}x{size[1]}; "
                "use pool='ceil', which supports every size"
            )
        far = [r for r in range(32) if serves(model, 1024 + r)]
        near = sorted((m for m in range(1, n + 65) if serves(model, m)), key=lambda m: abs(m - n))[:2]
        raise InputError(
            f"{what} {n} is not supported with pool={model.pool!r} and crop={model.crop}: supported are sides n with "
            f"n mod 32 in {far or 'no class'}, near {n}: {sorted(near) or 'none'}; "
            "change the size or the crop, or use pool='ceil' with the default crop, which supports every size"
        )
