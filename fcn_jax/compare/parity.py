"""Compare the layers, gradients and training steps of two implementations. The result is plain data."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from fcn_jax.errors import InputError

Arrays = Mapping[str, np.ndarray]
"""Name -> array, in the order in which the layers run."""
Part = Literal["layers", "loss", "gradients", "statistics", "steps"]
PARTS: tuple[Part, ...] = ("layers", "loss", "gradients", "statistics", "steps")
"""The parts of a report; a limit can be set on each."""
_BLOCK = 1 << 20


@dataclasses.dataclass(frozen=True)
class Gradient:
    """The loss of a batch in training mode, its gradient, and the running statistics afterwards."""

    loss: float | np.ndarray
    """A number, or a scalar array in the dtype of its computation."""
    gradients: Arrays
    """Gradients of all parameters, in the same axis order on both sides."""
    statistics: Arrays
    """Running statistics of batch norms after the step."""


@dataclasses.dataclass(frozen=True)
class TrainedStep:
    """One step of training."""

    loss: float
    """Loss of the batch before the step."""
    parameters: Arrays
    """Parameters after the step; valid until the next step is requested."""


@dataclasses.dataclass(frozen=True)
class Side:
    """One implementation of a network, with its weights.

    Images are float (b, h, w, 3), normalised; labels are integers (b, h, w), 255 is ignored. The caller chooses names,
    axes and order; both sides of a comparison must agree on them, and names that only one side has are reported. Every
    call starts from the same weights.
    """

    name: str
    layers: Callable[[np.ndarray, bool], Arrays]
    """(images, train) -> outputs of layers; the last one is the logits."""
    gradient: Callable[[np.ndarray, np.ndarray], Gradient] | None = None
    """(images, labels) -> mean softmax cross-entropy over valid pixels, its gradient, statistics."""
    train: Callable[[np.ndarray, np.ndarray, int], Iterator[TrainedStep]] | None = None
    """(images, labels, steps) -> the steps of training on this one batch."""


@dataclasses.dataclass(frozen=True)
class Row:
    """The difference between two arrays x and y."""

    shape: tuple[int, ...]
    error: float
    """|x - y| / |y|, Euclidean norms."""
    max_abs: float
    """Largest |x - y| of an element."""
    ulp_median: float
    ulp_max: int
    """Distance between two elements, in floating-point numbers of the coarser dtype."""
    name: str = ""
    of_global: bool = False
    """The error is |x - y| over the norm of the whole gradient, because the true value is zero."""
    ours_off: float | None = None
    """Error of our side against the reference (float64), if there is one."""
    theirs_off: float | None = None
    noise: float | None = None
    """Error between two computations of the other side (torch's two memory formats), if given."""

    @property
    def judged(self) -> float:
        """The error that limits apply to: against the reference if there is one, else against the other side."""
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
    """|q - q1| / |q1|: how far their parameters have moved since the first step."""


@dataclasses.dataclass(frozen=True)
class Predictions:
    """The agreement of both sides' predictions, over all pixels."""

    agreement: float
    """Share of pixels with the same class."""
    kl_mean: float
    """Mean of sum_c q_c log(q_c / p_c), in nats; q is the other side's softmax, p ours."""
    kl_max: float


@dataclasses.dataclass
class Report:
    """The result of ``compare``."""

    ours: str
    theirs: str
    threshold: float
    layers: dict[str, list[Row]] = dataclasses.field(default_factory=dict)
    """By mode, "eval" and "train", in order of execution."""
    predictions: dict[str, Predictions] = dataclasses.field(default_factory=dict)
    """By mode, of the logits."""
    loss: Row | None = None
    gradients: list[Row] = dataclasses.field(default_factory=list)
    statistics: list[Row] = dataclasses.field(default_factory=list)
    steps: list[StepRow] = dataclasses.field(default_factory=list)
    unmatched: list[str] = dataclasses.field(default_factory=list)
    """Names that only one side has."""

    def errors(self, part: Part) -> dict[str, float]:
        """Return the errors of a part to which limits apply, by name."""
        if part == "layers":
            return {f"{row.name} ({mode})": row.judged for mode, rows in self.layers.items() for row in rows}
        if part == "steps":
            return {f"step {row.step}": max(row.error, row.loss_error, key=_rank) for row in self.steps}
        rows = {"loss": [self.loss] if self.loss else [], "gradients": self.gradients, "statistics": self.statistics}
        return {row.name: row.judged for row in rows[part]}

    def worst(self, part: Part) -> tuple[str, float] | None:
        """Return the name and size of the largest error of a part; NaN counts as the largest."""
        return max(self.errors(part).items(), key=lambda item: _rank(item[1]), default=None)

    def to_json(self) -> dict[str, Any]:
        """Return the report as dicts, lists and numbers."""
        over = {mode: first_over(rows, self.threshold) for mode, rows in self.layers.items()}
        return {**dataclasses.asdict(self), "first_over": over, "worst": {part: self.worst(part) for part in PARTS}}


def _rank(error: float) -> float:
    return math.inf if math.isnan(error) else error


def first_over(rows: list[Row], threshold: float) -> str | None:
    """Return the name of the first row whose error is above the threshold or NaN."""
    return next((row.name for row in rows if not row.judged <= threshold), None)


def _blocks(*arrays: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """Split arrays of one size into blocks that fit in the cache: fc6 at full width has 10^8 elements."""
    flat = [np.asarray(array).reshape(-1) for array in arrays]
    for start in range(0, flat[0].size, _BLOCK):
        yield tuple(array[start : start + _BLOCK] for array in flat)


def square_sums(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """Return the sums of (x - y)^2 and of y^2 over all elements in float64; InputError if the shapes differ."""
    if np.shape(ours) != np.shape(theirs):
        raise InputError(f"expected arrays of one shape, got {np.shape(ours)} and {np.shape(theirs)}")
    difference = size = 0.0
    with np.errstate(invalid="ignore"):
        for x, y in _blocks(ours, theirs):
            difference += float(np.sum(np.square(x.astype(np.float64) - y.astype(np.float64))))
            size += float(np.sum(np.square(y.astype(np.float64))))
    return difference, size


def error_norm(ours: np.ndarray, theirs: np.ndarray, scale: float | None = None) -> float:
    """Return |ours - theirs| / |theirs| in Euclidean norms, computed in float64; ``scale`` replaces |theirs|.

    Example of a scale: the norm of the whole gradient, for a part whose true value is zero. The result is 0 if both are
    equal, infinity if only the divisor is zero, NaN if either has NaN or infinity. Shapes must agree.
    """
    return joint_error({"": ours}, {"": theirs}, [""], scale)


def joint_error(ours: Arrays, theirs: Arrays, names: Collection[str], scale: float | None = None) -> float:
    """Return |ours - theirs| / |theirs|, with one norm over all named arrays; see ``error_norm``."""
    sums = [square_sums(ours[name], theirs[name]) for name in names]
    squares, size = sum(pair[0] for pair in sums), sum(pair[1] for pair in sums)
    divisor = math.sqrt(size) if scale is None else scale
    return 0.0 if squares == 0 else math.sqrt(squares) / divisor if divisor else math.inf


def ulp_distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Count the steps of ``nextafter`` from each element of x to that of y, in uint64; +0 and -0 are equal.

    Both must have one shape and one dtype: float64, float32, float16 or bfloat16; anything else raises an InputError.
    The result is 2^64 - 1 where exactly one of the two is NaN, and 0 where both are.
    """
    x, y = np.asarray(x), np.asarray(y)
    if x.dtype != y.dtype or x.shape != y.shape or not jnp.issubdtype(x.dtype, jnp.floating):
        raise InputError(
            f"expected floats of one dtype and shape, got {x.dtype} {x.shape} and {y.dtype} {y.shape}; cast them first"
        )
    integer = np.dtype(f"i{x.dtype.itemsize}")
    bits = (np.ascontiguousarray(value).view(integer).astype(np.int64) for value in (x, y))
    # Without the sign bit, the bits order floats by magnitude; negated for negative numbers, they order all floats.
    a, b = (np.where(value < 0, np.iinfo(integer).min - value, value) for value in bits)
    distance = np.maximum(a, b).astype(np.uint64) - np.minimum(a, b).astype(np.uint64)
    nan_x, nan_y = np.isnan(x), np.isnan(y)
    distance = np.where(nan_x | nan_y, np.iinfo(np.uint64).max, distance)
    return np.where(nan_x & nan_y, np.uint64(0), distance).reshape(x.shape)


def measure(ours: np.ndarray, theirs: np.ndarray, scale: float | None = None, **more: Any) -> Row:
    """Measure how far ``ours`` is from ``theirs``; see ``error_norm``. ULPs are those of the coarser dtype.

    ``more`` are further fields of the row.
    """
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    error = error_norm(ours, theirs, scale)
    coarser = ours.dtype if jnp.finfo(ours.dtype).eps >= jnp.finfo(theirs.dtype).eps else theirs.dtype
    if not ours.size:
        return Row(ours.shape, error, 0.0, 0.0, 0, **more)
    counts, gap = np.empty(ours.size, np.uint64), 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        for steps, x, y in _blocks(counts, ours, theirs):
            steps[:] = ulp_distance(x.astype(coarser), y.astype(coarser))
            gap = float(np.maximum(gap, np.max(np.abs(x.astype(np.float64) - y.astype(np.float64)))))
    largest = int(counts.max())
    return Row(ours.shape, error, gap, float(np.median(counts, overwrite_input=True)), largest, **more)


def compare_arrays(
    ours: Arrays,
    theirs: Arrays,
    reference: Arrays = MappingProxyType({}),
    noise: Arrays = MappingProxyType({}),
    cancelled: Collection[str] = (),
) -> list[Row]:
    """Measure the arrays that both sides have, in our order.

    ``reference`` has the exact values, ``noise`` the other side's from another computation. ``cancelled`` names arrays
    whose true value is zero; their difference is divided by the norm of all. Raises an InputError if shapes differ.
    """
    whole = math.sqrt(sum(square_sums(y, y)[1] for y in theirs.values())) if cancelled else None
    rows = []
    for name in [name for name in ours if name in theirs]:
        x, y = ours[name], theirs[name]
        if np.shape(x) != np.shape(y):
            raise InputError(f"{name} is {np.shape(x)} on our side and {np.shape(y)} on the other")
        scale = whole if name in cancelled else None
        more: dict[str, Any] = {"name": name, "of_global": scale is not None}
        if reference:
            more["ours_off"] = error_norm(x, reference[name], scale)
            more["theirs_off"] = error_norm(y, reference[name], scale)
        if noise:
            more["noise"] = error_norm(noise[name], y, scale)
        rows.append(measure(x, y, scale, **more))
    return rows


def compare_predictions(ours: np.ndarray, theirs: np.ndarray) -> Predictions:
    """Compare logits (..., num_classes) of one shape by the classes and probabilities that they predict."""
    x, y = (np.asarray(logits, np.float64) for logits in (ours, theirs))
    log_p, log_q = (z - np.logaddexp.reduce(z, axis=-1, keepdims=True) for z in (x, y))
    kl = np.maximum(np.sum(np.exp(log_q) * (log_q - log_p), axis=-1), 0.0)  # negative only by rounding
    return Predictions(float(np.mean(x.argmax(-1) == y.argmax(-1))), float(kl.mean()), float(kl.max()))


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
        theirs: the other; errors are relative to it.
        images: float (b, h, w, 3), normalised.
        labels: integers (b, h, w), 255 is ignored.
        steps: maximum number of training steps; 0 for none.
        modes: in which layers are compared. Batch norm uses running statistics in "eval", the batch's in "train".
        threshold: the report names the first layer whose error is above it.
        reference: a third side, in float64, that gives the exact values.
        noise: the other side computed in another way, to measure its rounding noise.
        cancelled: parameters whose true gradient is zero; see ``compare_arrays``.

    Raises:
        InputError: a side does not accept the images, or two arrays of one name have different shapes.
    """
    report, unmatched = Report(ours.name, theirs.name, threshold), set()
    for mode in modes:
        train = mode == "train"
        a, b = ours.layers(images, train), theirs.layers(images, train)
        report.layers[mode] = compare_arrays(a, b, reference.layers(images, train) if reference else {})
        unmatched |= a.keys() ^ b.keys()
        if a.keys() & b.keys() >= {"logits"}:
            report.predictions[mode] = compare_predictions(a["logits"], b["logits"])
    if ours.gradient and theirs.gradient:
        g, h = ours.gradient(images, labels), theirs.gradient(images, labels)
        none = Gradient(0.0, {}, {})
        r, n = (side.gradient(images, labels) if side and side.gradient else none for side in (reference, noise))
        (report.loss,) = compare_arrays(*({"loss": np.asarray(f.loss)} if f.gradients else {} for f in (g, h, r, n)))
        report.gradients = compare_arrays(g.gradients, h.gradients, r.gradients, n.gradients, cancelled)
        report.statistics = compare_arrays(g.statistics, h.statistics, r.statistics, n.statistics)
        unmatched |= (g.gradients.keys() ^ h.gradients.keys()) | (g.statistics.keys() ^ h.statistics.keys())
        del g, h, r, n
    # Sort both in the layers' order of execution.
    depth = {row.name: index for rows in report.layers.values() for index, row in enumerate(rows)}
    for rows in (report.gradients, report.statistics):
        rows.sort(key=lambda row: depth.get(row.name.rpartition(".")[0], len(depth)))
    if steps and ours.train and theirs.train:
        # Both sides train in lockstep; map drops a step before it requests the next, so one of each is in memory.
        trained = (ours.train(images, labels, steps), theirs.train(images, labels, steps))
        report.steps = list(map(functools.partial(_compare_step, {}), itertools.count(1), *trained))
    report.unmatched = sorted(unmatched)
    return report


def _compare_step(start: dict[str, np.ndarray], number: int, ours: TrainedStep, theirs: TrainedStep) -> StepRow:
    """Compare one step of both trainings; the first fills ``start`` with the other side's parameters."""
    shared = [name for name in ours.parameters if name in theirs.parameters]
    if not shared:
        raise InputError("the two sides share no parameter names; rename the parameters of one side")
    if not start:
        start.update((name, np.array(theirs.parameters[name])) for name in shared)
    loss_error = error_norm(np.asarray(ours.loss), np.asarray(theirs.loss))
    error = joint_error(ours.parameters, theirs.parameters, shared)
    return StepRow(number, ours.loss, theirs.loss, loss_error, error, joint_error(theirs.parameters, start, shared))
