"""The four families of fully convolutional networks, from images to logits of the images' own size.

All take normalised float images (b, h, w, 3) and return logits (b, h, w, num_classes). They share the VGG encoder and
part in padding, in what stands on pool5, and in how the coarse scores are brought back to full size and fused with
finer ones.
"""

from __future__ import annotations

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from fcn_jax.errors import InputError
from fcn_jax.models.heads import FullyConvolutionalHead, SmallHead
from fcn_jax.models.layers import BatchNorm, Compute, conv, scaled
from fcn_jax.models.upsample import TransposedConv, resize_bilinear
from fcn_jax.models.vgg import ENCODERS, VGG

__all__ = ["FCN", "LadderFCN", "Pad100FCN", "ResizeFCN", "SameFCN", "ScoreFCN"]


class FCN(nn.Module):
    """What all families have: the encoder and how to compute."""

    num_classes: int
    stride: int
    """Stride of the finest map that is fused: 32 (none), 16 (pool4), 8 (pool3)."""
    encoder: str = "vgg16"
    encoder_norm: Literal["batch"] | None = None
    width: float = 1.0
    freeze_encoder: bool = False
    remat: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    precision: Any = None
    axis_name: str | None = None

    @property
    def compute(self) -> Compute:
        """How the layers compute."""
        return Compute(self.dtype, self.param_dtype, self.precision, self.axis_name)

    def make_vgg(self, pool: Literal["ceil", "floor"], margin: int = 1, name: str | None = None) -> VGG:
        """Make the encoder."""
        convs = ENCODERS[self.encoder]
        return VGG(convs, self.compute, self.encoder_norm, self.width, pool, margin, self.remat, name=name)

    def encode(self, vgg: VGG, images: jax.Array, train: bool) -> tuple[jax.Array, ...]:
        """Run the encoder; frozen, it normalises by its running statistics and passes no gradient."""
        pools = vgg(images.astype(self.dtype), train and not self.freeze_encoder)
        return jax.lax.stop_gradient(pools) if self.freeze_encoder else pools


def _ids(images: jax.Array, example_ids: jax.Array | None) -> jax.Array:
    """Return the examples' positions in the global batch; without them the batch is taken to be whole."""
    return jnp.arange(images.shape[0]) if example_ids is None else example_ids


class ScoreFCN(FCN):
    """The paper's form: score layers on pool5's features, pool4 and pool3, fused by transposed convolutions of k = 2s.

    The two families of this form differ in the margin around the image and, following from it, in what is cropped.
    """

    fc_features: int = 4096
    fc6_kernel: int = 7
    pool: Literal["ceil", "floor"] = "ceil"
    dropout: Literal["element", "channel"] = "channel"
    dropout_rate: float = 0.5
    skip_scales: tuple[float, float] = (1.0, 1.0)
    skip_bias: bool = True
    upsample_bias: bool = True

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False, example_ids: jax.Array | None = None) -> jax.Array:
        """Return the logits (b, h, w, num_classes) of images (b, h, w, 3).

        Args:
            images: normalised images of any size that the options serve.
            train: batch statistics and dropout, which needs a "dropout" key.
            example_ids: (b,) positions in the global batch, for dropout; by default 0 ... b - 1.

        Raises:
            InputError: an option does not serve this size.
        """
        _, h, w, _ = images.shape
        size = (h, w)
        self.check_size(size)
        _, _, pool3, pool4, x = self.encode(self._vgg(), images, train)
        x = self._head()(x, train, _ids(images, example_ids))
        x = self._score("score_fr", bias=True)(x)
        if self.stride <= 16:
            x = self._upsample("upscore2", 2)(x)
            x = self.fuse(x, self._score("score_pool4")(pool4 * self.skip_scales[0]), 0)
        if self.stride <= 8:
            x = self._upsample("upscore_pool4", 2)(x)
            x = self.fuse(x, self._score("score_pool3")(pool3 * self.skip_scales[1]), 1)
        x = self._upsample(f"upscore{self.stride}", self.stride)(x)
        return self.fit(x, size)

    def _score(self, name: str, bias: bool | None = None) -> nn.Conv:
        return conv(
            self.num_classes, 1, self.compute, bias=self.skip_bias if bias is None else bias, zero=True, name=name
        )

    def _vgg(self) -> VGG:
        raise NotImplementedError

    def _head(self) -> FullyConvolutionalHead:
        raise NotImplementedError

    def _upsample(self, name: str, factor: int) -> TransposedConv:
        raise NotImplementedError

    def check_size(self, size: tuple[int, int]) -> None:
        """Raise InputError where the options cannot serve images of this height and width."""
        raise NotImplementedError

    def fuse(self, up: jax.Array, skip: jax.Array, index: int) -> jax.Array:
        """Add the scores of a finer map; ``index`` is 0 for pool4, 1 for pool3."""
        raise NotImplementedError

    def fit(self, up: jax.Array, size: tuple[int, int]) -> jax.Array:
        """Cut the upsampled scores to the image's size."""
        raise NotImplementedError


class SameFCN(ScoreFCN):
    """Family `same`: nothing is padded beyond SAME, so upsampled maps are at least as large as what they are added to.

    Sources: the paper without the reference's pad-100 margin; with ``fc6_kernel=1`` the torch networks of the
    Boostcamp notes, which run where the shapes happen to match.
    """

    def _vgg(self) -> VGG:
        return self.make_vgg(self.pool, name="vgg")

    def _head(self) -> FullyConvolutionalHead:
        features, kernel = self.fc_features, self.fc6_kernel
        return FullyConvolutionalHead(
            features, kernel, "SAME", self.dropout_rate, self.dropout, self.compute, name="head"
        )

    def _upsample(self, name: str, factor: int) -> TransposedConv:
        bias = self.upsample_bias
        return TransposedConv(
            self.num_classes, 2 * factor, factor, self.compute, padding=factor // 2, use_bias=bias, name=name
        )

    def check_size(self, size: tuple[int, int]) -> None:
        """Raise InputError under floor pooling for sides that are no multiple of 32."""
        if self.pool == "floor" and any(n % 32 or n == 0 for n in size):
            raise InputError(
                f"expected height and width to be multiples of 32 with pool='floor', got {size[0]}x{size[1]}; "
                "use pool='ceil', which serves every size"
            )

    def fuse(self, up: jax.Array, skip: jax.Array, index: int) -> jax.Array:
        """Crop the upsampled map top-left to the skip and add."""
        return up[:, : skip.shape[1], : skip.shape[2]] + skip

    def fit(self, up: jax.Array, size: tuple[int, int]) -> jax.Array:
        """Crop top-left to the image."""
        return up[:, : size[0], : size[1]]


class Pad100FCN(ScoreFCN):
    """Family `pad100`: the Caffe reference. conv1_1 pads by 100, the rest is VALID, and offsets line the maps up again.

    Sources: ``voc-fcn8s/net.py`` of the reference (ceil pooling) and pytorch-fcn; with ``pool="floor"`` the torch
    networks of Fanrencli's "FCN (2015)", whose 32s crops at 6.
    """

    crop: tuple[int, int, int] = (5, 9, 31)
    """Offsets in pixels of the map at pool4, at pool3 and at the output."""
    upsample_bias: bool = False
    dropout: Literal["element", "channel"] = "element"

    def _vgg(self) -> VGG:
        return self.make_vgg(self.pool, margin=100, name="vgg")

    def _head(self) -> FullyConvolutionalHead:
        features, kernel = self.fc_features, self.fc6_kernel
        return FullyConvolutionalHead(
            features, kernel, "VALID", self.dropout_rate, self.dropout, self.compute, name="head"
        )

    def _upsample(self, name: str, factor: int) -> TransposedConv:
        bias = self.upsample_bias
        return TransposedConv(self.num_classes, 2 * factor, factor, self.compute, use_bias=bias, name=name)

    def check_size(self, size: tuple[int, int]) -> None:
        """Raise InputError where a map vanishes or a crop falls short, naming the sizes that work."""
        for what, n in zip(("height", "width"), size, strict=True):
            if not self.serves(n):
                far = [r for r in range(32) if self.serves(1024 + r)]
                near = sorted((m for m in range(1, n + 65) if self.serves(m)), key=lambda m: abs(m - n))[:2]
                raise InputError(
                    f"{what} {n} is not served with pool={self.pool!r} and crop={self.crop}: it serves sides n with "
                    f"n mod 32 in {far or 'no class'}, near {n}: {sorted(near) or 'none'}; "
                    "change the size or the crop, or use pool='ceil' with the default crop, which serves every size"
                )

    def serves(self, n: int) -> bool:
        """Tell whether an image side of n pixels can be brought back to n pixels."""
        maps, side = [], n + 198
        for _ in range(5):
            side = (side + (self.pool == "ceil")) // 2
            maps.append(side)
        side -= self.fc6_kernel - 1
        if n < 1 or side < 1:
            return False
        for factor, finer, offset in ((16, maps[3], self.crop[0]), (8, maps[2], self.crop[1])):
            if self.stride <= factor:
                side = 2 * side + 2
                if offset + side > finer:
                    return False
        return self.crop[2] + n <= (side + 1) * self.stride

    def fuse(self, up: jax.Array, skip: jax.Array, index: int) -> jax.Array:
        """Crop the skip at its offset to the upsampled map and add."""
        offset, (_, h, w, _) = self.crop[index], up.shape
        return up + skip[:, offset : offset + h, offset : offset + w]

    def fit(self, up: jax.Array, size: tuple[int, int]) -> jax.Array:
        """Crop at the output's offset."""
        offset = self.crop[2]
        return up[:, offset : offset + size[0], offset : offset + size[1]]


def _pad_to(images: jax.Array, height: int, width: int) -> jax.Array:
    """Pad with zeros at the bottom and right."""
    return jnp.pad(images, ((0, 0), (0, height - images.shape[1]), (0, width - images.shape[2]), (0, 0)))


class LadderFCN(FCN):
    """Family `ladder`: five learned 3x3 stride-2 rungs from pool5 to full size, each ReLU and BN, and a 1x1 classifier.

    In 32s, 16s and 8s a skip is added between ReLU and BN of its rung; in FCNs (stride 2: pool4 ... pool1) after the
    BN. Images are zero-padded at the bottom and right to multiples of 32 and the logits cut back.
    Sources: the torch networks of pochih's FCN-pytorch and of the FCN1 notes, which run at multiples of 32.
    """

    skip_after_norm: bool = False

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False, example_ids: jax.Array | None = None) -> jax.Array:
        """Return the logits (b, h, w, num_classes) of images (b, h, w, 3); see ``ScoreFCN`` for the arguments."""
        _, h, w, _ = images.shape
        padded = _pad_to(images, -(-h // 32) * 32, -(-w // 32) * 32)
        *pools, x = self.encode(self.make_vgg("floor", name="vgg"), padded, train)
        for rung, channels in enumerate((512, 256, 128, 64, 32), start=1):
            rung_stride = 32 >> rung
            skip = pools.pop() if rung_stride >= self.stride else None
            x = nn.relu(self._deconv(scaled(channels, self.width), f"deconv{rung}")(x))
            if skip is not None and not self.skip_after_norm:
                x = x + skip
            x = BatchNorm(self.compute, name=f"bn{rung}")(x, train)
            if skip is not None and self.skip_after_norm:
                x = x + skip
        x = conv(self.num_classes, 1, self.compute, zero=True, name="classifier")(x)
        return x[:, :h, :w]

    def _deconv(self, features: int, name: str) -> TransposedConv:
        return TransposedConv(
            features, 3, 2, self.compute, padding=1, output_padding=1, use_bias=True, bilinear=False, name=name
        )


class ResizeFCN(FCN):
    """Family `resize`: a small head on pool5, interpolated bilinearly to the exact size of each finer map.

    Corners are aligned. Images with a side below 32 are zero-padded to 32 and the logits cut back.
    Source: ``core/models/fcn.py`` of awesome-semantic-segmentation-pytorch (Tramac).
    """

    head_features: int = 128
    dropout: Literal["element", "channel"] = "element"
    dropout_rate: float = 0.1
    aux_head: bool = False

    def setup(self) -> None:
        """Name the parts."""
        small = (self.head_features, self.num_classes, self.dropout_rate, self.dropout, self.compute)
        self.vgg = self.make_vgg("floor")
        self.head = SmallHead(*small)
        self.score_pool4 = conv(self.num_classes, 1, self.compute, zero=True) if self.stride <= 16 else None
        self.score_pool3 = conv(self.num_classes, 1, self.compute, zero=True) if self.stride <= 8 else None
        if self.aux_head:
            self.aux = SmallHead(*small)

    def __call__(self, images: jax.Array, train: bool = False, example_ids: jax.Array | None = None) -> Any:
        """Return the logits (b, h, w, num_classes) of images (b, h, w, 3); see ``ScoreFCN`` for the arguments.

        With ``aux_head``, training returns (logits, auxiliary logits), both of the image's size.
        """
        _, h, w, _ = images.shape
        size = (max(h, 32), max(w, 32))
        maps, aux = self.scores(_pad_to(images, *size), train, example_ids)
        logits = self.merge(maps, size)[:, :h, :w]
        if aux is not None and train:
            return logits, resize_bilinear(aux, size, self.precision)[:, :h, :w]
        return logits

    def scores(
        self, images: jax.Array, train: bool = False, example_ids: jax.Array | None = None
    ) -> tuple[tuple[jax.Array, ...], jax.Array | None]:
        """Return the score maps at strides 32, 16, 8 (as far as there are), and the auxiliary scores at stride 32."""
        ids = _ids(images, example_ids)
        _, _, pool3, pool4, pool5 = self.encode(self.vgg, images, train)
        maps = [self.head(pool5, train, ids)]
        if self.score_pool4 is not None:
            maps.append(self.score_pool4(pool4))
        if self.score_pool3 is not None:
            maps.append(self.score_pool3(pool3))
        aux = self.aux(pool5, train, ids) if self.aux_head and (train or self.is_initializing()) else None
        return tuple(maps), aux

    def merge(self, maps: tuple[jax.Array, ...], size: tuple[int, int]) -> jax.Array:
        """Interpolate each score map to the next finer one, add, and interpolate to ``size``; it has no parameters."""
        x = maps[0]
        for skip in maps[1:]:
            _, h, w, _ = skip.shape
            x = resize_bilinear(x, (h, w), self.precision) + skip
        return resize_bilinear(x, size, self.precision)
