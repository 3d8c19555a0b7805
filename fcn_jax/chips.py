"""Memory and peak throughput of TPUs and GPUs, from the vendors' documentation."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

_GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """Memory and peak throughput of one chip."""

    memory: int
    """Bytes of device memory; 0 for a CPU."""
    peak: float = 0
    """Peak dense bfloat16 FLOP/s; 0 if not stated."""
    kind: str = ""
    """A regular expression for ``jax.Device.device_kind``."""
    flops_per_cycle: int = 0
    """Peak FLOP/s divided by the clock frequency (TPUs); 0 if unknown."""
    example: str = ""
    """An example of ``--target`` for ``fcn-jax compile``."""


# TPUs: cloud.google.com/tpu/docs (clocks: v5e 1.5 GHz, v5p and v6e 1.75 GHz). GPUs: NVIDIA's data sheets, without
# sparsity; the H100's memory is the value in XLA's target description.
CHIPS = {
    "v4": Chip(32 * _GIB, 275e12, r"TPU v4$"),
    "v5e": Chip(16 * _GIB, 197e12, r"TPU v5 ?(lite|e)", 2**17, "v5e:2x2"),
    "v5p": Chip(95 * _GIB, 459e12, r"TPU v5p?$", 2**18, "v5p:2x2x2"),
    "v6e": Chip(32 * _GIB, 918e12, r"TPU v6 ?(lite|e)", 2**19, "v6e:2x2"),
    "a100": Chip(40 * _GIB, 312e12, r"NVIDIA A100"),
    "h100": Chip(84_929_347_584, 989.4e12, r"NVIDIA H100(?!.*(PCIe|NVL))", example="h100:8"),
    "h200": Chip(141 * 10**9, 989.4e12, r"NVIDIA H200"),
    "cpu": Chip(0, example="cpu:8"),
}


def peak_of(device: Any) -> float | None:
    """Return the peak bfloat16 FLOP/s of a ``jax.Device``; None for a CPU and for chips that ``CHIPS`` lacks."""
    return next((chip.peak for chip in CHIPS.values() if chip.kind and re.match(chip.kind, device.device_kind)), None)
