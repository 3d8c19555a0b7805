"""A row of the benchmark: one piece of work that two implementations do, and what is known of it beforehand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from fcn_jax.training.devices import Parallel

__all__ = ["Numbers", "Pair", "Row", "Runner", "compile_step", "jax_runner", "planned_bytes"]

Numbers = Mapping[str, Mapping[str, np.ndarray]]
"""Quantity -> name -> array, in one framework's axes on both sides; each quantity is compared by one norm."""


@dataclass(frozen=True)
class Runner:
    """One implementation of a row, its weights and inputs on the device."""

    call: Callable[[], Any]
    """Do the work once; it may come back before the device has finished."""
    wait: Callable[[Any], object]
    """Wait until the device has computed what a call returned."""
    numbers: Callable[[Any], Numbers]
    """What the first call computed; asked for before the second."""
    compile: Callable[[], int | None] = lambda: None
    """Compile ahead; return the bytes that the program plans to use, where that is known."""

    def run(self) -> Any:
        """Call, wait, and return what the call returned."""
        out = self.call()
        self.wait(out)
        return out


class Pair(NamedTuple):
    """Both implementations, of the same weights and inputs."""

    ours: Callable[[], Runner]
    theirs: Callable[[str], Runner]
    """By the name of a variant."""


@dataclass(frozen=True)
class Row:
    """A piece of work."""

    name: str
    group: str
    open: Callable[[], Pair]
    """Draw weights and inputs."""
    tolerances: Mapping[str, float]
    """Of each quantity: |x - y| / |y| up to which two sides are taken to have computed the same."""
    variants: tuple[str, ...]
    """How torch computes it; the fastest counts."""
    flops: int | None = None
    """Of one call: two for each multiplication with its addition."""
    images: int | None = None
    """Of one call."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """Sizes, for the record."""


def jax_runner(function: Any, arguments: tuple[Any, ...], numbers: Callable[[Any], Numbers]) -> Runner:
    """Make the runner of a jitted function that changes nothing.

    Args:
        function: what ``jax.jit`` returned.
        arguments: placed on the device here.
        numbers: see ``Runner``.
    """
    arguments = jax.device_put(arguments, jax.devices()[0])
    return Runner(
        lambda: function(*arguments),
        jax.block_until_ready,
        numbers,
        lambda: planned_bytes(function.lower(*arguments).compile()),
    )


def compile_step(parallel: Parallel, state: Any, batch: Any) -> Any:
    """Compile a training step for states and batches of these shapes; calls of the step then find it compiled."""
    step: Any = parallel.step  # jit's and pmap's results have more than the call that their type names
    return step.lower(state, batch).compile()


def planned_bytes(compiled: Any) -> int | None:
    """Return arguments, outputs and temporaries of a compiled program; what is donated counts once."""
    plan = compiled.memory_analysis()
    if plan is None:
        return None
    total = plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes
    return total - plan.alias_size_in_bytes
