"""The process of a command: robust output, quiet libraries, the compilation cache, and exit codes."""

from __future__ import annotations

import contextlib
import errno
import inspect
import io
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

from fcn_jax.errors import InputError, Stopped, check_local, out_of_memory

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG}
_MOST_COMPILED = 2 * 2**30
"""Size limit of the compilation cache in bytes; the least recently used programs are removed first."""


class Output:
    """Standard output that ignores write errors, so that a run survives a closed pipe or a full disk."""

    def __init__(self) -> None:
        self._file = sys.stdout

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, text: str) -> int:
        """Write text if that is possible; return the number of characters written."""
        return self._lenient(lambda: self._file.write(text)) or 0

    def flush(self) -> None:
        """Flush if that is possible."""
        self._lenient(self._file.flush)

    def _lenient(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except OSError:
            with open(os.devnull, "w") as nowhere:  # also takes what is left in buffers
                os.dup2(nowhere.fileno(), self._file.fileno())


OutputPath = Annotated[
    Path,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda given: Path(os.path.expanduser(given[0])),  # shells keep ~ in --out=~/folder
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda path: [str(path)],
    ),
]
"""Type of the options that name what a command writes."""


def make_folder(folder: Path, flag: str = "--out") -> None:
    """Create a folder for a command's results. Raises InputError, naming the option, if that fails."""
    check_local(folder, flag)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{flag} {folder}: {error.strerror}; name a writable folder") from error


def check_file(path: Path, flag: str) -> None:
    """Create the folder of a result file. Raises InputError if that fails or the path is a folder."""
    make_folder(path.parent, flag)
    if path.is_dir():
        raise InputError(f"{flag} {path}: is a folder; name a file")


def check_not_source(file: Path, source: str | Path | None, flag: str = "--out") -> None:
    """Raise InputError where writing a file would overwrite the one that the command reads."""
    if source is not None and file.exists() and file.resolve() == Path(os.path.expanduser(source)).resolve():
        raise InputError(f"{file} is the source and would be overwritten; choose another {flag}")


def guarded(command: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """Run a command and return its exit code; a user's mistake becomes one line on stderr and exit code 2.

    With FCN_JAX_DEBUG=1 in the environment, the traceback is printed before that line.
    """
    _quieten_orbax()
    keep_compiled()
    try:
        return command(arguments)
    except (Exception, KeyboardInterrupt) as error:
        found = _message(error)
        if found is None:
            raise
        if os.environ.get("FCN_JAX_DEBUG"):
            traceback.print_exc()
        print(found[0], file=sys.stderr)
        return found[1]


def _message(error: BaseException) -> tuple[str, int] | None:
    """Return the line for the user and the exit code; None for an error that is not the user's."""
    if isinstance(error, InputError):
        return f"error: {error}", 2
    if isinstance(error, Stopped):
        return str(error), 128 + error.number
    if isinstance(error, KeyboardInterrupt):
        return (
            "stopped; the same command resumes a run from its last checkpoint",
            130,
        )  # 128 + SIGINT, as shells have it
    # A file that cannot be written, or an invalid path, wherever it is first used.
    if isinstance(error, OSError) and (error.filename is not None or error.errno in _DISK):
        return f"error: {error.filename or 'a file'}: {error.strerror}; check the path and the disk", 2
    if line := out_of_memory(error):
        return f"error: {line}", 2
    if isinstance(error, RuntimeError | AssertionError) and not _has_backend():
        platforms = os.environ.get("JAX_PLATFORMS", "")
        return f"error: JAX finds no device with JAX_PLATFORMS={platforms!r}; name a platform of this machine", 2
    return None


def _has_backend() -> bool:
    try:
        return bool(jax.devices())
    except (RuntimeError, AssertionError):  # JAX asserts if none of the requested platforms is available
        return False


def _quieten_orbax() -> None:
    """Silence orbax, which logs its defaults and, on a full disk, an error per array that it also raises.

    gcsfs logs every bucket whose type it cannot determine.
    """
    for name in ("absl", "asyncio", "gcsfs"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited")
    hook = sys.unraisablehook

    def without_late_writes(failed: Any) -> None:
        late = str(failed.exc_value) == "Event loop is closed" or inspect.iscoroutine(failed.object)
        unwritten = isinstance(failed.exc_value, OSError) and isinstance(failed.object, io.IOBase)
        if not late and not unwritten:
            hook(failed)

    sys.unraisablehook = without_late_writes


def keep_compiled() -> None:
    """Enable JAX's compilation cache, so that later starts are fast, unless the user has configured it."""
    folder = Path("~/.cache/fcn_jax/compiled").expanduser()
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        with contextlib.suppress(OSError):  # without a cache everything is compiled again
            folder.mkdir(parents=True, exist_ok=True)
            for program in folder.glob("*-cache"):  # JAX stops caching if a program lacks its access time
                if not program.with_name(program.name.removesuffix("-cache") + "-atime").exists():
                    program.unlink()
            jax.config.update("jax_compilation_cache_dir", str(folder))
            jax.config.update("jax_compilation_cache_max_size", _MOST_COMPILED)
