"""Losses, returned as a sum and the weight to divide it by, so that parts of a batch add up exactly.

Pixel losses (softmax, sigmoid, focal), and region losses of each image (Dice, Lovasz), weighted by its valid pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fcn_jax.errors import InputError, unknown

IGNORE = 255
"""Label of pixels that are excluded from the loss and the scores, as in PASCAL VOC."""


class LossSum(NamedTuple):
    """A loss over some pixels; the mean loss of a global batch is the sum of totals divided by the sum of weights."""

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


def _focal(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return -(1 - p[y])^2 log p[y], p the softmax (Lin et al. 2017, with gamma 2)."""
    loss = _softmax(logits, labels)
    return jnp.square(jnp.expm1(-loss)) * loss


LOSSES: dict[str, PixelLoss] = {"softmax": _softmax, "sigmoid": _sigmoid, "focal": _focal}

RegionLoss = Callable[[jax.Array, jax.Array], jax.Array]
"""(softmax, one-hot labels), each (b, pixels, num_classes), zero at ignored pixels -> (b, num_classes)."""


def _dice(probabilities: jax.Array, truth: jax.Array) -> jax.Array:
    """Return 1 - 2 sum p y / (sum p + sum y) of each image and class (Milletari et al. 2016, without squares)."""
    sizes = (probabilities + truth).sum(1)
    return 1 - 2 * (probabilities * truth).sum(1) / jnp.where(sizes > 0, sizes, 1)


def _lovasz(probabilities: jax.Array, truth: jax.Array) -> jax.Array:
    """Return the Lovasz extension of 1 - IoU of each image and class at the errors |y - p| (Berman et al. 2018).

    Where p and y are zero, as at ignored pixels, the error is zero and adds nothing.
    """
    errors = jnp.abs(truth - probabilities)
    order = jnp.argsort(jax.lax.stop_gradient(errors), axis=1, descending=True)
    errors, truth = (jnp.take_along_axis(x, order, axis=1) for x in (errors, truth))
    # 1 - IoU once the pixels of the largest errors are wrong; its increments are the weights of the errors.
    left = truth.sum(1, keepdims=True) - jnp.cumsum(truth, axis=1)
    union = left + jnp.cumsum(jnp.ones_like(truth), axis=1)
    jaccard = 1 - left / union
    return (errors * jnp.diff(jaccard, axis=1, prepend=0)).sum(1)


REGION_LOSSES: dict[str, RegionLoss] = {"dice": _dice, "lovasz": _lovasz}


def _hardest(pixel_loss: jax.Array, valid: jax.Array, fraction: float) -> jax.Array:
    """Return the mask (b, h, w) of each image's ceil(fraction x valid) hardest pixels, and any ties with the last."""
    flat = jnp.where(valid, jax.lax.stop_gradient(pixel_loss), -jnp.inf).reshape(len(valid), -1)
    keep = jnp.ceil(fraction * valid.reshape(len(valid), -1).sum(1)).astype(jnp.int32)
    descending = jnp.sort(flat, axis=1, descending=True)
    threshold = jnp.take_along_axis(descending, jnp.maximum(keep - 1, 0)[:, None], axis=1)
    return valid & (flat >= threshold).reshape(valid.shape)


def sum_pixels(
    terms: Mapping[str, float],
    logits: jax.Array,
    labels: jax.Array,
    class_weights: jax.Array | np.ndarray | None = None,
    hard_fraction: float = 1.0,
) -> LossSum:
    """Sum a weighted combination of losses over the valid pixels.

    weight = sum of w[y] over pixels whose label y is not 255. A pixel loss has total = sum of w[y] loss. A region loss
    is the mean over the classes in an image's labels, weighted by w, times the image's share of the weight. Ignored
    labels are replaced before the loss is computed: optax returns NaN for 255, and NaN times zero is NaN.

    Args:
        terms: factor of each loss, by its name in ``LOSSES`` or ``REGION_LOSSES``.
        logits: (b, h, w, num_classes); the loss is computed in float32 or better.
        labels: (b, h, w) integers.
        class_weights: (num_classes,), by default 1; total / weight is then the weighted mean of torch's
            CrossEntropyLoss.
        hard_fraction: fraction of each image's valid pixels to keep, those with the largest loss; only for a single
            pixel loss. Pixels are chosen per image, so that splitting a batch over devices does not change the choice.
    """
    valid = labels != IGNORE
    safe = jnp.where(valid, labels, 0).astype(jnp.int32)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    by_class = jnp.ones(logits.shape[-1:]) if class_weights is None else jnp.asarray(class_weights)
    weight = valid * by_class.astype(logits.dtype)[safe]
    if hard_fraction < 1.0:
        (name,) = terms
        weight = weight * _hardest(LOSSES[name](logits, safe) * weight, valid, hard_fraction)
    total = jnp.zeros((), logits.dtype)
    for name, factor in terms.items():
        if name in LOSSES:
            total += factor * jnp.sum(LOSSES[name](logits, safe) * weight)
        else:
            of_images = _region_loss(REGION_LOSSES[name], logits, safe, valid, by_class.astype(logits.dtype))
            total += factor * jnp.sum(of_images * weight.sum((1, 2)))
    return LossSum(total, jnp.sum(weight))


def _region_loss(
    region_loss: RegionLoss, logits: jax.Array, labels: jax.Array, valid: jax.Array, by_class: jax.Array
) -> jax.Array:
    """Return the mean (b,) over the classes in each image's truth; 0 where it has none."""
    b, h, w, classes = logits.shape
    counted = valid.reshape(b, h * w, 1)
    truth = jax.nn.one_hot(labels.reshape(b, h * w), classes, dtype=logits.dtype) * counted
    found = region_loss(jax.nn.softmax(logits).reshape(truth.shape) * counted, truth)
    present = by_class * truth.any(1)
    return (present * found).sum(1) / jnp.maximum(present.sum(1), jnp.finfo(logits.dtype).tiny)


def median_frequency_weights(pixels: np.ndarray, image_pixels: np.ndarray) -> np.ndarray:
    """Return the class weights (num_classes,): the median class frequency divided by each class's own.

    The frequency of a class is the number of its pixels divided by that of all valid pixels in the images where it
    occurs. A class that never occurs has weight 0.
    Source: Eigen & Fergus 2015, section 6.3.2; Badrinarayanan et al. 2017 (SegNet).

    Args:
        pixels: (num_classes,) number of pixels of each class.
        image_pixels: (num_classes,) number of valid pixels in the images where the class occurs.
    """
    occurs = pixels > 0
    frequency = np.divide(pixels, image_pixels, out=np.zeros(len(pixels)), where=occurs)
    median = np.median(frequency[occurs]) if occurs.any() else 0.0
    return np.divide(median, frequency, out=np.zeros(len(pixels)), where=occurs)


def make_loss(
    kind: str | Mapping[str, float],
    class_weights: np.ndarray | None = None,
    hard_fraction: float = 1.0,
    aux_weight: float = 0.4,
) -> Loss:
    """Make the loss of a run: (logits (b, h, w, num_classes), labels (b, h, w)) -> ``LossSum``.

    Args:
        kind: a key of ``LOSSES`` or ``REGION_LOSSES``, or factors by key, as in {"softmax": 1, "dice": 0.5}.
        class_weights: see ``sum_pixels``.
        hard_fraction: see ``sum_pixels``, in (0, 1].
        aux_weight: factor on the loss of an auxiliary head's logits, where the logits are a pair.

    Raises:
        InputError: unknown kind, a fraction outside (0, 1], or one below 1 without exactly one pixel loss.
    """
    terms = {kind: 1.0} if isinstance(kind, str) else dict(kind)
    for name in terms:
        if name not in LOSSES | REGION_LOSSES:
            raise unknown("loss", name, LOSSES | REGION_LOSSES)
    if not 0 < hard_fraction <= 1:
        raise InputError(f"expected 0 < hard_fraction <= 1, got {hard_fraction}; 1 keeps every pixel")
    if hard_fraction < 1 and not (len(terms) == 1 and terms.keys() <= LOSSES.keys()):
        raise InputError(
            f"hard_fraction {hard_fraction} needs a single pixel loss, got {', '.join(terms)}; set it to 1"
        )

    def loss(logits: Any, labels: jax.Array) -> LossSum:
        if isinstance(logits, tuple):
            main, aux = (loss(each, labels) for each in logits)
            return LossSum(main.total + aux_weight * aux.total, main.weight)
        return sum_pixels(terms, logits, labels, class_weights, hard_fraction)

    return loss
