"""Open weights: a .safetensors, torch or Caffe file, a published name, or a dict of arrays."""

from __future__ import annotations

import contextlib
import mmap
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fcn_jax.errors import InputError, first_line, unknown
from fcn_jax.paths import is_remote, to_path
from fcn_jax.weights.caffe import read_caffe
from fcn_jax.weights.pretrained import PRETRAINED, fetch, is_published

# pytorch-fcn's trainer writes .pth.tar.
_TORCH_SUFFIXES = (".pth", ".pt", ".pth.tar")
# Keys under which a checkpoint keeps the state dict, and prefixes that DataParallel and torch.compile add to all names.
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")
# The dtype codes in safetensors' header.
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32"}
_PAGE = (b"<!doctype", b"<html", b"<head", b"<?xml")
_ZIP = b"PK\x03\x04"


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor."""

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
    """Wrappers and prefixes removed from around the tensors: ``model_state_dict``, ``module.`` ..."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes by name."""
        return {name: info.shape for name, info in self.infos.items()}


Source = str | os.PathLike[str] | Mapping[str, Any] | Tensors


def open_source(source: Source) -> Tensors:
    """Open a file, a name in ``PRETRAINED``, ``hf://OWNER/REPO[@REVISION]``, or a dict of arrays (NumPy, JAX or torch).

    A file may be local or at ``gs://BUCKET/...``.

    Wrappers of a state dict (``state_dict``, ``model_state_dict``, ``model``) and prefixes of all names (``module.``,
    ``_orig_mod.``) are removed. An opened source is returned unchanged.

    Raises:
        InputError: the file is missing, damaged, of another type or without tensors, or torch is needed but missing.
    """
    if isinstance(source, Tensors):
        return source
    if isinstance(source, Mapping):
        return _from_mapping(source, "the dict")
    name = os.fspath(source) if isinstance(source, str | os.PathLike) else None
    if not isinstance(name, str):
        hint = "; give module.state_dict()" if hasattr(source, "state_dict") else ""
        what = "a path, a name of published weights or a dict of arrays"
        raise InputError(f"expected {what}, got {type(source).__name__}{hint}")
    path = fetch(name) if is_published(name) or is_remote(name) else to_path(name, "weights")
    try:
        head = _read_head(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    suffix = path.suffix.lower()
    if mistaken := _mistaken_for(head, suffix):
        raise InputError(f"{path}: {mistaken}")
    if suffix == ".caffemodel":
        return replace(_from_mapping(read_caffe(path), str(path)), metadata={"format": "caffe"})
    is_safetensors = suffix == ".safetensors"
    return _from_safetensors(path) if is_safetensors else _from_mapping(_read_torch(path, head), str(path))


def _read_head(path: Path) -> bytes:
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give a weights file, such as `fcn-jax export` writes for a run")
    if not path.name.lower().endswith((".safetensors", ".caffemodel", *_TORCH_SUFFIXES)):
        if not path.suffix and not path.exists():
            raise InputError(f"{path}: no such file, and {unknown('name of published weights', str(path), PRETRAINED)}")
        kinds = ".safetensors, .pth, .pt or .caffemodel"
        raise InputError(f"{path}: expected a {kinds} file, got {path.suffix or 'no suffix'!r}")
    if not path.is_file():
        raise InputError(f"{path}: no such file; check the path")
    with path.open("rb") as file:
        return file.read(1024)


def _mistaken_for(head: bytes, suffix: str) -> str | None:
    """Identify a file by its first bytes; None where they fit its suffix."""
    if not head:
        return "the file is empty; fetch it again"
    if head.removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith(_PAGE):
        return "this is a web page, not weights; fetch the file itself"
    if head.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, not the file itself; fetch that with git lfs pull"
    # A .safetensors file begins with an eight-byte length, then a brace.
    if suffix != ".safetensors" and head[8:10] == b'{"':
        return "a safetensors file; give it the suffix .safetensors"
    is_torch = head.startswith(_ZIP) or (head.startswith(b"\x80") and head[1:2] < b"\x06")
    if is_torch and (suffix == ".caffemodel" or (suffix == ".safetensors" and head[8:9] != b"{")):
        return "a torch file (a zip archive or a pickle); give it the suffix .pth"
    if suffix == ".caffemodel" and re.match(rb"[\w\s#\"':{}.-]+$", head[:200]):
        return "a text file, perhaps the network's .prototxt; give the .caffemodel with its weights"
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
    stored, prefixes = _strip(infos)

    def read(name: str) -> np.ndarray:
        try:
            return file.get_tensor(stored[name])
        except (safetensors.SafetensorError, AttributeError, TypeError, ValueError) as error:
            raise _not_for_numpy(str(path), name, f"a tensor of {infos[stored[name]].dtype}") from error

    return Tensors(str(path), {name: infos[key] for name, key in stored.items()}, read, file.metadata() or {}, prefixes)


def _from_mapping(source: Any, origin: str) -> Tensors:
    wrappers: tuple[str, ...] = ()
    while isinstance(source, Mapping):
        key = next((key for key in _WRAPPERS if isinstance(source.get(key), Mapping)), None)
        if key is None:
            break
        if len(wrappers) == 8:  # only a dict that contains itself is nested this deep
            raise InputError(f"{origin}: contains itself under {key!r}; store model.state_dict()")
        source, wrappers = source[key], (*wrappers, key)
    if not isinstance(source, Mapping):
        raise InputError(f"{origin}: expected a dict of tensors, got {type(source).__name__}; store model.state_dict()")
    if not source:
        raise InputError(f"{origin}: holds no tensors; store model.state_dict()")
    infos = {}
    for name, value in source.items():
        with contextlib.suppress(AttributeError, TypeError, RuntimeError):  # RuntimeError: a nested tensor has no shape
            infos[name] = TensorInfo(tuple(value.shape), str(value.dtype).removeprefix("torch."))
        if not isinstance(name, str) or name not in infos:
            kind = "a nested tensor" if getattr(value, "is_nested", False) else type(value).__name__
            raise InputError(f"{origin}: expected arrays by name, got {kind} under {name!r}")
    stored, prefixes = _strip(infos)
    infos = {name: infos[key] for name, key in stored.items()}

    def read(name: str) -> np.ndarray:
        return _to_numpy(source[stored[name]], origin, name)

    return Tensors(origin, infos, read, unwrapped=(*wrappers, *prefixes))


def _strip(names: Mapping[str, Any]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return stripped name -> full name, and the removed prefixes, those of ``_PREFIXES`` that all names share."""
    stored = {name: name for name in names}
    found: tuple[str, ...] = ()
    while prefix := next((p for p in _PREFIXES if stored and all(name.startswith(p) for name in stored)), None):
        stored = {name.removeprefix(prefix): whole for name, whole in stored.items()}
        found = (*found, prefix)
    return stored, found


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


def _read_torch(path: Path, head: bytes) -> Any:
    """Read a file of torch.save, in the zip format (torch >= 1.6) or the older one, without executing its content."""
    torch = import_torch(path)
    zipped = head.startswith(_ZIP)  # as torch itself tests it
    _check_content(path, zipped)
    # Checkpoints may hold NumPy numbers beside the weights; these are allowed, by their names in NumPy 2 and 1. Strings
    # are not: their size comes from the file, and NumPy crashes on a negative one.
    makers: list[Any] = [value.__reduce__()[0] for value in (np.float64(1), np.zeros(1))]
    dtypes = {type(np.dtype(code)) for code in np.typecodes["All"] if code not in "OSUV"}
    numbers = [*makers, *((make, f"numpy.core.multiarray.{make.__name__}") for make in makers), np.dtype, np.ndarray]
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([*numbers, *dtypes]):
            warnings.simplefilter("ignore")  # about pickle protocols
            # Only the zip format can be memory-mapped.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a damaged file may raise any exception in the unpickler
        raise InputError(f"{path}: {_why_refused(error)}") from error


def _why_refused(error: Exception) -> str:
    text = str(error)
    if not isinstance(error, pickle.UnpicklingError):
        return f"not a whole torch file ({first_line(error)}); fetch it again"
    name = re.search(r"GLOBAL (\S+)", text)
    reason = name[1] if name else text.rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
    reason = reason[:120] if reason.isprintable() else ascii(reason)[:120]
    what = "holds something other than tensors" + ("" if name else ", or is damaged")
    return f"{what} ({reason}); if you trust it, load it with torch and save model.state_dict()"


def _check_content(path: Path, zipped: bool) -> None:
    """Reject TorchScript, and content that may need unlimited memory: compressed records and bytearrays.

    torch.save does not compress, so no record is larger than the file.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data.find(b"\nbytearray\n") >= 0:  # as a pickle names the type
            raise InputError(f"{path}: holds bytearrays, which may be of any size; store model.state_dict() alone")
        size = len(data)
    entries: list[zipfile.ZipInfo] = []
    with contextlib.suppress(Exception):  # a damaged archive may raise anything; torch reports whether it can be read
        if zipped:
            with zipfile.ZipFile(path) as archive:
                entries = archive.filelist
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        way_out = "if you trust it, load it with torch.jit.load and save its state_dict()"
        raise InputError(f"{path}: a TorchScript archive; {way_out}")
    if any(entry.compress_type or entry.file_size > size for entry in entries):
        way_out = "extract it and store it uncompressed"
        raise InputError(f"{path}: a compressed archive, which torch.save does not write; {way_out}")


def import_torch(what: object) -> Any:
    """Import and return torch. Raises InputError, beginning with ``what``, if it is not installed."""
    try:
        import torch
    except ImportError as error:
        way_out = "pip install fcn_jax[torch], or use a .safetensors file"
        raise InputError(f"{what}: torch files need torch: {way_out}") from error
    return torch
