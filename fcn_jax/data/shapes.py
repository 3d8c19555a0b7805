"""`shapes`: generated images of two to five overlapping objects whose classes differ only in outline.

Colours and textures of objects and background come from one distribution, so that a network has to learn shape. A
border of ignored pixels runs along every outline, as in PASCAL VOC.
"""

from __future__ import annotations

import cv2
import numpy as np

from fcn_jax.config import DataConfig
from fcn_jax.data.io import Entry, Listing, palette
from fcn_jax.errors import InputError
from fcn_jax.losses import IGNORE

VERSION = "1"
"""Increase it when the same index generates a different image."""

CLASSES = ("background", "disc", "square", "triangle", "star", "ring")
SPLITS = ("train", "val", "test")
_HELD_OUT = 256  # images in val and in test
_SUBPIXEL = 4  # OpenCV's fixed-point coordinates: 1/16 pixel
_CROSS = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]], np.uint8)


def _circle(radius: float) -> np.ndarray:
    angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _polygon(corners: int, inner: float = 1.0) -> np.ndarray:
    """Corners on the unit circle; with ``inner`` < 1 every other one lies on that smaller circle."""
    angles = np.arange(corners) * 2 * np.pi / corners
    radii = np.where(np.arange(corners) % 2, inner, 1.0)
    return radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


_OUTLINES: tuple[tuple[np.ndarray, ...], ...] = (
    (_circle(0.9),),
    (_polygon(4) * 1.1,),
    (_polygon(3) * 1.2,),
    (_polygon(10, inner=0.45) * 1.2,),
    (_circle(1.0), _circle(0.55)),
)
"""Closed outlines of each object class, with a radius of about one; an inner outline is a hole."""


def _colours(rng: np.random.Generator, count: int) -> np.ndarray:
    """Return ``count`` RGB colours far apart, shuffled, so that background and objects have one distribution."""
    chosen = rng.uniform(30, 225, (1, 3))
    while len(chosen) < count:
        candidates = rng.uniform(30, 225, (8, 3))
        nearest = np.linalg.norm(candidates[:, None] - chosen[None], axis=2).min(axis=1)
        chosen = np.concatenate([chosen, candidates[[np.argmax(nearest)]]])
    return rng.permutation(chosen).astype(np.float32)


def _texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Return a brightness offset, float32 (h, w) in about [-25, 25]: a pattern or none, on a linear gradient."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    angle, slope = rng.uniform(0, 2 * np.pi, 2)
    u = np.cos(angle) * x + np.sin(angle) * y
    v = -np.sin(angle) * x + np.cos(angle) * y
    period = rng.uniform(5, 12)
    kind, strength = rng.integers(4), rng.uniform(6, 16)
    if kind == 0:
        pattern = np.zeros((height, width), np.float32)
    elif kind == 1:
        pattern = np.sin(u * (2 * np.pi / period))
    elif kind == 2:
        pattern = np.sign(np.sin(u * (2 * np.pi / period)) * np.sin(v * (2 * np.pi / period)))
    else:
        coarse = rng.uniform(-1, 1, (max(2, height // 8), max(2, width // 8))).astype(np.float32)
        pattern = np.asarray(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC), np.float32)
    light = (np.cos(slope) * (x / width - 0.5) + np.sin(slope) * (y / height - 0.5)) * rng.uniform(0, 18)
    return (strength * pattern + light).astype(np.float32)


def _places(rng: np.random.Generator, height: int, width: int) -> list[tuple[float, float, float]]:
    """Return (x, y, radius) in pixels of two to five objects that overlap slightly but never cover another's centre."""
    side = min(height, width)
    placed: list[tuple[float, float, float]] = []
    wanted = int(rng.integers(2, 6))
    for _ in range(40):
        if len(placed) == wanted:
            break
        radius = side * rng.uniform(0.13, 0.25)
        x, y = rng.uniform(0.7 * radius, width - 0.7 * radius), rng.uniform(0.7 * radius, height - 0.7 * radius)
        if all(np.hypot(x - other_x, y - other_y) > 0.75 * (radius + other) for other_x, other_y, other in placed):
            placed.append((x, y, radius))
    return placed


def generate(split: str, index: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Draw image ``index`` of a split; it depends only on ``split``, ``index`` and ``size`` (height, width).

    Returns:
        The image, uint8 (h, w, 3) RGB, and the label, uint8 (h, w): 0 background, 1..5 the object, 255 along outlines.
    """
    rng = np.random.default_rng(np.random.SeedSequence([SPLITS.index(split), index]))
    height, width = size
    places = _places(rng, height, width)
    colours = _colours(rng, len(places) + 1)
    image = colours[0] + _texture(rng, height, width)[..., None]
    label = np.zeros((height, width), np.uint8)
    for (x, y, radius), colour in zip(places, colours[1:], strict=True):
        kind = int(rng.integers(1, len(CLASSES)))
        angle = rng.uniform(0, 2 * np.pi)
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        outlines = [(outline @ turn * radius + (x, y)) * 2**_SUBPIXEL for outline in _OUTLINES[kind - 1]]
        cover = np.zeros((height, width), np.uint8)
        corners = [np.round(outline).astype(np.int32) for outline in outlines]
        cv2.fillPoly(cover, corners, 255, lineType=cv2.LINE_AA, shift=_SUBPIXEL)
        alpha = (cover.astype(np.float32) / 255)[..., None]
        image += alpha * (colour + _texture(rng, height, width)[..., None] - image)
        inside = (cover >= 128).astype(np.uint8)
        label[inside > 0] = kind
        # One pixel on either side of the outline.
        label[cv2.morphologyEx(inside, cv2.MORPH_GRADIENT, _CROSS) > 0] = IGNORE
    image += rng.normal(0, 3, image.shape).astype(np.float32)
    return np.clip(np.round(image), 0, 255).astype(np.uint8), label


def listing(split: str, config: DataConfig) -> Listing:
    """List a split of ``shapes``: ``config.shapes_count`` images in train, 256 in val and in test."""
    size, count = config.shapes_size, config.shapes_count
    if min(size) < 32 or count < 1:
        raise InputError(
            f"shapes needs --data.shapes-size of at least 32 32 and a count of at least 1, got {size} and {count}"
        )

    def read(entry: Entry) -> tuple[bytes, np.ndarray]:
        image, label = generate(split, int(entry.name), size)
        return cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes(), label

    entries = tuple(Entry(f"{index:06d}") for index in range(count if split == "train" else _HELD_OUT))
    return Listing("shapes", split, CLASSES, palette(len(CLASSES)), entries, read, version=f"{VERSION} {tuple(size)}")
