"""Recipes: one end to end, and the shapes of a training step of each."""

import jax
import numpy as np
import pytest
from small_networks import zeros
from small_recipes import SHRUNK, run_through, shrink

from fcn_jax.cli import train as train_module
from fcn_jax.cli.train import main as train_command
from fcn_jax.recipes import RECIPES
from fcn_jax.training import trainer
from fcn_jax.training.trainer import make_trainer


@pytest.mark.usefixtures("easy")
def test_a_recipe_trains_resumes_evaluates_and_draws_figures(tmp_path, monkeypatch, capsys):
    run_through("binary-bce", tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_builds_a_training_step(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "init_variables", lambda model, *_: zeros(model))
    config, title = train_module.config_of_recipe([*shrink(recipe, tmp_path), "--run", str(tmp_path / "run")])
    made = make_trainer(config)
    (h, w), b = config.data.crop_size or config.data.input_size or (32, 32), config.train.batch_size
    batch = {"image": np.zeros((b, h, w, 3), np.uint8), "label": np.zeros((b, h, w), np.uint8)}
    state, sums = jax.eval_shape(made.parallel.step, made.state, made.parallel.place_batch(batch))
    assert jax.tree.map(np.shape, state) == jax.tree.map(np.shape, made.state) and sums.loss.shape == ()
    assert recipe in title and RECIPES[recipe].score in title


@pytest.mark.slow
def test_resuming_does_not_need_the_initial_weights(tmp_path, capsys):
    common = [*shrink("shapes", tmp_path), "--train.steps", "1"]
    assert train_command([*common, "--run", str(tmp_path / "first")]) == 0
    command = [*common, "--run", str(tmp_path / "second"), "--init-from", str(tmp_path / "first")]
    assert train_command(command) == 0
    (tmp_path / "first").rename(tmp_path / "moved")
    assert train_command(command) == 0
    assert "resuming" in capsys.readouterr().out


def test_recipes_state_source_command_and_score():
    assert set(SHRUNK) == set(RECIPES)
    for name, recipe in RECIPES.items():
        assert recipe.source and recipe.score and recipe.command.startswith(f"python train.py {name}")
        assert recipe.config.run == f"runs/{name}"
