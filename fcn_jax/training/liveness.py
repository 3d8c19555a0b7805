"""Signs of life between the processes of a run, so that none waits for one that is gone.

A collective whose partner was killed may never return: NCCL waits, and so do the threads of gloo that have nothing to
do with the lost connection. JAX's own heartbeat then aborts the process after a while, with a stack trace. Here each
process tells the others through JAX's coordination service, which lives in process 0, that it is there, and when it
ends.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from typing import Any, NoReturn

import jax

__all__ = ["AGAIN", "Liveness", "leave"]

AGAIN = "start all of them again, and they go on from the last checkpoint"
"""What to do where a process is gone."""
_BEAT = 2.0
"""Seconds between two signs of life."""
_SILENCE = 20.0
"""Seconds without one after which a process counts as gone."""
_ALIVE, _RUN = "fcn_jax/alive", "fcn_jax/run"
_DONE = "done"


class Liveness:
    """Says every two seconds that this process lives, and ends it where another one does not.

    Process 0 watches all, all watch process 0, and what it finds it tells them: the work grows with the number of
    processes and not with its square.
    """

    def __init__(self, client: Any, index: int, count: int):
        """Start watching.

        Args:
            client: of JAX's coordination service.
            index: which process this is.
            count: number of processes.
        """
        self._client, self._index = client, index
        self._watched = range(1, count) if index == 0 else (0,)
        self._heard: dict[int, tuple[str | None, float]] = {other: (None, time.monotonic()) for other in self._watched}
        self._stopped = threading.Event()
        for task in (self._beat, self._watch):
            threading.Thread(target=task, name=f"fcn_jax{task.__name__}", daemon=True).start()

    def stop(self) -> None:
        """Stop watching: this process is done, and its silence from here on means nothing."""
        self._stopped.set()
        self._say(_DONE)

    def _say(self, word: str) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            key = f"{_RUN}/alive" if self._index == 0 else f"{_ALIVE}/{self._index}"
            self._client.key_value_set(key, word, allow_overwrite=True)

    def _beat(self) -> None:
        number = 0
        while not self._stopped.wait(_BEAT if number else 0):
            number += 1
            self._say(str(number))
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                found = dict(self._client.key_value_dir_get(_RUN))
                end = found.get(f"{_RUN}/end")
                if end is not None and end != _ended(self._index):
                    self._lost(end)
                if self._index == 0:
                    alive = dict(self._client.key_value_dir_get(_ALIVE))
                    self._hear({other: alive.get(f"{_ALIVE}/{other}") for other in self._watched})
                else:
                    self._hear({0: found.get(f"{_RUN}/alive")})

    def _hear(self, words: dict[int, str | None]) -> None:
        for other, word in words.items():
            if word != self._heard[other][0] or word == _DONE:
                self._heard[other] = (word, time.monotonic())

    def _watch(self) -> None:
        while not self._stopped.wait(1):
            for other, (_, when) in self._heard.items():
                if time.monotonic() - when > _SILENCE:
                    self._lost(f"process {other} of the run has given no sign of life for {_SILENCE:g} s")

    def _lost(self, what: str) -> None:
        """End this process because another one is gone."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        _end(self._client, self._index, f"error: {what}; {AGAIN}", 1, what)


def leave(client: Any, index: int, message: str, code: int) -> NoReturn:
    """Print why this process ends, tell the others that it does, and end it at once, without clean-up.

    Args:
        client: of JAX's coordination service.
        index: which process this is.
        message: for the user.
        code: of the exit.
    """
    _end(client, index, message, code, _ended(index))


def _ended(index: int) -> str:
    return f"process {index} of the run ended"


def _end(client: Any, index: int, message: str, code: int, what: str) -> NoReturn:
    sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)

    def tell() -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process was faster, or process 0 is gone
            client.key_value_set(f"{_RUN}/end", what)

    telling = threading.Thread(target=tell, daemon=True)  # a process 0 that is frozen would never answer
    telling.start()
    telling.join(2 * _BEAT)
    if index == 0:
        time.sleep(2 * _BEAT)  # with this process the service goes, and whatever it has not told by then
    os._exit(code)
