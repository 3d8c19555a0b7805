"""One run in two processes: killed, frozen, signalled, on a mesh, and with different configs."""

import os
import shutil
import signal

import pytest
from launch import address, assert_equal_runs, assert_lost_another, finish, finish_after_a_kill, start, train

from fcn_jax.training.run import open_run

# Signals one of the processes; all of them then stop.
ASKED = """
import signal, sys
from fcn_jax.cli.process import guarded
from fcn_jax.cli.train import main
from fcn_jax.data.pipeline import TrainIterator
take = TrainIterator.__next__
def asking(self):
    if self._step == 3:
        signal.raise_signal(signal.SIGTERM)
    return take(self)
TrainIterator.__next__ = asking
sys.argv.pop(1)
sys.exit(guarded(main, sys.argv[1:]))
"""


def test_a_killed_process_ends_the_other_and_the_run_resumes_to_the_same_result(reference, tmp_path):
    run = tmp_path / "run"
    code, printed, seconds = finish_after_a_kill(run)
    assert seconds < 60
    assert_lost_another(code, printed)
    assert open_run(run, "last").step == 3
    codes, outputs = train(run)
    assert codes == [0, 0], outputs
    assert "resuming" in outputs[0] and "resuming" not in outputs[1]
    assert "best checkpoint" in outputs[0] and "best checkpoint" not in outputs[1]
    assert len(list((run / "events").iterdir())) == 2  # by the first process, before and after
    assert_equal_runs(run, reference)


def test_one_process_resumes_a_checkpoint_of_two(reference, tmp_path):
    run = tmp_path / "run"
    finish_after_a_kill(run)
    codes, outputs = train(run, count=1)
    assert codes == [0] and "resuming" in outputs[0], outputs
    assert_equal_runs(run, reference)


def test_two_processes_on_a_mesh_resume_a_checkpoint_of_one(reference, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    shutil.rmtree(run / "checkpoints/6")
    codes, outputs = train(run, "--parallel", "mesh")
    assert codes == [0, 0] and "resuming" in outputs[0], outputs
    assert_equal_runs(run, reference)


def test_a_signal_to_one_process_stops_all_at_the_same_step(reference, tmp_path):
    run = tmp_path / "run"
    codes, outputs = train(run, code=ASKED)
    assert codes == [143, 143], outputs
    (step,) = (int(path.name) for path in (run / "interrupted").iterdir())
    assert step in (4, 5) and all(f"stopped by SIGTERM at step {step}, which is saved" in out for out in outputs)
    codes, outputs = train(run)
    assert codes == [0, 0] and f"at step {step}" in " ".join(outputs[0].split()), outputs
    assert_equal_runs(run, reference)
    assert not (run / "interrupted").exists()


def test_processes_with_different_configs_stop_and_name_the_difference(tmp_path):
    codes, outputs = train(tmp_path / "run", each=((), ("--optim.lr", "0.5")))
    assert codes == [2, 2]
    for printed in outputs:
        assert "the processes differ in optim.lr" in printed and "Traceback" not in printed
    assert not (tmp_path / "run").exists()


AGREEING = """
import sys, time
import jax
import numpy as np
from fcn_jax.errors import InputError
from fcn_jax.training import distributed as d
from fcn_jax.devices import make_mesh, pick_devices
from fcn_jax.training.run import open_run

address, index, run = sys.argv[1], int(sys.argv[2]), sys.argv[3]
with d.processes(address, 2, index):
    assert d.is_writer() == (index == 0) and d.share() == {"process_index": index, "process_count": 2}
    # beyond 32 bits, where float32 and int32 would both be wrong
    values = np.array([[2**40 + index, -7]])
    np.testing.assert_array_equal(d.gather(values), [[[2**40, -7]], [[2**40 + 1, -7]]])
    assert d.from_writer([None, 5][index]) is None and d.from_writer([0, None][index]) == 0
    devices = pick_devices(2)
    assert [device.process_index for device in devices] == [0, 1]
    for count in (3, 5):
        try:
            pick_devices(count)
        except InputError as error:
            assert "a multiple of 2 processes" in str(error)
        else:
            raise AssertionError("an uneven number of devices was accepted")
    stop = d.Agreement(make_mesh(pick_devices(None)))
    # asked for by process 1 at the second call, known to both at the third
    assert [stop(index == 1 and call == 1) for call in range(4)] == [False, False, True, False]
    # as --init-from does: on a local device of each process
    trained = open_run(run)
    assert len(set(d.gather(d.digest(trained.variables)).tolist())) == 1
    order = []
    d.writer_first(lambda: order.append(time.time()))
    first, second = d.gather(int(order[0] * 1e6)).tolist()
    assert first < second
    def load():
        if index == 1:
            raise InputError("no images here; correct --data.dir")
    try:
        d.together(load)
    except d.AgreedError as error:
        assert str(error) == "process 1: no images here; correct --data.dir"
    else:
        raise AssertionError("the error of the other process was not raised")
    print("agreed", flush=True)
    if index == 1:
        raise InputError("a mistake of this process alone")
    jax.block_until_ready(d.gather(0))  # the other process never takes part
"""


def test_processes_agree_and_exit_together(reference):
    where = address()
    started = [start([where, index, reference], 2, AGREEING) for index in range(2)]
    codes, outputs = finish(started)
    assert all("agreed" in printed for printed in outputs), outputs
    assert_lost_another(codes[0], outputs[0])
    assert codes[1] == 2 and outputs[1].splitlines()[-1] == "error: a mistake of this process alone"


WAITING = """
import sys
from fcn_jax.training import distributed as d
with d.processes(sys.argv[1], 2, int(sys.argv[2])):
    for _ in range(1_000_000):
        print(d.gather(0).sum(), flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("index", [0, 1])
def test_the_other_process_exits_within_a_minute_of_a_kill_or_freeze(index, number):
    where = address()
    started = [start([where, each, ""], 1, WAITING) for each in range(2)]
    other = started[1 - index]
    try:
        assert other.stdout.readline()
        os.kill(started[index].pid, number)
        printed = other.communicate(timeout=60)[0]
        assert_lost_another(other.returncode, printed)
    finally:
        for process in started:
            process.kill()
        finish(started)
