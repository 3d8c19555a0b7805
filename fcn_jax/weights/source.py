"""Opening what weights come from: a .safetensors or torch file, or a dict of arrays; a bad one is one line of error."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fcn_jax.errors import InputError, unknown
from fcn_jax.weights.fetch import PRETRAINED, fetch
from fcn_jax.weights.torch_file import first_line, read_torch

__all__ = ["Source", "TensorInfo", "Tensors", "open_source"]

Source = str | os.PathLike[str] | Mapping[str, Any]

# The last: what pytorch-fcn's trainer writes.
_TORCH_SUFFIXES = (".pth", ".pt", ".pth.tar")
# The codes of safetensors' header.
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32"}
_WRAPPERS = ("state_dict", "model_state_dict", "model")


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor without reading it."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Tensors:
    """An opened source: names, shapes, and a way to read one tensor at a time."""

    origin: str
    infos: dict[str, TensorInfo]
    read: Callable[[str], np.ndarray]
    metadata: dict[str, str] = field(default_factory=dict)
    unwrapped: tuple[str, ...] = ()
    """What was taken off around the state dict, from the outside in: ``model_state_dict``, ``module.`` ..."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes by name."""
        return {name: info.shape for name, info in self.infos.items()}


def open_source(source: Source) -> Tensors:
    """Open a file, a pretrained encoder by its name in ``PRETRAINED``, or a dict of arrays (NumPy, JAX or torch).

    What wraps a state dict (``state_dict``, ``model_state_dict``, ``model``) and ``module.`` before every name are
    taken off.

    Raises:
        InputError: no such file, not such a file, damaged, torch is needed and missing, or no tensors in it.
    """
    if isinstance(source, Mapping):
        return _from_mapping(source, "the dict")
    path = fetch(source) if isinstance(source, str) and source in PRETRAINED else Path(source)
    if not path.name.lower().endswith((".safetensors", *_TORCH_SUFFIXES)):
        if not path.suffix and not path.exists():
            raise unknown("pretrained encoder", str(path), PRETRAINED)
        raise InputError(f"{path}: expected a .safetensors, .pth or .pt file, got {path.suffix or 'no suffix'!r}")
    if not path.is_file():
        raise InputError(f"{path}: no such file; check the path")
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    if not head:
        raise InputError(f"{path}: the file is empty; fetch it again")
    if head.lstrip().startswith(b"<"):
        raise InputError(f"{path}: this is a web page, not weights; fetch the file itself")
    if path.suffix.lower() == ".safetensors":
        return _from_safetensors(path)
    return _from_mapping(read_torch(path, head), str(path))


def _from_safetensors(path: Path) -> Tensors:
    import safetensors

    try:
        file = safetensors.safe_open(path, framework="numpy")
        infos = {}
        for name in file.keys():  # noqa: SIM118  (the file is no mapping)
            part = file.get_slice(name)
            code = str(part.get_dtype())
            infos[name] = TensorInfo(tuple(part.get_shape()), _DTYPES.get(code, code.lower()))
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a whole safetensors file ({first_line(error)}); fetch it again") from error
    stripped, prefix = _strip(infos)
    stored = dict(zip(stripped, infos, strict=True))
    return Tensors(str(path), stripped, lambda name: file.get_tensor(stored[name]), file.metadata() or {}, prefix)


def _from_mapping(source: Any, origin: str) -> Tensors:
    unwrapped: tuple[str, ...] = ()
    while isinstance(source, Mapping):
        key = next((key for key in _WRAPPERS if isinstance(source.get(key), Mapping)), None)
        if key is None:
            break
        source, unwrapped = source[key], (*unwrapped, key)
    if not isinstance(source, Mapping):
        raise InputError(f"{origin}: expected a dict of tensors, got {type(source).__name__}; store model.state_dict()")
    if not source:
        raise InputError(f"{origin}: holds no tensors; store model.state_dict()")
    for name, value in source.items():
        if not isinstance(name, str) or not hasattr(value, "shape") or not hasattr(value, "dtype"):
            raise InputError(f"{origin}: expected arrays by name, got {type(value).__name__} under {name!r}")
    infos = {
        name: TensorInfo(tuple(value.shape), str(value.dtype).removeprefix("torch.")) for name, value in source.items()
    }
    stripped, prefix = _strip(infos)
    stored = dict(zip(stripped, source.values(), strict=True))
    return Tensors(origin, stripped, lambda name: _to_numpy(stored[name]), unwrapped=(*unwrapped, *prefix))


def _strip(infos: dict[str, TensorInfo]) -> tuple[dict[str, TensorInfo], tuple[str, ...]]:
    """Take ``module.`` (``torch.nn.DataParallel``) off the names where all have it; say whether it was there."""
    if infos and all(name.startswith("module.") for name in infos):
        return {name.removeprefix("module."): info for name, info in infos.items()}, ("module.",)
    return infos, ()


def _to_numpy(value: Any) -> np.ndarray:
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        # NumPy has no bfloat16; float32 holds it exactly.
        value = (value.float() if str(value.dtype) == "torch.bfloat16" else value).numpy()
    return np.asarray(value)
