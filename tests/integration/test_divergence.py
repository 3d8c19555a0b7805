"""Non-finite losses and gradients: the step changes nothing, and the run stops or skips it."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import TINY, in_folder, place_batches, train

from fcn_jax.config import OptimConfig
from fcn_jax.errors import InputError
from fcn_jax.losses import make_loss
from fcn_jax.models import create_model, init_variables
from fcn_jax.optim import make_optimizer
from fcn_jax.step import make_train_step, new_state
from fcn_jax.training.logging import Logger
from fcn_jax.training.run import RunFolder


def _step(**options):
    model = create_model("fcn8s", 3, encoder="vgg11", encoder_norm="batch", width=0.03, fc_features=8, fc6_kernel=1)
    variables = init_variables(model, jax.random.key(0), (32, 32))
    optimizer = make_optimizer(variables["params"], OptimConfig(schedule="poly"), 10)
    step = jax.jit(make_train_step(model.apply, optimizer, make_loss("softmax"), **options))
    state = new_state(variables, optimizer, 0)
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    return step, state, {"image": images, "label": np.random.default_rng(1).integers(0, 3, (2, 32, 32))}


@pytest.mark.parametrize(("value", "accumulate"), [(np.nan, 1), (np.inf, 1), (1e30, 1), (np.nan, 2)])
def test_a_non_finite_step_changes_only_counters(value, accumulate):
    step, state, batch = _step(accumulate=accumulate)
    state, sums = step(state, batch)
    assert bool(sums.finite)
    bad = {**batch, "image": batch["image"].copy()}
    bad["image"][1, 3, 4] = value
    if value == 1e30:  # finite sums with infinite squares
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


def test_a_nan_loss_names_step_and_images_and_can_be_skipped(tmp_path, monkeypatch):
    config, taken = in_folder(tmp_path), []

    def poison(batch, place):
        taken.append(0)
        image = batch["image"].astype(np.float32)
        return place({**batch, "image": image * np.nan if len(taken) == 6 else image})

    place_batches(monkeypatch, poison)
    message = r"step 6: loss nan .* learning rate 0\.0\d+, on 0000\d\d, .*skip.*--optim\.lr"
    with pytest.raises(InputError, match=message):
        train(config)
    taken.clear()
    skipping = in_folder(tmp_path, "skipping", train=replace(TINY.train, nonfinite="skip"))
    train(skipping)
    rows = [row for row in RunFolder(skipping.run).rows() if row["kind"] == "train"]
    assert {row["step"]: row["skipped"] for row in rows} == {3: 0, 4: 0, 6: 1, 8: 0, 9: 0, 12: 0, 13: 0}
    assert all(np.isfinite(row["loss"]) for row in rows)
    monkeypatch.undo()
    # With skip, the stopped run resumes from its checkpoint.
    assert "at step 4" in train(replace(config, train=replace(config.train, nonfinite="skip")))


@pytest.mark.slow
def test_too_many_skipped_steps_stop_the_run(tmp_path, monkeypatch):
    config = in_folder(tmp_path, train=replace(TINY.train, nonfinite="skip", steps=30, eval_every=30 * 4 / 16))
    place_batches(monkeypatch, lambda batch, place: place({**batch, "image": batch["image"] * np.float32(np.nan)}))
    with pytest.raises(InputError, match="step 20: loss nan"):
        train(config)
    assert [row["skipped"] for row in RunFolder(config.run).rows()] == [3] * 6


def test_skipped_steps_are_counted_across_a_restart(tmp_path):
    bad = {"loss": np.nan, "grad_norm": np.nan, "finite": False, "names": []}
    config = replace(TINY, train=replace(TINY.train, nonfinite="skip"))
    saved = {"unlogged": [{"step": step, **bad} for step in (30, 31)], "skipped_in_a_row": 18}
    folder, trainer = SimpleNamespace(path=tmp_path), SimpleNamespace(schedule=lambda step: 0.1)
    logger = Logger(folder, None, trainer, config, None, saved)  # type: ignore[arg-type]
    assert logger.progress() == saved
    with pytest.raises(InputError, match="step 31: loss nan"):
        logger.flush(31)
