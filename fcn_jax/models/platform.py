"""Which form of an operation a platform gets: the CPU its own, every other one the plain form."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax

__all__ = ["by_platform", "plain_forms"]

_PLAIN: ContextVar[bool] = ContextVar("plain_forms", default=False)


def by_platform(*arguments: jax.Array, cpu: Callable[..., Any], plain: Callable[..., Any]) -> Any:
    """Call ``cpu`` with the arguments where the program is compiled for the CPU, otherwise ``plain``."""
    if _PLAIN.get():
        return plain(*arguments)
    return jax.lax.platform_dependent(*arguments, cpu=cpu, default=plain)


@contextmanager
def plain_forms() -> Iterator[None]:
    """Trace the plain forms on the CPU too, where it stands in for the devices that a program is meant for."""
    token = _PLAIN.set(True)
    try:
        yield
    finally:
        _PLAIN.reset(token)
