"""What a run of the benchmark measures: device, sizes, how often."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp

from fcn_jax.errors import InputError

__all__ = ["NETWORKS", "NUM_CLASSES", "Settings", "make_settings"]

NETWORKS = ("fcn8s", "fcn32s_pad100", "fcn8s_pad100", "fcn8s_ladder", "fcn8s_resize")
"""One of each family, and the largest map of scores."""
NUM_CLASSES = 21
"""PASCAL VOC with its background."""


@dataclass(frozen=True)
class Settings:
    """A run, resolved."""

    kind: Literal["cpu", "gpu"]
    """The way it is computed: float32, or bfloat16 with all that PyTorch offers on a GPU."""
    on_gpu: bool
    """Whether a GPU computes it; a smoke run takes the GPU's way on the CPU where there is none."""
    against_torch: bool = True
    image_size: int = 256
    """Height and width of the networks' images, and of the first encoder stage, in pixels."""
    upsampled_size: int = 512
    """Height and width that the transposed convolutions reach, in pixels."""
    batch_size: int = 2
    encoder: str = "vgg16"
    width: float = 1.0
    matmul_size: int = 4096
    """Side of the square product that gives the machine's rate."""
    rounds: int = 7
    sample_seconds: float = 0.2
    """A sample is the mean of as many calls as fill this time."""
    smoke: bool = False

    @property
    def dtype(self) -> str:
        """What is computed in; parameters of networks stay in float32."""
        return "float32" if self.kind == "cpu" else "bfloat16"

    @property
    def jax_dtype(self) -> Any:
        """The same for JAX."""
        return jnp.float32 if self.kind == "cpu" else jnp.bfloat16


_GPU: dict[str, Any] = {"image_size": 512, "batch_size": 16, "matmul_size": 8192, "rounds": 10}
# Small enough for a minute on two cores, large enough that every stage has more than one pixel.
_SMOKE: dict[str, Any] = {
    "image_size": 64,
    "upsampled_size": 64,
    "batch_size": 2,
    "encoder": "vgg11",
    "width": 0.0625,
    "matmul_size": 256,
    "rounds": 2,
    "sample_seconds": 0.0,
    "smoke": True,
}


def make_settings(device: str | None, smoke: bool = False, **given: Any) -> Settings:
    """Resolve a run on the devices that are there.

    Args:
        device: "cpu", "gpu", or None for what JAX computes on by itself.
        smoke: tiny sizes, few rounds; "gpu" then runs on the CPU where there is no GPU.
        given: fields of ``Settings``; those that are None keep their default.

    Raises:
        InputError: no GPU is there, or a size is out of range.
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
