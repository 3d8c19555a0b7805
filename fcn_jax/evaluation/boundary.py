"""Boundary IoU, which sees thin objects and edges that the IoU of areas does not: counts in, merged by adding."""

from __future__ import annotations

import numpy as np

from fcn_jax.losses import IGNORE


def boundary_counts(labels: np.ndarray, predictions: np.ndarray, num_classes: int, pixels: int) -> np.ndarray:
    """Count the pixels near the boundaries of each class in one image.

    The boundary region of a class has those of its pixels whose distance from a pixel of another class or from outside
    of the image is at most ``pixels``, diagonal steps counting as one (Cheng et al. 2021, Boundary IoU). Ignored pixels
    are not counted and bound nothing.

    Args:
        labels: integers (h, w), 0 ... num_classes - 1 or 255.
        predictions: integers (h, w).
        num_classes: number of classes.
        pixels: width of the region, at least 1.

    Returns:
        (2, num_classes) int64: pixels in both regions, and in either. Counts of images add.
    """
    import cv2

    counts, ignored = np.zeros((2, num_classes), np.int64), labels == IGNORE
    kernel = np.ones((2 * pixels + 1, 2 * pixels + 1), np.uint8)

    def region(mask: np.ndarray) -> np.ndarray:
        eroded = cv2.erode(mask.astype(np.uint8), kernel, borderType=cv2.BORDER_CONSTANT, borderValue=(0,))
        return mask & (eroded == 0)

    for index in np.union1d(labels[~ignored], predictions[~ignored]):
        # Further away nothing changes the regions.
        rows, columns = (
            slice(max(0, where.min() - pixels), where.max() + pixels + 1)
            for where in np.nonzero((labels == index) | (predictions == index))
        )
        skip = ignored[rows, columns]
        true, predicted = (region((values[rows, columns] == index) | skip) & ~skip for values in (labels, predictions))
        counts[:, index] = np.sum(true & predicted), np.sum(true | predicted)
    return counts


def boundary_iou(counts: np.ndarray) -> np.ndarray:
    """Reduce the counts of ``boundary_counts`` (2, num_classes) to the IoU of each class; NaN where it has none."""
    return np.divide(counts[0], counts[1], out=np.full(counts.shape[1], np.nan), where=counts[1] > 0)
