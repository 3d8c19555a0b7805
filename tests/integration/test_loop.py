"""Performance of the training loop: no recompilation, no implicit transfers, logged rates and waiting times."""

import gzip
import json
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from jax import monitoring
from tiny_run import TINY, in_folder, place_batches, train

from fcn_jax.chips import CHIPS
from fcn_jax.cli.train import main as train_command
from fcn_jax.data.pipeline import TrainIterator
from fcn_jax.models import model_from_config, summarize
from fcn_jax.training import loop
from fcn_jax.training.logging import TIMES
from fcn_jax.training.run import RunFolder


def run(tmp_path, name="run", **changes):
    """Take nine steps, with a validation every three."""
    config = in_folder(tmp_path, name, train=replace(TINY.train, steps=9, eval_every=3 * 4 / 16), **changes)
    text = train(config)
    return list(RunFolder(config.run).rows()), text


@pytest.mark.parametrize("parallel", ["pmap", pytest.param("mesh", marks=pytest.mark.slow)])
def test_nothing_is_compiled_after_the_first_step_and_the_first_validation(parallel, tmp_path, monkeypatch):
    compiled, at_validation = [], []

    def count(event, seconds, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(seconds)

    log = loop.Logger.validation

    def noting(self, step, evaluation):
        at_validation.append(len(compiled))
        return log(self, step, evaluation)

    monkeypatch.setattr(loop.Logger, "validation", noting)
    monitoring.register_event_duration_secs_listener(count)
    try:
        run(tmp_path, parallel=parallel)
    finally:
        monitoring.unregister_event_duration_listener(count)
    assert at_validation[0] > 0
    # Saving the first checkpoint may compile a copy; the third interval compiles nothing.
    assert len(at_validation) == 3 and at_validation[1] == at_validation[2]


def test_a_row_has_the_means_of_its_steps_and_the_last_learning_rate(tmp_path):
    three, _ = run(tmp_path, "three")
    config = in_folder(tmp_path, "each", train=replace(TINY.train, steps=9, eval_every=3 * 4 / 16, log_every=1))
    train(config)
    each = [row for row in RunFolder(config.run).rows() if row["kind"] == "train"]
    rows = [row for row in three if row["kind"] == "train"]
    assert [row["step"] for row in rows] == [3, 6, 9] and len(each) == 9
    for index, row in enumerate(rows):
        steps = each[3 * index : 3 * index + 3]
        assert len({step["loss"] for step in steps}) == 3
        for name in ("loss", "grad_norm"):
            assert row[name] == pytest.approx(np.mean([step[name] for step in steps]), rel=1e-5)
        assert row["lr"] == pytest.approx(0.1 * (1 - (row["step"] - 1) / 9) ** 0.9, rel=1e-5)  # poly, before the step


@pytest.mark.parametrize("parallel", ["pmap", pytest.param("mesh", marks=pytest.mark.slow)])
def test_an_implicit_host_to_device_transfer_is_an_error(parallel, tmp_path, monkeypatch):
    rows = (2, 2) if parallel == "pmap" else (4,)
    place_batches(monkeypatch, lambda batch, _: {k: np.reshape(v, (*rows, *v.shape[1:])) for k, v in batch.items()})
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        run(tmp_path, parallel=parallel)


@pytest.mark.slow
def test_the_share_of_time_spent_waiting_for_data_is_logged(tmp_path, monkeypatch):
    rows, text = run(tmp_path, "quick")
    shares = [row["data_wait"] for row in rows if row["kind"] == "train"]
    assert len(shares) == 3 and all(0 <= share <= 1 for share in shares)
    assert "s after the start of the command" in text and "  goodput " in text and "MFU" not in text
    take = TrainIterator.__next__
    monkeypatch.setattr(TrainIterator, "__next__", lambda self: time.sleep(0.3) or take(self))
    rows, _ = run(tmp_path, "slow")
    slow = [row["data_wait"] for row in rows if row["kind"] == "train"]
    # Each batch sleeps 0.3 s, and a step takes some hundredths of a second.
    assert min(slow) > 0.5 > np.median(shares)


def test_mfu_goodput_and_image_rate_are_logged(tmp_path, monkeypatch):
    monkeypatch.setitem(CHIPS, "cpu", replace(CHIPS["cpu"], peak=1e12, kind="cpu"))
    rows, text = run(tmp_path)
    forward = sum(layer.flops for layer in summarize(model_from_config(TINY.model, 6), TINY.data.shapes_size, batch=4))
    rows = [row for row in rows if row["kind"] == "train"][1:]
    for row in rows:
        assert row["mfu"] == pytest.approx(3 * forward / (2 * 1e12) / row["step_s"])  # two devices
        assert row["images_per_s"] == pytest.approx(4 / row["step_s"])
        assert 0 < row["goodput"] < 1
    assert "MFU 0%" in text
    (events,) = (tmp_path / "run/events").iterdir()
    assert all(f"train/{name}".encode() in events.read_bytes() for name in TIMES)


def test_steps_are_traced_for_the_profiler(tmp_path, fails):
    _, text = run(tmp_path, profile=(2, 4))
    assert "trace in" in text
    (trace,) = (tmp_path / "run/profile").rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    steps = {event["args"]["step_num"] for event in events if event.get("name") == "train"}
    assert steps == {"2", "3", "4"} and list((tmp_path / "run/profile").rglob("*.xplane.pb"))
    fails(train_command, ["shapes", "--profile", "4", "2"], "--profile FIRST LAST")
    assert "nothing is traced" in run(tmp_path, profile=(2, 4))[1]  # the run had finished


def test_the_compilation_cache_is_on_by_default_and_can_be_moved(tmp_path):
    code = (
        "import jax, sys; from fcn_jax.cli.process import keep_compiled; keep_compiled();"
        "print(jax.config.jax_compilation_cache_dir)"
    )

    def cache(**environment):
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    assert cache(HOME=str(tmp_path)) == str(tmp_path / ".cache/fcn_jax/compiled")
    assert (tmp_path / ".cache/fcn_jax/compiled").is_dir()
    assert cache(HOME=str(tmp_path), JAX_COMPILATION_CACHE_DIR="/elsewhere") == "/elsewhere"
    assert cache(HOME="/proc") == "None"  # nothing can be written there


@pytest.mark.slow
def test_a_second_process_reuses_compiled_programs(tmp_path):
    code = (
        "import jax, fcn_jax; from fcn_jax.cli.process import keep_compiled; keep_compiled();"
        "model = fcn_jax.create_model('fcn32s', 2, encoder='vgg11', width=0.03);"
        "fcn_jax.init_variables(model, jax.random.key(0))"
    )
    environment = {"HOME": str(tmp_path), "JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    kept = []
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
        kept.append(sorted(path.name for path in (tmp_path / ".cache/fcn_jax/compiled").glob("*-cache")))
    assert any(name.startswith("jit_init") for name in kept[0]) and kept[0] == kept[1]
