"""Reading .pth files without running what is in them; one that would run code is refused with the way out."""

from __future__ import annotations

import pickle
import pickletools
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fcn_jax.errors import InputError

__all__ = ["first_line", "read_torch"]

# What torch.load(weights_only=True) takes: nothing to name where a file is refused.
_HARMLESS = ("torch._utils.", "torch.storage.", "collections.OrderedDict", "numpy.", "_codecs.encode")


def read_torch(path: Path, head: bytes) -> Any:
    """Read a file of torch.save, of the zip format (torch >= 1.6) or the older one.

    Args:
        path: the file.
        head: its first bytes.

    Raises:
        InputError: torch is missing, the file is damaged, or it holds more than tensors and plain values.
    """
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f"{path}: reading torch files needs torch: pip install fcn_jax[torch], or convert the file once to "
            ".safetensors on a machine that has torch"
        ) from error
    from numpy._core.multiarray import scalar

    # pytorch-fcn's trainer keeps its best score beside the weights, as a NumPy scalar under NumPy 1's name.
    plain: list[Any] = [(scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar"), np.dtype]
    plain += [type(np.dtype(name)) for name in ("float64", "float32", "int64", "int32")]
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(plain):
            warnings.simplefilter("ignore")  # on pickle protocols; whether it could be read is answered below
            # Only the zip format can be mapped instead of read whole.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=head.startswith(b"PK"))
    except pickle.UnpicklingError as error:
        foreign = [name for name in _globals(path) if not name.startswith(_HARMLESS) and not _is_storage(name)]
        raise _refusal(path, foreign) from error
    except Exception as error:  # a damaged file fails anywhere in the unpickler, with any exception
        raise InputError(f"{path}: not a whole torch file ({first_line(error)}); fetch it again") from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error, shortened."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text if len(text) <= 120 else text[:117] + "..."


def _refusal(path: Path, foreign: list[str]) -> InputError:
    if any(name.startswith("torch.nn.modules.") for name in foreign):
        out = path.with_name(f"{path.stem}.state{path.suffix}")
        return InputError(
            f"{path}: a whole pickled model ({foreign[0]}), which runs code when it is read; if you trust it, convert "
            'it where its classes can be imported: python -c "import torch; torch.save(torch.load('
            f"'{path}', map_location='cpu', weights_only=False).state_dict(), '{out}')\""
        )
    if foreign:
        return InputError(f"{path}: a pickle that would run code when it is read ({foreign[0]}); do not open it")
    return InputError(f"{path}: not a torch file; fetch it again")


def _is_storage(name: str) -> bool:
    return name.startswith("torch.") and name.endswith("Storage")


def _globals(path: Path) -> list[str]:
    """List what the file's pickles import, in order, without running them."""
    names: list[str] = []
    for data in _pickles(path):
        strings: list[str] = []
        try:
            for opcode, argument, _ in pickletools.genops(data):
                if opcode.name in ("GLOBAL", "INST"):
                    names.append(str(argument).replace(" ", "."))
                elif opcode.name == "STACK_GLOBAL":  # module and name were pushed as strings just before
                    names.append(".".join(strings[-2:]))
                elif isinstance(argument, str):
                    strings.append(argument)
        except ValueError:  # where the pickles end, or are damaged
            continue
    return names


def _pickles(path: Path) -> Iterator[Any]:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith("data.pkl"):
                    yield archive.read(name)
    else:
        # The older format is five pickles in a row (magic number, protocol, system, object, keys), then the numbers.
        with path.open("rb") as file:
            for _ in range(5):
                yield file
