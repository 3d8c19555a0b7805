"""Hostile input for everything that reads outside bytes: mutated real files, by seed, in processes that are watched.

    python tests/fuzzing.py --cases 100000 --seed 0
    python tests/fuzzing.py --reader mat --case 17 --seed 0      # one case again, with its traceback

A case is good if the reader returns or raises InputError, within ``SECONDS`` and ``MEMORY``, and has run no code.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

SECONDS = 20.0
"""For one case, on a machine that others use too; the slowest good one takes a second."""
MEMORY = 2 << 30
"""Bytes that one case may take beyond what the process had."""
SPARE = 16 << 30
"""Address space beyond what a process starts with, so that a reader gone wild does not take the machine down."""


class Hang(BaseException):
    """A case has taken too long. No Exception, so that no reader takes it for damage of its file."""


def _expired(signum, frame):
    raise Hang(f"longer than {SECONDS:g} s")


@contextlib.contextmanager
def time_limit(seconds):
    """Raise Hang in what runs longer; code that never comes back to Python is killed from outside."""
    before = signal.signal(signal.SIGALRM, _expired)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def attempt(reader, files, work):
    """Read ``files`` in the folder ``work``; return "result" or "refused", or raise what no reader should raise."""
    from fcn_jax.errors import InputError

    marker = work / "marker"
    try:
        with time_limit(SECONDS):
            reader.read(files, work)
        outcome = "result"
    except InputError as error:
        if "\n" in str(error).strip():
            raise AssertionError(f"an error of several lines: {error}") from error
        outcome = "refused"
    if marker.exists():
        marker.unlink()
        raise AssertionError("code out of the file was run, or something was written outside of the folder")
    return outcome


def make_case(reader, corpus, seed, case):
    """Return the files of a case; seed, reader and number decide everything."""
    rng = np.random.default_rng([seed, zlib.crc32(reader.name.encode()), case])
    return reader.mutate(rng, corpus)


@dataclass
class Tally:
    """What became of a reader's cases."""

    reader: str
    outcomes: collections.Counter = field(default_factory=collections.Counter)
    failures: list = field(default_factory=list)
    slowest: float = 0.0
    slowest_case: int = -1
    peak: int = 0
    seconds: float = 0.0

    def add(self, other):
        """Add what became of further cases."""
        self.outcomes += other.outcomes
        self.failures += other.failures
        if other.slowest > self.slowest:
            self.slowest, self.slowest_case = other.slowest, other.slowest_case
        self.peak = max(self.peak, other.peak)
        self.seconds += other.seconds


def _resident(name):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    return 0


def _reset_peak():
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): sets the peak back to what is resident now


def _limit_address_space():
    size = _resident("VmSize") + SPARE
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


def _die_with_parent():
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def run_cases(reader, seed, cases, report=lambda case: None):
    """Run the numbered cases of a reader in this process."""
    tally = Tally(reader.name)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fcn_jax_fuzz_") as folder:
        work = Path(folder)
        (work / "corpus").mkdir()
        corpus = reader.corpus(work / "corpus", work / "marker")
        _reset_peak()
        base = _resident("VmRSS")
        for case in cases:
            report(case)
            files = make_case(reader, corpus, seed, case)
            if sum(map(len, files.values())) > 2**20:  # what making it took is not the reader's
                _reset_peak()
            before = time.perf_counter()
            failure = None
            try:
                tally.outcomes[attempt(reader, files, work)] += 1
            except (Exception, Hang, SystemExit) as error:
                last = traceback.extract_tb(error.__traceback__)[-1]
                failure = f"{type(error).__name__}: {error}"[:300] + f" ({Path(last.filename).name}:{last.lineno})"
            took = time.perf_counter() - before
            if took > tally.slowest:
                tally.slowest, tally.slowest_case = took, case
            peak = _resident("VmHWM") - base
            tally.peak = max(tally.peak, peak)
            if peak > MEMORY:
                failure = failure or f"took {peak >> 20} MiB"
                _reset_peak()
            if failure:
                tally.failures.append((case, failure))
                tally.outcomes["failed"] += 1
    tally.seconds = time.perf_counter() - started
    return tally


def _child(name, seed, cases, current, connection):
    from fuzz_readers import READERS

    _die_with_parent()
    nothing = os.open(os.devnull, os.O_WRONLY)
    for output in (1, 2):
        os.dup2(nothing, output)

    def report(case):
        current.value = case

    _limit_address_space()
    connection.send(run_cases(READERS[name], seed, cases, report))
    connection.close()


def run_watched(name, seed, cases):
    """Run cases in another process; one that kills it or never ends is a failure, and the others go on."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fuzz_readers"])
    total, left = Tally(name), list(cases)
    while left:
        receiver, sender = context.Pipe(duplex=False)
        current = context.Value("q", -1, lock=False)
        process = context.Process(target=_child, args=(name, seed, left, current, sender))
        process.start()
        sender.close()
        seen, since = -1, time.monotonic()
        while not receiver.poll(0.5) and process.is_alive():
            if current.value != seen:
                seen, since = current.value, time.monotonic()
            elif time.monotonic() - since > (3 if seen >= 0 else 9) * SECONDS:
                process.kill()
        done = None
        with contextlib.suppress(EOFError, ConnectionError):
            done = receiver.recv() if receiver.poll(1) else None
        process.join()
        receiver.close()
        if done is not None:
            total.add(done)
            break
        case = current.value
        code = process.exitcode
        total.failures.append((case, "never came back" if code == -signal.SIGKILL else f"the process died ({code})"))
        total.outcomes["failed"] += 1
        if case not in left:
            break
        total.outcomes["not counted"] += left.index(case)
        left = left[left.index(case) + 1 :]
    return total


def shares(readers, cases):
    """Deal the cases out by the readers' weights, each at least one."""
    total = sum(reader.weight for reader in readers.values())
    return {name: max(1, round(cases * reader.weight / total)) for name, reader in readers.items()}


def run_all(seed, counts, processes=2, chunk=2500):
    """Run so many cases of each reader over a few processes; return the tallies by reader."""
    tallies = {name: Tally(name) for name in counts}
    jobs = [
        (name, range(start, min(start + chunk, count)))
        for name, count in counts.items()
        for start in range(0, count, chunk)
    ]
    with ThreadPoolExecutor(processes) as pool:
        for tally in pool.map(lambda job: run_watched(job[0], seed, job[1]), jobs):
            tallies[tally.reader].add(tally)
    return tallies


def _print(tallies, seed):
    print(f"{'reader':12}{'cases':>8}{'results':>9}{'errors':>8}{'failed':>8}{'slowest s':>11}{'peak MiB':>10}{'s':>8}")
    for tally in tallies.values():
        cases, found = sum(tally.outcomes.values()), tally.outcomes
        print(
            f"{tally.reader:12}{cases:8}{found['result']:9}{found['refused']:8}{found['failed']:8}"
            f"{tally.slowest:11.2f}{tally.peak >> 20:10}{tally.seconds:8.0f}"
        )
    for tally in tallies.values():
        for case, failure in tally.failures[:20]:
            print(f"FAILED --reader {tally.reader} --case {case} --seed {seed}: {failure}")
        if len(tally.failures) > 20:
            print(f"FAILED {tally.reader}: and {len(tally.failures) - 20} more")


def _again(reader, seed, case):
    """Run one case in this process and show what it is and what comes of it."""
    with tempfile.TemporaryDirectory(prefix="fcn_jax_fuzz_") as folder:
        work = Path(folder)
        (work / "corpus").mkdir()
        files = make_case(reader, reader.corpus(work / "corpus", work / "marker"), seed, case)
        for name, data in files.items():
            print(f"{name}: {len(data)} bytes, {data[:200]!r}")
        try:
            with time_limit(SECONDS):
                print("result:", str(reader.read(files, work))[:500])
        except BaseException:
            traceback.print_exc()
            return 1
    return 0


def main():
    from fuzz_readers import READERS

    parser = argparse.ArgumentParser(description="Feed mutated files to every reader.")
    parser.add_argument("--cases", type=int, default=2000, help="over all readers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", choices=READERS, help="this one alone")
    parser.add_argument("--case", type=int, help="this one alone, with its traceback")
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    if given.case is not None:
        return _again(READERS[given.reader], given.seed, given.case)
    readers = READERS if given.reader is None else {given.reader: READERS[given.reader]}
    started = time.perf_counter()
    tallies = run_all(given.seed, shares(readers, given.cases), given.processes)
    _print(tallies, given.seed)
    failed = sum(len(tally.failures) for tally in tallies.values())
    cases = sum(sum(tally.outcomes.values()) for tally in tallies.values())
    print(f"{cases} cases, {failed} failed, {time.perf_counter() - started:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
