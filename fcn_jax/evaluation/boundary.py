"""Boundary IoU, which is more sensitive to thin objects and edges than the IoU of whole masks."""

from __future__ import annotations

from typing import Any

import numpy as np

from fcn_jax.losses import IGNORE


def boundary_counts(labels: np.ndarray, predictions: np.ndarray, num_classes: int, pixels: int) -> np.ndarray:
    """Count the pixels near the boundaries of each class in one image.

    The boundary region of a class contains its pixels within ``pixels`` of another class or of the outside of the
    image, in Chebyshev distance (Cheng et al. 2021, Boundary IoU). Ignored pixels are not counted and form no boundary.

    Args:
        labels: integers (h, w), 0 ... num_classes - 1 or 255.
        predictions: integers (h, w).
        num_classes: number of classes.
        pixels: width of the region, at least 1.

    Returns:
        (2, num_classes) int64: pixels in both regions, and in either. Counts of several images can be added.
    """
    valid = labels != IGNORE
    near_true, near_predicted = (_near_boundary(values, valid, pixels) for values in (labels, predictions))

    def count(values: np.ndarray, where: np.ndarray) -> np.ndarray:
        return np.bincount(values[where], minlength=num_classes)

    both = count(labels, near_true & near_predicted & (labels == predictions))
    return np.stack([both, count(labels, near_true) + count(predictions, near_predicted) - both])


def _near_boundary(classes: np.ndarray, valid: np.ndarray, pixels: int) -> np.ndarray:
    """Return which valid pixels are within ``pixels`` of another class or of the outside of the image."""
    import cv2

    window = np.ones((2 * pixels + 1, 2 * pixels + 1), np.uint8)
    outside: dict[str, Any] = {"borderType": cv2.BORDER_CONSTANT, "borderValue": (254,)}
    classes = classes.astype(np.uint8)
    # Ignored pixels are never the largest or the smallest.
    largest = cv2.dilate(np.where(valid, classes, np.uint8(0)), window, **outside)
    smallest = cv2.erode(np.where(valid, classes, np.uint8(255)), window, **outside)
    return valid & ((largest != classes) | (smallest != classes))


def boundary_iou(counts: np.ndarray) -> np.ndarray:
    """Return the IoU of each class from ``boundary_counts`` (2, num_classes); NaN for a class without pixels."""
    return np.divide(counts[0], counts[1], out=np.full(counts.shape[1], np.nan), where=counts[1] > 0)
