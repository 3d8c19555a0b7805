"""One run in two processes: real ones, started through train.py, on this machine's CPU."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import fcn_jax
from fcn_jax.config import Config, DataConfig
from fcn_jax.data import datasets
from fcn_jax.data.io import encode_label
from fcn_jax.data.pipeline import make_eval_batches
from fcn_jax.data.voc import palette
from fcn_jax.errors import InputError
from fcn_jax.evaluation.evaluate import evaluate, make_predictor
from fcn_jax.training import distributed
from fcn_jax.training import run as runs
from fcn_jax.training.distributed import digest, from_writer, gather, processes, together, writer_first
from fcn_jax.training.trained import open_trained

ROOT = Path(__file__).parents[2]
SETTINGS = (
    "--model.name fcn8s --model.encoder vgg11 --model.encoder-norm batch --model.width 0.03 --model.fc-features 8 "
    "--model.fc6-kernel 1 --data.shapes-size 32 32 --data.shapes-count 16 --train.batch-size 8 --train.steps 6 "
    "--train.eval-every 1.5 --train.log-every 1 --train.eval-batch-size 4 --optim.warmup-steps 0"
).split()
# The sums over devices are added in another order where some of them come over the network: gloo against XLA's own.
LAST_BITS = 1e-6
# By the signs of life, or by an error of the collective, where it has one; whichever comes first.
LOST = "^error: .* of the run (ended|has given no sign of life).*; start all of them again, and they go on from"
# Dies in the middle of a run, and nothing of it gets the chance to say so.
KILLED = """
import os, signal, sys, time
from pathlib import Path
from fcn_jax import cli
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
sys.exit(cli.guarded(cli.run_train, sys.argv[1:]))
"""


# Asks one of the processes to stop, which all of them then do.
ASKED = """
import signal, sys
from fcn_jax import cli
from fcn_jax.data.pipeline import TrainIterator
take = TrainIterator.__next__
def asking(self):
    if self._step == 3:
        signal.raise_signal(signal.SIGTERM)
    return take(self)
TrainIterator.__next__ = asking
sys.argv.pop(1)
sys.exit(cli.guarded(cli.run_train, sys.argv[1:]))
"""


def _environment(devices):
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    compiled = jax.config.jax_compilation_cache_dir
    cache = {"JAX_COMPILATION_CACHE_DIR": compiled, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), **cache}


def _address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def _start(arguments, devices, code=None):
    command = [sys.executable, *(["train.py"] if code is None else ["-c", code]), *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, env=_environment(devices), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def _launch(run, *extra, count=2, each=((), ()), code=None):
    """Start a run in ``count`` processes that share four devices, the last of them through ``code`` if given."""
    address, started = _address(), []
    for index in range(count):
        arguments = ["shapes", "--run", run, "--data.cache-dir", run.parent / "cache", *SETTINGS, *extra, *each[index]]
        if count > 1:
            arguments += ["--distributed", address, "--num-processes", count, "--process-id", index]
        other = code is not None and index == count - 1
        started.append(_start([run, *arguments] if other else arguments, 4 // count, code if other else None))
    return started


def _finish(started, timeout=240):
    """Return exit codes and what was printed."""
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [process.returncode for process in started], outputs


def _train(*arguments, **options):
    return _finish(_launch(*arguments, **options))


def _rows(run, kind):
    return [row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if row["kind"] == kind]


def _parameters(run):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(open_trained(run, "last").variables)])


def _check_equal(run, reference):
    losses, expected = ([(row["step"], row["loss"]) for row in _rows(which, "train")] for which in (run, reference))
    np.testing.assert_allclose(losses, expected, rtol=LAST_BITS)
    assert [row["step"] for row in _rows(run, "val")] == [3, 6]
    for row, other in zip(_rows(run, "val"), _rows(reference, "val"), strict=True):
        assert row["confusion"] == other["confusion"]
    found, expected = _parameters(run), _parameters(reference)
    assert np.linalg.norm(found - expected) <= LAST_BITS * np.linalg.norm(expected)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The run in one process."""
    run = tmp_path_factory.mktemp("reference") / "run"
    codes, outputs = _train(run, count=1)
    assert codes == [0], outputs
    return run


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run in two processes, the second of which is killed after the first checkpoint.

    Its folder, the first process's exit code, what that printed, and the seconds by which it outlived the other.
    """
    run = tmp_path_factory.mktemp("killed") / "run"
    started = _launch(run, code=KILLED)
    try:
        assert started[1].wait(240) == -9
    finally:
        if started[1].poll() is None:
            for process in started:
                process.kill()
    before = time.monotonic()
    codes, outputs = _finish(started)
    return run, codes[0], outputs[0], time.monotonic() - before


def test_a_killed_process_ends_the_others_within_a_minute_and_leaves_a_checkpoint(killed):
    run, code, printed, seconds = killed
    assert code == 1 and seconds < 60
    assert re.search(LOST, printed.splitlines()[-1]) and "Traceback" not in printed
    assert open_trained(run, "last").step == 3


def test_started_again_two_processes_end_as_one_does(killed, reference, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(killed[0], run)
    codes, outputs = _train(run)
    assert codes == [0, 0], outputs
    assert "resuming" in outputs[0] and "resuming" not in outputs[1]
    assert "best checkpoint" in outputs[0] and "best checkpoint" not in outputs[1]
    assert len(list((run / "events").iterdir())) == 2  # of the first process, before and after
    _check_equal(run, reference)


def test_one_process_goes_on_from_what_two_have_saved(killed, reference, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(killed[0], run)
    codes, outputs = _train(run, count=1)
    assert codes == [0] and "resuming" in outputs[0], outputs
    _check_equal(run, reference)


def test_two_processes_on_a_mesh_go_on_from_what_one_has_saved(reference, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    shutil.rmtree(run / "checkpoints/6")
    codes, outputs = _train(run, "--parallel", "mesh")
    assert codes == [0, 0] and "resuming" in outputs[0], outputs
    _check_equal(run, reference)


def test_a_signal_to_one_process_stops_all_at_one_step(reference, tmp_path):
    run = tmp_path / "run"
    codes, outputs = _train(run, code=ASKED)
    assert codes == [143, 143], outputs
    (step,) = (int(path.name) for path in (run / "interrupted").iterdir())
    assert step in (4, 5) and all(f"stopped by SIGTERM at step {step}, which is saved" in out for out in outputs)
    codes, outputs = _train(run)
    assert codes == [0, 0] and f"at step {step}" in " ".join(outputs[0].split()), outputs
    _check_equal(run, reference)
    assert not (run / "interrupted").exists()


def test_processes_that_were_not_started_alike_stop_with_what_differs(tmp_path):
    codes, outputs = _train(tmp_path / "run", each=((), ("--optim.lr", "0.5")))
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
from fcn_jax.training.devices import make_mesh, pick_devices
from fcn_jax.training.trained import open_trained

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
            raise AssertionError("an uneven number of devices was taken")
    stop = d.Agreement(make_mesh(pick_devices(None)))
    # asked for by process 1 at the second call, known to both at the third
    assert [stop(index == 1 and call == 1) for call in range(4)] == [False, False, True, False]
    # as --init-from does; on a device of each process's own
    trained = open_trained(run)
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
        raise AssertionError("the mistake of the other process went by")
    print("agreed", flush=True)
    if index == 1:
        raise InputError("a mistake of this process alone")
    jax.block_until_ready(d.gather(0))  # in which the other never takes part
"""


def test_processes_agree_and_end_together(reference):
    address = _address()
    started = [_start([address, index, reference], 2, AGREEING) for index in range(2)]
    codes, outputs = _finish(started)
    assert all("agreed" in printed for printed in outputs), outputs
    assert codes == [1, 2]
    assert re.search(LOST, outputs[0].splitlines()[-1]) and "Traceback" not in outputs[0]
    assert outputs[1].splitlines()[-1] == "error: a mistake of this process alone"


WAITING = """
import sys
from fcn_jax.training import distributed as d
with d.processes(sys.argv[1], 2, int(sys.argv[2])):
    for _ in range(1_000_000):
        print(d.gather(0).sum(), flush=True)
"""


def test_a_killed_first_process_ends_the_others():
    address = _address()
    started = [_start([address, index], 1, WAITING) for index in range(2)]
    try:
        assert started[1].stdout.readline()
        started[0].kill()
        printed = started[1].communicate(timeout=60)[0]
    finally:
        _finish(started)
    # With process 0 JAX's service is gone, and JAX may abort before a line of ours.
    # Ours where it is quicker, otherwise the words with which JAX aborts.
    ours = started[1].returncode == 1 and "start all of them again" in printed
    assert ours or (started[1].returncode == -6 and "another task died" in printed), started[1].returncode


def test_an_address_where_nobody_listens_is_one_line(monkeypatch):
    monkeypatch.setattr(distributed, "_START", 0.2)
    with pytest.raises(InputError, match="did not find each other"), processes(_address(), 2, 1):
        pass


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((None, 2, None), "--distributed HOST:PORT"),
        (("auto", None, 1), "--distributed HOST:PORT"),
        (("somewhere", 2, 0), "auto or HOST:PORT, got somewhere"),
        (("host:99999", 2, 0), "a port is in"),
        (("host:1234", 2, None), "needs --num-processes and --process-id"),
        (("host:1234", 2, 2), "--num-processes 2 --process-id 2"),
        (("host:1234", 0, 0), "--num-processes 0 --process-id 0"),
    ],
)
def test_a_launch_that_makes_no_sense_is_one_line(given, message):
    with pytest.raises(InputError, match=message), processes(*given):
        pass


def test_a_run_folder_that_is_not_shared_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "_SHOWN_AFTER", 0.2)
    folder = runs.RunFolder(tmp_path / "run", writes=False)
    with pytest.raises(InputError, match="on a disk that all share"):
        folder.start(Config(), runs.DatasetInfo("folder", ("a",), ((0, 0, 0),)))
    folder.append({"step": 1})
    assert not folder.path.exists()


def test_auto_where_nothing_tells_a_process_its_place_is_one_line(tmp_path):
    process = _start(["--run", tmp_path / "run", "--distributed", "auto"], 1)
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 2 and "no SLURM, TPU pod, Kubernetes or Open MPI" in printed
    assert "Traceback" not in printed


def test_one_process_needs_nobody():
    with processes(None):
        assert gather([1, 2]).tolist() == [[1, 2]] and from_writer(None) is None
        assert together(lambda: 3) == writer_first(lambda: 3) == 3
    with pytest.raises(KeyError), processes(None):
        raise KeyError("goes its usual way")


def test_a_digest_tells_one_bit():
    tree = {"a": np.zeros((2, 3), np.float32), "b": np.ones(2, np.float32)}
    other = {**tree, "b": np.nextafter(tree["b"], np.float32(2))}
    assert digest(tree) == digest(jax.tree.map(jax.numpy.asarray, tree)) != digest(other)


@pytest.mark.parametrize("count", [2, 3])
def test_the_shares_of_an_evaluation_add_up_to_the_whole(count):
    sizes = [(20, 30), (33, 40), (20, 30), (64, 64), (40, 33)]
    rng = np.random.default_rng(0)
    records = [
        {
            "image": encode_label(rng.integers(0, 256, (*size, 3), dtype=np.uint8)),
            "label": encode_label(rng.integers(0, 4, size).astype(np.uint8)),
            "name": str(number),
        }
        for number, size in enumerate(sizes)
    ]
    split = datasets.Split("made", "up", ("a", "b", "c", "d"), palette(4), records)
    model = fcn_jax.create_model("fcn32s", 4, encoder="vgg11", width=0.03, fc_features=8, fc6_kernel=1)
    variables = fcn_jax.init_variables(model, jax.random.key(0))
    predict = make_predictor(model, "imagenet")

    def score(**share):
        batches = make_eval_batches(split, DataConfig(eval_multiple=64), 2, **share)
        return evaluate(predict, variables, batches, 4)

    whole = score()
    parts = [score(process_index=index, process_count=count) for index in range(count)]
    np.testing.assert_array_equal(sum(part.confusion for part in parts), whole.confusion)
    assert [part.images for part in parts] == [len(sizes[index::count]) for index in range(count)]
    assert score(process_index=7, process_count=8).images == 0
