"""Run a row: set both sides up, check that they computed the same, and only then time them, turn about."""

from __future__ import annotations

import functools
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import jax

from fcn_jax.compare.machine import meter
from fcn_jax.compare.measures import square_sums
from fcn_jax.compare.rows import Numbers, Row, Runner
from fcn_jax.compare.settings import Settings
from fcn_jax.errors import first_line

__all__ = ["OURS", "Result", "SideResult", "alternate", "differences", "release", "run_row"]

OURS = "jax"
_MAX_CALLS = 1024


@dataclass
class SideResult:
    """What was found of one side of a row; seconds and bytes."""

    first_s: float
    """Compilation and the first call."""
    planned_bytes: int | None = None
    """What the compiled program says that it uses."""
    peak_bytes: int | None = None
    """What the device's allocator counted above what was there before."""
    calls: int = 0
    """In each sample."""
    samples_s: list[float] = field(default_factory=list)
    """Mean seconds of a call, one for each round."""

    @property
    def median_s(self) -> float:
        """The figure that counts."""
        return statistics.median(self.samples_s)


@dataclass
class Result:
    """What was found of a row."""

    row: Row
    sides: dict[str, SideResult] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    """Variant -> quantity -> |ours - theirs| / |theirs|."""
    status: str = "ok"
    """"ok", "wrong" (the sides computed different things and were not timed), or "failed" (a side did not run)."""
    notes: list[str] = field(default_factory=list)

    @property
    def ours(self) -> SideResult | None:
        """Our side, where it was timed."""
        side = self.sides.get(OURS)
        return side if side and side.samples_s else None

    @property
    def theirs(self) -> tuple[str, SideResult] | None:
        """The fastest of the other side's variants, where any was timed."""
        timed = {name: side for name, side in self.sides.items() if name != OURS and side.samples_s}
        return min(timed.items(), key=lambda item: item[1].median_s) if timed else None

    @property
    def worst(self) -> tuple[str, float] | None:
        """The quantity with the largest error for its tolerance, and that error."""

        def share(item: tuple[str, float]) -> float:
            return math.inf if math.isnan(item[1]) else item[1] / self.row.tolerances[item[0]]

        found = [item for errors in self.errors.values() for item in errors.items()]
        return max(found, key=share) if found else None

    def to_json(self) -> dict[str, Any]:
        """Return everything, samples included."""
        row = self.row
        about = {"name": row.name, "group": row.group, "flops": row.flops, "images": row.images, **row.about}
        sides: dict[str, Any] = {}
        for name, side in self.sides.items():
            sides[name] = asdict(side)
            if side.samples_s:
                low, middle, high = _quartiles(side.samples_s)
                sides[name] |= {"median_s": middle, "quartiles_s": [low, high], "min_s": min(side.samples_s)}
                sides[name] |= {"max_s": max(side.samples_s)}
        return {
            **about,
            "status": self.status,
            "notes": self.notes,
            "tolerances": dict(row.tolerances),
            "errors": self.errors,
            "sides": sides,
        }


def _quartiles(samples: Sequence[float]) -> tuple[float, float, float]:
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, middle, high


def differences(ours: Numbers, theirs: Numbers) -> dict[str, float]:
    """Return |ours - theirs| / |theirs| of each quantity, one Euclidean norm over all its arrays.

    Raises:
        InputError: two arrays differ in shape.
        ValueError: a side lacks a quantity or an array.
    """
    lacking = ours.keys() ^ theirs.keys()
    lacking |= {name for key in ours.keys() & theirs.keys() for name in ours[key].keys() ^ theirs[key].keys()}
    if lacking:
        raise ValueError(f"expected the same numbers of both sides, got {sorted(lacking)} of one only")
    found = {}
    for quantity, arrays in theirs.items():
        pairs = [square_sums(ours[quantity][name], array) for name, array in arrays.items()]
        squares, size = sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)
        found[quantity] = 0.0 if squares == 0 else math.sqrt(squares / size) if size else math.inf
    return found


def alternate(names: Sequence[str], rounds: int) -> Iterator[str]:
    """Yield whose turn it is: every side once a round, in turned order every other round against a drift."""
    for index in range(rounds):
        yield from names if index % 2 == 0 else reversed(names)


def run_row(row: Row, settings: Settings, clock: Callable[[], float] = time.perf_counter) -> Result:
    """Set up, check, time.

    Args:
        row: what to run.
        settings: rounds, seconds, and whether against torch.
        clock: gives seconds.

    Returns:
        The result; nothing was timed where ``status`` is not "ok". A side that runs out of memory or does not compile
        is a failed row, or a note where another variant of torch did run.
    """
    result = Result(row)
    try:
        pair = row.open()
        runners = {}
        runners[OURS], expected = _set_up(result, OURS, pair.ours, clock)
        for variant in row.variants if settings.against_torch else ():
            try:
                make = functools.partial(pair.theirs, variant)
                runner, numbers = _set_up(result, variant, make, clock, torch=True)
            except RuntimeError as error:  # torch's own, of its allocator and its compiler among them
                result.notes.append(f"{variant}: {first_line(error)}")
                continue
            result.errors[variant] = differences(expected, numbers)
            runners[variant] = runner
        if settings.against_torch and len(runners) == 1:
            result.status = "failed"
        elif _is_wrong(result.errors, row.tolerances):
            result.status = "wrong"
        else:
            del expected
            _time(result, runners, settings, clock)
    except RuntimeError as error:  # XLA's are, too
        result.status = "failed"
        result.notes.append(first_line(error))
    return result


def _is_wrong(errors: Mapping[str, Mapping[str, float]], tolerances: Mapping[str, float]) -> bool:
    return any(not error <= tolerances[q] for each in errors.values() for q, error in each.items())


def _set_up(
    result: Result, name: str, make: Callable[[], Runner], clock: Callable[[], float], torch: bool = False
) -> tuple[Runner, Numbers]:
    """Compile and call once, and once more for the memory of a call that follows another."""
    used = meter(torch)  # before weights and inputs are on the device, which are its own
    runner = make()
    began = clock()
    planned = runner.compile()
    out = runner.run()
    first = clock() - began
    numbers = runner.numbers(out)
    del out
    runner.run()
    result.sides[name] = SideResult(first, planned, used())
    return runner, numbers


def _time(result: Result, runners: Mapping[str, Runner], settings: Settings, clock: Callable[[], float]) -> None:
    def sample(name: str, calls: int) -> float:
        return _sample(runners[name], calls, settings.on_gpu, clock)

    for name in runners:
        result.sides[name].calls = _calls(functools.partial(sample, name), settings.sample_seconds)
    gc.collect()
    for name in alternate(list(runners), settings.rounds):
        side = result.sides[name]
        if side.calls > 1:
            # The cores have to wake and the other framework's threads to stop spinning: up to 10 ms, seen on a virtual
            # machine. A single call that fills a sample alone hides it.
            sample(name, math.ceil(side.calls / 4))
        side.samples_s.append(sample(name, side.calls))


def _calls(sample: Callable[[int], float], seconds: float) -> int:
    """Return how many calls fill a sample, found by trying 1, 4, 16 ... until they take a quarter of it."""
    calls = 1
    while (once := sample(calls)) * calls < seconds / 4 and calls < _MAX_CALLS:
        calls = min(4 * calls, _MAX_CALLS)
    return min(_MAX_CALLS, max(1, math.ceil(seconds / max(once, 1e-9))))


def _sample(runner: Runner, calls: int, queued: bool, clock: Callable[[], float]) -> float:
    """Return the mean seconds of some calls; on a GPU they are queued and waited for together, as training does."""
    began = clock()
    out: Any = None
    for _ in range(calls):
        out = None  # as training does, give the results before back, so that their memory serves again
        out = runner.call()
        if not queued:
            runner.wait(out)
    runner.wait(out)
    return (clock() - began) / calls


def release(torch: bool) -> None:
    """Forget what was compiled and give memory back, so that a row finds the device as the first one did."""
    jax.clear_caches()
    gc.collect()
    if torch:
        from fcn_jax.compare import bench_torch as torch_side

        torch_side.release()
