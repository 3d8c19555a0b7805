"""Runs in several processes, started through train.py on the CPU."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from fcn_jax.training.run import open_run

ROOT = Path(__file__).parents[1]
SETTINGS = (
    "--model.name fcn8s --model.encoder vgg11 --model.encoder-norm batch --model.width 0.03 --model.fc-features 8 "
    "--model.fc6-kernel 1 --data.shapes-size 32 32 --data.shapes-count 16 --train.batch-size 8 --train.steps 6 "
    "--train.eval-every 1.5 --train.log-every 1 --train.eval-batch-size 4 --optim.warmup-steps 0"
).split()
# Between processes, gloo adds the sums over devices in another order than XLA does within one.
LAST_BITS = 1e-6
# Our message, if a collective raises before JAX ends the process.
LOST = "^error: another process of the run ended or is unreachable; start all of them again to resume from"
# JAX's message, if another process's heartbeat is missing or the coordination service is gone.
LOST_BY_JAX = "heartbeat|another task died|coordination service"
# Kills the process in the middle of a run, without any shutdown.
KILLED = """
import os, signal, sys, time
from pathlib import Path
from fcn_jax.cli.process import guarded
from fcn_jax.cli.train import main
from fcn_jax.data.pipeline import TrainIterator
folder, take = Path(sys.argv.pop(1)), TrainIterator.__next__
def dying(self):
    batch = take(self)
    if self._step == 5:
        while not (folder / "checkpoints/3").is_dir():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)
    return batch
TrainIterator.__next__ = dying
sys.exit(guarded(main, sys.argv[1:]))
"""


def environment(devices):
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    here = {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}
    return {**os.environ, **here, "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}


def address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def start(arguments, devices, code=None):
    command = [sys.executable, *(["train.py"] if code is None else ["-c", code]), *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(devices), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def launch(run, *extra, count=2, each=((), ()), code=None):
    """Start a run in ``count`` processes that share four devices, the last of them through ``code`` if given."""
    where, started = address(), []
    for index in range(count):
        arguments = ["shapes", "--run", run, "--data.cache-dir", run.parent / "cache", *SETTINGS, *extra, *each[index]]
        if count > 1:
            arguments += ["--distributed", where, "--num-processes", count, "--process-id", index]
        other = code is not None and index == count - 1
        started.append(start([run, *arguments] if other else arguments, 4 // count, code if other else None))
    return started


def finish(started, timeout=240):
    """Wait for processes; return their exit codes and outputs."""
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [process.returncode for process in started], outputs


def finish_after_a_kill(run):
    """Run in two processes and kill the second after the first checkpoint.

    Returns the exit code and the output of the first, and the seconds by which it outlived the second.
    """
    started = launch(run, code=KILLED)
    try:
        assert started[1].wait(240) == -9
    finally:
        if started[1].poll() is None:
            for process in started:
                process.kill()
    before = time.monotonic()
    codes, outputs = finish(started)
    return codes[0], outputs[0], time.monotonic() - before


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The same run in one process."""
    run = tmp_path_factory.mktemp("reference") / "run"
    codes, outputs = train(run, count=1)
    assert codes == [0], outputs
    return run


def train(*arguments, **options):
    return finish(launch(*arguments, **options))


def rows(run, kind):
    return [row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if row["kind"] == kind]


def parameters(run):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(open_run(run, "last").variables)])


def assert_equal_runs(run, reference):
    losses, expected = ([(row["step"], row["loss"]) for row in rows(which, "train")] for which in (run, reference))
    np.testing.assert_allclose(losses, expected, rtol=LAST_BITS)
    assert [row["step"] for row in rows(run, "val")] == [3, 6]
    for row, other in zip(rows(run, "val"), rows(reference, "val"), strict=True):
        assert row["confusion"] == other["confusion"]
    found, expected = parameters(run), parameters(reference)
    assert np.linalg.norm(found - expected) <= LAST_BITS * np.linalg.norm(expected)


def assert_lost_another(process_code, printed):
    """Check that a process exited because another one did, with our message or JAX's."""
    ours = process_code == 1 and re.search(LOST, printed, re.MULTILINE) and "Traceback" not in printed
    assert ours or (process_code == -6 and re.search(LOST_BY_JAX, printed)), (process_code, printed[-2000:])
