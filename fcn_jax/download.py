"""Download files: atomic, with a digest check and a progress bar, and resuming partial downloads."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from fcn_jax.errors import InputError

_CHUNK = 1 << 20


def check_digest(path: Path, digest: str, where: object, way_out: str) -> None:
    """Raise InputError, with the texts ``where`` and ``way_out``, if a file does not match ``digest``.

    ``digest`` is ``ALGORITHM:HEX``; the first digits are enough.
    """
    algorithm, _, expected = digest.partition(":")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()
    if not found.startswith(expected):
        raise InputError(f"{where}: its {algorithm} is {found}, expected {expected}; {way_out}")


def download(url: str, target: Path, digest: str | None = None) -> Path:
    """Download a file to ``target``, unless that exists.

    Args:
        url: http://, https:// or file://.
        target: the file's path; its folder is created.
        digest: see ``check_digest``; None if none was published: then only the length is checked.

    Raises:
        InputError: the download fails, the digest does not match, or the folder cannot be written to.
    """
    if target.is_file():
        return target
    import filelock  # imported here, as the benchmark runs without it

    part = target.with_name(f"{target.name}.part")
    lock = filelock.FileLock(f"{part}.lock")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with lock:
            if target.is_file():
                return target
            _fetch(url, part)
            if digest is not None:
                try:
                    check_digest(part, digest, url, "it is not the published file: fetch it elsewhere")
                except InputError:
                    part.unlink()
                    raise
            os.replace(part, target)
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
        reason = getattr(error, "reason", None) or error
        expected = f" ({digest})" if digest else ""
        way_out = f"fetch {target.name}{expected} elsewhere and put it at {target}"
        raise InputError(f"{url} cannot be fetched ({reason}); {way_out}") from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(lock.lock_file)
    return target


def _fetch(url: str, part: Path) -> None:
    done = part.stat().st_size if part.exists() else 0
    try:
        response = _open(url, done)
    except urllib.error.HTTPError as error:
        if error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        done, response = 0, _open(url, 0)  # the partial file is of another version
    with response:
        if getattr(response, "status", None) != http.client.PARTIAL_CONTENT:
            done = 0
        length = response.headers.get("Content-Length")
        total = done + int(length) if length else None
        with part.open("ab" if done else "wb") as file, _progress() as progress:
            task = progress.add_task(url.rpartition("/")[2], total=total, completed=done)
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                progress.advance(task, len(chunk))
    if total is not None and part.stat().st_size != total:
        raise OSError(f"{part.stat().st_size} of {total} bytes received; the same command resumes the download")


def _open(url: str, done: int) -> Any:
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    return urllib.request.urlopen(request, timeout=60)  # seconds, for each network operation


def _progress() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)
