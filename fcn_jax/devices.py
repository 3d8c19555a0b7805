"""Run the training step on several devices: under ``jax.pmap``, or under ``jax.jit`` on a mesh with more axes.

A mesh has three axes. ``data`` and ``fsdp`` split the batch. ``fsdp`` also splits parameters and momentum, which are
gathered for the gradient. ``space`` splits the height of images and feature maps; XLA exchanges the borders.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fcn_jax.errors import InputError, unknown
from fcn_jax.models.kernels import cpu_kernels
from fcn_jax.step import Batch, StepSums, TrainState, TrainStep

AXIS = "data"
"""The axis name under ``jax.pmap``."""
BATCH = ("data", "fsdp")
"""The axes of a mesh that split the batch."""
SMALLEST = 2**16
"""Arrays with fewer elements are replicated, not split over ``fsdp``."""
Devices = Sequence[Any]
"""Several ``jax.Device``, which type checkers take for a variable."""


@dataclass(frozen=True)
class Parallel:
    """A training step over several devices, and the functions that place its inputs there."""

    mesh: Mesh
    step: Callable[[TrainState, Batch], tuple[TrainState, StepSums]]
    """Takes a placed state, whose buffers it donates, and a placed global batch."""
    shardings: Callable[[Any], Any]
    """Returns the sharding of each array of a state; a tree of shapes suffices."""
    place_state: Callable[[TrainState], TrainState]
    """Copies the state, which is the same in every process, to the devices."""
    place_batch: Callable[[Mapping[str, Any]], Batch]
    """Splits a batch (b, ...) over the devices; each process passes its own rows."""
    local: Callable[[Any], Any]
    """Returns a state or the step's results as arrays on the devices of this process only."""


def pick_devices(count: int | None) -> Devices:
    """Return ``count`` devices, by default all: equally many of each process, in the order of processes.

    Raises:
        InputError: there are too few devices, or they cannot be divided equally among the processes.
    """
    processes = jax.process_count()
    by_process = [jax.local_devices(index) for index in range(processes)]
    if len({len(devices) for devices in by_process}) > 1:
        raise InputError(
            f"expected equally many devices in every process, got {[len(devices) for devices in by_process]}; "
            "start them on machines with the same number of devices"
        )
    total = processes * len(by_process[0])
    if count is None:
        count = total
    if not 1 <= count <= total or count % processes:
        shared = f", a multiple of {processes} processes" if processes > 1 else ""
        raise InputError(f"expected devices in 1 ... {total}{shared}, got {count}; JAX sees {total} here")
    return [device for devices in by_process for device in devices[: count // processes]]


def make_mesh(devices: Devices, fsdp: int = 1, space: int = 1) -> Mesh:
    """Return a mesh of devices in the given order, so that a process's rows of a batch lie on its own devices."""
    shape = (len(devices) // (fsdp * space), fsdp, space)
    return Mesh(np.asarray(devices).reshape(shape), (*BATCH, "space"), axis_types=(AxisType.Auto,) * 3)


def pick_mesh(axes: str | None, count: int | None = None, pick: Callable[[int | None], Devices] = pick_devices) -> Mesh:
    """Make the mesh of a run.

    Args:
        axes: sizes by name, as in "data=4,space=2". ``data`` defaults to all remaining devices, the other axes to 1.
        count: number of devices, by default all.
        pick: returns that number of devices.

    Raises:
        InputError: the axes cannot be parsed, or there are too few devices.
    """
    if axes is None:
        return make_mesh(pick(count))
    if not re.fullmatch(r"(data|fsdp|space)=[1-9]\d*(,(data|fsdp|space)=[1-9]\d*)*", axes):
        raise InputError(f"expected --mesh such as data=4,space=2 with the axes data, fsdp and space, got {axes}")
    sizes = {name: int(size) for name, _, size in (part.partition("=") for part in axes.split(","))}
    fsdp, space = sizes.get("fsdp", 1), sizes.get("space", 1)
    own = sizes["data"] * fsdp * space if "data" in sizes else count
    if count not in (None, own):
        raise InputError(f"--mesh {axes} has {own} devices, but --devices is {count}; leave one of them out")
    devices = pick(own)
    each = len(devices) // jax.process_count()
    if each % (fsdp * space):
        raise InputError(
            f"--mesh {axes}: fsdp x space is {fsdp * space}, which does not divide the {each} devices of a process; "
            "choose divisors of that"
        )
    return make_mesh(devices, fsdp, space)


def groups(mesh: Mesh) -> int:
    """Return the number of parts into which a mesh splits a batch."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def height_unit(mesh: Mesh) -> int:
    """Return the number that the height of images has to be a multiple of for a mesh to split it; 1 if it does not."""
    return 32 * mesh.shape["space"] if mesh.shape["space"] > 1 else 1


def check_height(height: int | None, mesh: Mesh, way_out: str = "set --data.crop-size") -> None:
    """Raise InputError if a mesh cannot split images of this height; the message names the nearest that it can."""
    unit = height_unit(mesh)
    if unit == 1 or (height is not None and height % unit == 0):
        return
    below = (height or 0) // unit * unit
    nearest = " or ".join(str(each) for each in (below, below + unit) if each)
    raise InputError(
        f"--mesh with space={mesh.shape['space']} needs image heights that are multiples of {unit}, got "
        f"{height or 'images of different heights'}; the nearest is {nearest}; {way_out}"
    )


def batch_sharding(x: Any, mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch's array (b, h, ...): split by example, and by height where that is possible."""
    split = x.ndim > 2 and mesh.shape["space"] > 1 and x.shape[1] % height_unit(mesh) == 0
    return NamedSharding(mesh, PartitionSpec(BATCH, "space") if split else PartitionSpec(BATCH))


def kernels_for(mesh: Mesh) -> Any:
    """Return the context ``cpu_kernels``, enabled for CPU devices if the mesh does not split the height of images."""
    return cpu_kernels(mesh.devices.flat[0].platform == "cpu" and mesh.shape["space"] == 1)


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """Split each large array of a state over ``fsdp``, along the last of its longest axes that can be divided."""

    def sharding(x: Any) -> NamedSharding:
        size = mesh.shape["fsdp"]
        axes = [axis for axis, length in enumerate(x.shape) if length % size == 0]
        if size == 1 or np.prod(x.shape) < SMALLEST or not axes:
            return NamedSharding(mesh, PartitionSpec())
        longest = max(axes, key=lambda axis: (x.shape[axis], axis))
        return NamedSharding(mesh, PartitionSpec(*(None,) * longest, "fsdp"))

    return jax.tree.map(sharding, state)


def _on(mesh: Mesh, tree: Any, times: int = 1) -> Any:
    """Rewrap arrays on another mesh without a copy: as parts of global arrays, ``times`` as long, or as local ones."""

    def rewrap(x: jax.Array) -> jax.Array:
        sharding = NamedSharding(mesh, getattr(x.sharding, "spec", PartitionSpec()))
        shape, pieces = (times * x.shape[0], *x.shape[1:]) if times > 1 else x.shape, x.addressable_shards
        return jax.make_array_from_single_device_arrays(shape, sharding, [piece.data for piece in pieces])

    return jax.tree.map(rewrap, tree)


def _spread(batch: Mapping[str, Any], mesh: Mesh, sharding: Callable[[Any, Mesh], NamedSharding]) -> Batch:
    """Copy this process's rows to its devices, as a part of the global batch."""
    local = {key: jax.device_put(x, sharding(x, mesh.local_mesh)) for key, x in batch.items()}
    return local if jax.process_count() == 1 else _on(mesh, local, jax.process_count())


MakeStep = Callable[..., TrainStep]
"""(axis_name=..., shard=...) -> a step, both as ``step.make_train_step`` takes them."""


def _pmap(make_step: MakeStep, mesh: Mesh) -> tuple[Any, Any]:
    """The state goes in and comes out unstacked (``in_axes=None``): one replicated copy, not one row per device."""
    if mesh.size != mesh.shape[AXIS]:
        raise InputError("--parallel pmap does not support the axes fsdp and space; leave --parallel out")
    step: Any = jax.pmap(
        make_step(axis_name=AXIS),
        axis_name=AXIS,
        in_axes=(None, 0),
        out_axes=(None, None),
        devices=list(mesh.devices.flat),
        donate_argnums=(0,),
    )
    local = mesh.local_mesh.size

    def place_batch(batch: Mapping[str, Any]) -> Batch:
        parts = {key: np.reshape(x, (local, -1, *x.shape[1:])) for key, x in batch.items()}
        return _spread(parts, mesh, lambda x, mesh: NamedSharding(mesh, PartitionSpec(AXIS)))

    def step_together(state: TrainState, batch: Batch) -> tuple[TrainState, StepSums]:
        # pmap returns arrays of this process alone; checkpoints need global arrays.
        return _on(mesh, step(state, batch))

    return step if jax.process_count() == 1 else step_together, place_batch


def _mesh(make_step: MakeStep, mesh: Mesh) -> tuple[Any, Any]:
    """``shard_map`` splits the batch and sums over devices explicitly; XLA shards the height and the state.

    Left to XLA, the gradient of a bfloat16 network would be summed over the devices in bfloat16.
    """
    whole = PartitionSpec()
    # check_vma=False: the step's own sums make its results replicated, and JAX need not verify it.
    manual = dict(in_specs=(whole, whole, PartitionSpec(BATCH), whole), out_specs=whole, axis_names=set(BATCH))
    if groups(mesh) == 1:  # XLA refuses a sum over axes of size one
        train_step = make_step(axis_name=None)
    else:
        train_step = make_step(axis_name=BATCH, shard=partial(jax.shard_map, mesh=mesh, check_vma=False, **manual))

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, StepSums]:
        state, sums = train_step(state, batch)
        everywhere = jax.tree.map(lambda _: NamedSharding(mesh, whole), sums)
        return jax.lax.with_sharding_constraint((state, sums), (state_shardings(state, mesh), everywhere))

    def place_batch(batch: Mapping[str, Any]) -> Batch:
        return _spread(batch, mesh, batch_sharding)

    return jax.jit(step, donate_argnums=0), place_batch


PARALLEL: dict[str, Callable[[MakeStep, Mesh], tuple[Any, Any]]] = {"pmap": _pmap, "mesh": _mesh}


def make_parallel(mode: str, make_step: MakeStep, mesh: Mesh) -> Parallel:
    """Make the training step for the devices of a mesh.

    Args:
        mode: "pmap" or "mesh"; both give the same numbers.
        make_step: ``partial(step.make_train_step, ...)``, to be called with ``axis_name`` and ``shard``.
        mesh: the devices, from ``make_mesh`` or ``pick_mesh``.

    Raises:
        InputError: unknown mode, or a mesh with axes that pmap does not support.
    """
    if mode not in PARALLEL:
        raise unknown("parallel", mode, PARALLEL)
    step, place_batch = PARALLEL[mode](make_step, mesh)
    shardings = partial(state_shardings, mesh=mesh)
    if jax.process_count() == 1:
        return Parallel(mesh, step, shardings, lambda s: jax.device_put(s, shardings(s)), place_batch, lambda s: s)

    def place(x: Any, sharding: NamedSharding) -> jax.Array:
        # device_put would send every array between processes to check that they are equal.
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    def place_state(state: TrainState) -> TrainState:
        return jax.tree.map(place, state, shardings(state))

    return Parallel(mesh, step, shardings, place_state, place_batch, partial(_on, mesh.local_mesh))
