"""The machine that a benchmark ran on: hardware, versions, load, and the memory that JAX's allocator counts."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from fcn_jax.training.run import environment


def describe() -> dict[str, Any]:
    """Return hardware, versions and commit, for the record."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
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
    """Return the load averages over 1, 5 and 15 minutes: a value above this process's own shows other work."""
    return list(os.getloadavg()) if hasattr(os, "getloadavg") else None


def meter() -> Callable[[], int | None]:
    """Start to measure the memory of JAX's first device.

    Returns:
        A function that gives the peak since then, in bytes above what was allocated at the start. None on the CPU,
        which has no such counter, and where an earlier peak was higher: XLA's peak never falls.
    """
    device = jax.devices()[0]
    before = device.memory_stats()

    def used() -> int | None:
        now = device.memory_stats()
        if not before or not now or now["peak_bytes_in_use"] <= before["peak_bytes_in_use"]:
            return None
        return now["peak_bytes_in_use"] - before["bytes_in_use"]

    return used
