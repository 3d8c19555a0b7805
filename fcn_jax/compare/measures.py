"""How far two arrays are apart: relative norm, largest difference, and steps between floating-point numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from fcn_jax.errors import InputError

__all__ = ["Difference", "error_norm", "measure", "square_sums", "ulp_distance"]

_BLOCK = 1 << 20
_UNSIGNED = {2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass(frozen=True)
class Difference:
    """What ``measure`` finds."""

    shape: tuple[int, ...]
    error: float
    """|x - y| / |y|, Euclidean norms."""
    max_abs: float
    """Largest |x - y| of an element."""
    ulp_median: float
    ulp_max: int
    """Floating-point numbers between two elements, counted in the coarser of the two dtypes."""


def square_sums(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """Return the sums of (x - y)^2 and of y^2 over all elements, computed in float64.

    Raises:
        InputError: the shapes differ.
    """
    if np.shape(ours) != np.shape(theirs):
        raise InputError(f"expected arrays of one shape, got {np.shape(ours)} and {np.shape(theirs)}")
    difference = size = 0.0
    with np.errstate(invalid="ignore"):
        for x, y in _blocks(ours, theirs):
            difference += float(np.sum(np.square(x.astype(np.float64) - y.astype(np.float64))))
            size += float(np.sum(np.square(y.astype(np.float64))))
    return difference, size


def _blocks(*arrays: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """Cut arrays of one size into parts that fit the cache: fc6 at full width has 10^8 elements."""
    flat = [np.asarray(array).reshape(-1) for array in arrays]
    for start in range(0, flat[0].size, _BLOCK):
        yield tuple(array[start : start + _BLOCK] for array in flat)


def error_norm(ours: np.ndarray, theirs: np.ndarray, scale: float | None = None) -> float:
    """Return |ours - theirs| / |theirs| in Euclidean norms, computed in float64.

    Args:
        ours: any shape.
        theirs: the same shape.
        scale: divide by this instead of |theirs|, e.g. by the norm of a whole gradient for one of its parts that is
            zero but for rounding.

    Returns:
        0 where both are equal, infinity where only the divisor is zero, NaN where one holds NaN or infinity.

    Raises:
        InputError: the shapes differ.
    """
    squares, size = square_sums(ours, theirs)
    if squares == 0.0:
        return 0.0
    divisor = math.sqrt(size) if scale is None else scale
    return math.sqrt(squares) / divisor if divisor else math.inf


def ulp_distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Count the steps of ``nextafter`` from each element of x to that of y.

    The bits of a floating-point number without its sign count upwards from zero, so numbers of one sign are as far
    apart as these integers, and numbers of two signs as far as their sum; +0 and -0 are the same number.

    Args:
        x: float64, float32, float16 or bfloat16, any shape.
        y: the same dtype and shape.

    Returns:
        uint64, the shape of x; 2^64 - 1 where exactly one of the two is NaN, 0 where both are.

    Raises:
        InputError: dtypes or shapes differ, or the dtype is not a floating one.
    """
    x, y = np.asarray(x), np.asarray(y)
    if x.dtype != y.dtype or x.shape != y.shape or not jnp.issubdtype(x.dtype, jnp.floating):
        raise InputError(
            f"expected floats of one dtype and shape, got {x.dtype} {x.shape} and {y.dtype} {y.shape}; cast them first"
        )
    sign = np.uint64(1 << (8 * x.dtype.itemsize - 1))
    bits = [np.ascontiguousarray(v).view(_UNSIGNED[x.dtype.itemsize]).astype(np.uint64) for v in (x, y)]
    a, b = (value & (sign - np.uint64(1)) for value in bits)
    same_sign = (bits[0] & sign) == (bits[1] & sign)
    distance = np.where(same_sign, np.maximum(a, b) - np.minimum(a, b), a + b)
    nan_x, nan_y = np.isnan(x), np.isnan(y)
    distance = np.where(nan_x | nan_y, np.iinfo(np.uint64).max, distance)
    return np.where(nan_x & nan_y, np.uint64(0), distance).reshape(x.shape)


def measure(ours: np.ndarray, theirs: np.ndarray, scale: float | None = None) -> Difference:
    """Measure how far ``ours`` is from ``theirs``; see ``error_norm`` for the arguments and errors.

    ULPs are counted in the coarser of the two dtypes, to which the other array is rounded first.
    """
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    error = error_norm(ours, theirs, scale)
    coarser = ours.dtype if jnp.finfo(ours.dtype).eps >= jnp.finfo(theirs.dtype).eps else theirs.dtype
    if not ours.size:
        return Difference(ours.shape, error, 0.0, 0.0, 0)
    counts, gap = np.empty(ours.size, np.uint64), []
    with np.errstate(invalid="ignore", over="ignore"):
        for steps, x, y in _blocks(counts, ours, theirs):
            steps[:] = ulp_distance(x.astype(coarser), y.astype(coarser))
            gap.append(np.max(np.abs(x.astype(np.float64) - y.astype(np.float64))))
    largest = int(counts.max())
    return Difference(ours.shape, error, float(np.max(gap)), float(np.median(counts, overwrite_input=True)), largest)
