"""Runs of several processes: start-up, shutdown, which one writes, collective decisions, and signals.

Every process runs the same commands in the same order, so all of them must call these functions. In a single process
everything here returns at once.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fcn_jax.errors import InputError, Stopped, first_line, out_of_memory

_HEARTBEAT = 30
"""Seconds without a heartbeat after which JAX's coordination service ends all processes."""
_SHUTDOWN = 60
"""Seconds of the shutdown barrier: the first finished process waits for the last, which may be drawing figures."""
_START = 300
"""Seconds in which all processes have to connect; a cluster does not start them at the same time."""
_OF_ANOTHER = re.compile("gloo|nccl|connection|coordination|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED", re.I)
"""Matches errors of collectives and barriers when another process has ended."""
_MESSAGE = 1024
"""Bytes of a message from one process to the others."""

T = TypeVar("T")


class AgreedError(InputError):
    """A user's mistake that is raised in every process, so that all of them stop."""


_IN_ORDER = (AgreedError, Stopped)
"""Exceptions that all processes raise together."""


@contextmanager
def processes(
    distributed: str | None, num_processes: int | None = None, process_id: int | None = None
) -> Iterator[None]:
    """Connect to the other processes of a run for the duration of the context.

    Enter it before anything asks JAX for a device. An error in this process alone ends it at once, without the shutdown
    barrier, where it would wait for the others; they notice the lost connection or heartbeat.

    Args:
        distributed: None for a single process; "auto" to take address and rank from the environment (SLURM, TPU pods,
            Kubernetes, Open MPI); or the HOST:PORT at which process 0 waits for the others.
        num_processes: number of processes; with HOST:PORT only.
        process_id: index of this process, 0 ... num_processes - 1; with HOST:PORT only.

    Raises:
        InputError: invalid combination of arguments, or the processes do not find each other.
    """
    _check(distributed, num_processes, process_id)
    if distributed is None:
        yield
        return
    _connect(distributed, num_processes, process_id)
    with exit_on_error():
        try:
            yield
        except _IN_ORDER:
            jax.distributed.shutdown()
            raise
        jax.distributed.shutdown()


def _check(distributed: str | None, num_processes: int | None, process_id: int | None) -> None:
    both = f"--num-processes {num_processes} --process-id {process_id}"
    if distributed is None or distributed == "auto":
        if num_processes is not None or process_id is not None:
            raise InputError(
                f"expected {both} only with --distributed HOST:PORT, got --distributed {distributed}; "
                "name the address of process 0, or leave them out"
            )
        return
    address = re.fullmatch(r"(\[[^\]]+\]|[^:\s]+):(\d+)", distributed)
    if address is None or not 0 < int(address[2]) < 2**16:
        raise InputError(f"expected --distributed auto or HOST:PORT, got {distributed}; a port is in 1 ... 65535")
    if num_processes is None or process_id is None:
        raise InputError(
            f"--distributed {distributed} needs --num-processes and --process-id, got {both}; "
            "give both, or --distributed auto if the cluster sets them"
        )
    if not 0 <= process_id < num_processes:
        raise InputError(f"expected 0 <= --process-id < --num-processes, got {both}; process ids count from 0")


def _connect(distributed: str, num_processes: int | None, process_id: int | None) -> None:
    waits: dict[str, Any] = {
        "initialization_timeout": _START,
        "heartbeat_timeout_seconds": _HEARTBEAT,
        "shutdown_timeout_seconds": _SHUTDOWN,
    }
    if distributed == "auto":
        try:
            jax.distributed.initialize(**waits)
        except (ValueError, KeyError) as error:
            raise InputError(
                "--distributed auto: found no SLURM, TPU pod, Kubernetes or Open MPI environment "
                f"({error}); start it there, or give --distributed HOST:PORT --num-processes N --process-id I"
            ) from error
        except RuntimeError as error:
            raise _not_found(distributed, error) from error
        return
    if process_id != 0:
        _wait_for_address(distributed)
    try:
        # Without cluster detection, which inside a SLURM job would leave each process one device, whatever the address.
        jax.distributed.initialize(
            distributed, num_processes, process_id, cluster_detection_method="deactivate", **waits
        )
    except RuntimeError as error:
        raise _not_found(distributed, error) from error


def _wait_for_address(address: str) -> None:
    """Wait until something listens at the address; otherwise JAX would abort the process with a stack trace."""
    host, _, port = address.rpartition(":")
    until = time.monotonic() + _START
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise _not_found(address, error) from error
        time.sleep(0.5)


def _not_found(distributed: str, error: Exception) -> InputError:
    return InputError(
        f"--distributed {distributed}: the processes did not find each other within {_START} s "
        f"({first_line(error)}); check address, port and firewall, and that all of them were started"
    )


@contextmanager
def exit_on_error() -> Iterator[None]:
    """End this process at once, without clean-up, if it alone fails.

    A normal exit would wait for a barrier or a checkpoint being saved, which need the other processes, while those wait
    for this one: a deadlock. With a single process this does nothing.
    """
    try:
        yield
    except _IN_ORDER:
        raise
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        message, code = _last_words(error)
        sys.stdout.flush()
        print(message, file=sys.stderr, flush=True)
        os._exit(code)


def _last_words(error: BaseException) -> tuple[str, int]:
    """Return what to tell the user, and the exit code."""
    if isinstance(error, InputError):
        return f"error: {error}", 2
    if isinstance(error, KeyboardInterrupt):
        return "stopped; the same commands resume from the last checkpoint", 130
    if line := out_of_memory(error):
        return f"error: {line}", 2
    # JAX raises ValueError if the program ends before its call returns.
    if isinstance(error, jax.errors.JaxRuntimeError | ValueError) and _OF_ANOTHER.search(str(error)):
        again = "start all of them again to resume from the last checkpoint"
        return f"error: another process of the run ended or is unreachable; {again} ({first_line(error)})", 1
    return "".join(traceback.format_exception(error)), 1


def is_writer() -> bool:
    """Whether this is the process that writes files and prints."""
    return jax.process_index() == 0


def share() -> dict[str, int]:
    """Return this process's share of the data, as keyword arguments for ``data.pipeline``."""
    return {"process_index": jax.process_index(), "process_count": jax.process_count()}


def gather(values: Any) -> np.ndarray:
    """Gather integers of up to 64 bits from all processes: (processes, *shape), in their order.

    Args:
        values: an array, of the same shape in every process.
    """
    values = np.asarray(values, np.int64)
    if jax.process_count() == 1:
        return values[None]
    # As pairs of 32 bits, since JAX truncates 64-bit integers by default.
    halves = np.atleast_1d(values).reshape(-1).view(np.uint32)
    rows = np.asarray(multihost_utils.process_allgather(halves))
    return np.ascontiguousarray(rows).view(np.int64).reshape(-1, *values.shape)


def from_writer(value: int | None) -> int | None:
    """Return the writer's value in every process: others may see a shared folder in another state."""
    known, number = gather([value is not None, value or 0])[0].tolist()
    return number if known else None


def together(action: Callable[[], T]) -> T:
    """Run an action in every process; an InputError in any of them is raised in all.

    Raises:
        AgreedError: in every process, with the message of the first that failed.
    """
    if jax.process_count() == 1:
        return action()
    message, result = b"", None
    try:
        result = action()
    except InputError as error:
        message = (str(error) or repr(error)).encode()[:_MESSAGE]
    for index, row in enumerate(gather(np.frombuffer(message.ljust(_MESSAGE, b"\0"), np.int64))):
        text = row.tobytes().rstrip(b"\0").decode(errors="replace")
        if text:
            raise AgreedError(text if index == 0 else f"process {index}: {text}")
    return result  # type: ignore[return-value]


def writer_first(action: Callable[[], T]) -> T:
    """Run an action in the writer and then in the others, which on a shared disk find what it downloaded.

    Raises:
        AgreedError: as ``together`` does.
    """
    if jax.process_count() == 1:
        return action()
    mine = is_writer()
    first = together(action if mine else lambda: None)
    rest = together((lambda: None) if mine else action)
    return first if mine else rest  # type: ignore[return-value]


def digest(tree: Any) -> int:
    """Return a checksum of a tree of arrays that this process can read."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        total = zlib.crc32(np.ascontiguousarray(leaf).view(np.uint8).data, total)
    return total


def check_same(facts: Mapping[str, Any]) -> None:
    """Check that all processes have the same settings; otherwise results would differ or processes deadlock.

    Args:
        facts: values by name, compared by their ``repr``; the same names everywhere.

    Raises:
        AgreedError: in every process, with the names of what differs.
    """
    rows = gather([zlib.crc32(repr(value).encode()) for value in facts.values()])
    wrong = [name for name, column in zip(facts, rows.T, strict=True) if np.any(column != column[0])]
    if wrong:
        raise AgreedError(
            f"the processes differ in {', '.join(wrong)}; start all of them with the same settings and files"
        )


class Agreement:
    """Tells all processes, at the same call, whether any of them requests something, such as to stop.

    Each call returns the answer to the previous one, so that no process waits for communication.
    """

    def __init__(self, mesh: Mesh):
        """Communicate over the devices of a mesh, which all processes share."""
        self._spread = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._add = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._pending: jax.Array | None = None

    def __call__(self, mine: bool) -> bool:
        """Pass this process's request; return whether any process had one at the last call (if alone: at this one)."""
        if jax.process_count() == 1:
            return mine
        flags = np.full(len(self._spread.mesh.local_mesh.devices.flat), mine, np.int32)
        before, self._pending = self._pending, self._add(jax.make_array_from_process_local_data(self._spread, flags))
        return before is not None and bool(before)


# --- signals

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_ONE_REQUEST = 0.2
"""Seconds in which signals count as one, since some tools signal a process and then its group."""


class StopRequested(Exception):
    """Raised by ``StopRequest.check``; ``number`` is the signal number."""

    def __init__(self, number: int):
        """Store the signal number."""
        super().__init__(signal.Signals(number).name)
        self.number = number


class StopRequest:
    """Records whether a signal has arrived, and which one."""

    number: int | None = None

    def check(self) -> None:
        """Raise StopRequested if a signal has arrived."""
        if self.number is not None:
            raise StopRequested(self.number)


@contextmanager
def stop_request(say: Callable[[str], None]) -> Iterator[StopRequest]:
    """Treat SIGINT, SIGTERM and SIGHUP (unless ignored, as by nohup) as a request to stop between steps.

    A second signal ends the process at once, without clean-up; files on disk are intact at any time.

    Args:
        say: called once with a message that confirms the request.
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
        say(f"{signal.Signals(number).name}: finishing this step and saving; send it again to exit at once")

    if threading.current_thread() is not threading.main_thread():
        yield request  # only the main thread may handle signals
        return
    heeded = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, hear) for number in heeded}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
