"""Every recipe end to end, shrunk, on tiny trees in the sets' own formats: train, stop, resume, evaluate, draw."""

import json

import jax
import numpy as np
import pytest
import trees

from fcn_jax.cli.eval import main as eval_command
from fcn_jax.cli.train import main as train_command
from fcn_jax.errors import InputError
from fcn_jax.recipes import RECIPES
from fcn_jax.training import loop
from fcn_jax.training.run import RunFolder, open_run

SMALL = ["--model.width", "0.06", "--train.steps", "12", "--train.log-every", "2", "--optim.warmup-steps", "0"]
SCRATCH = ["--init", "None", "--init-from", "None"]
SCORE_NET = ["--model.encoder", "vgg11", "--model.fc-features", "8"]
OTHER_NET = ["--model.encoder", "vgg11"]
VOC_NAMES = {
    "train": ["2007_000001", "2007_000002", "2007_000003", "2007_000004"],
    "val": ["2007_000101", "2007_000102"],
}


@pytest.fixture
def easy(monkeypatch):
    """Pictures whose colour tells the class, and classes of very unequal size, so that a few steps lower the loss."""

    def mask(seed, num_classes, size=(12, 16), ignore=255):
        label = np.zeros(size, np.uint8)
        label[:, size[1] // 2 + seed % 3 :] = 1 + seed % (num_classes - 1)
        label[0] = ignore
        return label

    def picture(seed, size=(12, 16)):
        image = np.full((*size, 3), 40, np.uint8)
        image[:, size[1] // 2 + seed % 3 :] = 200
        return image

    monkeypatch.setattr(trees, "mask", mask)
    monkeypatch.setattr(trees, "picture", picture)


def _tree(recipe, root):
    if recipe == "shapes":
        return ["--data.shapes-size", "32", "32", "--data.shapes-count", "16"]
    if recipe.startswith("camvid"):
        trees.camvid(root, {"train": 4, "val": 2}, suffix=".jpg")
    elif recipe == "voc-tramac":
        trees.voc(root, "2012", VOC_NAMES)
    elif recipe.startswith("voc"):
        trees.sbd(root, {"train": VOC_NAMES["train"], "val": []})
        trees.voc(root, "2011", {"val": VOC_NAMES["val"], "train": []})
    else:
        trees.folder(root, {"train": 4, "val": 2}, classes=("background", "bag"))
    return ["--data.dir", str(root)]


# What each recipe needs to fit: a rate at which a small network from scratch moves where the published one starts from
# ImageNet weights, a crop and a batch as small as the pictures.
SHRUNK = {
    "shapes": [*SCORE_NET, "--train.batch-size", "8"],
    "camvid": [*SCORE_NET, "--data.crop-size", "16", "16", "--data.workers", "0", "--train.batch-size", "4"],
    "camvid-cpu": [
        *SCORE_NET, "--data.input-size", "16", "20", "--data.crop-size", "16", "16", "--train.batch-size", "4",
    ],
    "voc-paper-32s": [*SCORE_NET, "--optim.lr", "1e-7"],
    "voc-paper-16s": [*SCORE_NET, "--optim.lr", "1e-7"],
    "voc-paper-8s": [*SCORE_NET, "--optim.lr", "1e-7"],
    "voc-paper-8s-atonce": [*SCORE_NET, "--optim.lr", "1e-7"],
    "voc-cvpr": [*SCORE_NET, "--optim.lr", "1e-3", "--data.crop-size", "16", "16", "--train.batch-size", "4"],
    "voc-tramac": [
        *OTHER_NET, "--optim.lr", "1e-2", "--data.base-size", "20", "--data.crop-size", "16", "16",
        "--data.workers", "0", "--train.batch-size", "4",
    ],
    "binary-bce": [
        *OTHER_NET, "--data.input-size", "32", "32", "--train.pictures-every", "4", "--train.keep-every", "6",
    ],
    "scratch-fcn1": [*OTHER_NET, "--data.input-size", "32", "32", "--train.batch-size", "4"],
}  # fmt: skip


def _evals(recipe, examples=4):
    """Epochs between validations that make one every 6 steps."""
    arguments = SHRUNK[recipe]
    batch = int(arguments[arguments.index("--train.batch-size") + 1]) if "--train.batch-size" in arguments else None
    batch = batch or RECIPES[recipe].config.train.batch_size
    return ["--train.eval-every", str(6 * batch / (16 if recipe == "shapes" else examples))]


class Killed(BaseException):
    """Stands for a process that ends without a word."""


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_trains_stops_resumes_evaluates_and_draws(recipe, easy, tmp_path, monkeypatch, capsys):
    data = _tree(recipe, tmp_path / "data")
    run = tmp_path / "run"
    places = ["--run", str(run), "--data.cache-dir", str(tmp_path / "cache"), "--devices", "1"]
    command = [recipe, *SMALL, *SHRUNK[recipe], *SCRATCH, *_evals(recipe), *data, *places]
    validate, calls = loop.validate, []

    def killed_at_the_second(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise Killed
        return validate(*args, **kwargs)

    monkeypatch.setattr(loop, "validate", killed_at_the_second)
    with pytest.raises(Killed):
        train_command(command)
    monkeypatch.setattr(loop, "validate", validate)
    capsys.readouterr()
    assert train_command(command) == 0
    assert "resuming" in capsys.readouterr().out

    rows = list(RunFolder(run).rows())
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    assert [row["step"] for row in rows if row["kind"] == "train"] == [2, 4, 6, 8, 10, 12]
    assert np.mean(losses[-2:]) < losses[0]
    assert [row["step"] for row in rows if row["kind"] == "val"] == [6, 12]
    assert {"curves.png", "confusion.png", "panel.png"} <= {path.name for path in (run / "figures").iterdir()}
    if recipe == "binary-bce":
        assert [path.stem for path in sorted((run / "figures/train").iterdir())] == ["0000004", "0000008", "0000012"]

    assert eval_command(["--run", str(run), "--checkpoint", "last"]) == 0
    saved = json.loads((run / "eval.json").read_text())
    assert saved["scores"] == rows[-1]["scores"] and saved["step"] == 12


def test_a_stopped_run_ends_with_the_bits_of_one_that_was_not(tmp_path, monkeypatch):
    common = ["shapes", *SMALL, *SHRUNK["shapes"], *_evals("shapes"), *_tree("shapes", tmp_path)]
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
    common = ["shapes", *SMALL, *SHRUNK["shapes"], *_evals("shapes"), *_tree("shapes", tmp_path)]
    common += ["--data.cache-dir", str(tmp_path / "cache"), "--devices", "2"]
    for mode in ("pmap", "mesh"):
        assert train_command([*common, "--run", str(tmp_path / mode), "--parallel", mode]) == 0
    first, second = (list(RunFolder(tmp_path / mode).rows()) for mode in ("pmap", "mesh"))
    # float32 over a dozen steps: the order of sums differs
    losses = [[row["loss"] for row in rows if row["kind"] == "train"] for rows in (first, second)]
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_a_longer_stride_starts_a_shorter_one_by_name(tmp_path, easy, capsys):
    data = _tree("voc-paper-32s", tmp_path / "data")
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


def test_resuming_does_not_need_the_weights_it_started_from(tmp_path, capsys):
    common = ["shapes", *SMALL, *SHRUNK["shapes"], "--train.steps", "1", *_tree("shapes", tmp_path)]
    common += ["--data.cache-dir", str(tmp_path / "cache"), "--devices", "1"]
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
