"""Every recipe through a kill and a resume; parallel modes, stages and bit-identical results of shrunk recipes."""

import json

import jax
import numpy as np
import pytest
from small_recipes import SCORE_NET, SMALL, run_through, shrink, train_until_killed, tree
from tiny_run import timeless_rows

from fcn_jax.cli.eval import main as eval_command
from fcn_jax.cli.train import main as train_command
from fcn_jax.errors import InputError
from fcn_jax.recipes import RECIPES
from fcn_jax.training.run import RunFolder, open_run


@pytest.mark.usefixtures("easy")
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_trains_resumes_evaluates_and_draws_figures(recipe, tmp_path, monkeypatch, capsys):
    run_through(recipe, tmp_path, monkeypatch, capsys)


def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(tmp_path, monkeypatch):
    common = shrink("shapes", tmp_path, devices=2)
    assert train_command([*common, "--run", str(tmp_path / "whole")]) == 0
    train_until_killed([*common, "--run", str(tmp_path / "stopped")], monkeypatch)
    assert train_command([*common, "--run", str(tmp_path / "stopped")]) == 0
    assert eval_command(["--run", str(tmp_path / "stopped"), "--checkpoint", "last"]) == 0
    saved = json.loads((tmp_path / "stopped/eval.json").read_text())
    rows, again = (timeless_rows(RunFolder(tmp_path / name)) for name in ("whole", "stopped"))
    assert rows == again and saved["scores"] == rows[-1]["scores"]
    whole, stopped = (open_run(tmp_path / name, "last").variables for name in ("whole", "stopped"))
    jax.tree.map(np.testing.assert_array_equal, whole, stopped)


def test_pmap_and_mesh_train_the_same_network(tmp_path):
    common = shrink("shapes", tmp_path, devices=2)
    for mode in ("pmap", "mesh"):
        assert train_command([*common, "--run", str(tmp_path / mode), "--parallel", mode]) == 0
    first, second = (list(RunFolder(tmp_path / mode).rows()) for mode in ("pmap", "mesh"))
    # A dozen steps in float32, with sums in another order.
    losses = [[row["loss"] for row in rows if row["kind"] == "train"] for rows in (first, second)]
    np.testing.assert_allclose(*losses, rtol=1e-4)


@pytest.mark.usefixtures("easy")
def test_a_16s_network_is_initialised_from_a_32s_run(tmp_path, capsys):
    common = f"{SMALL} {SCORE_NET} --train.steps 1 --optim.lr 1e-5 --devices 1".split()
    common += ["--data.cache-dir", str(tmp_path / "cache"), *tree("voc-paper-32s", tmp_path / "data")]
    assert train_command(["voc-paper-32s", *common, "--init", "None", "--run", str(tmp_path / "32s")]) == 0
    start = ["--init-from", str(tmp_path / "32s"), "--run", str(tmp_path / "16s")]
    assert train_command(["voc-paper-16s", *common, *start]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "new: score_pool4, upscore16, upscore2; unused: upscore32" in out
    assert "learns little" not in out
    with pytest.raises(InputError, match="--data.preprocessing caffe"):
        elsewhere = [*start[:-1], str(tmp_path / "imagenet"), "--data.preprocessing", "imagenet"]
        train_command(["voc-paper-16s", *common, *elsewhere])
    with pytest.raises(InputError, match="head.fc6.weight is 8x31x7x7, head.fc6.weight needs 8x51x7x7"):
        other = ["--init-from", str(tmp_path / "32s"), "--run", str(tmp_path / "wide"), "--model.width", "0.1"]
        train_command(["voc-paper-16s", *common, *other])
