"""What a comparison needs of an implementation: three callables. Anything that gives them can be compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

__all__ = ["Arrays", "Gradient", "Side", "TrainedStep"]

Arrays = Mapping[str, np.ndarray]
"""Name -> array, in the order in which the layers run."""


@dataclass(frozen=True)
class Gradient:
    """The loss of a batch in training mode and what follows from it."""

    loss: float | np.ndarray
    """A number, or an array () in the dtype it was computed in."""
    gradients: Arrays
    """Of every parameter, in one framework's axes on both sides."""
    statistics: Arrays
    """Running statistics of batch norms after the step."""


@dataclass(frozen=True)
class TrainedStep:
    """One step of training."""

    loss: float
    """Of the batch before the step."""
    parameters: Arrays
    """After the step; valid until the next step is asked for."""


@dataclass(frozen=True)
class Side:
    """One implementation of a network, with its weights.

    Images are float (b, h, w, 3), normalised; labels are integers (b, h, w), 255 is ignored. Names, axes and order are
    up to the caller, as long as both sides of a comparison agree; what only one side names is reported. Every call
    starts from the same weights.
    """

    name: str
    layers: Callable[[np.ndarray, bool], Arrays]
    """(images, train) -> outputs of layers, the last of them the logits."""
    gradient: Callable[[np.ndarray, np.ndarray], Gradient] | None = None
    """(images, labels) -> mean softmax cross-entropy over valid pixels, its gradient, statistics."""
    train: Callable[[np.ndarray, np.ndarray, int], Iterator[TrainedStep]] | None = None
    """(images, labels, steps) -> the steps of training on this one batch."""
