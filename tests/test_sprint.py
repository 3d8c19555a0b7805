"""Training from memory gives what the loop's parts give, and its command leaves what it says."""

import csv
import itertools
import json
import subprocess
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest
import trees
import tyro
from test_architecture import BARE_IMAGE_LACKS

from fcn_jax import cli, cli_sprint
from fcn_jax.arguments import override
from fcn_jax.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from fcn_jax.data import memory
from fcn_jax.errors import InputError
from fcn_jax.evaluation.evaluate import PLAIN, Views, make_predictor
from fcn_jax.models import init_variables, model_from_config
from fcn_jax.recipes import RECIPES
from fcn_jax.training import in_memory
from fcn_jax.training.in_memory import make_score, train_in_memory
from fcn_jax.training.setup import make_trainer

MODEL = ModelConfig(encoder="vgg11", encoder_norm="batch", width=0.05, fc_features=8, fc6_kernel=1, dropout_rate=0.0)
TINY = "--model.encoder vgg11 --model.width 0.05 --model.fc-features 8 --data.crop-size 32 32 --train.batch-size 2"
TINY = [*TINY.split(), "--train.epochs", "2", "--train.eval-every", "1", "--devices", "1", "--train.log-every", "1"]


@pytest.fixture
def camvid(tmp_path):
    return trees.camvid(tmp_path / "camvid", {"train": 5, "val": 2, "test": 3}, size=(32, 48))


def _config(root, tmp_path, **train):
    data = DataConfig("camvid/train", "camvid/val", dir=str(root), cache_dir=str(tmp_path / "cache"), jitter=0.2)
    train = TrainConfig(**{"batch_size": 2, "steps": 4, "log_every": 1, "seed": 3} | train)
    return Config(model=MODEL, data=data, optim=OptimConfig(lr=0.1, schedule="poly"), train=train, devices=1)


def _train(config):
    train, val = (memory.read(name, config.data) for name in ("camvid/train", "camvid/val"))
    return train_in_memory(config, train, val, make_score(config, 11), lambda line: None)


def test_it_takes_the_steps_that_the_loop_takes_on_the_batches_of_its_seed(camvid, tmp_path):
    config = _config(camvid, tmp_path)
    trainer = make_trainer(config)
    batches = memory.train_batches(memory.read("camvid/train", config.data), config.data, 2, seed=3)
    state, losses = trainer.state, []
    for batch in itertools.islice(batches, 4):
        placed = trainer.parallel.place_batch({"image": batch["image"], "label": batch["label"]})
        state, sums = trainer.parallel.step(state, placed)
        losses.append(float(sums.loss))
    found = _train(config)
    rows = [row for row in found.rows if row["kind"] == "train"]
    np.testing.assert_allclose([row["loss"] for row in rows], losses, rtol=1e-5)
    for there, here in zip(jax.tree.leaves(state.params), jax.tree.leaves(found.variables["params"]), strict=True):
        np.testing.assert_allclose(here, there, rtol=1e-4, atol=1e-5)
    assert [row["step"] for row in found.rows if row["kind"] == "val"] == [2, 4]  # five images, two a step
    assert [row["lr"] for row in rows] == pytest.approx([float(trainer.schedule(step)) for step in range(4)])


def test_a_seed_gives_the_same_weights_again(camvid, tmp_path):
    first, again = (_train(_config(camvid, tmp_path)) for _ in range(2))
    for a, b in zip(jax.tree.leaves(first.variables), jax.tree.leaves(again.variables), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_loss_that_is_not_finite_stops_it_or_is_left_out(camvid, tmp_path, monkeypatch):
    config = _config(camvid, tmp_path)
    with pytest.raises(InputError, match="not finite.*--optim.lr"):
        _train(replace(config, optim=replace(config.optim, lr=1e30)))

    def poisoned(*arguments):
        for index, batch in enumerate(memory.train_batches(*arguments)):
            yield {**batch, "image": batch["image"] * np.float32(np.nan if index == 1 else 1)}

    monkeypatch.setattr(in_memory, "train_batches", poisoned)
    with pytest.raises(InputError, match="not finite in 1 of 2 steps up to step 2"):
        _train(replace(config, train=replace(config.train, log_every=2)))
    found = _train(replace(config, train=replace(config.train, log_every=2, nonfinite="skip")))
    rows = [row for row in found.rows if row["kind"] == "train"]
    assert [row["skipped"] for row in rows] == [1, 0]
    assert np.isfinite([row["loss"] for row in rows]).all()


def test_one_step_has_no_rate(camvid, tmp_path):
    found = _train(_config(camvid, tmp_path, steps=1))
    assert found.images_per_second is None and [row["kind"] for row in found.rows] == ["train", "val"]


def test_several_devices_train_and_score(camvid, tmp_path):
    one, two = (_train(replace(_config(camvid, tmp_path), devices=count)) for count in (1, 2))
    losses = [[row["loss"] for row in found.rows if row["kind"] == "train"] for found in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == 4


def test_where_less_is_installed_one_command_leaves_numbers_and_pictures(camvid, tmp_path):
    lacks = set(BARE_IMAGE_LACKS.split()) - {"cv2"}
    blocked = f"import sys; sys.modules.update(dict.fromkeys({sorted(lacks)}))"
    code = f"{blocked}; from fcn_jax.cli_sprint import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["camvid", "--data.dir", camvid, "--out", tmp_path / "out", "--test", "camvid/test", *TINY]
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "camvid/test, plain: mean IU" in done.stdout and "images/s" in done.stdout
    assert "no curves.png" in done.stdout
    record = json.loads((tmp_path / "out/results.json").read_text())
    assert record["steps"] == 5 and record["images_per_second"] > 0 and record["config"]["model"]["width"] == 0.05
    assert set(record["scores"]) == {"camvid/val", "camvid/test"}
    valid = 3 * 31 * 48  # one row of each of three masks is void
    for scores in record["scores"]["camvid/test"].values():
        assert np.sum(scores["confusion"]) == valid
    rows = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows].count("train") == 5 and rows[-1]["kind"] == "val"
    table = list(csv.reader((tmp_path / "out/camvid-test_iu.csv").read_text().splitlines()))
    assert table[0][:2] == ["class", "plain"] and len(table) == 12 and len(table[0]) == 4
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"camvid-val_panel.png", "camvid-test_panel.png", "camvid-val_iu.csv"} < names


def test_the_test_split_is_read_only_when_asked_for(camvid, tmp_path):
    for path in [*(camvid / "test").iterdir(), *(camvid / "testannot").iterdir()]:
        path.unlink()
    arguments = ["camvid", "--data.dir", camvid, "--out", tmp_path / "out", *TINY]
    assert cli_sprint.main([str(argument) for argument in arguments]) == 0
    assert set(json.loads((tmp_path / "out/results.json").read_text())["scores"]) == {"camvid/val"}
    assert (tmp_path / "out/curves.png").is_file() and (tmp_path / "out/camvid-val_confusion.png").is_file()


def test_scores_are_those_of_the_variables_and_the_views(camvid, tmp_path):
    config = _config(camvid, tmp_path)
    val = memory.read("camvid/val", config.data)
    score, model = make_score(config, 11), model_from_config(config.model, 11)
    variables = init_variables(model, jax.random.key(0))
    rng = np.random.default_rng(0)  # of fresh weights one class is everywhere
    variables["params"] = jax.tree.map(lambda x: x + (x.ndim > 1) * rng.normal(0, 0.5, x.shape), variables["params"])
    confusions = []
    for views in (PLAIN, Views(scales=(0.5, 1.0), flip=True)):
        result = score(variables, val, views)
        predict = make_predictor(model, "imagenet", views=views)
        for sample, example in zip(result.samples, val.examples, strict=True):
            assert sample.name == example["name"]
            expected = predict(variables, example["image"][None], (32, 48))[0]
            assert (sample.prediction != expected).mean() < 0.01  # rounding, between the devices' programs
        confusions.append(result.confusion)
    assert np.abs(confusions[0] - confusions[1]).sum() > 0.05 * confusions[0].sum()


def test_the_last_validation_is_of_the_final_weights(camvid, tmp_path):
    config = _config(camvid, tmp_path)
    found = _train(config)
    again = make_score(config, 11)(found.variables, memory.read("camvid/val", config.data), PLAIN)
    assert found.rows[-1]["scores"]["mean_iu"] == again.scores.mean_iu


def test_results_are_not_written_over(capsys, camvid, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/results.json").write_text(json.dumps({"scores": {"camvid/val": {}}}))
    assert cli_sprint.main(["camvid", "--data.dir", str(camvid), "--out", str(tmp_path / "out"), *TINY]) == 2
    assert "new folder" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_to_shows_before_training(capsys, camvid, tmp_path):
    (tmp_path / "out/results.partial").mkdir(parents=True)
    assert cli_sprint.main(["camvid", "--data.dir", str(camvid), "--out", str(tmp_path / "out"), *TINY]) == 2
    output = capsys.readouterr()
    assert "results.partial" in output.err and "step" not in output.out
    (tmp_path / "file").write_text("")
    assert cli_sprint.main(["camvid", "--data.dir", str(camvid), "--out", str(tmp_path / "file"), *TINY]) == 2
    assert f"{tmp_path}/file: File exists" in capsys.readouterr().err


def test_ctrl_c_says_what_is_kept(capsys, camvid, tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_sprint, "train_in_memory", interrupted)
    arguments = ["camvid", "--data.dir", str(camvid), "--out", str(tmp_path / "out"), *TINY]
    assert cli_sprint.main(arguments) == 130
    assert "starts anew" in capsys.readouterr().err
    assert cli.guarded(cli.run_sprint, arguments) == 130


def test_jpegs_without_pillow_say_so(tmp_path):
    trees.camvid(tmp_path, {"train": 1, "val": 1}, suffix=".jpg")
    code = "import sys; sys.modules['PIL'] = None; from fcn_jax.cli_sprint import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["camvid", "--data.dir", str(tmp_path), "--out", str(tmp_path / "out"), *TINY]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and "Pillow" in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_images_that_cannot_be_read_are_left_out_where_wanted(capsys, camvid, tmp_path):
    (camvid / "train/train_001.png").write_bytes(b"nothing")
    arguments = ["camvid", "--data.dir", str(camvid), "--out", str(tmp_path / "out"), *TINY]
    assert cli_sprint.main(arguments) == 2
    assert "train_001" in capsys.readouterr().err
    assert cli_sprint.main([*arguments, "--data.unreadable", "skip"]) == 0
    output = capsys.readouterr().out
    assert "1 images are left out" in output and "4 images to train on" in output


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nosuch", "--out", "x"], ["nosuch", "camvid"]),
        (["camvid"], ["--out"]),
        (["camvid", "--out", "OUT", "--optim.nosuch", "1"], ["--optim.nosuch", "--optim.lr"]),
        (["camvid", "--out", "OUT", "--optim", "1"], ["--optim"]),
        (["camvid", "--out", "OUT", "--optim.lr"], ["--optim.lr", "value"]),
        (["camvid", "--out", "OUT", "--optim.lr", "quick"], ["--optim.lr", "quick", "float"]),
        (["camvid", "--out", "OUT", "--data.crop-size", "3"], ["--data.crop-size", "3"]),
        (["camvid", "--out", "OUT", "surplus"], ["surplus"]),
        (["camvid", "--out", "OUT", "--optim.lr", "1", "2"], ["--optim.lr", "expected float"]),
        (["camvid", "--out", "OUT", "--optim.no-lr"], ["--optim.no-lr"]),
        (["--optim.lr", "0.1", "camvid", "--out", "OUT"], ["recipe before --optim.lr"]),
        (["shapes", "--out", "OUT", "--init", "vgg.pth"], ["--init", "train.py"]),
        (["shapes", "--out", "OUT", "--distributed", "auto"], ["--distributed", "train.py"]),
        (["camvid", "--out", "OUT"], ["--data.dir"]),
        (["camvid", "--out", "OUT", "--data.dir", "/nonexistent"], ["/nonexistent", "--data.dir"]),
        (["shapes", "--out", "/proc/nosuch/x", "--data.shapes-count", "2"], ["/proc/nosuch", "check the path"]),
        (["shapes", "--out", "OUT", "--train.batch-size", "0"], ["--train.batch-size"]),
        (["shapes", "--out", "OUT", "--test", "camvid/test", "--data.dir", "CAMVID"], ["shapes/train", "camvid/test"]),
    ],
)
def test_mistakes_give_a_line_and_exit_code_2(capsys, camvid, tmp_path, arguments, named):
    there = {"OUT": str(tmp_path / "out"), "CAMVID": str(camvid)}
    assert cli_sprint.main([there.get(argument, argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and len(error.strip().splitlines()) == 1, error
    for word in named:
        assert word in error


def _by_tyro(arguments):
    configs = {name: ("", recipe.config) for name, recipe in RECIPES.items()}
    return tyro.extras.overridable_config_cli(configs, args=["camvid", *arguments])


@pytest.mark.parametrize(
    "arguments",
    [
        "--model.width 0.25 --data.input-size 180 240 --loss.class-weights none --devices 2",
        "--optim.lr=.1 --optim.nesterov --optim.no-bias-decay --data.scale 1. 2",
        "--model.encoder None --data.dir 12 --loss.class-weights 1 2 --train.epochs 1e1 --optim.weight_decay 0",
    ],
)
def test_fields_are_set_as_in_train_py(arguments):
    ours = override(RECIPES["camvid"].config, arguments.split())
    assert ours == _by_tyro(arguments.split()) != RECIPES["camvid"].config


def test_the_module_runs_as_a_command():
    command = [sys.executable, "-m", "fcn_jax.cli_sprint", "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "--test" in done.stdout
