"""Opening what weights come from: a .safetensors or torch file, or a dict of arrays; a bad one is one line of error."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np

from fcn_jax.errors import InputError, first_line, unknown
from fcn_jax.weights.fetch import PRETRAINED, fetch
from fcn_jax.weights.layouts import Preprocessing
from fcn_jax.weights.torch_file import WRAPPERS, read_torch

__all__ = ["Source", "TensorInfo", "Tensors", "open_source"]

Source = str | os.PathLike[str] | Mapping[str, Any]

# The last: what pytorch-fcn's trainer writes.
_TORCH_SUFFIXES = (".pth", ".pt", ".pth.tar")
# The codes of safetensors' header.
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32"}
# What torch.nn.DataParallel and torch.compile put before every name.
_PREFIXES = ("module.", "_orig_mod.")
# More dicts around a state dict than anybody writes: only one that contains itself has so many.
_MOST_WRAPPERS = 8
_PAGE = (b"<!doctype", b"<html", b"<head", b"<?xml")


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

    @property
    def preprocessing(self) -> str | None:
        """What images the weights were trained on, as far as the file says it; InputError where it says another."""
        said, known = self.metadata.get("preprocessing"), get_args(Preprocessing)
        if said is not None and said not in known:
            raise InputError(
                f"{self.origin}: its metadata says preprocessing {said!r}, expected {' or '.join(known)}; "
                "write the file again"
            )
        return said


def open_source(source: Source) -> Tensors:
    """Open a file, a pretrained encoder by its name in ``PRETRAINED``, or a dict of arrays (NumPy, JAX or torch).

    What wraps a state dict (``state_dict``, ``model_state_dict``, ``model``) and what stands before every name
    (``module.``, ``_orig_mod.``) are taken off.

    Raises:
        InputError: no such file, not such a file, damaged, torch is needed and missing, or no tensors in it.
    """
    if isinstance(source, Mapping):
        return _from_mapping(source, "the dict")
    name = _name(source)
    path = fetch(name) if name in PRETRAINED else Path(name)
    try:
        head = _read_head(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    safe = path.suffix.lower() == ".safetensors"
    mistaken = _mistaken_for(head, safe)
    if mistaken:
        raise InputError(f"{path}: {mistaken}")
    return _from_safetensors(path) if safe else _from_mapping(read_torch(path, head), str(path))


def _name(source: Any) -> str:
    """Return a path as a string."""
    hint = "; give module.state_dict()" if hasattr(source, "state_dict") else ""
    if not isinstance(source, str | os.PathLike) or not isinstance(os.fspath(source), str):
        raise InputError(
            f"expected a path, the name of a pretrained encoder or a dict of arrays, got {type(source).__name__}{hint}"
        )
    return os.fspath(source)


def _read_head(path: Path) -> bytes:
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give a file of weights")
    if not path.name.lower().endswith((".safetensors", *_TORCH_SUFFIXES)):
        if not path.suffix and not path.exists():
            raise InputError(f"{path}: no such file, and {unknown('pretrained encoder', str(path), PRETRAINED)}")
        raise InputError(f"{path}: expected a .safetensors, .pth or .pt file, got {path.suffix or 'no suffix'!r}")
    if not path.is_file():
        raise InputError(f"{path}: no such file; check the path")
    with path.open("rb") as file:
        return file.read(1024)


def _mistaken_for(head: bytes, safe: bool) -> str | None:
    """Say what a file is by its first bytes, where it is not what its name says.

    A .safetensors file begins with eight bytes that may be any number, then a brace.
    """
    if not head:
        return "the file is empty; fetch it again"
    if head.removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith(_PAGE):
        return "this is a web page, not weights; fetch the file itself"
    if head.startswith(b"version https://git-lfs"):
        return "a pointer of git-lfs, not the file that it stands for; fetch that with git lfs pull"
    if not safe and head[8:10] == b'{"':
        return "a safetensors file; give it the suffix .safetensors"
    if safe and head[8:9] != b"{" and head.startswith((b"PK\x03\x04", b"\x80")):
        return "a torch file (a zip archive or a pickle); give it the suffix .pth"
    return None


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
    stripped, prefixes = _strip(infos)
    stored = dict(zip(stripped, infos, strict=True))

    def read(name: str) -> np.ndarray:
        try:
            return file.get_tensor(stored[name])
        except Exception as error:  # what is raised depends on which type it is that NumPy lacks
            raise _not_for_numpy(str(path), name, f"a tensor of {stripped[name].dtype}") from error

    return Tensors(str(path), stripped, read, file.metadata() or {}, prefixes)


def _from_mapping(source: Any, origin: str) -> Tensors:
    source, unwrapped = _unwrap(source, origin)
    if not isinstance(source, Mapping):
        raise InputError(f"{origin}: expected a dict of tensors, got {type(source).__name__}; store model.state_dict()")
    if not source:
        raise InputError(f"{origin}: holds no tensors; store model.state_dict()")
    infos = {}
    for name, value in source.items():
        info = _info(value)
        if not isinstance(name, str) or info is None:
            kind = "a nested tensor" if getattr(value, "is_nested", False) else type(value).__name__
            raise InputError(f"{origin}: expected arrays by name, got {kind} under {name!r}")
        infos[name] = info
    stripped, prefixes = _strip(infos)
    stored = dict(zip(stripped, source.values(), strict=True))
    return Tensors(
        origin, stripped, lambda name: _to_numpy(stored[name], origin, name), unwrapped=(*unwrapped, *prefixes)
    )


def _unwrap(source: Any, origin: str) -> tuple[Any, tuple[str, ...]]:
    """Take off the dicts around a state dict; say under which keys it lay."""
    unwrapped: tuple[str, ...] = ()
    while isinstance(source, Mapping):
        key = next((key for key in WRAPPERS if isinstance(source.get(key), Mapping)), None)
        if key is None:
            break
        if len(unwrapped) == _MOST_WRAPPERS:
            raise InputError(f"{origin}: contains itself under {key!r}; store model.state_dict()")
        source, unwrapped = source[key], (*unwrapped, key)
    return source, unwrapped


def _info(value: Any) -> TensorInfo | None:
    try:
        return TensorInfo(tuple(value.shape), str(value.dtype).removeprefix("torch."))
    except (AttributeError, TypeError, RuntimeError):  # RuntimeError: a nested tensor of torch has no shape
        return None


def _strip(infos: dict[str, TensorInfo]) -> tuple[dict[str, TensorInfo], tuple[str, ...]]:
    """Take ``_PREFIXES`` off the names where all have them; say which were there, from the outside in."""
    found: tuple[str, ...] = ()
    while prefix := next((p for p in _PREFIXES if infos and all(name.startswith(p) for name in infos)), None):
        infos = {name.removeprefix(prefix): info for name, info in infos.items()}
        found = (*found, prefix)
    return infos, found


def _to_numpy(value: Any, origin: str, name: str) -> np.ndarray:
    if not hasattr(value, "detach"):
        return np.asarray(value)
    dtype = str(value.dtype).removeprefix("torch.")
    try:
        plain = value.detach().cpu().resolve_conj().resolve_neg()
        # NumPy has no bfloat16; float32 holds it exactly.
        return (plain.float() if dtype == "bfloat16" else plain).numpy()
    except (TypeError, RuntimeError) as error:
        layout = str(value.layout).removeprefix("torch.")
        kind = "meta " if value.is_meta else "" if layout == "strided" else f"{layout} "
        raise _not_for_numpy(origin, name, f"a {kind}tensor of {dtype}") from error


def _not_for_numpy(origin: str, name: str, kind: str) -> InputError:
    return InputError(f"{origin}: {name} is {kind}, which NumPy cannot hold; store a dense tensor of float32")
