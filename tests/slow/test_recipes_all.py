"""Every recipe through a kill and a resume; modes, stages and bits of shrunk recipes."""

import json

import jax
import numpy as np
import pytest
from small_recipes import SCORE_NET, SHRUNK, SMALL, Killed, easy, evals, run_through, tree  # noqa: F401  (a fixture)

from fcn_jax.cli.eval import main as eval_command
from fcn_jax.cli.train import main as train_command
from fcn_jax.errors import InputError
from fcn_jax.recipes import RECIPES
from fcn_jax.training import loop
from fcn_jax.training.run import RunFolder, open_run


@pytest.mark.usefixtures("easy")
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_trains_stops_resumes_evaluates_and_draws(recipe, tmp_path, monkeypatch, capsys):
    run_through(recipe, tmp_path, monkeypatch, capsys)


def test_a_stopped_run_ends_with_the_bits_of_one_that_was_not(tmp_path, monkeypatch):
    common = ["shapes", *SMALL, *SHRUNK["shapes"], *evals("shapes"), *tree("shapes", tmp_path)]
    common += ["--data.cache-dir", str(tmp_path / "cache"), "--devices", "2"]
    assert train_command([*common, "--run", str(tmp_path / "whole")]) == 0
    validate, calls = loop.validate, []

    def killed(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise Killed
        return validate(*args, **kwargs)

    monkeypatch.setattr(loop, "validate", killed)
    with pytest.raises(Killed):
        train_command([*common, "--run", str(tmp_path / "stopped")])
    monkeypatch.setattr(loop, "validate", validate)
    assert train_command([*common, "--run", str(tmp_path / "stopped")]) == 0
    assert eval_command(["--run", str(tmp_path / "stopped"), "--checkpoint", "last"]) == 0
    saved = json.loads((tmp_path / "stopped/eval.json").read_text())
    assert saved["scores"] == list(RunFolder(tmp_path / "whole").rows())[-1]["scores"]
    whole, stopped = (open_run(tmp_path / name, "last").variables for name in ("whole", "stopped"))
    jax.tree.map(np.testing.assert_array_equal, whole, stopped)

    def timeless(name):
        timing = ("images_per_s", "data_wait")
        return [{k: v for k, v in row.items() if k not in timing} for row in RunFolder(tmp_path / name).rows()]

    assert timeless("whole") == timeless("stopped")


def test_pmap_and_mesh_train_the_same_network(tmp_path):
    common = ["shapes", *SMALL, *SHRUNK["shapes"], *evals("shapes"), *tree("shapes", tmp_path)]
    common += ["--data.cache-dir", str(tmp_path / "cache"), "--devices", "2"]
    for mode in ("pmap", "mesh"):
        assert train_command([*common, "--run", str(tmp_path / mode), "--parallel", mode]) == 0
    first, second = (list(RunFolder(tmp_path / mode).rows()) for mode in ("pmap", "mesh"))
    # float32 over a dozen steps: the order of sums differs
    losses = [[row["loss"] for row in rows if row["kind"] == "train"] for rows in (first, second)]
    np.testing.assert_allclose(*losses, rtol=1e-4)


@pytest.mark.usefixtures("easy")
def test_a_longer_stride_starts_a_shorter_one_by_name(tmp_path, capsys):
    data = tree("voc-paper-32s", tmp_path / "data")
    common = [*SMALL, *SCORE_NET, "--train.steps", "1", "--optim.lr", "1e-5", *data]
    common += ["--data.cache-dir", str(tmp_path / "cache"), "--devices", "1"]
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
