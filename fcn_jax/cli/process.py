"""A command's process: output that stops no run, quiet libraries, kept programs, and what becomes its exit code."""

from __future__ import annotations

import contextlib
import errno
import inspect
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from fcn_jax.errors import InputError, Stopped

__all__ = ["Output", "guarded", "keep_compiled"]

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG}


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


def _quieten_orbax() -> None:
    """Keep orbax from announcing its defaults and, where a disk is full, each array's failure: it raises that too."""
    for name in ("absl", "asyncio"):
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
            jax.config.update("jax_compilation_cache_dir", str(folder))


def guarded(command: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """Run a command; a user's mistake becomes one line on stderr and exit code 2."""
    _quieten_orbax()
    try:
        return command(arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Stopped as stop:
        print(stop, file=sys.stderr)
        return 128 + stop.number
    except OSError as error:  # a file that cannot be written or a path that cannot be named, wherever that shows
        if error.filename is None and error.errno not in _DISK:
            raise
        print(f"error: {error.filename or 'a file'}: {error.strerror}; check the path and the disk", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130  # 128 + SIGINT, as shells have it
