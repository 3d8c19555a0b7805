"""Compile the programs of train.py and predict for accelerators that need not be present, and analyse them.

XLA's compilers for TPUs and GPUs run on any Linux x86-64 machine. Values that they do not report are left out.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from fcn_jax.chips import CHIPS, Chip
from fcn_jax.config import Config
from fcn_jax.devices import batch_sharding, check_height, kernels_for, pick_mesh
from fcn_jax.errors import InputError, first_line
from fcn_jax.evaluation.evaluate import make_class_maps
from fcn_jax.losses import make_loss
from fcn_jax.models import init_variables, model_from_config, summarize
from fcn_jax.models.fcn import FCN
from fcn_jax.optim import make_optimizer
from fcn_jax.preprocessing import preprocessing_of
from fcn_jax.step import new_state
from fcn_jax.training.config_checks import loss_terms
from fcn_jax.training.trainer import make_parallel_step

# In training, v5p and v6e run the loss's gather on the SparseCores, and libtpu cannot print such a program.
_PRINTABLE = {"xla_tpu_offload_gather_to_sparsecore": False}
# Autotuning times kernels on the GPU, which is not present; Triton's GEMMs need autotuning.
_GPU_OPTIONS = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
DEFAULT_PRECISION = {"tpu": "one bfloat16 pass", "gpu": "TF32", "cpu": "float32"}
"""How each platform computes float32 products at the default precision."""


@dataclass(frozen=True)
class Target:
    """The devices to compile for."""

    name: str
    chip: Chip
    devices: list[Any]

    @property
    def platform(self) -> str:
        """Return "tpu", "gpu" or "cpu"."""
        return self.devices[0].platform

    def mesh(self, config: Config, inference: bool) -> Mesh:
        """Arrange the devices in the config's mesh; without ``config.mesh``, inference uses one device."""

        def pick(count: int | None) -> list[Any]:
            if count not in (None, len(self.devices)):
                target = f"--target {self.name} has {len(self.devices)}"
                raise InputError(f"--mesh {config.mesh} has {count} devices, but {target}")
            return self.devices[:1] if inference and config.mesh is None else self.devices

        return pick_mesh(config.mesh, None, pick)


def open_target(name: str) -> Target:
    """Describe the devices of a target: ``FAMILY:AxB[xC]`` for TPUs, ``h100:N`` or ``cpu:N``.

    Raises:
        InputError: the target is unknown, or its compiler is not installed.
    """
    family, _, shape = name.partition(":")
    side = r"[1-9]\d*"
    if (
        family not in CHIPS
        or not CHIPS[family].example
        or not re.fullmatch(side if family in ("h100", "cpu") else rf"{side}(x{side}){{1,2}}", shape)
    ):
        known = ", ".join(chip.example for chip in CHIPS.values() if chip.example)
        raise InputError(f"unknown target {name!r}; choose a family and its shape, as in {known}")
    # The target describes all devices, so JAX need not look for real ones.
    jax.config.update("jax_platforms", "cpu")
    if family == "cpu":
        with contextlib.suppress(RuntimeError):  # JAX is already initialised
            jax.config.update("jax_num_cpu_devices", int(shape))
        if len(devices := jax.devices("cpu")) < int(shape):
            raise InputError(f"target {name}: JAX already runs with {len(devices)} CPU devices; start another process")
        return Target(name, CHIPS[family], devices[: int(shape)])
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    plugins = "jax-cuda12-pjrt jax-cuda12-plugin nvidia-cuda-nvcc-cu12"
    try:
        if family == "h100":
            config = (resources.files(__package__) / "targets" / "h100.txtpb").read_text()
            described = topologies.get_topology_desc(platform="cuda", target_config=config, topology=f"1x1x{shape}")
        else:
            described = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except jax.errors.JaxRuntimeError as error:
        raise InputError(f"target {name}: {first_line(error)}; choose another shape") from error
    except (RuntimeError, OSError, KeyError, AttributeError) as error:
        packages = f"pip install --no-deps {plugins}, in jaxlib's version" if family == "h100" else "pip install libtpu"
        raise InputError(f"target {name}: its compiler is not available ({first_line(error)}); {packages}") from error
    return Target(name, CHIPS[family], list(described.devices))


@dataclass(frozen=True)
class Work:
    """What to compile."""

    config: Config
    num_classes: int
    size: tuple[int, int]
    """Height and width of the images."""
    batch_size: int
    """The global batch size, over all devices."""
    inference: bool = False

    @property
    def parallel(self) -> str:
        """Return "pmap" or "mesh"."""
        return "mesh" if self.config.mesh else self.config.parallel

    @property
    def model(self) -> FCN:
        """Make the network."""
        return model_from_config(self.config.model, self.num_classes, self.config.train.remat)


def lower(work: Work, target: Target) -> Any:
    """Trace the training step of train.py, or the class maps of eval.py on one device, to a ``jax.stages.Lowered``."""
    config, model, shape = work.config, work.model, (*work.size, 3)
    variables = jax.eval_shape(lambda key: init_variables(model, key), jax.random.key(0))
    mesh = target.mesh(config, work.inference)
    check_height(work.size[0], mesh)

    def placed(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(x, mesh))

    images = jax.ShapeDtypeStruct((work.batch_size, *shape), jnp.uint8)
    if work.inference:
        class_maps = kernels_for(mesh)(make_class_maps(model, preprocessing_of(config.data)))
        return jax.jit(class_maps, static_argnums=2).lower(variables, placed(images), work.size, None)
    optimizer = make_optimizer(variables["params"], config.optim, 1000, config.model.freeze_stages)
    # Only whether there are class weights matters here, not their values.
    class_weights = None if config.loss.class_weights == "none" else np.ones(work.num_classes)
    loss = make_loss(loss_terms(config.loss), class_weights, config.loss.hard_fraction, config.loss.aux_weight)
    parallel = make_parallel_step(config, model, optimizer, loss, mesh)
    step: Any = parallel.step  # jit and pmap return objects with more methods than their annotated type
    state = jax.eval_shape(lambda v: new_state(v, optimizer), variables)
    batch = {"image": images, "label": jax.ShapeDtypeStruct(images.shape[:3], jnp.uint8)}
    if config.parallel == "pmap" and config.mesh is None:
        lead = (mesh.size, work.batch_size // mesh.size)
        return step.lower(state, {k: jax.ShapeDtypeStruct((*lead, *x.shape[1:]), x.dtype) for k, x in batch.items()})
    lies = parallel.shardings(state)
    state = jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), state, lies)
    return step.lower(state, {key: placed(x) for key, x in batch.items()})


@dataclass
class CompileReport:
    """The analysis of a compiled program; values are per device unless stated otherwise."""

    memory: dict[str, int] = field(default_factory=dict)
    """Bytes that the compiler plans: arguments, outputs, temporaries, reused (outputs that alias arguments), total."""
    flops: float | None = None
    bytes_accessed: float | None = None
    cycles: dict[str, dict[str, int]] = field(default_factory=dict)
    """Layer -> "forward" and "backward": the TPU compiler's own estimate, without waiting for other chips."""
    largest: list[dict[str, Any]] = field(default_factory=list)
    """The instructions with the most estimated cycles."""
    collectives: list[dict[str, Any]] = field(default_factory=list)
    products: list[dict[str, Any]] = field(default_factory=list)
    """Convolutions and matrix products, by operand dtype and requested precision."""
    text: str = field(default="", repr=False)
    """The compiled program."""
    notes: list[str] = field(default_factory=list)
    """Caveats about the numbers."""


class DoesNotFit(InputError):
    """The compiler reports that the program needs more memory than the chip has."""


def compile_work(work: Work, target: Target) -> CompileReport:
    """Compile for a target and analyse the program.

    Raises:
        DoesNotFit: the program does not fit in memory; the compiler's first line says why.
        InputError: it does not compile.
    """
    lowered = lower(work, target)
    try:
        compiled = lowered.compile(_GPU_OPTIONS if target.platform == "gpu" else None)
    except jax.errors.JaxRuntimeError as error:
        kind = DoesNotFit if "RESOURCE_EXHAUSTED" in str(error) else InputError
        message = f"a batch of {work.batch_size} does not compile for {target.name}: {first_line(error)}"
        raise kind(f"{message}; choose a smaller batch or --train.remat") from error
    report = CompileReport(products=count_products(lowered.as_text()))
    if (plan := compiled.memory_analysis()) is not None:
        parts = {
            "arguments": plan.argument_size_in_bytes,
            "outputs": plan.output_size_in_bytes,
            "temporaries": plan.temp_size_in_bytes,
            "reused": plan.alias_size_in_bytes,
        }
        report.memory = parts | {"total": sum(parts.values()) - 2 * parts["reused"]}
    try:
        report.text = compiled.as_text()
    except jax.errors.JaxRuntimeError:
        compiled = lowered.compile(_PRINTABLE)
        report.text = compiled.as_text()
        report.notes.append("below, the loss's gather is on the TensorCore: libtpu cannot print SparseCore programs")
    report.collectives = count_collectives(report.text)
    if work.config.train.accumulate > 1 and not work.inference:
        report.notes.append("no FLOPs, bytes or cycles: the compiler counts the loop of gradient accumulation once")
    elif target.platform == "tpu":
        costs = compiled.cost_analysis()
        report.flops, report.bytes_accessed = costs["flops"], costs["bytes accessed"]
        layers = [row.path.split("/")[-1] for row in summarize(work.model, work.size)]
        report.cycles, report.largest = estimated_cycles(report.text, layers)
    return report


def fits(work: Work, target: Target) -> bool:
    """Return whether the program compiles and its planned memory fits on the chip."""
    try:
        report = compile_work(work, target)
    except DoesNotFit:
        return False
    return not target.chip.memory or report.memory.get("total", 0) <= target.chip.memory


def largest(fits: Callable[[int], bool], unit: int, start: int) -> int:
    """Return the largest multiple of ``unit`` that fits, by doubling ``start`` and bisection; 0 if none fits."""
    low, high = 0, start
    while fits(high):
        low, high = high, 2 * high
    while high - low > unit:
        middle = (low + high) // (2 * unit) * unit
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


# Analysis of programs

_KINDS = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all|collective-broadcast"
_OPERATION = re.compile(rf"^\s*(?:ROOT )?%?\S+ = (.+?) ({_KINDS})(-start)?\((.*)$", re.MULTILINE)
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_SINGLE = re.compile(r"replica_groups=\{(\{\d+\},?)+\}|replica_groups=\[\d+,1\]")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_PRODUCT = re.compile(r"stablehlo\.(convolution|dot_general)\b.*?\((tensor<\S+?>), (tensor<\S+?>)\) ->")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_NAMES = re.compile(r'^\s*(?:ROOT )?%?(\S+) = (\(?[^\s{(]+)|op_name="([^"]*)"')


def count_collectives(hlo: str) -> list[dict[str, Any]]:
    """Count the collective operations of a compiled program that connect two or more devices.

    An operation in a loop counts once, and so does one that appears in several fusions (with the same channel). Of an
    asynchronous pair only the start counts. Its tuple holds operands and results, for all-reduce the results alone.
    ``hlo`` is ``compiled.as_text()``. The entries have "kind", "dtype", "count" (operations with such a result) and
    "bytes" (of the results on one device).
    """
    counts: Counter[tuple[str, str]] = Counter()
    sizes: Counter[tuple[str, str]] = Counter()
    channels: set[str] = set()
    for shape, kind, start, rest in _OPERATION.findall(hlo):
        channel = _CHANNEL.search(rest)
        if _SINGLE.search(rest) or (channel and channel[1] in channels):
            continue  # a group of one device, or part of an asynchronous operation already counted
        channels |= {channel[1]} if channel and kind != "all-reduce" else set()  # all of ``psum`` share one
        arrays = _ARRAY.findall(shape)
        if start and kind != "all-reduce":
            arrays = arrays[len(arrays) // 2 :] if kind != "collective-permute" else arrays[1:2]
        counts.update({(kind, dtype) for dtype, _ in arrays})
        for dtype, lengths in arrays:
            bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
            sizes[kind, dtype] += int(np.prod([int(n) for n in lengths.split(",") if n])) * bits // 8
    return [
        {"kind": kind, "dtype": dtype, "count": count, "bytes": sizes[kind, dtype]}
        for (kind, dtype), count in sorted(counts.items())
    ]


def count_products(stablehlo: str) -> list[dict[str, Any]]:
    """Count the convolutions and matrix products of a lowered program, given ``lowered.as_text()``."""
    found: Counter[tuple[str, str, str]] = Counter()
    for line in stablehlo.splitlines():
        if match := _PRODUCT.search(line):
            operands = " x ".join(dict.fromkeys(re.split("[x<>]", operand)[-2] for operand in match.groups()[1:]))
            precision = re.search(r"(DEFAULT|HIGHEST|HIGH)\b", line)
            found[match[1], operands, precision[1] if precision else "DEFAULT"] += 1
    return [
        {"operation": operation, "operands": operands, "precision": precision, "count": count}
        for (operation, operands, precision), count in sorted(found.items())
    ]


def estimated_cycles(hlo: str, layers: list[str]) -> tuple[dict[str, dict[str, int]], list[dict[str, Any]]]:
    """Add up the TPU compiler's cycle estimates by layer, and list the ten most expensive instructions.

    Instructions outside the layers (loss, preprocessing, optimiser) count as "other". Loops are left out, because the
    compiler gives no estimate for a whole loop.
    """
    cycles: dict[str, dict[str, int]] = defaultdict(lambda: {"forward": 0, "backward": 0})
    rows = []
    for line in hlo[hlo.index("\nENTRY") :].splitlines():
        if not (match := _CYCLES.search(line)):
            continue
        count, names = int(match[1]), _NAMES.findall(line)
        path = next((name for *_, name in names if name), "")
        parts = [part.partition(".")[0] for part in path.split("/")]
        layer = next((part for part in parts if part in layers), "other")
        cycles[layer]["backward" if "transpose(" in path else "forward"] += count
        rows.append({"cycles": count, "instruction": names[0][0], "result": names[0][1], "operation": path})
    order = {layer: cycles[layer] for layer in [*dict.fromkeys(layers), "other"] if layer in cycles}
    return order, sorted(rows, key=lambda row: -row["cycles"])[:10]


def to_json(work: Work, target: Target, report: CompileReport) -> Mapping[str, Any]:
    """Return the report without the program's text, and a description of what was compiled."""
    numbers = {name: value for name, value in vars(report).items() if name != "text"}
    what = {"target": target.name, "devices": len(target.devices), "size": work.size, "batch_size": work.batch_size}
    what |= {"network": work.config.model.name, "dtype": work.config.model.dtype, "parallel": work.parallel}
    what["num_classes"] = work.num_classes
    return what | {"inference": work.inference, "chip_memory": target.chip.memory} | numbers
