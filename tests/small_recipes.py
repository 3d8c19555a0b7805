"""Recipes shrunk to seconds, on tiny data sets in the original formats."""

import json

import numpy as np
import pytest
import trees

from fcn_jax.cli.eval import main as eval_command
from fcn_jax.cli.train import main as train_command
from fcn_jax.recipes import RECIPES
from fcn_jax.training import loop
from fcn_jax.training.run import RunFolder

SMALL = "--model.width 0.06 --train.steps 12 --train.log-every 2 --optim.warmup-steps 0"
SCRATCH = "--init None --init-from None"
OTHER_NET = "--model.encoder vgg11"
SCORE_NET = f"{OTHER_NET} --model.fc-features 8"
VOC_NAMES = {"train": [f"2007_00000{i}" for i in (1, 2, 3, 4)], "val": ["2007_000101", "2007_000102"]}


@pytest.fixture
def easy(monkeypatch):
    """Make colour show the class, and class sizes very unequal, so that a few steps lower the loss."""

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


def tree(recipe, root):
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


# What each recipe needs at this size: crops and batches for tiny images, and another learning rate. The small network
# trains from scratch, where the published one starts from ImageNet weights.
CROP = "--data.crop-size 16 16"
SHRUNK = {
    "shapes": SCORE_NET,
    "camvid": f"{SCORE_NET} {CROP} --data.workers 0",
    "camvid-vgg16": f"{SCORE_NET} {CROP}",
    "camvid-cpu": f"{SCORE_NET} {CROP} --data.input-size 16 20",
    **{f"voc-paper-{net}": f"{SCORE_NET} --optim.lr 1e-7" for net in ("32s", "16s", "8s", "8s-atonce")},
    "voc-cvpr": f"{SCORE_NET} {CROP} --optim.lr 1e-3 --model.dropout-rate 0",
    "voc-tramac": f"{OTHER_NET} {CROP} --optim.lr 1e-2 --data.base-size 20 --data.workers 0",
    "voc-torchvision": f"{CROP} --optim.lr 1e-2 --data.base-size 20 --data.workers 0",
    "own": f"{SCORE_NET} {CROP} --optim.lr 0.1 --data.base-size 20 --data.workers 0",
    "binary-bce": f"{OTHER_NET} --data.input-size 32 32 --train.pictures-every 4 --train.keep-every 6",
    "scratch-fcn1": f"{OTHER_NET} --data.input-size 32 32",
}
BATCHES = {
    "shapes": 8,
    "camvid": 4,
    "own": 4,
    "camvid-vgg16": 4,
    "camvid-cpu": 4,
    "voc-cvpr": 4,
    "voc-tramac": 4,
    "voc-torchvision": 4,
    "scratch-fcn1": 4,
}


def shrink(recipe, folder, devices=1):
    """Return the command of a small recipe on data in a folder, with a validation every 6 steps, without --run."""
    batch = BATCHES.get(recipe, RECIPES[recipe].config.train.batch_size)
    sizes = f"--train.batch-size {batch} --train.eval-every {6 * batch / (16 if recipe == 'shapes' else 4)}"
    words = f"{recipe} {SMALL} {SHRUNK[recipe]} {SCRATCH} {sizes} --devices {devices}".split()
    return [*words, "--data.cache-dir", str(folder / "cache"), *tree(recipe, folder / "data")]


class Killed(BaseException):
    """Stands for a kill of the process."""


def train_until_killed(command, monkeypatch):
    """Train until a simulated kill in the second validation."""
    validate, calls = loop.validate, []

    def killed_at_the_second(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise Killed
        return validate(*args, **kwargs)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(loop, "validate", killed_at_the_second)
        train_command(command)


def run_through(recipe, tmp_path, monkeypatch, capsys):
    """Train, simulate a kill, resume, evaluate, draw figures."""
    run = tmp_path / "run"
    command = [*shrink(recipe, tmp_path), "--run", str(run)]
    train_until_killed(command, monkeypatch)
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
