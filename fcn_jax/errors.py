"""Exceptions that the command lines print as one line and turn into an exit code."""

from __future__ import annotations

import re
from collections.abc import Iterable


class InputError(ValueError):
    """Invalid input from the user; the message names the input and a way out.

    The command lines print it as one line and exit with code 2. For library callers it is a ``ValueError``.
    """


class Stopped(Exception):
    """A signal stopped a command, which exited cleanly; the message says what was saved.

    The exit code is 128 + the signal's ``number``, as in shells.
    """

    def __init__(self, message: str, number: int):
        """Store the message and the signal's number."""
        super().__init__(message)
        self.number = number


class UnreadableError(InputError):
    """A data set's file is missing, truncated, too large or of the wrong type; ``data.unreadable`` may skip it."""


def check_local(path: object, flag: str) -> None:
    """Raise InputError for an object-store URL ``SCHEME://...``, which pathlib would take for a local path."""
    if scheme := re.match(r"([a-z][a-z0-9+.-]*):/", str(path), re.IGNORECASE):  # pathlib drops the second slash
        raise InputError(f"{flag} {path}: {scheme[1]}:// is not supported here; give a local path")


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error, at most 200 characters, to quote in our own message."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text if len(text) <= 200 else text[:197] + "..."


def out_of_memory(error: BaseException) -> str | None:
    """Return a line for the user if a host or a device ran out of memory, else None."""
    if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
        return None
    way_out = "use smaller images or batches, or train with --train.accumulate or --train.remat"
    return f"out of memory ({first_line(error)}); {way_out}"


def unknown(kind: str, name: object, known: Iterable[str]) -> InputError:
    """Return the error for a name that is not in ``known``; its message lists them."""
    return InputError(f"unknown {kind} {name!r}; choose one of: {', '.join(known)}")
