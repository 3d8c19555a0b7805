"""Run a benchmark row: set up both sides, check that their results agree, time them in turn. Describe the machine."""

from __future__ import annotations

import functools
import gc
import math
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from fcn_jax.compare.parity import joint_error
from fcn_jax.config import Config
from fcn_jax.errors import InputError, first_line
from fcn_jax.training.run import environment

NETWORKS = ("fcn8s", "fcn32s_pad100", "fcn8s_pad100", "fcn8s_ladder", "fcn8s_resize", "fcn_resnet50")
"""One network per family, and the one with the largest score map."""
NUM_CLASSES = 21
"""PASCAL VOC, background included."""
OURS = "jax"
_MAX_CALLS = 1024
Numbers = Mapping[str, Mapping[str, np.ndarray]]
"""Quantity -> name -> array, in the same axis order on both sides. Each quantity is compared by one norm."""


@dataclass(frozen=True)
class Settings:
    """What a run of the benchmark measures: device, sizes, repetitions."""

    kind: Literal["cpu", "gpu"]
    """Precision and options: float32, or bfloat16 with the options that make PyTorch fast on a GPU."""
    on_gpu: bool
    """Whether it runs on a GPU; a smoke run may use the GPU's settings on a CPU."""
    image_size: int = 256
    """Height and width of the networks' images, and of the first encoder stage, in pixels."""
    upsampled_size: int = 512
    """Height and width of the transposed convolutions' outputs, in pixels."""
    batch_size: int = 2
    encoder: str = "vgg16"
    width: float = 1.0
    matmul_size: int = 4096
    """Side of the square matrices whose product measures the machine's FLOP rate."""
    rounds: int = 7
    sample_seconds: float = 0.2
    """Length of a sample, which is the mean time of as many calls as fill it."""
    smoke: bool = False

    @property
    def dtype(self) -> str:
        """The compute dtype; network parameters stay in float32."""
        return "float32" if self.kind == "cpu" else "bfloat16"

    @property
    def jax_dtype(self) -> Any:
        """The compute dtype as a JAX type."""
        return jnp.dtype(self.dtype).type


_GPU: dict[str, Any] = {"image_size": 512, "batch_size": 16, "matmul_size": 8192, "rounds": 10}
# Small enough for a minute on two cores, large enough that every stage has more than one pixel.
_SMOKE: dict[str, Any] = {"image_size": 64, "upsampled_size": 64, "batch_size": 2, "encoder": "vgg11", "width": 0.0625}
_SMOKE |= {"matmul_size": 256, "rounds": 2, "sample_seconds": 0.0, "smoke": True}


def make_settings(device: str | None, smoke: bool = False, **given: Any) -> Settings:
    """Make the settings of a run on "cpu", "gpu", or JAX's default; fields ``given`` as None keep their default.

    A smoke run has tiny sizes and few rounds. It runs "gpu" on the CPU if there is no GPU.

    Raises:
        InputError: there is no GPU, or a size is out of range.
    """
    present = jax.default_backend() == "gpu"
    kind: Literal["cpu", "gpu"] = "gpu" if device == "gpu" or (device is None and present) else "cpu"
    if kind == "gpu" and not present and not smoke:
        raise InputError("JAX sees no GPU here; install fcn_jax[cuda] on a machine with one, or give --device cpu")
    sizes = (_GPU if kind == "gpu" else {}) | (_SMOKE if smoke else {})
    sizes |= {name: value for name, value in given.items() if value is not None}
    settings = replace(Settings(kind, on_gpu=kind == "gpu" and present), **sizes)
    if settings.image_size < 32 or settings.image_size % 32:
        raise InputError(f"expected --image-size to be a multiple of 32, got {settings.image_size}")
    if settings.batch_size < 1 or settings.rounds < 1 or not 0 <= settings.sample_seconds < float("inf"):
        raise InputError("expected --batch-size and --rounds of at least 1, and --seconds of at least 0")
    return settings


@dataclass(frozen=True)
class Runner:
    """One implementation of a row, with its weights and inputs on the device."""

    call: Callable[[], Any]
    """Do the work once; it may return before the device has finished."""
    wait: Callable[[Any], object]
    """Wait until the device has computed the result of a call."""
    numbers: Callable[[Any], Numbers]
    """Convert the result of the first call; called before the second."""
    compile: Callable[[], int | None] = lambda: None
    """Compile ahead of time; return the memory that the compiler plans, in bytes, if known."""


@dataclass(frozen=True)
class Row:
    """A workload that both implementations run."""

    name: str
    group: str
    open: Callable[[Any], tuple[Callable[[], Runner], Callable[[str], Runner]]]
    """(``torch_adapter`` or None) -> functions to set up our side, and the other by variant; draws weights, inputs."""
    tolerances: Mapping[str, float]
    """By quantity: the largest |x - y| / |y| at which both sides count as equal."""
    variants: tuple[str, ...]
    """The torch configurations to time; the fastest counts."""
    flops: int | None = None
    """FLOPs per call, two per multiply-add."""
    images: int | None = None
    """Images per call."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """Sizes, for the JSON record."""


@dataclass
class SideResult:
    """The measurements of one side of a row."""

    first_s: float
    """Time of compilation and the first call, in seconds."""
    planned_bytes: int | None = None
    """Memory that the compiled program plans to use."""
    peak_bytes: int | None = None
    """Peak memory of the device's allocator above its use before the side was set up."""
    calls: int = 0
    """Calls per sample."""
    samples_s: list[float] = field(default_factory=list)
    """Mean seconds per call, one value per round."""

    @property
    def median_s(self) -> float:
        """The median seconds per call."""
        return float(np.median(self.samples_s))

    def to_json(self) -> dict[str, Any]:
        """Return the fields, and median, quartiles and extremes of the samples."""
        if not self.samples_s:
            return asdict(self)
        least, low, middle, high, most = np.percentile(self.samples_s, (0, 25, 50, 75, 100)).tolist()
        return asdict(self) | {"median_s": middle, "quartiles_s": [low, high], "min_s": least, "max_s": most}


@dataclass
class Result:
    """The measurements of a row."""

    row: Row
    sides: dict[str, SideResult] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    """Variant -> quantity -> |ours - theirs| / |theirs|."""
    status: str = "ok"
    """"ok", "wrong" (the results differ, so nothing was timed), or "failed" (a side did not run)."""
    notes: list[str] = field(default_factory=list)

    @property
    def ours(self) -> SideResult | None:
        """Our side, if it was timed."""
        side = self.sides.get(OURS)
        return side if side and side.samples_s else None

    @property
    def theirs(self) -> tuple[str, SideResult] | None:
        """The fastest timed variant of the other side, if any."""
        timed = {name: side for name, side in self.sides.items() if name != OURS and side.samples_s}
        return min(timed.items(), key=lambda item: item[1].median_s) if timed else None

    @property
    def worst(self) -> tuple[str, float] | None:
        """The quantity with the largest error relative to its tolerance, and that error."""
        found = [item for errors in self.errors.values() for item in errors.items()]
        return max(found, key=lambda item: (math.isnan(item[1]), item[1] / self.row.tolerances[item[0]]), default=None)

    def to_json(self) -> dict[str, Any]:
        """Return everything, samples included."""
        row = self.row
        record = {"name": row.name, "group": row.group, "flops": row.flops, "images": row.images, **row.about}
        record |= {"status": self.status, "notes": self.notes, "tolerances": dict(row.tolerances)}
        return record | {"errors": self.errors, "sides": {name: side.to_json() for name, side in self.sides.items()}}


def differences(ours: Numbers, theirs: Numbers) -> dict[str, float]:
    """Return |ours - theirs| / |theirs| per quantity; ValueError if shapes differ or a side lacks an array."""
    lacking = ours.keys() ^ theirs.keys()
    lacking |= {name for key in ours.keys() & theirs.keys() for name in ours[key].keys() ^ theirs[key].keys()}
    if lacking:
        raise ValueError(f"expected the same arrays from both sides; only one has {sorted(lacking)}")
    return {quantity: joint_error(ours[quantity], arrays, arrays) for quantity, arrays in theirs.items()}


def alternate(names: Sequence[str], rounds: int) -> Iterator[str]:
    """Yield every name once per round, in reverse order every other round, so that drift affects all equally."""
    for index in range(rounds):
        yield from names if index % 2 == 0 else reversed(names)


def run_row(row: Row, settings: Settings, torch: Any = None) -> Result:
    """Set up, check and time a row; ``torch`` is the module ``torch_adapter``, or None to measure our side alone.

    Nothing is timed unless the result's ``status`` is "ok". The row fails if a side runs out of memory or does not
    compile. For a variant of torch this is only a note, provided that another variant ran.
    """
    result = Result(row)
    try:
        ours, theirs = row.open(torch)
        runner, expected = _set_up(result, OURS, ours, meter)
        runners = {OURS: runner}
        for variant in row.variants if torch else ():
            try:
                runner, numbers = _set_up(result, variant, functools.partial(theirs, variant), torch.meter)
            except RuntimeError as error:  # includes errors of torch's allocator and compiler
                result.notes.append(f"{variant}: {first_line(error)}")
                continue
            result.errors[variant] = differences(expected, numbers)
            runners[variant] = runner
        if torch and len(runners) == 1:
            result.status = "failed"
        elif not all(e <= row.tolerances[q] for errors in result.errors.values() for q, e in errors.items()):
            result.status = "wrong"
        else:
            del expected
            _time(result, runners, settings)
    except RuntimeError as error:  # includes XLA's errors
        result.status = "failed"
        result.notes.append(first_line(error))
    return result


def _set_up(result: Result, name: str, make: Callable[[], Runner], meter: Callable[[], Any]) -> tuple[Runner, Numbers]:
    """Compile and call once; call again to measure the memory of consecutive calls."""
    used = meter()  # before weights and inputs are on the device, so that they count
    runner = make()
    began = time.perf_counter()
    planned = runner.compile()
    out = runner.call()
    runner.wait(out)
    first = time.perf_counter() - began
    numbers = runner.numbers(out)
    del out
    runner.wait(runner.call())
    result.sides[name] = SideResult(first, planned, used())
    return runner, numbers


def _time(result: Result, runners: Mapping[str, Runner], settings: Settings) -> None:
    def sample(name: str, calls: int) -> float:
        """Return the mean seconds per call. On a GPU the calls are queued and awaited together, as in training."""
        runner, out = runners[name], None
        began = time.perf_counter()
        for _ in range(calls):
            out = None  # as in training, free the previous result first, so that its memory is reused
            out = runner.call()
            if not settings.on_gpu:
                runner.wait(out)
        runner.wait(out)
        return (time.perf_counter() - began) / calls

    for name in runners:
        calls = 1  # then 4, 16 ... until they take a quarter of a sample
        while (once := sample(name, calls)) * calls < settings.sample_seconds / 4 and calls < _MAX_CALLS:
            calls = min(4 * calls, _MAX_CALLS)
        filling = math.ceil(settings.sample_seconds / max(once, 1e-9))
        result.sides[name].calls = min(_MAX_CALLS, max(1, filling))
    gc.collect()
    for name in alternate(list(runners), settings.rounds):
        side = result.sides[name]
        if side.calls > 1:
            # Warm up: the cores wake and the other framework's threads stop spinning, which took up to 10 ms on a
            # virtual machine. If one call fills the sample, this delay does not matter.
            sample(name, math.ceil(side.calls / 4))
        side.samples_s.append(sample(name, side.calls))


def pipeline_rates(config: Config, workers: Sequence[int] = (0, 2), seconds: float = 10.0) -> Iterator[dict[str, Any]]:
    """Measure how fast a config's input pipeline yields training batches (decoded, augmented, stacked).

    Each number of worker processes (0: threads of this one) runs for ``seconds`` after ten warmup batches.

    Yields:
        "workers", "batches", "images_per_s" and "images_per_core_s" (per second of this process's CPU time; None
        with worker processes).
    """
    from fcn_jax.data.datasets import load  # imports grain and tfds, which the other benchmarks do not need
    from fcn_jax.data.pipeline import make_train_iterator

    split, size = load(config.data.train, config.data), config.train.batch_size
    for count in workers:
        stream = make_train_iterator(split, replace(config.data, workers=count), size, config.train.seed)
        try:
            for _ in range(10):  # workers start, buffers fill
                next(stream)
            wall, processor, batches = time.perf_counter(), time.process_time(), 0
            while time.perf_counter() - wall < seconds:
                next(stream)
                batches += 1
            used, images = time.process_time() - processor, batches * size
            rate = images / (time.perf_counter() - wall)
        finally:
            stream.close()
        per_core = images / used if count == 0 else None
        yield {"workers": count, "batches": batches, "images_per_s": rate, "images_per_core_s": per_core}


def describe() -> dict[str, Any]:
    """Return hardware, versions and commit, for the record."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", info.read_text() if info.exists() else "", re.MULTILINE)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    return {
        "hardware": {
            "cpu": names[0] if names else platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "cores_allowed": cores_allowed(),
            "memory_bytes": memory,
            "jax_devices": [f"{device.platform}: {device.device_kind}" for device in jax.devices()],
        },
        "versions": {"platform": platform.platform(), **environment()},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def cores_allowed() -> int | None:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()


def load() -> list[float] | None:
    """Return the load averages over 1, 5 and 15 minutes: a value above this process's own shows other load."""
    return list(os.getloadavg()) if hasattr(os, "getloadavg") else None


def meter() -> Callable[[], int | None]:
    """Return a function that returns the peak memory of JAX's first device from now on, in bytes above current use.

    It returns None on the CPU, which has no such counter, and if an earlier peak was higher: XLA's peak never falls.
    """
    device = jax.devices()[0]
    before = device.memory_stats()

    def used() -> int | None:
        now = device.memory_stats()
        if not before or not now or now["peak_bytes_in_use"] <= before["peak_bytes_in_use"]:
            return None
        return now["peak_bytes_in_use"] - before["bytes_in_use"]

    return used
