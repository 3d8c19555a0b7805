"""What a measurement was made on: hardware, versions, load, and the memory that a device's allocator counts."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from fcn_jax.training.run import environment

__all__ = ["cores_allowed", "describe", "load", "meter"]


def describe(against_torch: bool) -> dict[str, Any]:
    """Return hardware, versions and commit, for the record."""
    about: dict[str, Any] = {
        "hardware": {
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "cores_allowed": cores_allowed(),
            "memory_bytes": _memory_bytes(),
            "jax_devices": [f"{device.platform}: {device.device_kind}" for device in jax.devices()],
        },
        "versions": {
            "platform": platform.platform(),
            **environment(),
        },
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }
    if against_torch:
        from fcn_jax.compare import bench_torch as torch_side

        found = torch_side.describe()
        about["hardware"] |= found["hardware"]
        about["versions"] |= found["versions"]
    return about


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def cores_allowed() -> int | None:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError, AttributeError):
        return None


def load() -> list[float] | None:
    """Return the load averages over 1, 5 and 15 minutes: above this process's own, others took part."""
    try:
        return list(os.getloadavg())
    except (OSError, AttributeError):
        return None


def meter(torch: bool) -> Callable[[], int | None]:
    """Start counting a device's memory; what is returned tells the peak since, in bytes above what was there.

    None on the CPU, which has no such counter. XLA's peak never falls: a row that stays under an earlier one's has
    none either.
    """
    if torch:
        from fcn_jax.compare import bench_torch as torch_side

        return torch_side.meter()
    device = jax.devices()[0]
    before = device.memory_stats()

    def used() -> int | None:
        now = device.memory_stats()
        if not before or not now or now["peak_bytes_in_use"] <= before["peak_bytes_in_use"]:
            return None
        return now["peak_bytes_in_use"] - before["bytes_in_use"]

    return used
