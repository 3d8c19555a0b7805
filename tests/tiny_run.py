"""A run of seconds that tests disturb, and its undisturbed result."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from fcn_jax.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from fcn_jax.errors import Stopped
from fcn_jax.step import TrainState
from fcn_jax.training import loop
from fcn_jax.training.checkpoint import Checkpoints, restore_newest
from fcn_jax.training.logging import TIMES
from fcn_jax.training.run import RunFolder

TINY = Config(
    devices=2,
    model=ModelConfig(name="fcn8s", encoder="vgg11", encoder_norm="batch", width=0.03, fc_features=8, fc6_kernel=1),
    data=DataConfig(shapes_size=(32, 32), shapes_count=16),
    optim=OptimConfig(schedule="poly", lr=0.1),
    train=TrainConfig(batch_size=4, steps=13, eval_every=4 * 4 / 16, log_every=3, eval_batch_size=4),
)  # logged at 3, 4, 6, 8, 9, 12, 13, validated and saved at 4, 8, 12, 13
TIMING = ("images_per_s", *TIMES)


def train(config):
    console = Console(record=True, width=200)
    loop.train(config, console)
    return console.export_text()


def saved_state(step):
    """Return a small state whose values depend on its step."""
    return TrainState(
        step=jnp.asarray(step, jnp.int32),
        params={"w": jnp.arange(float(step), step + 50.0)},
        batch_stats={"mean": jnp.full((3,), float(step))},
        opt_state=({"v": jnp.full((3,), -float(step))},),
        key=jax.random.key_data(jax.random.key(step)),
    )


def saved_variables():
    state = saved_state(0)
    return {"params": state.params, "batch_stats": state.batch_stats}


def place_batches(monkeypatch, place):
    """Place batches on the devices by ``place(batch, original function)``."""
    make = loop.make_trainer

    def made(*args, **kwargs):
        trainer = make(*args, **kwargs)
        right = trainer.parallel.place_batch
        return replace(trainer, parallel=replace(trainer.parallel, place_batch=lambda batch: place(batch, right)))

    monkeypatch.setattr(loop, "make_trainer", made)


def in_folder(folder, name="run", workers=0, **changes):
    data = replace(TINY.data, cache_dir=str(folder / "cache"), workers=workers)
    return replace(TINY, run=str(folder / name), data=data, **changes)


def arrays(config):
    """Return step and state of the newest checkpoint."""
    trainer = loop.make_trainer(config, resuming=True)
    restored = restore_newest(RunFolder(config.run).checkpoints, trainer.state)
    return restored.step, jax.tree.map(np.asarray, restored.state)


def timeless_rows(folder):
    return [{k: v for k, v in row.items() if k not in TIMING} for row in folder.rows()]


def end(config):
    """Return the result of a run: rows without times, the saved steps, the best step."""
    folder = RunFolder(config.run)
    checkpoints = Checkpoints(folder.checkpoints)
    best = checkpoints.best_step()
    checkpoints.close()
    assert not folder.checkpoints.with_name("interrupted").exists()
    return timeless_rows(folder), sorted(path.name for path in folder.checkpoints.iterdir()), best


def assert_same(config, undisturbed):
    (rows, steps, best), (step, state) = end(config), arrays(config)
    assert rows == undisturbed["rows"]
    assert (steps, best, step) == (undisturbed["steps"], undisturbed["best"], 13)
    jax.tree.map(np.testing.assert_array_equal, state, undisturbed["state"])


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    config = in_folder(tmp_path_factory.mktemp("undisturbed"))
    train(config)
    rows, steps, best = end(config)
    assert [(row["kind"], row["step"]) for row in rows] == [
        *[("train", 3), ("train", 4), ("val", 4), ("train", 6), ("train", 8), ("val", 8), ("train", 9)],
        *[("train", 12), ("val", 12), ("train", 13), ("val", 13)],
    ]
    return {"rows": rows, "steps": steps, "best": best, "state": arrays(config)[1]}


def environment():
    compiled = jax.config.jax_compilation_cache_dir
    return {**os.environ, "JAX_ENABLE_X64": "1", "JAX_COMPILATION_CACHE_DIR": compiled}


START = """
import json, os, signal, sys, time
from rich.console import Console
from fcn_jax.cli.process import guarded
from fcn_jax.training import loop
from fcn_jax.training.config_checks import config_from_json
from fcn_jax.training.run import RunFolder

def run(_=None):
    return loop.train(config_from_json(json.loads(sys.argv[1])), Console())

"""


def in_process(code, config, *arguments, **options):
    """Start a process with code that may call ``run()``."""
    command = [sys.executable, "-c", START + code, json.dumps(asdict(config)), *arguments]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


@pytest.fixture
def heard():
    """Default signal handlers: nohup and background jobs of shells ignore some signals."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


KILL = """
import shutil
def killing(owner, name, when, after=False):
    original = getattr(owner, name)
    def instead(*args, **kwargs):
        result = original(*args, **kwargs) if after else None
        if when(*args):
            os.kill(os.getpid(), signal.SIGKILL)
        return result if after else original(*args, **kwargs)
    setattr(owner, name, instead)
def half_is_written(self, row):
    if row["step"] == 6:
        with self.metrics_file.open("a") as file:
            file.write(json.dumps(row)[:20])
    return row["step"] == 6
calls = []
MOMENTS = {
    "in a step": [(loop.Logger, "step", lambda self, step, *rest: step == 7)],
    "in a row": [(RunFolder, "append", half_is_written)],
    "in a validation": [(loop, "evaluate", lambda *args: calls.append(0) or len(calls) == 2)],
    "in a save": [(loop.Checkpoints, "save", lambda self, state, *rest: int(state.step) == 8, True)],
    # A checkpoint is written under another name and renamed once it is whole.
    "before the commit of the first": [
        (os, name, lambda source, target, **options: os.path.basename(target) == "4") for name in ("rename", "replace")
    ],
    "in the removal of an old one": [
        (shutil, "rmtree", lambda path, *args, **options: os.path.basename(path).startswith("4"))
    ],
    "after the last save": [(loop.Checkpoints, "close", lambda *args: True, True)],
}
for kill in MOMENTS[sys.argv[2]]:
    killing(*kill)
run()
"""


def signalling(monkeypatch, owner, name, number, when):
    original = getattr(owner, name)

    def instead(*args, **kwargs):
        if when(*args):
            signal.raise_signal(number)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, instead)


def check_stop(number, moment, saved, undisturbed, tmp_path, monkeypatch):
    """Check that a signal stops the run with its state saved, and that it resumes to the same result."""
    config, calls = in_folder(tmp_path), []
    owner, name, when = {
        "start": (loop, "progress_bar", lambda *args: True),
        "step": (loop.Logger, "step", lambda self, step, *rest: step == 7),
        "validation": (loop, "evaluate", lambda *args: calls.append(0) or len(calls) == 2),
        "save": (loop.Checkpoints, "save", lambda self, state, *rest: int(state.step) == 8),
    }[moment]
    message = f"stopped by {number.name} at step {saved}, which is saved"
    with monkeypatch.context() as patched, pytest.raises(Stopped, match=message) as stopped:
        signalling(patched, owner, name, number, when)
        train(config)
    assert stopped.value.number == number
    # A validation is not finished; after a save there is nothing more to save.
    assert (Path(config.run) / "interrupted" / str(saved)).is_dir() is (moment != "save")
    assert (Path(config.run) / "checkpoints" / str(saved)).exists() is (moment == "save")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert f"resuming {config.run} at step {saved}" in train(config)
    assert_same(config, undisturbed)
