"""Run the step on several devices: under ``jax.pmap``, or under ``jax.jit`` with the batch spread over a mesh."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fcn_jax.errors import InputError, unknown
from fcn_jax.step import Batch, StepSums, TrainState, TrainStep

AXIS = "batch"
Devices = Sequence[Any]
"""Of ``jax.Device``, which type checkers take for a variable."""


@dataclass(frozen=True)
class Parallel:
    """A step over several devices, and how state and batches get there; the state looks the same in both modes."""

    mesh: Mesh
    step: Callable[[TrainState, Batch], tuple[TrainState, StepSums]]
    """Takes a placed state (which it consumes) and a placed global batch."""
    place_state: Callable[[TrainState], TrainState]
    """Copies the state to every device; it is the same in every process."""
    place_batch: Callable[[Mapping[str, Any]], Batch]
    """Spreads a batch (b, ...) over the devices, b / devices examples each; a process gives its own rows of it."""
    local: Callable[[Any], Any]
    """Returns a tree of what the step returns or takes as a state, as copies on the devices of this process alone."""


def pick_devices(count: int | None) -> Devices:
    """Return ``count`` devices, all by default: the first of each process, process by process.

    Raises:
        InputError: there are fewer, or the processes cannot have equally many.
    """
    processes = jax.process_count()
    by_process = [jax.local_devices(index) for index in range(processes)]
    if len({len(devices) for devices in by_process}) > 1:
        raise InputError(
            f"expected equally many devices in every process, got {[len(devices) for devices in by_process]}; "
            "start them on machines that are alike"
        )
    total = processes * len(by_process[0])
    if count is None:
        count = total
    if not 1 <= count <= total or count % processes:
        shared = f", a multiple of {processes} processes" if processes > 1 else ""
        raise InputError(f"expected devices in 1 ... {total}{shared}, got {count}; JAX sees {total} here")
    return [device for devices in by_process for device in devices[: count // processes]]


def make_mesh(devices: Devices) -> Mesh:
    """Line devices up along the batch axis, in their order: a process's rows of a batch lie on its own devices."""
    return Mesh(np.asarray(devices), (AXIS,), axis_types=(AxisType.Auto,))


def _rewrap(tree: Any, sharding: NamedSharding) -> Any:
    """See arrays as parts of arrays over more devices, or take this process's part of such; nothing is copied.

    A replicated array keeps its shape; of one spread over axis 0, each device's part does.
    """

    def rewrap(x: jax.Array) -> jax.Array:
        pieces = [shard.data for shard in x.addressable_shards]
        rows = len(pieces[0]) * sharding.mesh.size if sharding.spec else None
        shape = x.shape if rows is None else (rows, *x.shape[1:])
        return jax.make_array_from_single_device_arrays(shape, sharding, pieces)

    return jax.tree.map(rewrap, tree)


def _spread(batch: Any, mesh: Mesh) -> Any:
    """Copy this process's rows to its devices, as a part of the global batch."""
    local = jax.device_put(batch, NamedSharding(mesh.local_mesh, PartitionSpec(AXIS)))
    return local if jax.process_count() == 1 else _rewrap(local, NamedSharding(mesh, PartitionSpec(AXIS)))


def _pmap(train_step: TrainStep, mesh: Mesh) -> tuple[Any, Any]:
    """The state goes in and comes out unstacked (``in_axes=None``): one replicated copy, not one row per device."""
    step: Any = jax.pmap(
        train_step,
        axis_name=AXIS,
        in_axes=(None, 0),
        out_axes=(None, None),
        devices=list(mesh.devices.flat),
        donate_argnums=(0,),
    )
    local, everywhere = mesh.local_mesh.size, NamedSharding(mesh, PartitionSpec())

    def place_batch(batch: Mapping[str, Any]) -> Batch:
        return _spread({key: np.reshape(x, (local, -1, *x.shape[1:])) for key, x in batch.items()}, mesh)

    def step_together(state: TrainState, batch: Batch) -> tuple[TrainState, StepSums]:
        # What comes out of pmap is this process's copy alone; checkpoints are made of the global form.
        return _rewrap(step(state, batch), everywhere)

    return step if jax.process_count() == 1 else step_together, place_batch


def _mesh(train_step: TrainStep, mesh: Mesh) -> tuple[Any, Any]:
    """Under jit the batch is one global array; the step sees a device's part of it, and sums over the axis itself.

    Left to XLA the gradient of a bfloat16 network would be summed over the devices in bfloat16.
    """
    whole, part = PartitionSpec(), PartitionSpec(AXIS)
    # A replicated value is one that the step makes so, by its sums; JAX need not derive it.
    step = jax.shard_map(train_step, mesh=mesh, in_specs=(whole, part), out_specs=whole, check_vma=False)
    everywhere, spread = NamedSharding(mesh, whole), NamedSharding(mesh, part)
    step = jax.jit(step, in_shardings=(everywhere, spread), out_shardings=everywhere, donate_argnums=(0,))
    return step, lambda batch: _spread(dict(batch), mesh)


PARALLEL: dict[str, Callable[[TrainStep, Mesh], tuple[Any, Any]]] = {"pmap": _pmap, "mesh": _mesh}


def make_parallel(mode: str, train_step: TrainStep, devices: Devices) -> Parallel:
    """Set a step up on some devices.

    Args:
        mode: "pmap" or "mesh"; both give the same numbers.
        train_step: the step of a device's part of the batch, which sums over the axis ``AXIS``.
        devices: the devices to use.

    Raises:
        InputError: another mode.
    """
    if mode not in PARALLEL:
        raise unknown("parallel", mode, PARALLEL)
    mesh = make_mesh(devices)
    step, place_batch = PARALLEL[mode](train_step, mesh)
    everywhere = NamedSharding(mesh, PartitionSpec())
    if jax.process_count() == 1:
        return Parallel(mesh, step, lambda state: jax.device_put(state, everywhere), place_batch, lambda tree: tree)

    def place(x: Any) -> jax.Array:
        # device_put would send every array between the processes, to see that they are the same.
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, everywhere, lambda index: host[index])

    here = NamedSharding(mesh.local_mesh, PartitionSpec())
    return Parallel(mesh, step, lambda state: jax.tree.map(place, state), place_batch, lambda tree: _rewrap(tree, here))
