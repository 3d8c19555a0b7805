"""Signals that ask a run to stop: the first is a request, the second ends the process."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["StopRequest", "StopRequested", "stop_request"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequested(Exception):
    """Raised by ``StopRequest.check``; ``number`` is the signal's."""

    def __init__(self, number: int):
        """Remember the signal."""
        super().__init__(signal.Signals(number).name)
        self.number = number


class StopRequest:
    """Whether a signal has come."""

    number: int | None = None

    def check(self) -> None:
        """Raise StopRequested where one has."""
        if self.number is not None:
            raise StopRequested(self.number)


@contextmanager
def stop_request(say: Callable[[str], None]) -> Iterator[StopRequest]:
    """Take SIGINT and SIGTERM as a request to stop, which the caller looks at between steps.

    The second one ends the process at once, without clearing up: what is on disk is whole at any moment.

    Args:
        say: is told once that the request was heard.
    """
    request = StopRequest()

    def hear(number: int, frame: FrameType | None) -> None:
        del frame
        if request.number is not None:
            os._exit(128 + number)
        request.number = number
        say(f"{signal.Signals(number).name}: finishing this step and saving; once more to leave at once")

    if threading.current_thread() is not threading.main_thread():
        yield request  # only the main thread may hear signals
        return
    before = {number: signal.signal(number, hear) for number in _SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
