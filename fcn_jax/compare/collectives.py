"""What devices say to each other in a training step, read from the compiled program; nothing is run."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from fcn_jax.compare.rows import compile_step
from fcn_jax.config import OptimConfig
from fcn_jax.losses import make_loss
from fcn_jax.models.catalog import init_variables
from fcn_jax.models.fcn import FCN
from fcn_jax.models.kernels import plain_kernels
from fcn_jax.optim import make_optimizer
from fcn_jax.step import make_train_step, new_state
from fcn_jax.training.devices import AXIS, make_parallel

__all__ = ["KINDS", "Collective", "StepCollectives", "count_collectives", "step_collectives"]

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all", "collective-broadcast")
_OPERATION = re.compile(rf"^\s*(?:ROOT )?%?\S+ = (.+?) ({'|'.join(KINDS)})(-start)?\((.*)$", re.MULTILINE)
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_SINGLE = re.compile(r"replica_groups=\{(\{\d+\},?)+\}|replica_groups=\[\d+,1\]")


@dataclass(frozen=True)
class Collective:
    """All operations of a kind in one program."""

    kind: str
    count: int
    bytes: int
    """Of the results on one device."""


@dataclass(frozen=True)
class StepCollectives:
    """What a training step exchanges."""

    mode: str
    devices: int
    gradient_bytes: int
    """Of all parameters."""
    found: tuple[Collective, ...]

    @property
    def bytes(self) -> int:
        """Of all kinds together."""
        return sum(each.bytes for each in self.found)

    def to_json(self) -> dict[str, Any]:
        """Return everything."""
        return {**asdict(self), "bytes": self.bytes}


def count_collectives(hlo: str) -> tuple[Collective, ...]:
    """Count the collective operations of a compiled program that connect two devices or more.

    An operation within a loop counts once. Of an asynchronous pair the start is counted; its tuple holds operands and
    results except for all-reduce, whose tuple is the results.

    Args:
        hlo: the program's text, ``compiled.as_text()``.
    """
    found: dict[str, list[int]] = {}
    for shape, kind, start, rest in _OPERATION.findall(hlo):
        if _SINGLE.search(rest):
            continue  # a device's sum with itself
        arrays = [_bytes(dtype, sizes) for dtype, sizes in _ARRAY.findall(shape)]
        if start and kind != "all-reduce":
            arrays = arrays[len(arrays) // 2 :] if kind != "collective-permute" else arrays[1:2]
        found.setdefault(kind, []).append(sum(arrays))
    return tuple(Collective(kind, len(sizes), sum(sizes)) for kind, sizes in sorted(found.items()))


def _bytes(dtype: str, sizes: str) -> int:
    """Return the bytes of an array that the program's text calls ``f32[3,3]``."""
    bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
    return math.prod(int(size) for size in sizes.split(",") if size) * bits // 8


def step_collectives(
    model: FCN, mode: str, devices: Sequence[Any], image_size: tuple[int, int], batch_size: int
) -> StepCollectives:
    """Compile the training step of train.py for some devices and count what it exchanges.

    The CPU's own forms are left out: their loops over rows would, on a mesh, sum over the devices in every round.

    Args:
        model: any network.
        mode: "pmap" or "mesh".
        devices: over which the batch is split.
        image_size: height and width in pixels.
        batch_size: of the global batch.
    """
    variables = jax.eval_shape(lambda key: init_variables(model, key), jax.random.key(0))
    optimizer = make_optimizer(variables["params"], OptimConfig(), 1)
    loss = make_loss("softmax")
    parallel = make_parallel(mode, lambda axis: make_train_step(model, optimizer, loss, None, axis_name=axis), devices)
    state = jax.eval_shape(lambda v: new_state(v, optimizer, 0), variables)
    everywhere = NamedSharding(parallel.mesh, PartitionSpec())
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), state)
    batch = _abstract_batch(mode, parallel.mesh, image_size, batch_size)
    with plain_kernels():
        text = compile_step(parallel, state, batch).as_text()
    gradient = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(variables["params"]))
    return StepCollectives(mode, len(devices), gradient, count_collectives(text))


def _abstract_batch(mode: str, mesh: Any, image_size: tuple[int, int], batch_size: int) -> Mapping[str, Any]:
    """Return the shapes of ``Parallel.place_batch``'s result: pmap has an axis of devices in front."""
    count = mesh.devices.size
    lead = (count, batch_size // count) if mode == "pmap" else (batch_size,)
    spread = NamedSharding(mesh, PartitionSpec(AXIS))
    return {
        "image": jax.ShapeDtypeStruct((*lead, *image_size, 3), jnp.float32, sharding=spread),
        "label": jax.ShapeDtypeStruct((*lead, *image_size), jnp.int32, sharding=spread),
    }
