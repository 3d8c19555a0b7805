"""A run survives a kill, signals and a second process."""

import signal
from dataclasses import replace

import pytest
from tiny_run import KILL, TINY, assert_same, check_stop, in_folder, in_process, signalling, train

from fcn_jax.errors import InputError
from fcn_jax.training import loop
from fcn_jax.training.run import RunFolder


def test_a_run_killed_during_a_save_resumes_to_the_same_result(undisturbed, tmp_path):
    config = in_folder(tmp_path, workers=2)
    killed = in_process(KILL, config, "in a save")
    _, errors = killed.communicate(timeout=240)
    assert killed.returncode == -signal.SIGKILL, errors.decode()
    train(config)
    assert_same(config, undisturbed)


MOMENTS = [(signal.SIGTERM, "step", 7), pytest.param(signal.SIGINT, "validation", 8, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("number", "moment", "saved"), MOMENTS)
@pytest.mark.usefixtures("heard")
def test_a_signal_stops_after_the_step_and_saves_the_state(number, moment, saved, undisturbed, tmp_path, monkeypatch):
    check_stop(number, moment, saved, undisturbed, tmp_path, monkeypatch)


def test_an_ignored_signal_stays_ignored(tmp_path, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        signalling(monkeypatch, loop, "progress_bar", signal.SIGHUP, lambda *args: True)
        train(in_folder(tmp_path, train=replace(TINY.train, steps=1)))
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_process_in_a_run_folder_is_rejected(tmp_path):
    config = in_folder(tmp_path)
    message = "is being trained by another process; wait until it ends"
    with RunFolder(config.run).locked(), pytest.raises(InputError, match=message):
        train(config)
    train(replace(config, train=replace(config.train, steps=1)))
