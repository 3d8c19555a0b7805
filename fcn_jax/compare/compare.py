"""Two implementations side by side: layer by layer, gradient by gradient, step by step. The result is plain data."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

import numpy as np

from fcn_jax.compare.measures import Difference, error_norm, measure, square_sums
from fcn_jax.compare.sides import Arrays, Gradient, Side, TrainedStep
from fcn_jax.errors import InputError

__all__ = ["PARTS", "Report", "Row", "StepRow", "compare", "compare_arrays", "compare_layers", "first_over"]

PARTS: tuple[Literal["layers", "loss", "gradients", "statistics", "steps"], ...]
PARTS = ("layers", "loss", "gradients", "statistics", "steps")
"""What a report holds, and what a limit can be put on."""


@dataclasses.dataclass(frozen=True)
class Row(Difference):
    """One array on both sides."""

    name: str = ""
    of_global: bool = False
    """The error is |x - y| over the norm of the whole gradient: this one is zero but for rounding."""
    ours_off: float | None = None
    """Error of our side against the reference (float64), where there is one."""
    theirs_off: float | None = None
    noise: float | None = None
    """Error between two ways in which the other side computes the same, where there is one (torch's memory formats)."""

    @property
    def judged(self) -> float:
        """What a limit is put on: our distance from the reference if there is one, else the sides' from each other."""
        return self.error if self.ours_off is None else self.ours_off


@dataclasses.dataclass(frozen=True)
class StepRow:
    """One training step on both sides."""

    step: int
    ours: float
    """Loss before the step."""
    theirs: float
    loss_error: float
    """|ours - theirs| / |theirs|."""
    error: float
    """|p - q| / |q| of all parameters after the step."""
    moved: float
    """|q - q1| / |q|: how far their parameters have come since the first step."""


@dataclasses.dataclass(frozen=True)
class Report:
    """What ``compare`` found."""

    ours: str
    theirs: str
    threshold: float
    layers: dict[str, list[Row]]
    """By mode, "eval" and "train", in the order in which they run."""
    loss: Row | None
    gradients: list[Row]
    statistics: list[Row]
    steps: list[StepRow]
    unmatched: list[str]
    """Names that one side alone has."""

    def errors(self, part: str) -> dict[str, float]:
        """Return the errors that a limit is put on, by name, of one of ``PARTS``."""
        if part == "layers":
            return {f"{row.name} ({mode})": row.judged for mode, rows in self.layers.items() for row in rows}
        if part == "loss":
            return {} if self.loss is None else {"loss": self.loss.judged}
        if part == "steps":
            return {f"step {row.step}": max(row.error, row.loss_error, key=_rank) for row in self.steps}
        return {row.name: row.judged for row in (self.gradients if part == "gradients" else self.statistics)}

    def worst(self, part: str) -> tuple[str, float] | None:
        """Return the name and size of the largest error of a part; NaN is larger than all."""
        return max(self.errors(part).items(), key=lambda item: _rank(item[1]), default=None)

    def to_json(self) -> dict[str, Any]:
        """Return dicts, lists and numbers; what is not finite becomes a string."""
        content = dataclasses.asdict(self)
        content["first_over"] = {mode: first_over(rows, self.threshold) for mode, rows in self.layers.items()}
        content["worst"] = {part: self.worst(part) for part in PARTS}
        return _plain(content)


def _rank(error: float) -> float:
    return math.inf if math.isnan(error) else error


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def first_over(rows: list[Row], threshold: float) -> str | None:
    """Return the name of the first row whose error is over the threshold, or not a number."""
    return next((row.name for row in rows if not row.judged <= threshold), None)


def compare_arrays(
    ours: Arrays,
    theirs: Arrays,
    *,
    reference: Arrays | None = None,
    noise: Arrays | None = None,
    cancelled: Collection[str] = (),
) -> list[Row]:
    """Measure the arrays that both sides have, in our order.

    Args:
        ours: name -> array.
        theirs: name -> array of the same shape.
        reference: what both should be.
        noise: what the other side also gives.
        cancelled: names whose true value is zero; their difference is divided by the norm of all arrays.

    Raises:
        InputError: two arrays of one name have different shapes.
    """
    whole = math.sqrt(sum(square_sums(y, y)[1] for y in theirs.values())) if cancelled else None
    rows = []
    for name, x in ours.items():
        if name not in theirs:
            continue
        if np.shape(x) != np.shape(theirs[name]):
            raise InputError(f"{name} is {np.shape(x)} on our side and {np.shape(theirs[name])} on the other")
        scale = whole if name in cancelled else None

        def against(a: Arrays | None, b: Arrays | None, name: str = name, scale: float | None = scale) -> float | None:
            return None if a is None or b is None else error_norm(a[name], b[name], scale)

        row = Row(
            **dataclasses.asdict(measure(x, theirs[name], scale)),
            name=name,
            of_global=scale is not None,
            ours_off=against(ours, reference),
            theirs_off=against(theirs, reference),
            noise=against(noise, theirs),
        )
        rows.append(row)
    return rows


def compare_layers(
    ours: Callable[[np.ndarray], Arrays], theirs: Callable[[np.ndarray], Arrays], inputs: np.ndarray
) -> list[Row]:
    """Measure the layers that two callables return for the same inputs, in the order of the first."""
    return compare_arrays(ours(inputs), theirs(inputs))


def compare(
    ours: Side,
    theirs: Side,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    steps: int = 0,
    modes: Collection[str] = ("eval", "train"),
    threshold: float = 1e-5,
    reference: Side | None = None,
    noise: Side | None = None,
    cancelled: Collection[str] = (),
) -> Report:
    """Compare two implementations on one batch.

    Args:
        ours: one side.
        theirs: the other; its numbers are what errors are divided by.
        images: float (b, h, w, 3), normalised.
        labels: integers (b, h, w), 255 is ignored.
        steps: of training, at most; 0 leaves them out.
        modes: in which layers are compared: batch norms by their running statistics, or by the batch's.
        threshold: the first layer over it is named.
        reference: a third side that computes what both should be, in float64.
        noise: the other side once more, computed in another way: how far it is from itself.
        cancelled: parameters whose true gradient is zero, see ``compare_arrays``.

    Raises:
        InputError: a side cannot serve the images, or two arrays of one name have different shapes.
    """
    layers: dict[str, list[Row]] = {}
    unmatched: set[str] = set()
    for mode in modes:
        train = mode == "train"
        a, b = ours.layers(images, train), theirs.layers(images, train)
        layers[mode] = compare_arrays(a, b, reference=reference.layers(images, train) if reference else None)
        unmatched |= a.keys() ^ b.keys()
    loss: Row | None = None
    gradients: list[Row] = []
    statistics: list[Row] = []
    if ours.gradient and theirs.gradient:
        g, h = ours.gradient(images, labels), theirs.gradient(images, labels)
        others = [s.gradient(images, labels) if s and s.gradient else None for s in (reference, noise)]
        loss, gradients, statistics = _compare_gradients([g, h, *others], cancelled)
        unmatched |= (g.gradients.keys() ^ h.gradients.keys()) | (g.statistics.keys() ^ h.statistics.keys())
        del g, h, others
    # Both in the order in which the layers run.
    depth = {row.name: index for rows in layers.values() for index, row in enumerate(rows)}
    for rows in (gradients, statistics):
        rows.sort(key=lambda row: depth.get(row.name.rpartition(".")[0], len(depth)))
    walked: list[StepRow] = []
    if steps and ours.train and theirs.train:
        # Both walk together, and map forgets a step before it asks for the next: one of each is held.
        walks = (ours.train(images, labels, steps), theirs.train(images, labels, steps))
        walked = list(map(functools.partial(_compare_step, {}), itertools.count(1), *walks))
    return Report(ours.name, theirs.name, threshold, layers, loss, gradients, statistics, walked, sorted(unmatched))


def _compare_gradients(found: list[Gradient | None], cancelled: Collection[str]) -> tuple[Row, list[Row], list[Row]]:
    """Compare loss, gradients and statistics of ours, theirs, the reference and the noise (the last two may lack)."""
    sides: dict[str, list[Any]] = {
        "loss": [g and {"loss": np.asarray(g.loss)} for g in found],
        "gradients": [g and g.gradients for g in found],
        "statistics": [g and g.statistics for g in found],
    }
    rows = {
        part: compare_arrays(
            arrays[0],
            arrays[1],
            reference=arrays[2],
            noise=arrays[3],
            cancelled=cancelled if part == "gradients" else (),
        )
        for part, arrays in sides.items()
    }
    return rows["loss"][0], rows["gradients"], rows["statistics"]


def _compare_step(start: dict[str, np.ndarray], number: int, ours: TrainedStep, theirs: TrainedStep) -> StepRow:
    """Compare one step of both trainings; the first fills ``start`` with the other side's parameters."""
    shared = [name for name in ours.parameters if name in theirs.parameters]
    if not shared:
        raise InputError("the two sides share no parameter's name; give the names of one in the other's")
    if not start:
        start.update((name, np.array(theirs.parameters[name])) for name in shared)
    sums = np.array([square_sums(ours.parameters[name], theirs.parameters[name]) for name in shared]).sum(0)
    moved = np.array([square_sums(theirs.parameters[name], start[name]) for name in shared]).sum(0)
    return StepRow(
        number,
        ours.loss,
        theirs.loss,
        error_norm(np.asarray(ours.loss), np.asarray(theirs.loss)),
        math.sqrt(sums[0] / sums[1]) if sums[0] else 0.0,
        math.sqrt(moved[0] / moved[1]) if moved[0] else 0.0,
    )
