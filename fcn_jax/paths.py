"""User-supplied paths: local, or on Google Cloud Storage through etils.epath."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

from fcn_jax.errors import InputError, check_local, first_line


def is_remote(path: object) -> bool:
    """Whether a path is on Google Cloud Storage, ``gs://BUCKET/...``."""
    return str(path).startswith("gs://")


def to_path(given: str | os.PathLike[str], flag: str) -> Path:
    """Return a user's path with ``~`` expanded: a ``pathlib.Path``, or for gs:// an ``epath.Path`` with its methods.

    Raises:
        InputError: the path is not valid or on another object store, gcsfs is missing, or the bucket cannot be
            reached.
    """
    if not is_remote(given):
        check_local(given, flag)
        try:
            path = Path(given).expanduser()
            path.exists()
        except (OSError, ValueError, RuntimeError) as error:  # too long; with a zero byte; an unknown ~user
            reason = error.strerror if isinstance(error, OSError) else first_line(error)
            raise InputError(f"{flag} {str(given)!r}: not a usable path ({reason}); give another") from error
        return path
    if importlib.util.find_spec("gcsfs") is None:
        raise InputError(f"{flag} {given}: needs gcsfs: pip install fcn_jax[gcs]")
    from etils import epath

    remote = epath.Path(given)
    try:
        remote.exists()
    except Exception as error:  # gcsfs, google-auth and the HTTP client have their own types
        way_out = "check the bucket's name and your credentials (gcloud auth application-default login)"
        raise InputError(f"{flag} {given}: cannot be reached ({first_line(error)}); {way_out}") from error
    return cast(Path, remote)


def absolute(path: Path) -> Path:
    """Return ``path.absolute()``, but a gs:// path as it is: epath does not take it for absolute."""
    return path if is_remote(path) else path.absolute()


def state_of(path: Path) -> str:
    """Return a file's size and modification time as one string. Raises OSError if it is missing."""
    state: Any = path.stat()
    return f"{state.length}\0{state.mtime}" if is_remote(path) else f"{state.st_size}\0{state.st_mtime_ns}"


def write_whole(path: Path, text: str) -> None:
    """Write a text file atomically: even after a crash it holds the old or the new text, never a part."""
    if is_remote(path):
        path.write_text(text)  # object stores write atomically
        return
    with replacing(path) as part, part.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside a local ``path``; a file written there replaces it at the end, and is removed on errors."""
    part = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield part
        part.replace(path)
    finally:
        with suppress(OSError):  # an earlier error matters more
            part.unlink(missing_ok=True)


def upload(file: Path, target: Path) -> None:
    """Copy a local file to an object store."""
    from etils import epath

    epath.Path(file).copy(target, overwrite=True)
