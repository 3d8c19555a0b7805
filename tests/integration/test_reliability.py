"""What happens to the process does not happen to the run: kills, signals, outputs that nobody reads."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from tiny_run import TINY, assert_same, end, environment, in_folder, in_process, signalling, train

from fcn_jax.cli.process import guarded
from fcn_jax.errors import InputError, Stopped
from fcn_jax.training import loop
from fcn_jax.training.run import RunFolder, config_from_json

# --- kills

KILL = """
import dataclasses, json, os, signal, sys
import orbax.checkpoint._src.path.atomicity as atomicity
from rich.console import Console
from fcn_jax.training.run import RunFolder, config_from_json
from fcn_jax.training import checkpoint, loop

moment = sys.argv[2]

def kill(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def killing(owner, name, when, after=False):
    original = getattr(owner, name)
    def instead(*args, **kwargs):
        if not after and when(*args):
            kill()
        result = original(*args, **kwargs)
        if after and when(*args):
            kill()
        return result
    setattr(owner, name, instead)

def half_a_row(self, row):
    if row["step"] == 6:
        with self.metrics_file.open("a") as file:
            file.write(json.dumps(row)[:20])
        kill()
    original_append(self, row)

original_append = RunFolder.append
if moment == "in a step":
    killing(loop.Logger, "step", lambda self, step, *rest: step == 7)
elif moment == "in a row":
    RunFolder.append = half_a_row
elif moment == "in a validation":
    calls = []
    killing(loop, "evaluate", lambda *args: calls.append(0) or len(calls) == 2)
elif moment == "in a save":
    killing(loop.Checkpoints, "save", lambda self, state, *rest: int(state.step) == 8, after=True)
elif moment == "before the commit of the first":
    killing(atomicity.AtomicRenameTemporaryPath, "finalize", lambda *args: True)
elif moment == "in the removal of an old one":
    from orbax.checkpoint._src.path import deleter
    killing(deleter.StandardCheckpointDeleter, "delete", lambda *args: True)
elif moment == "after the last save":
    killing(loop.Checkpoints, "close", lambda *args: True, after=True)
loop.train(config_from_json(json.loads(sys.argv[1])), Console())
"""


MOMENTS = {
    "in a step": (0, 4),
    "in a row": (0, 4),
    "in a validation": (2, 4),
    "in a save": (2, None),  # the write was in the background: it may or may not have come to its end
    "before the commit of the first": (0, 0),
    "after the last save": (0, 13),
    "in the removal of an old one": (0, None),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_comes_to_the_same_end(moment, undisturbed, tmp_path):
    workers, saved = MOMENTS[moment]
    config = in_folder(tmp_path, workers=workers)
    killed = in_process(KILL, config, moment)
    _, errors = killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL, errors.decode()
    text = train(config)
    if saved is not None:
        assert (f"resuming {config.run} at step {saved}" in text) is (saved > 0)
    assert_same(config, undisturbed)


def test_worker_processes_end_with_the_run_that_is_killed(tmp_path):
    killed = in_process(KILL, in_folder(tmp_path, workers=2), "in a step", start_new_session=True)
    killed.communicate(timeout=120)  # returns when all who hold its output have ended
    assert killed.returncode == -signal.SIGKILL
    with pytest.raises(ProcessLookupError):
        for _ in range(50):
            os.killpg(killed.pid, 0)
            time.sleep(0.1)


# --- signals


@pytest.mark.parametrize(
    ("number", "moment", "saved"),
    [
        (signal.SIGHUP, "start", 0),
        (signal.SIGTERM, "step", 7),
        (signal.SIGINT, "validation", 8),
        (signal.SIGTERM, "save", 8),
    ],
)
@pytest.mark.usefixtures("heard")
def test_a_signal_stops_after_the_step_with_the_state_saved(number, moment, saved, undisturbed, tmp_path, monkeypatch):
    config = in_folder(tmp_path)
    with monkeypatch.context() as patched:
        if moment == "start":
            signalling(patched, loop, "progress_bar", number, lambda *args: True)
        elif moment == "step":
            signalling(patched, loop.Logger, "step", number, lambda self, step, *rest: step == 7)
        elif moment == "validation":
            calls = []
            signalling(patched, loop, "evaluate", number, lambda *args: calls.append(0) or len(calls) == 2)
        else:
            signalling(patched, loop.Checkpoints, "save", number, lambda self, state, *rest: int(state.step) == 8)
        with pytest.raises(Stopped, match=f"stopped by {number.name} at step {saved}, which is saved") as stopped:
            train(config)
    assert stopped.value.number == number
    # A validation is left as it stands; after a save there is nothing more to save.
    assert (Path(config.run) / "interrupted" / str(saved)).is_dir() is (moment != "save")
    assert (Path(config.run) / "checkpoints" / str(saved)).is_dir() is (moment == "save")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert f"resuming {config.run} at step {saved}" in train(config)
    assert_same(config, undisturbed)


@pytest.mark.usefixtures("heard")
def test_stopped_twice_at_the_same_step_and_with_other_devices(undisturbed, tmp_path, monkeypatch):
    config = in_folder(tmp_path)
    for number in (signal.SIGTERM, signal.SIGINT):
        with monkeypatch.context() as patched, pytest.raises(Stopped, match="at step 7"):
            # the second time before the first step is taken
            owner, name = (loop.Logger, "step") if number == signal.SIGTERM else (loop, "progress_bar")
            signalling(patched, owner, name, number, lambda _, step, *rest: step in (7, 13))
            train(config)
    other = replace(config, devices=4)
    assert "saved with 2 devices, going on with 4: sums may differ in the last bits" in train(other)
    rows, steps, _ = end(other)
    assert steps == undisturbed["steps"]
    for ours, theirs in zip(rows, undisturbed["rows"], strict=True):
        assert (ours["kind"], ours["step"]) == (theirs["kind"], theirs["step"])
        if ours["kind"] == "train":  # other sums, in float32
            np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-4)


def test_the_exit_code_names_the_signal_and_a_second_one_leaves_at_once(undisturbed, tmp_path, capsys):
    def stopped(arguments):
        raise Stopped("stopped by SIGTERM at step 7, which is saved; the same command goes on from there", 15)

    assert guarded(stopped, []) == 143
    assert "which is saved" in capsys.readouterr().err
    code = (
        "import json, sys, time; from rich.console import Console; from fcn_jax.training.run import config_from_json;"
        "from fcn_jax.training import loop;"
        "loop.evaluate = lambda *args: (print('validating', flush=True), time.sleep(100));"
        "loop.train(config_from_json(json.loads(sys.argv[1])), Console())"
    )
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
def test_a_run_goes_on_where_nobody_can_read_what_it_says(where, tmp_path):
    config = in_folder(tmp_path)
    command = [sys.executable, "train.py", "shapes", "--run", config.run, "--data.cache-dir", config.data.cache_dir]
    sizes = "--data.shapes-size 32 32 --data.shapes-count 16 --model.width 0.03 --model.encoder vgg11 --devices 1"
    sizes += " --model.fc-features 8 --model.fc6-kernel 1 --train.batch-size 4 --train.steps 6 --train.eval-every 1"
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe, open("/dev/full", "w") as full:
        out = pipe if where == "a closed pipe" else full
        done = subprocess.run(
            [*command, *sizes.split()],
            cwd=Path(__file__).parents[2],
            env=environment(),
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert (done.returncode, done.stderr) == (0, "")
    assert [row["step"] for row in RunFolder(config.run).rows() if row["kind"] == "val"] == [4, 6]


def test_signals_to_all_processes_of_a_job_stop_the_run_alone(undisturbed, tmp_path):
    config = in_folder(tmp_path, workers=2)
    code = (
        "import json, sys, time; from rich.console import Console; from fcn_jax.training.run import config_from_json;"
        "from fcn_jax.cli.process import guarded; from fcn_jax.data import pipeline;"
        "from fcn_jax.training import loop\n"
        "iterate = pipeline._iterate\n"
        "def noting(*args):\n"
        "    print('starting workers' if args[2:] == (2,) else '', flush=True)\n"
        "    return iterate(*args)\n"
        "pipeline._iterate = noting\n"
        "run = lambda _: loop.train(config_from_json(json.loads(sys.argv[1])), Console())\n"
        "if __name__ == '__main__': sys.exit(guarded(run, []))"
    )
    process = in_process(code, config, start_new_session=True)
    for line in process.stdout:
        if b"starting workers" in line:
            break
    time.sleep(1)  # they import what they need
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143 and b"stopped by SIGTERM at step" in errors, errors.decode()
    train(config)
    assert_same(config, undisturbed)


def test_a_signal_that_is_ignored_stays_ignored(tmp_path, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        signalling(monkeypatch, loop, "progress_bar", signal.SIGHUP, lambda *args: True)
        train(in_folder(tmp_path, train=replace(TINY.train, steps=1)))
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_process_in_a_runs_folder_is_refused(tmp_path):
    config = in_folder(tmp_path)
    with (
        RunFolder(config.run).locked(),
        pytest.raises(InputError, match=f"being trained by another process .process {os.getpid()} on"),
    ):
        train(config)
    train(replace(config, train=replace(config.train, steps=1)))


def test_the_config_of_a_process_is_the_config(tmp_path):
    config = in_folder(tmp_path)
    assert config_from_json(json.loads(json.dumps(asdict(config)))) == config
