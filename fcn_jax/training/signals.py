"""Signals that ask a run to stop: the first is a request, the second ends the process."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_ONE_REQUEST = 0.2
"""Seconds in which signals count as one: some who stop a process signal it and then its group."""


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
    """Take SIGINT, SIGTERM and SIGHUP (unless ignored, as by nohup) as a request to stop, looked at between steps.

    The second one ends the process at once, without clearing up: what is on disk is whole at any moment.

    Args:
        say: is told once that the request was heard.
    """
    request = StopRequest()
    heard = 0.0

    def hear(number: int, frame: FrameType | None) -> None:
        nonlocal heard
        del frame
        if request.number is not None:
            if time.monotonic() - heard > _ONE_REQUEST:
                os._exit(128 + number)
            return
        request.number, heard = number, time.monotonic()
        say(f"{signal.Signals(number).name}: finishing this step and saving; once more to leave at once")

    if threading.current_thread() is not threading.main_thread():
        yield request  # only the main thread may hear signals
        return
    heeded = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, hear) for number in heeded}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
