"""Runs, data and weights on an emulated object store."""

import json
import signal
from dataclasses import replace

import cv2
import gcs
import jax
import numpy as np
import pytest
from launch import assert_equal_runs
from launch import train as train_in_processes
from small_networks import build
from tiny_run import KILL, TINY, assert_same, in_folder, in_process, train

from fcn_jax import weights
from fcn_jax.cli.eval import main as eval_command
from fcn_jax.cli.train import main as train_command
from fcn_jax.config import DataConfig
from fcn_jax.data.datasets import load
from fcn_jax.errors import InputError
from fcn_jax.paths import to_path, upload
from fcn_jax.pretrained import from_pretrained
from fcn_jax.training.run import RunFolder


@pytest.fixture(scope="module")
def store():
    """Start an emulated store on the loopback and direct this process to it; yield its gs://BUCKET."""
    process, environment = gcs.start()
    patch = pytest.MonkeyPatch()
    for name, value in environment.items():
        patch.setenv(name, value)
    yield to_path(f"gs://{gcs.BUCKET}", "store")
    patch.undo()
    process.kill()
    process.communicate()


def on(store, config, name):
    return replace(config, run=str(store / name), data=replace(config.data, cache_dir=str(store / "cache")))


def test_a_run_on_a_store_is_trained_evaluated_and_opened(store, tmp_path, capsys):
    run = store / "short"
    short = in_folder(tmp_path, train=replace(TINY.train, steps=2, eval_every=2 * 4 / 16, log_every=1))
    config = on(store, short, run.name)
    assert f"figures in {run}/figures" in train(config)
    names = {*"checkpoints config.json events examples.json figures metrics.jsonl owner report.html".split()}
    assert {path.name for path in run.iterdir()} == names
    assert [(row["kind"], row["step"]) for row in RunFolder(run).rows()] == [("train", 1), ("train", 2), ("val", 2)]
    assert eval_command(["--run", config.run, "--split", "shapes/val"]) == 0
    assert f"scores in {run}/eval.json" in capsys.readouterr().out
    assert json.loads((run / "eval.json").read_text())["step"] == 2
    assert from_pretrained(config.run)[2].step == 2
    assert "resuming" in train(config)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["in a save", "in a step", "in a validation"])
def test_a_killed_run_on_a_store_resumes_to_the_result_of_one_on_disk(moment, store, tmp_path, undisturbed, capsys):
    run = store / moment.replace(" ", "-")
    config = on(store, in_folder(tmp_path), run.name)
    _, errors = (killed := in_process(KILL, config, moment)).communicate(timeout=300)
    assert killed.returncode == -signal.SIGKILL, errors.decode()
    assert f"figures in {run}/figures" in train(config)
    assert_same(config, undisturbed)
    names = {*"checkpoints config.json events examples.json figures metrics.jsonl owner report.html".split()}
    assert {path.name for path in run.iterdir()} == names
    assert eval_command(["--run", config.run, "--split", "shapes/val", "--checkpoint", "last"]) == 0
    assert f"scores in {run}/eval.json" in capsys.readouterr().out
    scores = json.loads((run / "eval.json").read_text())["scores"]
    assert scores == undisturbed["rows"][-1]["scores"]
    jax.tree.map(
        np.testing.assert_array_equal,
        from_pretrained(config.run, checkpoint="last")[1]["params"],
        undisturbed["state"].params,
    )


@pytest.mark.slow
def test_two_processes_on_a_store_train_like_one_on_disk(store, reference):
    codes, outputs = train_in_processes(store / "two")
    assert codes == [0, 0], outputs
    assert_equal_runs(store / "two", reference)


def test_the_newest_process_owns_a_run(store, tmp_path):
    config = on(store, in_folder(tmp_path), "owned")
    folder = RunFolder(config.run)
    with folder.locked():
        (folder.local / "metrics.jsonl").write_text("{}\n")
        folder.upload()
        assert (folder.path / "metrics.jsonl").read_text() == "{}\n"
        with RunFolder(config.run).locked(), pytest.raises(InputError, match="taken over by another process"):
            folder.upload()


def test_uploads_send_only_changed_files_and_are_rate_limited(store, tmp_path, monkeypatch):
    folder = RunFolder(str(store / "uploads"))
    folder.append({"step": 1, "kind": "train"})
    (folder.local / "other").write_text("as it was")
    folder.upload()
    (folder.path / "other").unlink()
    folder.append({"step": 2, "kind": "train"})
    folder.upload(every=3600)
    assert len((folder.path / "metrics.jsonl").read_text().splitlines()) == 1
    folder.upload()
    assert len((folder.path / "metrics.jsonl").read_text().splitlines()) == 2 and not (folder.path / "other").exists()
    assert [row["step"] for row in RunFolder(folder.path).rows()] == [1, 2]


@pytest.mark.filterwarnings("ignore:Sending a large body")  # from aiohttp, about uploads of gcsfs
def test_images_prepared_copies_and_weights_can_be_on_a_store(store, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        for kind, pixels in (("images", rng.integers(0, 255, (8, 9, 3))), ("masks", rng.integers(0, 2, (8, 9)))):
            path = store / "set/train" / kind / f"{name}.png"
            path.write_bytes(cv2.imencode(".png", pixels.astype(np.uint8))[1].tobytes())
    (store / "set/classes.txt").write_text("one\ntwo\n")
    config = DataConfig(dir=str(store / "set"), cache_dir=str(store / "copies"))
    split = load("folder/train", config)
    assert [split.source[index]["name"] for index in range(2)] == ["a", "b"] and split.image_size == (8, 9)
    (first,) = (store / "copies/folder").iterdir()
    (store / "set/train/images/b.png").write_bytes(cv2.imencode(".png", np.zeros((8, 9, 3)))[1].tobytes())
    assert len(load("folder/train", config)) == 2
    (second,) = (store / "copies/folder").iterdir()  # a changed source has a new copy, the old one is removed
    assert second.name != first.name
    next(path for path in second.iterdir() if "array_record" in path.name).unlink()
    with pytest.raises(InputError, match="prepared copy of a data set is damaged or gone"):
        load("folder/train", config).source[0]  # ArrayRecord treats a missing object as empty

    model, variables = build()
    weights.save(tmp_path / "some.safetensors", model, variables, "imagenet")
    upload(tmp_path / "some.safetensors", store / "some.safetensors")
    found = weights.load(str(store / "some.safetensors"), model, variables)
    jax.tree.map(np.testing.assert_array_equal, found, variables)


def test_other_stores_and_a_missing_gcsfs_are_reported(fails, monkeypatch):
    fails(train_command, ["shapes", "--run", "s3://bucket/run"], "--run s3://bucket/run", "s3:// is not supported")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    fails(train_command, ["shapes", "--run", "gs://bucket/run"], "--run gs://bucket/run", "pip install fcn_jax[gcs]")
