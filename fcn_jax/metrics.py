"""The paper's four scores and Dice from an integer confusion matrix; matrices of disjoint pixels add up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Scores:
    """Scores in [0, 1]; NaN where they are not defined.

    Source: Long, Shelhamer & Darrell 2015, section 5, with n_ij pixels of class i predicted as j and t_i = sum_j n_ij.
    """

    pixel_accuracy: float
    """sum_i n_ii / sum_i t_i."""
    mean_accuracy: float
    """Mean of n_ii / t_i over the classes that occur in the labels."""
    mean_iu: float
    """Mean of the IU over the classes that occur in the labels or are predicted."""
    frequency_weighted_iu: float
    """sum_i t_i IU_i / sum_i t_i."""
    per_class_iu: np.ndarray
    """(num_classes,) n_ii / (t_i + sum_j n_ji - n_ii); NaN for a class that neither occurs nor is predicted."""

    @property
    def per_class_dice(self) -> np.ndarray:
        """(num_classes,) Dice coefficient, which is the F1 score: 2 IU / (1 + IU)."""
        return 2 * self.per_class_iu / (1 + self.per_class_iu)

    def to_json(self) -> dict[str, Any]:
        """Return the scores, per-class Dice and mean Dice as JSON types, with NaN as None."""
        values = {
            **vars(self),
            "mean_dice": mean_of_defined(self.per_class_dice),
            "per_class_dice": self.per_class_dice,
        }
        return {name: plain(value) for name, value in values.items()}


def plain(value: Any) -> Any:
    """Convert a number or array to JSON types: a float or a nested list, with NaN as None."""
    if isinstance(value, np.ndarray):
        return [plain(each) for each in value]
    return None if np.isnan(value) else float(value)


def mean_of_defined(values: np.ndarray) -> float:
    """Return the mean of the values that are not NaN; NaN if all are."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else np.nan


def confusion_matrix(labels: Any, predictions: Any, num_classes: int, ignore: int = 255) -> Any:
    """Count pixels by true and predicted class; traceable under ``jax.jit``, where ranges are not checked.

    Args:
        labels: integers of any shape, 0 ... num_classes - 1 or ``ignore``.
        predictions: integers of the same shape, 0 ... num_classes - 1 wherever the label is not ignored.
        num_classes: number of classes.
        ignore: label of pixels that are not counted.

    Returns:
        (num_classes, num_classes) int64, rows are labels. Under ``jax.jit`` int32, which holds counts of fewer than
        2^31 pixels; values out of range are not counted there.

    Raises:
        ValueError: shapes differ, or a counted pixel has a label or prediction outside the classes.
    """
    if isinstance(labels, jax.core.Tracer) or isinstance(predictions, jax.core.Tracer):
        return _confusion_traced(jnp.asarray(labels), jnp.asarray(predictions), num_classes, ignore)
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    if labels.shape != predictions.shape:
        raise ValueError(
            f"expected labels and predictions of the same shape, got {labels.shape} and {predictions.shape}"
        )
    for what, values in (("labels", labels), ("predictions", predictions)):
        if values.size and not np.issubdtype(values.dtype, np.integer):
            raise ValueError(f"expected {what} to be integers, got {values.dtype}; take the argmax over classes first")
    valid = labels != ignore
    truth, guess = labels[valid].astype(np.int64), predictions[valid].astype(np.int64)
    for what, values in (("label", truth), ("prediction", guess)):
        outside = values[(values < 0) | (values >= num_classes)]
        if outside.size:
            raise ValueError(
                f"expected every {what} in 0 ... {num_classes - 1} or, for labels, {ignore}, got {outside[0]}; "
                "check the class list"
            )
    counts = np.bincount(truth * num_classes + guess, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes).astype(np.int64)


def _confusion_traced(labels: jax.Array, predictions: jax.Array, num_classes: int, ignore: int) -> jax.Array:
    counted = (labels != ignore) & (labels >= 0) & (labels < num_classes)
    counted &= (predictions >= 0) & (predictions < num_classes)
    index = jnp.where(counted, labels.astype(jnp.int32) * num_classes + predictions, num_classes**2)
    return jnp.bincount(index.ravel(), length=num_classes**2 + 1)[:-1].reshape(num_classes, num_classes)


def scores(confusion: np.ndarray) -> Scores:
    """Reduce a confusion matrix (num_classes, num_classes), rows are labels, to the paper's scores."""
    confusion = np.asarray(confusion)
    hit = np.diag(confusion).astype(np.float64)
    truth = confusion.sum(1).astype(np.float64)
    union = truth + confusion.sum(0) - hit
    accuracy = np.divide(hit, truth, out=np.full_like(hit, np.nan), where=truth > 0)
    iu = np.divide(hit, union, out=np.full_like(hit, np.nan), where=union > 0)
    total = truth.sum()
    if total == 0:
        return Scores(np.nan, np.nan, np.nan, np.nan, iu)
    return Scores(
        pixel_accuracy=float(hit.sum() / total),
        mean_accuracy=float(accuracy[truth > 0].mean()),
        mean_iu=float(iu[union > 0].mean()),
        frequency_weighted_iu=float((truth[truth > 0] * iu[truth > 0]).sum() / total),
        per_class_iu=iu,
    )
