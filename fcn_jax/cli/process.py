"""A command's process: output that stops no run, quiet libraries, compiled programs, and what becomes its exit code."""

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
from typing import Any

import jax

from fcn_jax.errors import InputError, Stopped, check_local

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG}
_MOST_COMPILED = 2 * 2**30
"""Bytes of compiled programs that are kept; the least recently used go first."""


class Output:
    """Standard output for a run, which goes on where nobody can read it any more: a closed pipe, a full disk."""

    def __init__(self) -> None:
        self._file = sys.stdout

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, text: str) -> int:
        """Write text, or nothing."""
        return self._lenient(lambda: self._file.write(text)) or 0

    def flush(self) -> None:
        """Flush what can be."""
        self._lenient(self._file.flush)

    def _lenient(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except OSError:
            with open(os.devnull, "w") as nowhere:  # where what is left in buffers goes, too
                os.dup2(nowhere.fileno(), self._file.fileno())


def make_folder(folder: Path, flag: str = "--out") -> None:
    """Make a folder for a command's results; an InputError, with the option's name, where it cannot be written to."""
    check_local(folder, flag)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{flag} {folder}: {error.strerror}; name a folder that can be written to") from error


def check_file(path: Path, flag: str) -> None:
    """Make the folder of a file for a command's results; an InputError where the file cannot be written."""
    make_folder(path.parent, flag)
    if path.is_dir():
        raise InputError(f"{flag} {path}: is a folder; name a file")


def guarded(command: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """Run a command; a user's mistake becomes one line on stderr and exit code 2.

    With FCN_JAX_DEBUG=1 in the environment its traceback comes before that line.
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
            "stopped; a run goes on from its last checkpoint with the same command",
            130,
        )  # 128 + SIGINT, as shells have it
    # A file that cannot be written or a path that cannot be named, wherever that shows.
    if isinstance(error, OSError) and (error.filename is not None or error.errno in _DISK):
        return f"error: {error.filename or 'a file'}: {error.strerror}; check the path and the disk", 2
    if isinstance(error, RuntimeError | AssertionError) and not _has_backend():
        platforms = os.environ.get("JAX_PLATFORMS", "")
        return f"error: JAX finds no device with JAX_PLATFORMS={platforms!r}; name a platform of this machine", 2
    return None


def _has_backend() -> bool:
    try:
        return bool(jax.devices())
    except (RuntimeError, AssertionError):  # JAX asserts where none of the platforms asked for is there
        return False


def _quieten_orbax() -> None:
    """Keep orbax from announcing its defaults and, where a disk is full, each array's failure: it raises that too.

    gcsfs announces each bucket whose kind it cannot tell.
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
    """Keep compiled programs on disk, so that a command's second start is quick; JAX's own settings go before ours."""
    folder = Path("~/.cache/fcn_jax/compiled").expanduser()
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        with contextlib.suppress(OSError):  # where nothing can be kept, everything is compiled anew
            folder.mkdir(parents=True, exist_ok=True)
            for program in folder.glob("*-cache"):  # JAX writes nothing more where one lacks its time of access
                if not program.with_name(program.name.removesuffix("-cache") + "-atime").exists():
                    program.unlink()
            jax.config.update("jax_compilation_cache_dir", str(folder))
            jax.config.update("jax_compilation_cache_max_size", _MOST_COMPILED)
