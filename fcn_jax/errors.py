"""The one exception that a user's own mistake raises."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["InputError", "unknown"]


class InputError(ValueError):
    """What the user gave cannot be used; the message names the thing and the way out.

    The command lines print it as one line and exit with code 2. As a ``ValueError`` it is what library callers expect.
    """


def unknown(kind: str, name: object, known: Iterable[str]) -> InputError:
    """Return the error for a name that is not among the known ones."""
    return InputError(f"unknown {kind} {name!r}; choose one of: {', '.join(known)}")
