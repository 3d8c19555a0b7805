"""The exceptions that a command line turns into a line and an exit code."""

from __future__ import annotations

import re
from collections.abc import Iterable


class InputError(ValueError):
    """What the user gave cannot be used; the message names the thing and the way out.

    The command lines print it as one line and exit with code 2. As a ``ValueError`` it is what library callers expect.
    """


class Stopped(Exception):
    """A signal ended a command in good order; the message says what was kept.

    The exit code is 128 + ``number``, the signal's, as shells have it.
    """

    def __init__(self, message: str, number: int):
        """Say what was kept, and which signal it was."""
        super().__init__(message)
        self.number = number


class UnreadableError(InputError):
    """A file of a data set is not there, cut short, too large or of another type; it may be left out of the set."""


def check_local(path: object, flag: str) -> None:
    """Raise InputError for a path of an object store, ``SCHEME://...``, which would name a local folder."""
    if scheme := re.match(r"([a-z][a-z0-9+.-]*):/", str(path), re.IGNORECASE):  # pathlib drops the second slash
        raise InputError(f"{flag} {path}: {scheme[1]}:// is not supported here; give a path on a disk")


def first_line(error: BaseException) -> str:
    """Return the first line of an error of some library, shortened, to be told in ours."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text if len(text) <= 200 else text[:197] + "..."


def unknown(kind: str, name: object, known: Iterable[str]) -> InputError:
    """Return the error for a name that is not among the known ones."""
    return InputError(f"unknown {kind} {name!r}; choose one of: {', '.join(known)}")
