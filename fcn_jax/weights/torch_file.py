"""Reading .pth files without running what is in them; one that would run code is refused with the way out."""

from __future__ import annotations

import pickle
import pickletools
import re
import shlex
import sys
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from fcn_jax.errors import InputError, first_line

__all__ = ["WRAPPERS", "read_torch"]

WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Under which of its keys a checkpoint keeps the state dict."""

# What torch.load(weights_only=True) takes: nothing to name where a file is refused.
_TAKEN = re.compile(
    r"torch\._utils\._rebuild_\w+|torch\._tensor\._rebuild_\w+|torch\.serialization\._get_layout"
    r"|torch\.nn\.parameter\.\w+|torch(\.cuda|\.storage)?\.\w*Storage|torch\.(Size|Tensor|device|bool|[a-z]+\d+\w*)"
    r"|collections\.(OrderedDict|Counter)|builtins\.(bytearray|complex|set)|_codecs\.encode"
    r"|numpy\.(dtype|ndarray|dtypes\.\w+)|numpy\._?core\.multiarray\.(scalar|_reconstruct)"
)
_PATHS = "Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath"
# What of the standard library is plain data or only puts it together. All else of it may run code.
_PLAIN = frozenset(
    f"{module}.{name}"
    for module, names in {
        "_codecs": "encode",
        "argparse": "Namespace",
        "builtins": "bool bytearray bytes complex dict float frozenset int list object range set slice str tuple",
        "collections": "ChainMap Counter OrderedDict UserDict UserList UserString defaultdict deque",
        "copyreg": "_reconstructor",
        "datetime": "date datetime time timedelta timezone",
        "decimal": "Decimal",
        "fractions": "Fraction",
        "functools": "partial",  # calls nothing that is not named beside it
        "pathlib": _PATHS,
        "pathlib._local": _PATHS,
        "types": "SimpleNamespace",
        "uuid": "SafeUUID UUID",
    }.items()
    for name in names.split()
)
_UNKNOWN = "?"


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
    zipped = head.startswith(b"PK\x03\x04")  # as torch tells them
    if zipped and _is_torchscript(path):
        code = "torch.save(torch.jit.load(sys.argv[1], map_location='cpu').state_dict(), sys.argv[2])"
        raise InputError(
            f"{path}: a TorchScript archive, not a state dict; if you trust it, write its state dict: "
            + _command(path, code)
        )
    _check_bulk(path, zipped)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_numpy_globals()):
            warnings.simplefilter("ignore")  # on pickle protocols; whether it could be read is answered below
            # Only the zip format can be mapped instead of read whole.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a damaged file fails anywhere in the unpickler, with any exception
        raise _refusal(path, zipped, error) from error


def _numpy_globals() -> list[Any]:
    """List what makes NumPy's arrays and scalars of numbers, as NumPy 1 and NumPy 2 name it.

    Checkpoints keep scores and states of random generators in them beside the weights. Not those of strings: their
    size comes from the file, and NumPy crashes at a negative one.
    """
    from numpy._core.multiarray import _reconstruct, scalar  # type: ignore[attr-defined]

    names = [(make, core) for make in (scalar, _reconstruct) for core in ("core", "_core")]
    makers = [(make, f"numpy.{core}.multiarray.{make.__name__}") for make, core in names]
    dtypes = {type(np.dtype(code)) for code in np.typecodes["All"] if code not in "OSUV"}
    return [*makers, np.dtype, np.ndarray, *dtypes]


def _refusal(path: Path, zipped: bool, error: Exception) -> InputError:
    """Tell why torch did not read a file, by what its pickles name."""
    names, whole = _scan(path, zipped)
    harmful = [_shown(name) for name in names if _may_run_code(*name)]
    if harmful:
        return InputError(f"{path}: a pickle that would run code when it is read ({harmful[0]}); do not open it")
    if not isinstance(error, pickle.UnpicklingError):
        return InputError(f"{path}: not a whole torch file ({first_line(error)}); fetch it again")
    if not whole:
        return InputError(f"{path}: not a torch file; fetch it again")
    foreign = [name for name in dict.fromkeys(map(_shown, names)) if not _TAKEN.fullmatch(name)]
    code = (
        "f = lambda x: x.state_dict() if hasattr(x, 'state_dict') else x; "
        "d = f(torch.load(sys.argv[1], map_location='cpu', weights_only=False)); "
        f"d = next((e for e in map(f, map(d.get, {WRAPPERS})) if isinstance(e, dict)), d); "
        "torch.save({k: v for k, v in d.items() if torch.is_tensor(v)}, sys.argv[2])"
    )
    return InputError(f"{path}: {_describe(foreign)} where its classes can be imported: {_command(path, code)}")


def _describe(foreign: list[str]) -> str:
    """Say what a pickle is by the names that torch does not take, and what to do."""
    if any(name.startswith("torch.nn.modules.") for name in foreign):
        return f"a whole pickled model ({foreign[0]}), which runs code when it is read; if you trust it, convert it"
    what = "a pickle of a newer protocol, or with arrays of strings or objects, which is"
    if foreign:
        # The types of Python itself are worth naming only where they are all there is.
        named = [name for name in foreign if not name.startswith(("builtins.", "copyreg."))] or foreign
        more = ", ..." if len(named) > 3 else ""
        what = f"holds Python objects ({', '.join(named[:3])}{more}) beside the weights, which are"
    return f"{what} not read, as that may run code; if you trust the file, write its tensors alone"


def _shown(name: tuple[str, str]) -> str:
    """Return a name for a message: a file may name anything, line breaks too."""
    text = ".".join(name)
    return text if text.isprintable() and len(text) <= 120 else ascii(text)[:120]


def _command(path: Path, code: str) -> str:
    out = path.with_name(re.sub(r"(\.pth)?\.(tar|pth|pt)$", "", path.name, flags=re.IGNORECASE) + ".state.pth")
    return f'python -c "import torch, sys; {code}" {shlex.quote(str(path))} {shlex.quote(str(out))}'


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") or "/code/" in name for name in archive.namelist())
    except Exception:  # a damaged archive fails anywhere; whether it can be read is answered later
        return False


def _check_bulk(path: Path, zipped: bool) -> None:
    """Refuse a file of which a few bytes would take any amount of memory: packed records, bytearrays of a given size.

    torch.save packs nothing, so that a file's records are no larger than itself.
    """
    try:
        if zipped:
            with zipfile.ZipFile(path) as archive:
                packed = any(entry.compress_type or entry.file_size > path.stat().st_size for entry in archive.filelist)
            if packed:
                raise InputError(
                    f"{path}: a packed archive, which torch.save does not write; unpack it, store it plain"
                )
    except InputError:
        raise
    except Exception:  # a damaged archive fails anywhere; whether it can be read is answered later
        return
    names, _ = _scan(path, zipped)
    if ("builtins", "bytearray") in names and not any(_may_run_code(*name) for name in names):
        raise InputError(f"{path}: holds bytearrays, which may be of any size; store model.state_dict() alone")


def _may_run_code(module: str, name: str) -> bool:
    """Tell whether a name is of the standard library and not plain data, or leads there through another module."""
    library = sys.stdlib_module_names
    if _UNKNOWN in (module, name):
        return True
    if module.partition(".")[0] in library:
        return f"{module}.{name}" not in _PLAIN
    return any(part.startswith("__") or part.lstrip("_") in library for part in name.split(".")[:-1])


def _scan(path: Path, zipped: bool) -> tuple[list[tuple[str, str]], bool]:
    """List what the file's pickles import, in order, without running them; tell whether all could be followed."""
    names: list[tuple[str, str]] = []
    try:
        for name in chain.from_iterable(map(_imports, _pickles(path, zipped))):
            names.append(name)
    except Exception:  # a damaged file fails anywhere, with any exception
        return names, False
    return names, True


def _pickles(path: Path, zipped: bool) -> Iterator[Any]:
    if zipped:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.filename.lower().endswith("data.pkl"):
                    yield archive.read(entry)
    else:
        # The older format is five pickles in a row (magic number, protocol, system, object, keys), then the numbers.
        with path.open("rb") as file:
            for _ in range(5):
                yield file


def _imports(data: Any) -> Iterator[tuple[str, str]]:
    """Yield module and name of what a pickle imports; ``_UNKNOWN`` for one that only running it would tell.

    Follows strings over the stack and the memo, where newer protocols keep them.
    """
    stack: list[Any] = []
    memo: dict[Any, Any] = {}
    for opcode, argument, _ in pickletools.genops(data):
        code, top = opcode.name, stack[-1] if stack else None
        if code == "MEMOIZE":
            memo[len(memo)] = top
            continue
        if code.endswith("PUT"):
            memo[argument] = top
            continue
        if code in ("GLOBAL", "INST"):
            yield _today(*str(argument).split(" ", 1))
        elif code == "STACK_GLOBAL":
            pair = stack[-2:]
            yield _today(*pair) if len(pair) == 2 and all(isinstance(s, str) for s in pair) else (_UNKNOWN, _UNKNOWN)
        _pop(stack, opcode.stack_before)
        if code.endswith("GET"):
            stack.append(memo.get(argument))
        elif code == "DUP":
            stack += [top, top]
        elif isinstance(argument, str) and code not in ("GLOBAL", "INST", "PERSID"):
            stack.append(argument)
        else:
            stack += [item if item is pickletools.markobject else None for item in opcode.stack_after]


def _pop(stack: list[Any], before: list[Any]) -> None:
    """Take off what an opcode takes: a number of items, or all down to the last mark and a number of items."""
    mark = pickletools.markobject
    if mark in before:
        while stack and stack.pop() is not mark:
            pass
        before = before[: before.index(mark)]
    if before:
        del stack[-len(before) :]


def _today(module: str, name: str) -> tuple[str, str]:
    """Return what Python 3 calls a name that protocols before 3 write as Python 2 did."""
    return NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
