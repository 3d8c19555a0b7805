"""What happens to the process does not happen to the run: kills, signals, damage, a full disk, a loss of NaN."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from fcn_jax import cli
from fcn_jax.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from fcn_jax.errors import InputError, Stopped
from fcn_jax.models import create_model, init_variables
from fcn_jax.runs import RunFolder, config_from_json
from fcn_jax.training import loop
from fcn_jax.training.checkpoint import Checkpoints, load_variables, restore_newest
from fcn_jax.training.losses import make_loss
from fcn_jax.training.optim import make_optimizer
from fcn_jax.training.step import TrainState, make_train_step, new_state

TINY = Config(
    devices=2,
    model=ModelConfig(name="fcn8s", encoder="vgg11", encoder_norm="batch", width=0.03, fc_features=8, fc6_kernel=1),
    data=DataConfig(shapes_size=(32, 32), shapes_count=16),
    optim=OptimConfig(schedule="poly", lr=0.1),
    train=TrainConfig(batch_size=4, steps=13, eval_every=4 * 4 / 16, log_every=3, eval_batch_size=4),
)  # logged at 3, 4, 6, 8, 9, 12, 13, validated and saved at 4, 8, 12, 13
TIMING = ("images_per_s", "data_wait")


def train(config):
    console = Console(record=True, width=200)
    loop.train(config, console)
    return console.export_text()


def in_folder(folder, name="run", workers=0, **changes):
    data = replace(TINY.data, cache_dir=str(folder / "cache"), workers=workers)
    return replace(TINY, run=str(folder / name), data=data, **changes)


def arrays(config):
    """Return everything that the newest checkpoint holds."""
    trainer = loop.make_trainer(config, resuming=True)
    restored = restore_newest(RunFolder(config.run).checkpoints, trainer.state)
    return restored.step, jax.tree.map(np.asarray, restored.state)


def end(config):
    """Return what a run came to: rows without times, the kept steps, the best one."""
    folder = RunFolder(config.run)
    rows = [{k: v for k, v in row.items() if k not in TIMING} for row in folder.rows()]
    checkpoints = Checkpoints(folder.checkpoints)
    best = checkpoints.best_step()
    checkpoints.close()
    assert not folder.checkpoints.with_name("interrupted").exists()
    return rows, sorted(path.name for path in folder.checkpoints.iterdir()), best


def assert_same(config, undisturbed):
    (rows, steps, best), (step, state) = end(config), arrays(config)
    assert rows == undisturbed["rows"]
    assert (steps, best, step) == (undisturbed["steps"], undisturbed["best"], 13)
    jax.tree.map(np.testing.assert_array_equal, state, undisturbed["state"])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    config = in_folder(tmp_path_factory.mktemp("undisturbed"))
    train(config)
    rows, steps, best = end(config)
    assert [(row["kind"], row["step"]) for row in rows] == [
        *[("train", 3), ("train", 4), ("val", 4), ("train", 6), ("train", 8), ("val", 8), ("train", 9)],
        *[("train", 12), ("val", 12), ("train", 13), ("val", 13)],
    ]
    return {"rows": rows, "steps": steps, "best": best, "state": arrays(config)[1]}


# --- kills

KILL = """
import dataclasses, json, os, signal, sys
import orbax.checkpoint._src.path.atomicity as atomicity
from rich.console import Console
from fcn_jax.runs import RunFolder, config_from_json
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


def environment():
    compiled = jax.config.jax_compilation_cache_dir
    return {**os.environ, "JAX_ENABLE_X64": "1", "JAX_COMPILATION_CACHE_DIR": compiled}


def in_process(code, config, *arguments, **options):
    command = [sys.executable, "-c", code, json.dumps(asdict(config)), *arguments]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


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


@pytest.fixture
def heard():
    """Signals as a terminal's foreground has them: nohup and shells' background jobs ignore some."""
    before = {
        number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def signalling(monkeypatch, owner, name, number, when):
    original = getattr(owner, name)

    def instead(*args, **kwargs):
        if when(*args):
            signal.raise_signal(number)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, instead)


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

    assert cli.guarded(stopped, []) == 143
    assert "which is saved" in capsys.readouterr().err
    code = (
        "import json, sys, time; from rich.console import Console; from fcn_jax.runs import config_from_json;"
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
            cwd=Path(__file__).parents[1],
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
        "import json, sys, time; from rich.console import Console; from fcn_jax.runs import config_from_json;"
        "from fcn_jax import cli; from fcn_jax.data import pipeline; from fcn_jax.training import loop\n"
        "iterate = pipeline._iterate\n"
        "def noting(*args):\n"
        "    print('starting workers' if args[2:] == (2,) else '', flush=True)\n"
        "    return iterate(*args)\n"
        "pipeline._iterate = noting\n"
        "run = lambda _: loop.train(config_from_json(json.loads(sys.argv[1])), Console())\n"
        "if __name__ == '__main__': sys.exit(cli.guarded(run, []))"
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


# --- damage


def _state(step):
    return TrainState(
        step=jnp.asarray(step, jnp.int32),
        params={"w": jnp.arange(50.0) + step},
        batch_stats={"mean": jnp.full((3,), float(step))},
        opt_state=({"v": jnp.full((3,), -float(step))},),
        key=jax.random.key_data(jax.random.key(step)),
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    checkpoints = Checkpoints(folder, keep_last=2)
    for step in (2, 4):
        checkpoints.save(_state(step), {"data": {"step": step}, "unlogged": []}, 0.5)
    checkpoints.close()
    return folder


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


DAMAGES = {"flipped": flip, "cut short": lambda path: os.truncate(path, path.stat().st_size // 2), "gone": Path.unlink}


@pytest.mark.parametrize("damage", DAMAGES)
def test_whatever_file_of_the_newest_checkpoint_is_damaged_the_state_is_one_that_was_saved(damage, saved, tmp_path):
    files = [path.relative_to(saved) for path in sorted((saved / "4").rglob("*")) if path.is_file()]
    files = [path for path in files if (saved / path).stat().st_size]
    older = 0
    for number, file in enumerate(files):
        folder = tmp_path / str(number) / "checkpoints"
        shutil.copytree(saved, folder)
        DAMAGES[damage](folder / file)
        step, state, progress, _, notes = restore_newest(folder, _state(0))
        jax.tree.map(np.testing.assert_array_equal, state, _state(step))
        assert progress == {"data": {"step": step}, "unlogged": []}
        names = sorted(path.name for path in folder.iterdir())
        if step == 4:  # the file says nothing that is needed
            assert names == ["2", "4"] and notes == ()
        else:
            older += 1
            assert names == ["2", "damaged-4"]
            (note,) = notes
            assert str(folder / "damaged-4") in note and "going on from step 2" in note
    assert older >= 5 and len(files) > 20


def test_a_bit_of_an_array_that_the_format_does_not_watch_is_noticed(tmp_path):
    folder = tmp_path / "checkpoints"
    weights = np.random.default_rng(0).normal(size=(64, 1000)).astype(np.float32)  # too many to be kept in an index
    states = {step: _state(step).replace(params={"w": jnp.asarray(weights) + step}) for step in (2, 4)}
    checkpoints = Checkpoints(folder)
    for state in states.values():
        checkpoints.save(state, {"data": {}, "unlogged": []}, 0.5)
    checkpoints.close()
    shutil.copytree(folder, tmp_path / "whole")
    path = max((path for path in (folder / "4").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = path.read_bytes()
    noticed = []
    for number in range(0, len(content), len(content) // 20):
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "whole", folder)
        path.write_bytes(content[:number] + bytes([content[number] ^ 1]) + content[number + 1 :])
        restored = restore_newest(folder, states[2])
        jax.tree.map(np.testing.assert_array_equal, restored.state, states[restored.step])
        noticed += restored.notes
    assert sum("variables are not what was saved" in note for note in noticed) >= 15


def test_without_a_good_checkpoint_nothing_is_started_and_nothing_touched(saved, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    for step in (2, 4):
        shutil.rmtree(folder / str(step) / "training")
    with pytest.raises(InputError, match="no checkpoint in .* can be read .*4: .*2: .*--run"):
        restore_newest(folder, _state(0))
    assert sorted(path.name for path in folder.iterdir()) == ["2", "4"]
    for path in (folder / "4" / "variables").rglob("d/*"):
        flip(path)
    like = {"params": _state(0).params, "batch_stats": _state(0).batch_stats}
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), like)
    with pytest.raises(InputError, match="4 is damaged"):
        load_variables(folder, "4", like)


def test_a_score_that_was_changed_is_noticed(saved, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    (folder / "4" / "metrics" / "metrics").write_text('{"mean_iu": 0.9}')
    restored = restore_newest(folder, _state(0))
    assert restored.step == 2 and "damaged-4: metrics are not what was saved" in restored.notes[0]


@pytest.mark.parametrize("damage", [flip, Path.unlink, lambda path: path.write_text('{"mean_iu": "high"}')])
def test_an_older_checkpoint_without_its_score_does_not_stand_in_the_way(damage, saved, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    damage(folder / "2" / "metrics" / "metrics")
    restored = restore_newest(folder, _state(0))
    assert restored.step == 4 and "damaged-2: its score is lost" in restored.notes[0]
    checkpoints = Checkpoints(folder)
    checkpoints.save(_state(6), {"data": {}, "unlogged": []}, 0.7)
    checkpoints.save(_state(8), {"data": {}, "unlogged": []}, 0.6)
    checkpoints.close()
    assert load_variables(folder, "best", {"params": _state(0).params, "batch_stats": _state(0).batch_stats})[1] == 6


@pytest.mark.usefixtures("heard")
def test_a_run_with_a_damaged_checkpoint_comes_to_the_same_end(undisturbed, tmp_path, monkeypatch):
    config = in_folder(tmp_path)
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        signalling(patched, loop.Logger, "step", signal.SIGTERM, lambda self, step, *rest: step == 11)
        train(config)
    folder = Path(config.run)
    shutil.rmtree(folder / "interrupted" / "11" / "progress")
    shutil.rmtree(folder / "checkpoints" / "8" / "variables")
    text = train(config)
    assert "damaged-11" in text and "damaged-8" in text and "at step 4" in text
    shutil.rmtree(folder / "checkpoints" / "damaged-8")
    shutil.rmtree(folder / "interrupted", ignore_errors=True)
    assert_same(config, undisturbed)
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(InputError, match="several validations and no checkpoint"):
        train(config)


# --- places that cannot be written


def test_a_save_that_fails_is_named_and_what_was_saved_is_good(undisturbed, tmp_path, monkeypatch):
    config = in_folder(tmp_path)
    checkpoints, aside = Path(config.run) / "checkpoints", tmp_path / "aside"

    def take_away(self, step, *rest):
        if step == 7:
            checkpoints.rename(aside)
            checkpoints.symlink_to("/proc")  # where nobody may write, root included
        return original(self, step, *rest)

    original = loop.Logger.step
    with monkeypatch.context() as patched, pytest.raises(InputError, match="could not be saved in .*checkpoints"):
        patched.setattr(loop.Logger, "step", take_away)
        train(config)
    checkpoints.unlink()
    aside.rename(checkpoints)
    assert "at step 4" in train(config)
    assert_same(config, undisturbed)


def test_a_full_disk_is_one_line_and_what_was_saved_is_good(undisturbed, tmp_path):
    config = in_folder(tmp_path)
    code = (
        "import json, resource, sys; from rich.console import Console; from fcn_jax.runs import config_from_json;"
        "from fcn_jax import cli; from fcn_jax.training import loop; original = loop.Logger.step\n"
        "def step(self, step, *rest):\n"
        "    if step == 7: resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), -1))\n"
        "    return original(self, step, *rest)\n"
        "loop.Logger.step = step\n"
        "run = lambda _: loop.train(config_from_json(json.loads(sys.argv[1])), Console())\n"
        "sys.exit(cli.guarded(run, []))"
    )
    for limit in ("10", "4096"):  # metrics.jsonl is stopped by the one, a checkpoint by the other
        process = in_process(code, config, limit)
        _, errors = process.communicate(timeout=120)
        lines = [line for line in errors.decode().splitlines() if not line.startswith(("W0", "I0", "E0"))]
        assert process.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: "), errors.decode()
        assert "saved before" in lines[0] and str(config.run) in lines[0]
    assert "at step 4" in train(config)
    assert_same(config, undisturbed)


def test_a_second_process_in_a_runs_folder_is_refused(tmp_path):
    config = in_folder(tmp_path)
    with (
        RunFolder(config.run).locked(),
        pytest.raises(InputError, match=f"being trained by another process .process {os.getpid()} on"),
    ):
        train(config)
    train(replace(config, train=replace(config.train, steps=1)))


# --- divergence


def _step(**options):
    model = create_model("fcn8s", 3, encoder="vgg11", encoder_norm="batch", width=0.03, fc_features=8, fc6_kernel=1)
    variables = init_variables(model, jax.random.key(0), (32, 32))
    optimizer = make_optimizer(variables["params"], OptimConfig(schedule="poly"), 10)
    step = jax.jit(make_train_step(model, optimizer, make_loss("softmax"), None, **options))
    state = new_state(variables, optimizer, 0)
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    return step, state, {"image": images, "label": np.random.default_rng(1).integers(0, 3, (2, 32, 32))}


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_is_not_finite_changes_counters_alone(value, accumulate):
    step, state, batch = _step(accumulate=accumulate)
    state, sums = step(state, batch)
    assert bool(sums.finite)
    bad = {**batch, "image": batch["image"].copy()}
    bad["image"][1, 3, 4] = value
    if value == 1e30:  # finite sums, and squares that are not
        state = state.replace(params=jax.tree.map(lambda x: x * 1e30, state.params))
    after, sums = step(state, bad)
    assert not bool(sums.finite)
    for name in ("params", "batch_stats"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(state, name))
    assert int(after.step) == int(state.step) + 1
    counters, momenta = [], []
    for old, new in zip(jax.tree.leaves(state.opt_state), jax.tree.leaves(after.opt_state), strict=True):
        if jnp.issubdtype(old.dtype, jnp.integer):
            counters.append(int(new) - int(old))
        else:
            momenta.append(np.array_equal(new, old))
    assert counters and set(counters) == {1} and momenta and all(momenta)


def test_a_loss_of_nan_names_the_step_and_the_images_and_can_be_skipped(tmp_path, monkeypatch):
    config = in_folder(tmp_path)
    make = loop.make_trainer

    def poisoned(*args, **kwargs):
        trainer = make(*args, **kwargs)
        taken = []

        def place(batch):
            taken.append(0)
            image = batch["image"].astype(np.float32)
            return trainer.parallel.place_batch({**batch, "image": image * np.nan if len(taken) == 6 else image})

        return replace(trainer, parallel=replace(trainer.parallel, place_batch=place))

    monkeypatch.setattr(loop, "make_trainer", poisoned)
    with pytest.raises(InputError, match=r"step 6: loss nan .* learning rate 0\.0\d+, on 0000\d\d, .*skip"):
        train(config)
    monkeypatch.setattr(loop, "make_trainer", lambda *args, **kwargs: make(*args, **kwargs))
    skipping = in_folder(tmp_path, "skipping", train=replace(TINY.train, nonfinite="skip"))
    monkeypatch.setattr(loop, "make_trainer", poisoned)
    train(skipping)
    rows = [row for row in RunFolder(skipping.run).rows() if row["kind"] == "train"]
    assert {row["step"]: row["skipped"] for row in rows} == {3: 0, 4: 0, 6: 1, 8: 0, 9: 0, 12: 0, 13: 0}
    assert all(np.isfinite(row["loss"]) for row in rows)
    monkeypatch.undo()
    # The run that stopped goes on, from what it had saved, when told to skip.
    assert "at step 4" in train(replace(config, train=replace(config.train, nonfinite="skip")))


def test_steps_that_are_skipped_without_end_stop_the_run(tmp_path, monkeypatch):
    train_config = replace(TINY.train, nonfinite="skip", steps=30, eval_every=30 * 4 / 16)
    config = in_folder(tmp_path, train=train_config)
    make = loop.make_trainer

    def poisoned(*args, **kwargs):
        trainer = make(*args, **kwargs)

        def place(batch):
            return trainer.parallel.place_batch({**batch, "image": batch["image"].astype(np.float32) * np.nan})

        return replace(trainer, parallel=replace(trainer.parallel, place_batch=place))

    monkeypatch.setattr(loop, "make_trainer", poisoned)
    with pytest.raises(InputError, match="step 20: loss nan"):
        train(config)
    assert [row["skipped"] for row in RunFolder(config.run).rows()] == [3] * 6


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_gives_no_name_is_one_line(number, capsys):
    def failing(arguments):
        raise OSError(number, os.strerror(number))

    assert cli.guarded(failing, []) == 2
    assert capsys.readouterr().err == f"error: a file: {os.strerror(number)}; check the path and the disk\n"


def test_the_config_of_a_process_is_the_config(tmp_path):
    config = in_folder(tmp_path)
    assert config_from_json(json.loads(json.dumps(asdict(config)))) == config
