"""Augmentation in NumPy and OpenCV: pure functions of an example, a generator and the config.

An example is ``{"image": uint8 (h, w, 3) RGB, "label": uint8 (h, w)}``; normalisation is done on the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np

from fcn_jax.config import DataConfig
from fcn_jax.losses import IGNORE
from fcn_jax.preprocessing import fill_color, preprocessing_of

Example = Mapping[str, Any]

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize an image (h, w, c) to ``size`` = (height, width): area averaging to shrink, bilinear to enlarge."""
    height, width = size
    if image.shape[:2] == (height, width):
        return image
    smaller = height * width < image.shape[0] * image.shape[1]
    method = cv2.INTER_AREA if smaller else cv2.INTER_LINEAR
    if image.shape[2] == 3:
        return cv2.resize(image, (width, height), interpolation=method)
    channels = (np.ascontiguousarray(image[..., index]) for index in range(image.shape[2]))  # OpenCV takes at most four
    return np.stack([cv2.resize(channel, (width, height), interpolation=method) for channel in channels], axis=-1)


def resize_label(label: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a label (h, w) to ``size`` = (height, width) by nearest neighbour, pixel centres aligned."""
    height, width = size
    if label.shape == (height, width):
        return label
    # INTER_NEAREST of OpenCV takes the top-left neighbour, half a pixel off the image; INTER_NEAREST_EXACT does not.
    return cv2.resize(label, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)


def resize(example: Example, size: tuple[int, int]) -> dict[str, Any]:
    """Resize image and label of an example to ``size`` = (height, width)."""
    return {**example, "image": resize_image(example["image"], size), "label": resize_label(example["label"], size)}


def scale(
    example: Example, rng: np.random.Generator, bounds: tuple[float, float], base_size: int | None = None
) -> dict[str, Any]:
    """Resize by a factor drawn uniformly from ``bounds``; with ``base_size``, factor 1 makes it the shorter side."""
    factor = rng.uniform(*bounds) if bounds[0] != bounds[1] else bounds[0]
    return resize(example, _scaled(example["label"].shape, factor, base_size))


def pad(example: Example, size: tuple[int, int], fill: tuple[int, ...]) -> dict[str, Any]:
    """Pad an example at the bottom and right to at least ``size``: image with ``fill``, label with ``IGNORE``."""
    height, width = example["label"].shape
    if height >= size[0] and width >= size[1]:
        return dict(example)
    size = (max(height, size[0]), max(width, size[1]))
    image = np.empty((*size, len(fill)), example["image"].dtype)
    label = np.full(size, IGNORE, np.uint8)
    image[:] = fill
    image[:height, :width] = example["image"]
    label[:height, :width] = example["label"]
    return {**example, "image": image, "label": label}


def crop(example: Example, rng: np.random.Generator, size: tuple[int, int], fill: tuple[int, ...]) -> dict[str, Any]:
    """Crop an example to ``size`` = (height, width) at a random position; pad a smaller example as ``pad`` does."""
    image, label = example["image"], example["label"]
    top = int(rng.integers(max(label.shape[0] - size[0], 0) + 1))
    left = int(rng.integers(max(label.shape[1] - size[1], 0) + 1))
    image = image[top : top + size[0], left : left + size[1]]
    label = label[top : top + size[0], left : left + size[1]]
    return pad({**example, "image": image, "label": label}, size, fill)


def jitter(image: np.ndarray, rng: np.random.Generator, strength: float) -> np.ndarray:
    """Change brightness, then contrast, then saturation, each by a factor drawn from [1 - strength, 1 + strength].

    Brightness scales the image (h, w, 3), contrast its distance from its mean grey, and saturation each pixel's
    distance from its grey value. Images that are not 8-bit RGB keep their saturation. Differs from torchvision's
    ColorJitter, which clips after each step and shuffles their order.
    """
    brightness, contrast, saturation = 1 + strength * rng.uniform(-1, 1, 3)
    if image.dtype != np.uint8 or image.shape[2] != 3:
        values = image * (brightness * contrast) + (1 - contrast) * brightness * image.mean()
        return np.rint(values).clip(0, np.iinfo(image.dtype).max).astype(image.dtype)
    # All three are linear in the pixel: out = M @ pixel + offset, one pass over the image.
    matrix = saturation * np.eye(3) + (1 - saturation) * np.outer(np.ones(3), _LUMA)
    grey = float(np.asarray(cv2.mean(image)[:3]) @ _LUMA) * brightness
    affine = np.concatenate([brightness * contrast * matrix, np.full((3, 1), (1 - contrast) * grey)], axis=1)
    return cv2.transform(image, affine.astype(np.float32))


def augmented_size(config: DataConfig, size: tuple[int, int] | None) -> tuple[int, int] | None:
    """Return (height, width) of every augmented example.

    That is the crop size, the input size, or the ``size`` of all images as ``scale`` changes it; None if sizes differ.
    """
    if window := config.crop_size or config.input_size:
        return window
    if size is None or config.scale[0] != config.scale[1]:
        return None
    return _scaled(size, config.scale[0], config.base_size)


def _scaled(size: tuple[int, int], factor: float, base_size: int | None) -> tuple[int, int]:
    if base_size is not None:
        factor *= base_size / min(size)
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def augment(example: Example, rng: np.random.Generator, config: DataConfig) -> dict[str, np.ndarray]:
    """Return a contiguous training example: resized, colour-jittered, scaled, cropped and flipped as configured.

    The crop has ``crop_size`` or else ``input_size``; without either, the image is not cropped. A disabled step draws
    no numbers from ``rng``.
    """
    out: dict[str, Any] = {"image": example["image"], "label": example["label"]}
    if config.input_size is not None:
        out = resize(out, config.input_size)
    if config.jitter:  # before the crop, so that padding keeps its colour
        out["image"] = jitter(out["image"], rng, config.jitter)
    if config.scale != (1.0, 1.0) or config.base_size is not None:
        out = scale(out, rng, config.scale, config.base_size)
    if window := config.crop_size or config.input_size:
        out = crop(out, rng, window, fill_color(preprocessing_of(config)))
    if config.flip and rng.random() < 0.5:
        out = {"image": out["image"][:, ::-1], "label": out["label"][:, ::-1]}
    return {"image": np.ascontiguousarray(out["image"]), "label": np.ascontiguousarray(out["label"])}
