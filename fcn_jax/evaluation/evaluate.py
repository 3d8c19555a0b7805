"""One confusion matrix over a whole split, at the labels' original size; used in training and in eval.py."""

from __future__ import annotations

import functools
import math
from bisect import insort
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fcn_jax import metrics
from fcn_jax.devices import batch_sharding, groups, kernels_for
from fcn_jax.errors import InputError
from fcn_jax.evaluation.boundary import boundary_counts
from fcn_jax.evaluation.padding import padded_logits
from fcn_jax.models.fcn import FCN
from fcn_jax.models.kernels import cpu_kernels
from fcn_jax.preprocessing import Preprocessing, normalize

Predictor = Callable[..., np.ndarray]
"""(variables, RGB images uint8 (b, h, w, 3), label size (H, W), extents) -> classes uint8 (b, H, W).

``extents``, by default None, are height and width (b, 2) of each image before padding at the bottom and right."""


@dataclass(frozen=True)
class Views:
    """Test-time augmentation: the variants of an image over which the softmax is averaged."""

    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    """Use each scale both unchanged and flipped left-right."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "scales", tuple(self.scales))
        if not self.scales or not all(0.1 <= scale <= 8 for scale in self.scales):
            raise InputError(f"expected --scales in 0.1 ... 8, got {self.scales}; 1 is the image's original size")

    def __str__(self) -> str:
        """Return "plain" or, for example, "2 views: flip"."""
        if self == PLAIN:
            return "plain"
        scales = [] if self.scales == (1.0,) else [f"scales {' '.join(f'{scale:g}' for scale in self.scales)}"]
        names = scales + ["flip"] * self.flip
        count = len(self.scales) * (1 + self.flip)
        return f"{count} view{'s' * (count > 1)}: {', '.join(names)}"


PLAIN = Views()


@dataclass(frozen=True)
class Sample:
    """One image with its ground truth and prediction."""

    name: str
    image: np.ndarray
    label: np.ndarray
    prediction: np.ndarray
    mean_iu: float = math.nan
    """Mean over the classes in the label or the prediction."""


@dataclass(frozen=True)
class Evaluation:
    """The pixel counts of a split, and a few of its images."""

    confusion: np.ndarray
    samples: tuple[Sample, ...]
    images: int
    boundary: np.ndarray | None = None
    """(2, num_classes), see ``boundary.boundary_counts``."""
    ranked: tuple[Sample, ...] = ()
    """The images with the lowest mean IU and those with the highest, in ascending order."""

    @property
    def scores(self) -> metrics.Scores:
        """The FCN paper's four scores and the IU of each class."""
        return metrics.scores(self.confusion)


def spread(total: int, count: int = 6) -> frozenset[int]:
    """Return ``count`` positions spread evenly over ``total`` images, since adjacent video frames look alike."""
    return frozenset(np.linspace(0, total - 1, min(count, total), dtype=int).tolist())


def _resized(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    return x if x.shape[1:3] == size else jax.image.resize(x, (len(x), *size, x.shape[3]), "bilinear")


Output = Literal["classes", "probabilities", "confidence"]
"""Per pixel: the class, the softmax, or the class and its probability as two floats."""


def at_least_float32(logits: jax.Array) -> jax.Array:
    """Return logits of any float dtype as float32, or float64 if they are."""
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def reduce_scores(scores: jax.Array, output: Output, are_logits: bool = True) -> jax.Array:
    """Return the output for scores (b, h, w, num_classes): uint8 (b, h, w), or floats with a last axis."""
    if output == "classes":
        return jnp.argmax(scores, axis=-1).astype(jnp.uint8)
    softmax = jax.nn.softmax(scores) if are_logits else scores
    if output == "probabilities":
        return softmax
    return jnp.stack([jnp.argmax(scores, axis=-1).astype(softmax.dtype), jnp.max(softmax, axis=-1)], axis=-1)


def make_class_maps(
    model: FCN, preprocessing: Preprocessing, views: Views = PLAIN, output: Output = "classes"
) -> Callable[..., jax.Array]:
    """Return the function that ``make_predictor`` compiles: (variables, images, label size, extents) -> classes."""

    def logits_of(
        variables: Mapping[str, Any], images: jax.Array, size: tuple[int, int], extents: jax.Array | None = None
    ) -> jax.Array:
        apply: Any = model.apply if extents is None else functools.partial(padded_logits, model, extents=extents)
        logits = apply(variables, images)
        return _resized(at_least_float32(logits), size)

    def forward(
        variables: Mapping[str, Any], images: jax.Array, size: tuple[int, int], extents: jax.Array | None
    ) -> jax.Array:
        images = normalize(images, preprocessing, model.param_dtype)
        if views == PLAIN:
            scores = logits_of(variables, images, size, extents)
        else:
            if extents is not None:
                raise ValueError("expected images without extents; evaluate with data.eval_multiple 1")
            _, height, width, _ = images.shape
            scores = jnp.zeros((len(images), *size, model.num_classes))
            for scale in views.scales:
                scaled = _resized(images, (max(1, round(height * scale)), max(1, round(width * scale))))
                scores += jax.nn.softmax(logits_of(variables, scaled, size))
                if views.flip:
                    scores += jax.nn.softmax(logits_of(variables, scaled[:, :, ::-1], size)[:, :, ::-1])
            scores = scores / (len(views.scales) * (1 + views.flip))
        return reduce_scores(scores, output, are_logits=views == PLAIN)

    return forward


def make_predictor(
    model: FCN, preprocessing: Preprocessing, mesh: Mesh | None = None, views: Views = PLAIN, output: Output = "classes"
) -> Predictor:
    """Return a function from images to class maps; logits are interpolated to the labels' size first.

    Args:
        model: the network.
        preprocessing: the preprocessing that its weights expect.
        mesh: devices to split a batch over if its size is a multiple of their number; by default one device.
        views: unless ``PLAIN``, the class with the largest mean softmax is chosen. Only for images without ``extents``.
        output: what to return: classes uint8 (b, H, W), or floats (b, H, W, num_classes) or (b, H, W, 2).
    """
    kernels = cpu_kernels(jax.default_backend() == "cpu") if mesh is None else kernels_for(mesh)
    compiled = jax.jit(kernels(make_class_maps(model, preprocessing, views, output)), static_argnums=2)

    def predict(variables: Mapping[str, Any], images: Any, size: tuple[int, int], extents: Any = None) -> np.ndarray:
        placed: Any = (images, extents)
        if mesh is not None:
            everywhere = NamedSharding(mesh, PartitionSpec())
            if len(images) % groups(mesh) == 0:
                placed = jax.tree.map(lambda x: jax.device_put(x, batch_sharding(x, mesh)), placed)
            else:
                placed = jax.device_put(placed, everywhere)
            variables = jax.device_put(variables, everywhere)
        return np.asarray(compiled(variables, placed[0], size, placed[1]))

    return predict


def evaluate(
    predict: Predictor,
    variables: Mapping[str, Any],
    batches: Iterable[Mapping[str, Any]],
    num_classes: int,
    samples_at: Container[int] = (),
    boundary_pixels: int | None = None,
    extremes: int = 0,
) -> Evaluation:
    """Score a split in batches from ``data.pipeline.make_eval_batches``, with a predictor from ``make_predictor``.

    ``samples_at`` are the positions, in the order of the batches, of the images to return. With ``boundary_pixels``,
    boundary regions of this width are counted as well. ``extremes`` is the number of images to return with the lowest
    mean IU, and with the highest.
    """
    boundary = None if boundary_pixels is None else np.zeros((2, num_classes), np.int64)
    confusion = np.zeros((num_classes, num_classes), np.int64)
    samples: list[Sample] = []
    ranked: list[Sample] = []
    images = 0
    for batch in batches:
        labels = batch["label"]
        extents = {"extents": batch["extent"]} if "extent" in batch else {}
        predictions = predict(variables, batch["image"], labels.shape[1:3], **extents)
        for row in np.flatnonzero(np.asarray(batch["valid"])):
            counts = metrics.confusion_matrix(labels[row], predictions[row], num_classes)
            confusion += counts
            h, w = labels.shape[1:3] if "extent" not in batch else batch["extent"][row]
            if boundary is not None and boundary_pixels is not None:
                boundary += boundary_counts(labels[row, :h, :w], predictions[row, :h, :w], num_classes, boundary_pixels)
            image = batch["image"][row] if "extent" not in batch else batch["image"][row, :h, :w]
            maps = labels[row, :h, :w], predictions[row, :h, :w]
            sample = Sample(batch["name"][row], image, *maps, metrics.scores(counts).mean_iu)
            if images in samples_at:
                samples.append(sample)
            if extremes and not math.isnan(sample.mean_iu):
                copies = {name: getattr(sample, name).copy() for name in ("image", "label", "prediction")}
                insort(ranked, replace(sample, **copies), key=lambda other: other.mean_iu)
                del ranked[extremes:-extremes]
            images += 1
    return Evaluation(confusion, tuple(samples), images, boundary, tuple(ranked))
