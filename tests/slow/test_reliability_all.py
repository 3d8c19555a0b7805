"""Kills at various moments of a run, signals to it, and output that cannot be written."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_run import KILL, assert_same, check_stop, end, environment, in_folder, in_process, signalling, train

from fcn_jax.errors import Stopped
from fcn_jax.training import loop
from fcn_jax.training.run import RunFolder

MOMENTS = {
    "in a step": (0, 4), "in a row": (0, 4), "in a validation": (2, 4), "after the last save": (0, 13),
    "before the commit of the first": (0, 0), "in the removal of an old one": (0, None),
    "in a save": (2, None),  # the background write may or may not have finished
}  # fmt: skip


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_resumes_to_the_same_result(moment, undisturbed, tmp_path):
    workers, saved = MOMENTS[moment]
    config = in_folder(tmp_path, workers=workers)
    killed = in_process(KILL, config, moment)
    _, errors = killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL, errors.decode()
    text = train(config)
    if saved is not None:
        assert (f"resuming {config.run} at step {saved}" in text) is (saved > 0)
    assert_same(config, undisturbed)


def test_worker_processes_exit_when_their_run_is_killed(tmp_path):
    killed = in_process(KILL, in_folder(tmp_path, workers=2), "in a step", start_new_session=True)
    killed.communicate(timeout=120)  # returns when all processes that share its output have exited
    assert killed.returncode == -signal.SIGKILL
    with pytest.raises(ProcessLookupError):
        for _ in range(50):
            os.killpg(killed.pid, 0)
            time.sleep(0.1)


@pytest.mark.parametrize(("number", "moment", "saved"), [(signal.SIGHUP, "start", 0), (signal.SIGTERM, "save", 8)])
@pytest.mark.usefixtures("heard")
def test_a_signal_at_the_start_or_during_a_save_stops_the_run(
    number, moment, saved, undisturbed, tmp_path, monkeypatch
):
    check_stop(number, moment, saved, undisturbed, tmp_path, monkeypatch)


@pytest.mark.usefixtures("heard")
def test_a_run_stopped_twice_at_one_step_resumes_on_other_devices(undisturbed, tmp_path, monkeypatch):
    config = in_folder(tmp_path)
    for number in (signal.SIGTERM, signal.SIGINT):
        with monkeypatch.context() as patched, pytest.raises(Stopped, match="at step 7"):
            # The second signal comes before the first step.
            owner, name = (loop.Logger, "step") if number == signal.SIGTERM else (loop, "progress_bar")
            signalling(patched, owner, name, number, lambda _, step, *rest: step in (7, 13))
            train(config)
    other = replace(config, devices=4)
    assert "saved with 2 devices, resumed with 4: sums may differ in the last bits" in train(other)
    rows, steps, _ = end(other)
    assert steps == undisturbed["steps"]
    for ours, theirs in zip(rows, undisturbed["rows"], strict=True):
        assert (ours["kind"], ours["step"]) == (theirs["kind"], theirs["step"])
        if ours["kind"] == "train":  # float32 sums in another order
            np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-4)


def test_a_second_signal_ends_the_process_immediately(undisturbed, tmp_path):
    code = "loop.evaluate = lambda *args: (print('validating', flush=True), time.sleep(100)); run()"
    process = in_process(code, in_folder(tmp_path))
    for line in process.stdout:
        if b"validating" in line:
            break
    process.terminate()
    time.sleep(0.5)
    assert process.poll() is None
    before = time.monotonic()
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 143 and time.monotonic() - before < 5
    train(in_folder(tmp_path))
    assert_same(in_folder(tmp_path), undisturbed)


@pytest.mark.parametrize("where", ["/dev/full", "a closed pipe"])
def test_a_run_continues_when_its_output_cannot_be_written(where, tmp_path):
    config = in_folder(tmp_path)
    command = [sys.executable, "train.py", "shapes", "--run", config.run, "--data.cache-dir", config.data.cache_dir]
    sizes = "--data.shapes-size 32 32 --data.shapes-count 16 --model.width 0.03 --model.encoder vgg11 --devices 1"
    sizes += " --model.fc-features 8 --model.fc6-kernel 1 --train.batch-size 4 --train.steps 6 --train.eval-every 1"
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe, open("/dev/full", "w") as full:
        out = pipe if where == "a closed pipe" else full
        given = {"cwd": Path(__file__).parents[2], "env": environment(), "stdout": out, "text": True}
        done = subprocess.run([*command, *sizes.split()], stderr=subprocess.PIPE, **given)
    assert (done.returncode, done.stderr) == (0, "")
    assert [row["step"] for row in RunFolder(config.run).rows() if row["kind"] == "val"] == [4, 6]


def test_a_signal_to_the_process_group_stops_the_run_cleanly(undisturbed, tmp_path):
    config = in_folder(tmp_path, workers=2)
    code = (
        "from fcn_jax.data import pipeline\n"
        "iterate = pipeline._iterate\n"
        "def noting(*args):\n"
        "    print('starting workers' if args[2:] == (2,) else '', flush=True)\n"
        "    return iterate(*args)\n"
        "pipeline._iterate = noting\n"
        "if __name__ == '__main__': sys.exit(guarded(run, []))"
    )
    process = in_process(code, config, start_new_session=True)
    for line in process.stdout:
        if b"starting workers" in line:
            break
    time.sleep(1)  # time for the workers' imports
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143 and b"stopped by SIGTERM at step" in errors, errors.decode()
    train(config)
    assert_same(config, undisturbed)
