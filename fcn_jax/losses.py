"""Pixel losses as a sum and the weight to divide it by, so that parts of a batch add up exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fcn_jax.errors import InputError, unknown

IGNORE = 255
"""Label of pixels that count neither in the loss nor in the scores, as in PASCAL VOC."""


class LossSum(NamedTuple):
    """A loss over some pixels; the mean loss of a global batch is the sum of totals over the sum of weights."""

    total: jax.Array
    weight: jax.Array


PixelLoss = Callable[[jax.Array, jax.Array], jax.Array]
Loss = Callable[[Any, jax.Array], LossSum]
"""(logits (b, h, w, num_classes) or a pair with those of an auxiliary head, labels (b, h, w)) -> ``LossSum``."""


def _softmax(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return -log softmax(z)[y] of each pixel (b, h, w)."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def _sigmoid(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the binary cross-entropy against the one-hot label, averaged over classes (gaussian37's notes)."""
    one_hot = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return optax.sigmoid_binary_cross_entropy(logits, one_hot).mean(-1)


LOSSES: dict[str, PixelLoss] = {"softmax": _softmax, "sigmoid": _sigmoid}


def _hardest(pixel_loss: jax.Array, valid: jax.Array, fraction: float) -> jax.Array:
    """Return the mask (b, h, w) of each image's ceil(fraction x valid) hardest pixels; ties with the last are in."""
    flat = jnp.where(valid, jax.lax.stop_gradient(pixel_loss), -jnp.inf).reshape(len(valid), -1)
    keep = jnp.ceil(fraction * valid.reshape(len(valid), -1).sum(1)).astype(jnp.int32)
    descending = jnp.sort(flat, axis=1, descending=True)
    threshold = jnp.take_along_axis(descending, jnp.maximum(keep - 1, 0)[:, None], axis=1)
    return valid & (flat >= threshold).reshape(valid.shape)


def sum_pixels(
    pixel_loss: PixelLoss,
    logits: jax.Array,
    labels: jax.Array,
    class_weights: jax.Array | np.ndarray | None = None,
    hard_fraction: float = 1.0,
) -> LossSum:
    """Sum a pixel loss over the valid pixels.

    total = sum of w[y] loss, weight = sum of w[y], over pixels whose label y is not 255. Ignored labels are replaced
    before the loss is computed: optax gives NaN for 255, and NaN survives a mask.

    Args:
        pixel_loss: a value of ``LOSSES``.
        logits: (b, h, w, num_classes); the loss is computed in float32 or better.
        labels: (b, h, w) integers.
        class_weights: (num_classes,), by default 1; total / weight is then the weighted mean of torch's
            CrossEntropyLoss.
        hard_fraction: keep this fraction of each image's valid pixels, those of the largest loss. It goes by image,
            so that the split of a batch over devices does not change what is kept.
    """
    valid = labels != IGNORE
    safe = jnp.where(valid, labels, 0).astype(jnp.int32)
    each = pixel_loss(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), safe)
    weight = valid.astype(each.dtype)
    if class_weights is not None:
        weight = weight * jnp.asarray(class_weights, each.dtype)[safe]
    if hard_fraction < 1.0:
        weight = weight * _hardest(each * weight, valid, hard_fraction)
    return LossSum(jnp.sum(each * weight), jnp.sum(weight))


def median_frequency_weights(pixels: np.ndarray, image_pixels: np.ndarray) -> np.ndarray:
    """Return each class's weight: the median class frequency over its own.

    The frequency of a class is its pixels over all pixels of the images it occurs in; a class that never occurs
    weighs 0.
    Source: Eigen & Fergus 2015, section 6.3.2; Badrinarayanan et al. 2017 (SegNet).

    Args:
        pixels: (num_classes,) pixels of each class.
        image_pixels: (num_classes,) valid pixels of the images where the class occurs.
    """
    occurs = pixels > 0
    frequency = np.divide(pixels, image_pixels, out=np.zeros(len(pixels)), where=occurs)
    median = np.median(frequency[occurs]) if occurs.any() else 0.0
    return np.divide(median, frequency, out=np.zeros(len(pixels)), where=occurs)


def make_loss(
    kind: str, class_weights: np.ndarray | None = None, hard_fraction: float = 1.0, aux_weight: float = 0.4
) -> Loss:
    """Make the loss of a run: (logits (b, h, w, num_classes), labels (b, h, w)) -> ``LossSum``.

    Args:
        kind: a key of ``LOSSES``.
        class_weights: see ``sum_pixels``.
        hard_fraction: see ``sum_pixels``, in (0, 1].
        aux_weight: factor on the loss of an auxiliary head's logits, where the logits are a pair.

    Raises:
        InputError: an unknown kind, or a fraction outside (0, 1].
    """
    if kind not in LOSSES:
        raise unknown("loss", kind, LOSSES)
    if not 0 < hard_fraction <= 1:
        raise InputError(f"expected 0 < hard_fraction <= 1, got {hard_fraction}; 1 keeps every pixel")

    def loss(logits: Any, labels: jax.Array) -> LossSum:
        if isinstance(logits, tuple):
            main, aux = (loss(each, labels) for each in logits)
            return LossSum(main.total + aux_weight * aux.total, main.weight)
        return sum_pixels(LOSSES[kind], logits, labels, class_weights, hard_fraction)

    return loss
