"""The collective operations of a training step, read from the compiled program; nothing is run."""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from fcn_jax.compare.jax_adapter import compile_step, step_on_devices
from fcn_jax.config import OptimConfig
from fcn_jax.models.catalog import init_variables
from fcn_jax.models.fcn import FCN
from fcn_jax.models.kernels import plain_kernels
from fcn_jax.optim import make_optimizer
from fcn_jax.step import new_state
from fcn_jax.training.devices import AXIS

_KINDS = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all|collective-broadcast"
_OPERATION = re.compile(rf"^\s*(?:ROOT )?%?\S+ = (.+?) ({_KINDS})(-start)?\((.*)$", re.MULTILINE)
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_SINGLE = re.compile(r"replica_groups=\{(\{\d+\},?)+\}|replica_groups=\[\d+,1\]")


def count_collectives(hlo: str) -> list[dict[str, Any]]:
    """Count the collective operations of a compiled program that connect two devices or more.

    An operation within a loop counts once. Of an asynchronous pair the start is counted; its tuple holds operands and
    results except for all-reduce, whose tuple is the results.

    Args:
        hlo: the program's text, ``compiled.as_text()``.

    Returns:
        "kind", "count" and "bytes" (of the results on one device), sorted by kind.
    """
    found: dict[str, list[int]] = {}
    for shape, kind, start, rest in _OPERATION.findall(hlo):
        if _SINGLE.search(rest):
            continue  # a device's sum with itself
        arrays = [_bytes(dtype, sizes) for dtype, sizes in _ARRAY.findall(shape)]
        if start and kind != "all-reduce":
            arrays = arrays[len(arrays) // 2 :] if kind != "collective-permute" else arrays[1:2]
        found.setdefault(kind, []).append(sum(arrays))
    return [{"kind": kind, "count": len(sizes), "bytes": sum(sizes)} for kind, sizes in sorted(found.items())]


def _bytes(dtype: str, sizes: str) -> int:
    """Return the bytes of an array that the program's text calls ``f32[3,3]``."""
    bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
    return math.prod(int(size) for size in sizes.split(",") if size) * bits // 8


def step_collectives(model: FCN, mode: str, devices: Any, size: tuple[int, int], batch_size: int) -> dict[str, Any]:
    """Compile the training step of train.py for some devices and count its collective operations.

    The CPU's own kernels are left out: on a mesh, their loops over rows would sum over the devices in every round.

    Args:
        model: any network.
        mode: "pmap" or "mesh".
        devices: over which the batch is split.
        size: height and width of the images in pixels.
        batch_size: of the global batch.

    Returns:
        "mode", "devices", "gradient_bytes" (of all parameters), "found" (see ``count_collectives``), and "bytes" of
        all kinds together.
    """
    variables = jax.eval_shape(lambda key: init_variables(model, key), jax.random.key(0))
    optimizer = make_optimizer(variables["params"], OptimConfig(), 1)
    parallel = step_on_devices(model, optimizer, mode, devices)

    def abstract(tree: Any, spec: PartitionSpec) -> Any:
        sharding = NamedSharding(parallel.mesh, spec)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    # The shapes of ``Parallel.place_batch``'s result: pmap has an axis of devices in front.
    lead = (len(devices), batch_size // len(devices)) if mode == "pmap" else (batch_size,)
    image = jax.ShapeDtypeStruct((*lead, *size, 3), jnp.float32)
    batch = {"image": image, "label": jax.ShapeDtypeStruct(image.shape[:-1], jnp.int32)}
    state = jax.eval_shape(lambda v: new_state(v, optimizer), variables)
    with plain_kernels():
        compiled = compile_step(parallel, abstract(state, PartitionSpec()), abstract(batch, PartitionSpec(AXIS)))
    found = count_collectives(compiled.as_text())
    gradient = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(variables["params"]))
    total = sum(each["bytes"] for each in found)
    return {"mode": mode, "devices": len(devices), "gradient_bytes": gradient, "found": found, "bytes": total}
