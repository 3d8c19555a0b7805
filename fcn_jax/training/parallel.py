"""Run the step on several devices: under ``jax.pmap``, or under ``jax.jit`` with the batch spread over a mesh."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fcn_jax.errors import InputError, unknown
from fcn_jax.training.step import Batch, StepSums, TrainState, TrainStep

__all__ = ["AXIS", "PARALLEL", "Parallel", "make_mesh", "make_parallel", "pick_devices"]

AXIS = "batch"
Devices = Sequence[Any]
"""Of ``jax.Device``, which type checkers take for a variable."""
MakeStep = Callable[[str | None], TrainStep]


@dataclass(frozen=True)
class Parallel:
    """A step over several devices, and how state and batches get there; the state looks the same in both modes."""

    mesh: Mesh
    step: Callable[[TrainState, Batch], tuple[TrainState, StepSums]]
    """Takes a placed state (which it consumes) and a placed global batch."""
    place_state: Callable[[TrainState], TrainState]
    """Copies the state to every device."""
    place_batch: Callable[[Mapping[str, Any]], Batch]
    """Spreads a global batch (b, ...) over the devices, b / devices examples each."""


def pick_devices(count: int | None) -> Devices:
    """Return the first ``count`` devices, all by default.

    Raises:
        InputError: there are fewer.
    """
    devices = jax.devices()
    if count is None:
        return devices
    if not 1 <= count <= len(devices):
        raise InputError(f"expected devices in 1 ... {len(devices)}, got {count}; JAX sees {len(devices)} here")
    return devices[:count]


def make_mesh(devices: Devices) -> Mesh:
    """Line devices up along the batch axis."""
    return jax.make_mesh((len(devices),), (AXIS,), devices=devices, axis_types=(AxisType.Auto,))


def _pmap(make_step: MakeStep, mesh: Mesh) -> tuple[Any, Any]:
    """The state goes in and comes out unstacked (``in_axes=None``): one replicated copy, not one row per device."""
    devices = list(mesh.devices.flat)
    step = jax.pmap(
        make_step(AXIS),
        axis_name=AXIS,
        in_axes=(None, 0),
        out_axes=(None, None),
        devices=devices,
        donate_argnums=(0,),
    )

    def place_batch(batch: Mapping[str, Any]) -> Batch:
        def spread(x: np.ndarray) -> jax.Array:
            stacked = np.reshape(x, (len(devices), -1, *x.shape[1:]))
            return jax.device_put(stacked, NamedSharding(mesh, PartitionSpec(AXIS)))

        return jax.tree.map(spread, dict(batch))

    return step, place_batch


def _mesh(make_step: MakeStep, mesh: Mesh) -> tuple[Any, Any]:
    """Under jit the batch is one global array; XLA inserts the sums over devices."""
    everywhere, spread = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(AXIS))
    step = jax.jit(
        make_step(None), in_shardings=(everywhere, spread), out_shardings=(everywhere, everywhere), donate_argnums=(0,)
    )
    return step, lambda batch: jax.device_put(dict(batch), spread)


PARALLEL: dict[str, Callable[[MakeStep, Mesh], tuple[Any, Any]]] = {"pmap": _pmap, "mesh": _mesh}


def make_parallel(mode: str, make_step: MakeStep, devices: Devices) -> Parallel:
    """Set a step up on some devices.

    Args:
        mode: "pmap" or "mesh"; both give the same numbers.
        make_step: makes the step for a pmap axis name, or for None where the batch is global.
        devices: the devices to use.

    Raises:
        InputError: another mode.
    """
    if mode not in PARALLEL:
        raise unknown("parallel", mode, PARALLEL)
    mesh = make_mesh(devices)
    step, place_batch = PARALLEL[mode](make_step, mesh)
    everywhere = NamedSharding(mesh, PartitionSpec())
    return Parallel(mesh, step, lambda state: jax.device_put(state, everywhere), place_batch)
