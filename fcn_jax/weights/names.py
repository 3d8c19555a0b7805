"""Convert names and axes of arrays between Flax and torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax import traverse_util

COUNTER = "num_batches_tracked"
"""The step counter of torch's batch norm; no network here uses it."""
LEAVES = ("weight", "bias", "running_mean", "running_var")
"""A module's tensors in the order of its state dict."""
_TORCH_LEAF = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
# Names of the transposed convolutions; every other kernel is a convolution's.
_TRANSPOSED = ("upscore", "deconv")


@dataclass(frozen=True)
class Parameter:
    """One array of a network's variables."""

    path: tuple[str, ...]
    """Collection, modules, leaf: ``("params", "vgg", "conv1_1", "kernel")``."""
    shape: tuple[int, ...]
    dtype: Any

    @property
    def module(self) -> str:
        """Its module's path joined by dots: ``vgg.conv1_1``."""
        return ".".join(self.path[1:-1])

    @property
    def leaf(self) -> str:
        """Its own name in torch: ``weight``, ``bias``, ``running_mean`` or ``running_var``."""
        return _TORCH_LEAF[self.path[-1]]

    @property
    def name(self) -> str:
        """Its whole name in torch: ``vgg.conv1_1.weight``."""
        return f"{self.module}.{self.leaf}"

    @property
    def transposed(self) -> bool:
        """Whether it is the kernel of a transposed convolution."""
        return len(self.shape) == 4 and self.path[-2].startswith(_TRANSPOSED)

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """Its shape in torch."""
        if len(self.shape) != 4:
            return self.shape
        h, w, i, o = self.shape
        return (i, o, h, w) if self.transposed else (o, i, h, w)


def list_parameters(variables: Mapping[str, Any]) -> list[Parameter]:
    """List the arrays of {"params": ...[, "batch_stats": ...]}; other collections are ignored."""
    flat = traverse_util.flatten_dict({key: dict(variables.get(key, {})) for key in ("params", "batch_stats")})
    return [Parameter(path, tuple(value.shape), value.dtype) for path, value in flat.items()]


def to_torch_axes(parameter: Parameter, value: np.ndarray, linear: bool = False) -> np.ndarray:
    """Convert a Flax array to torch's axes.

    Returns:
        Convolution (k, k, in, out) to (out, in, k, k) or, with ``linear``, to (out, in k k) of ``torch.nn.Linear``;
        transposed convolution (k, k, in, out) to (in, out, k, k); a vector is unchanged.
    """
    if value.ndim == 4:
        value = value.transpose((2, 3, 0, 1) if parameter.transposed else (3, 2, 0, 1))
        if linear:
            value = value.reshape(value.shape[0], -1)
    return np.require(value, requirements=("C", "W"))  # torch warns about read-only memory, as a JAX array's is


def from_torch(parameter: Parameter, value: np.ndarray) -> np.ndarray | None:
    """Convert an array from torch's axes to Flax's, the inverse of ``to_torch_axes``; None if the shape does not fit.

    Before a linear layer, torch flattens maps in the order channel, row, column (torchvision's ``models/vgg.py``).
    """
    shape = parameter.torch_shape
    if len(shape) == 4 and not parameter.transposed and value.shape == (shape[0], np.prod(shape[1:])):
        value = value.reshape(shape)
    if value.shape != shape:
        return None
    if value.ndim == 4:
        value = value.transpose((2, 3, 0, 1) if parameter.transposed else (2, 3, 1, 0))
    return np.ascontiguousarray(value)


def widen(kernel: np.ndarray, channels: int) -> np.ndarray:
    """Adapt an RGB network's first convolution to another number of input channels.

    Channel k gets the kernel of channel k modulo 3, divided by the number of channels that get the same one. With fewer
    than three channels, the remaining kernels are added to them. So an image that repeats the channels of an RGB image
    (r, g, b, r, g ...) has the same features, and a grey image those of the RGB image with three such channels.

    Args:
        kernel: (out, 3, k, k).
        channels: number of input channels of the result (out, channels, k, k).
    """
    wide = np.zeros((len(kernel), channels, *kernel.shape[2:]), kernel.dtype)
    for index in range(max(3, channels)):
        copies = len(range(index % 3, channels, 3)) or 1
        wide[:, index % channels] += kernel[:, index % 3] / copies
    return wide


def conversion(parameter: Parameter, shape: tuple[int, ...]) -> str:
    """Describe how ``from_torch`` converts an array of torch's ``shape``."""
    if len(parameter.shape) != 4:
        return "as it is"
    target = "x".join(map(str, parameter.shape))
    if len(shape) == 2:
        return f"linear {shape[0]}x{shape[1]} to h w in out, {target}"
    return f"{'in out h w' if parameter.transposed else 'out in h w'} to h w in out, {target}"
