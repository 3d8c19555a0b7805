"""The layers that the families are built from: convolution, max pooling, batch norm, dropout, and the heads on pool5.

Where frameworks differ (ties in pooling, the running variance) they follow PyTorch. Dimensions are b h w c.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from fcn_jax.models.kernels import conv2d, max_pool


@dataclass(frozen=True)
class Compute:
    """How layers compute: the dtypes of activations and of parameters, and the matmul precision.

    ``axis_name`` is the axis of ``jax.pmap`` or ``jax.shard_map`` that batch-norm statistics are averaged over; None
    if the batch is already global.
    """

    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    precision: Any = None
    axis_name: str | tuple[str, ...] | None = None
    whole_gradients: bool = False
    """Compute the gradients of parameters in ``param_dtype``, so that XLA also sums them over devices in it."""

    @property
    def product_dtype(self) -> Any:
        """The dtype to which kernels and biases are cast; results are in ``dtype``."""
        return jnp.promote_types(self.dtype, self.param_dtype) if self.whole_gradients else self.dtype


def scaled(channels: int, width: float) -> int:
    """Return a channel count under the width multiplier, at least 1."""
    return max(1, round(channels * width))


def conv(
    features: int,
    kernel: int,
    compute: Compute,
    *,
    padding: int | str = "SAME",
    stride: int = 1,
    dilation: int = 1,
    bias: bool = True,
    zero: bool = False,
    kind: type[Conv] | None = None,
    name: str | None = None,
) -> Any:
    """Make a convolution with a ``kernel`` x ``kernel`` window.

    ``padding`` is pixels added on every side, "SAME" or "VALID". The kernel is initialised from He's normal
    distribution or, with ``zero``, at zero, as score layers in the paper; the bias at zero. ``kind`` is the module's
    class.
    """
    return (kind or Conv)(
        features,
        (kernel, kernel),
        strides=(stride, stride),
        kernel_dilation=(dilation, dilation),
        padding=padding if isinstance(padding, str) else ((padding, padding), (padding, padding)),
        use_bias=bias,
        kernel_init=nn.initializers.zeros_init() if zero else nn.initializers.he_normal(),
        result_dtype=compute.dtype,
        dtype=compute.product_dtype,
        param_dtype=compute.param_dtype,
        precision=compute.precision,
        name=name,
    )


class Conv(nn.Conv):
    """A convolution through ``kernels.conv2d``, whose result may have a narrower dtype than its products."""

    result_dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Convolve x (b, h, w, c)."""
        shape = (*cast(Any, self.kernel_size), x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype).astype(self.dtype)
        options: dict[str, Any] = {"rhs_dilation": self.kernel_dilation, "precision": self.precision}
        strides, padding = cast(Any, (self.strides, self.padding))
        y = conv2d(x.astype(self.dtype), kernel, strides, padding, **options)
        if self.use_bias:
            y = y + self.param("bias", self.bias_init, (self.features,), self.param_dtype).astype(self.dtype)
        return y.astype(self.result_dtype)


class PooledConv(Conv):
    """A convolution that is always followed by max pooling.

    A bias shifts all pixels of a window equally, so its gradient is the sum over the pooled map, which has a quarter of
    the pixels. ``__call__`` alone gives the bias no gradient: ``max_pool`` has to follow.
    """

    def param(self, name: str, *args: Any, **options: Any) -> Any:
        """Return a parameter; the convolution itself treats the bias as a constant."""
        value = super().param(name, *args, **options)
        return jax.lax.stop_gradient(value) if name == "bias" else value

    def max_pool(self, y: jax.Array, mode: Literal["ceil", "floor"]) -> jax.Array:
        """Pool the result of ``__call__``, and add a zero that carries the gradient of the bias."""
        bias: jax.Array = self.get_variable("params", "bias").astype(self.dtype)
        return (max_pool(y, mode) + (bias - jax.lax.stop_gradient(bias))).astype(y.dtype)


class BatchNorm(nn.Module):
    """Batch normalisation over b, h, w, synchronised over all devices.

    In training: y = (x - mean) / sqrt(var + 1e-5) * scale + bias with the mean and biased variance of the *global*
    batch, and running <- 0.9 running + 0.1 batch, of the unbiased variance (differs from ``flax.linen.BatchNorm``,
    equals ``torch.nn.BatchNorm2d``). Otherwise the running statistics are used. Statistics are in float32 or better.
    """

    compute: Compute

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Normalise x (b, h, w, c) over all axes but the last."""
        compute, channels = self.compute, x.shape[-1:]
        stat_dtype = jnp.promote_types(compute.param_dtype, jnp.float32)
        scale = self.param("scale", nn.initializers.ones_init(), channels, compute.param_dtype)
        bias = self.param("bias", nn.initializers.zeros_init(), channels, compute.param_dtype)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, stat_dtype)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels, stat_dtype)
        x = x.astype(stat_dtype)
        if train:
            mean, var, unbiased = self._statistics(x)
            if not self.is_initializing():
                running_mean.value = 0.9 * running_mean.value + 0.1 * mean
                running_var.value = 0.9 * running_var.value + 0.1 * unbiased
        else:
            mean, var = running_mean.value, running_var.value
        factor = jax.lax.rsqrt(var + 1e-5) * scale
        # The gradient of the mean is -factor times that of the bias. This term, which is zero, saves a sum of its own.
        centre = jax.lax.stop_gradient(mean)
        y = (x - centre) * factor + (bias - (mean - centre) * factor)
        return y.astype(compute.dtype)

    def _statistics(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return mean, biased and unbiased variance (c,) of the global batch, in two passes for accuracy."""
        axes = tuple(range(x.ndim - 1))
        count = math.prod(x.shape[axis] for axis in axes)
        mean = jnp.mean(x, axes)
        if self.compute.axis_name is not None:
            count = count * jax.lax.axis_size(self.compute.axis_name)
            mean = jax.lax.pmean(mean, self.compute.axis_name)
        # With a constant here the gradient skips the sum of x - mean, which is zero. The square that is
        # subtracted below and its first derivative are zero too; the second derivative needs it.
        constant = jax.lax.stop_gradient(mean)
        var = jnp.mean(jnp.square(x - constant), axes)
        if self.compute.axis_name is not None:
            var = jax.lax.pmean(var, self.compute.axis_name)
        var = var - jnp.square(mean - constant)
        # A single value has no unbiased variance: torch raises an error, here it is zero.
        return mean, var, var * (count / max(count - 1, 1))


class Dropout(nn.Module):
    """Zero activations with probability ``rate`` and scale the rest by 1 / (1 - rate).

    Masks are keyed per example, by the "dropout" key and the example's id, so that they do not depend on how a batch is
    split over devices or parts. ``unit`` is what is dropped: an "element" (Caffe) or a whole "channel"
    (``torch.nn.Dropout2d``).
    """

    rate: float
    unit: Literal["element", "channel"]

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, example_ids: jax.Array | None = None) -> jax.Array:
        """Drop from x (b, h, w, c); ``example_ids`` (b,), by default 0 ... b - 1, are positions in the global batch."""
        if not train or self.rate == 0.0:
            return x
        b, h, w, c = x.shape
        example_ids = jnp.arange(b) if example_ids is None else example_ids
        shape = (h, w, c) if self.unit == "element" else (1, 1, c)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(self.make_rng("dropout"), example_ids)
        keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - self.rate, shape))(keys)
        return jnp.where(keep, x / (1.0 - self.rate), 0).astype(x.dtype)


class FullyConvolutionalHead(nn.Module):
    """fc6 and fc7 of VGG as convolutions, with ReLU and dropout: Long, Shelhamer & Darrell 2015, section 3.1."""

    features: int
    kernel_size: int
    padding: Literal["SAME", "VALID"]
    dropout_rate: float
    dropout: Literal["element", "channel"]
    compute: Compute

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, example_ids: jax.Array | None) -> jax.Array:
        """Map pool5 (b, h, w, c) to features (b, h', w', features)."""
        x = nn.relu(conv(self.features, self.kernel_size, self.compute, padding=self.padding, name="fc6")(x))
        x = Dropout(self.dropout_rate, self.dropout, name="drop6")(x, train, example_ids)
        x = nn.relu(conv(self.features, 1, self.compute, name="fc7")(x))
        return Dropout(self.dropout_rate, self.dropout, name="drop7")(x, train, example_ids)


class SmallHead(nn.Module):
    """3x3 convolution, BN, ReLU, dropout, 1x1 score layer: ``FCNHead`` of torchvision, ``_FCNHead`` of Tramac."""

    features: int
    num_classes: int
    dropout_rate: float
    dropout: Literal["element", "channel"]
    compute: Compute

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, example_ids: jax.Array | None) -> jax.Array:
        """Map the encoder's last map (b, h, w, c) to scores (b, h, w, num_classes)."""
        x = conv(self.features, 3, self.compute, padding=1, bias=False, name="conv")(x)
        x = nn.relu(BatchNorm(self.compute, name="bn")(x, train))
        x = Dropout(self.dropout_rate, self.dropout, name="drop")(x, train, example_ids)
        return conv(self.num_classes, 1, self.compute, zero=True, name="score")(x)
