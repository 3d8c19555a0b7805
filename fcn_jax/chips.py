"""What vendors say of the chips that networks are trained on."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

_GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """A chip's memory and its speed."""

    memory: int
    """Bytes."""
    peak: float = 0
    """FLOP/s of the matrix units in bfloat16, dense. 0: not stated."""
    kind: str = ""
    """A regular expression for ``jax.Device.device_kind``."""
    flops_per_cycle: int = 0
    """The peak over the clock (TPUs). 0: not known."""
    example: str = ""
    """A target of ``fcn-jax compile``."""


# TPUs: cloud.google.com/tpu/docs (clocks: v5e 1.5 GHz, v5p and v6e 1.75 GHz). GPUs: NVIDIA's data sheets, without
# sparsity; the H100's memory is the 84,929,347,584 bytes of XLA's description of it.
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
    """Return the peak of a ``jax.Device`` in FLOP/s; None for a CPU and for chips that are not in the table."""
    return next((chip.peak for chip in CHIPS.values() if chip.kind and re.match(chip.kind, device.device_kind)), None)
