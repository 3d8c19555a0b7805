"""What happens to the process does not happen to the run: a kill, signals, a second process."""

import signal
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_run import KILL, TINY, assert_same, in_folder, in_process, signalling, train

from fcn_jax.cli.process import guarded
from fcn_jax.errors import InputError, Stopped
from fcn_jax.training import loop
from fcn_jax.training.run import RunFolder


def test_a_run_that_is_killed_in_a_save_comes_to_the_same_end(undisturbed, tmp_path):
    config = in_folder(tmp_path, workers=2)
    killed = in_process(KILL, config, "in a save")
    _, errors = killed.communicate(timeout=240)
    assert killed.returncode == -signal.SIGKILL, errors.decode()
    train(config)
    assert_same(config, undisturbed)


@pytest.mark.parametrize(("number", "moment", "saved"), [(signal.SIGTERM, "step", 7), (signal.SIGINT, "validation", 8)])
@pytest.mark.usefixtures("heard")
def test_a_signal_stops_after_the_step_with_the_state_saved(number, moment, saved, undisturbed, tmp_path, monkeypatch):
    config = in_folder(tmp_path)
    with monkeypatch.context() as patched:
        if moment == "step":
            signalling(patched, loop.Logger, "step", number, lambda self, step, *rest: step == 7)
        else:
            calls = []
            signalling(patched, loop, "evaluate", number, lambda *args: calls.append(0) or len(calls) == 2)
        with pytest.raises(Stopped, match=f"stopped by {number.name} at step {saved}, which is saved") as stopped:
            train(config)
    assert stopped.value.number == number
    assert (Path(config.run) / "interrupted" / str(saved)).is_dir()  # a validation is left as it stands
    assert not (Path(config.run) / "checkpoints" / str(saved)).exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert f"resuming {config.run} at step {saved}" in train(config)
    assert_same(config, undisturbed)


def test_the_exit_code_names_the_signal(capsys):
    def stopped(arguments):
        raise Stopped("stopped by SIGTERM at step 7, which is saved; the same command goes on from there", 15)

    assert guarded(stopped, []) == 143
    assert "which is saved" in capsys.readouterr().err


def test_a_signal_that_is_ignored_stays_ignored(tmp_path, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        signalling(monkeypatch, loop, "progress_bar", signal.SIGHUP, lambda *args: True)
        train(in_folder(tmp_path, train=replace(TINY.train, steps=1)))
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_process_in_a_runs_folder_is_refused(tmp_path):
    config = in_folder(tmp_path)
    message = "is being trained by another process; wait for its end"
    with RunFolder(config.run).locked(), pytest.raises(InputError, match=message):
        train(config)
    train(replace(config, train=replace(config.train, steps=1)))
