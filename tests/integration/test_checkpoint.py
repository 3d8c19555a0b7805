import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from tiny_run import saved_state, saved_variables

from fcn_jax.config import Config, DataConfig
from fcn_jax.errors import InputError
from fcn_jax.training.checkpoint import Checkpoints, load_variables, restore_newest
from fcn_jax.training.run import DatasetInfo, RunFolder
from fcn_jax.training.trainer import run_length

INFO = DatasetInfo("folder", ("a", "b"), ((0, 0, 0), (1, 2, 3)))


def _save(folder, scores, **options):
    checkpoints = Checkpoints(folder, **options)
    for step, score in scores.items():
        checkpoints.save(saved_state(step), {"data": {"step": step}}, score)
    checkpoints.close()
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def test_last_best_and_interval_checkpoints_are_retained(tmp_path):
    scores = {1: 0.1, 2: 0.9, 3: 0.2, 4: 0.3, 5: 0.8, 6: 0.4, 7: 0.5}
    assert _save(tmp_path / "a", scores, keep_last=2) == [2, 6, 7]
    assert _save(tmp_path / "b", scores, keep_last=1, keep_steps=3) == [2, 3, 6, 7]


def test_an_undefined_score_is_never_the_best(tmp_path):
    assert _save(tmp_path / "a", {1: 0.1, 2: float("nan"), 3: float("nan")}, keep_last=1) == [1, 3]


def test_a_checkpoint_is_restored_bit_for_bit(tmp_path):
    _save(tmp_path / "a", {4: 0.5, 6: 0.4})
    checkpoints = Checkpoints(tmp_path / "a")
    assert checkpoints.best_step() == 4
    checkpoints.close()
    step, state, progress, validated, notes = restore_newest(tmp_path / "a", saved_state(0))
    jax.tree.map(np.testing.assert_array_equal, state, saved_state(6))
    assert (step, progress, validated, notes) == (6, {"data": {"step": 6}}, True, ())
    for which, step in (("best", 4), ("last", 6), ("4", 4)):
        variables, found = load_variables(tmp_path / "a", which, saved_variables())
        assert found == step and float(variables["params"]["w"][0]) == step


def test_a_run_without_checkpoints_is_reported(tmp_path):
    with pytest.raises(InputError, match="has not saved a checkpoint yet"):
        load_variables(tmp_path / "none", "best", {})
    Checkpoints(tmp_path / "empty").close()
    with pytest.raises(InputError, match="one of: none"):
        load_variables(tmp_path / "empty", "best", {})


def test_a_saved_config_round_trips_and_other_settings_are_rejected(tmp_path):
    config = Config(data=DataConfig(crop_size=(3, 4), classes="list.txt"))
    folder = RunFolder(tmp_path / "run")
    folder.start(config, INFO)
    assert folder.read_config() == (config, INFO)
    folder.start(Config(data=DataConfig(crop_size=(3, 4), classes="list.txt", workers=2), devices=1), INFO)
    with pytest.raises(InputError, match=r"data.crop_size \[3, 4\] \(now None\)"):
        folder.start(Config(data=DataConfig(classes="list.txt")), INFO)


def test_other_classes_are_rejected_and_the_config_file_is_unchanged(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.start(Config(), INFO)
    before = folder.config_file.read_bytes()
    for names in (("a", "c"), ("a", "b", "c")):
        with pytest.raises(InputError, match="other classes"):
            folder.start(Config(), DatasetInfo("folder", names, ((0, 0, 0), (1, 2, 3), (4, 5, 6))[: len(names)]))
    assert folder.config_file.read_bytes() == before


def test_a_restart_preserves_the_recorded_environment(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.start(Config(), INFO)
    content = json.loads(folder.config_file.read_text())
    content["environment"]["jax"] = "0.0.1"
    folder.config_file.write_text(json.dumps(content))
    folder.start(Config(devices=3), INFO)
    content = json.loads(folder.config_file.read_text())
    assert content["environment"]["jax"] == "0.0.1" and content["config"]["devices"] == 3


def test_rows_after_a_step_are_dropped_and_torn_rows_are_skipped(tmp_path):
    folder = RunFolder(tmp_path)
    for step in (1, 2):
        folder.append({"step": step, "kind": "train"})
    with folder.metrics_file.open("a") as file:
        file.write('{"sTep": 2, "kind": "val"}\n\x00[1, 2]\n[3]\n')
    folder.append({"step": 3, "kind": "train"})
    with folder.metrics_file.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [row["step"] for row in folder.rows()] == [1, 2, 3]
    assert folder.drop_rows_after(2) == 3  # damaged lines; the last was only cut short
    assert folder.metrics_file.read_text() == '{"step": 1, "kind": "train"}\n{"step": 2, "kind": "train"}\n'


def test_epochs_are_converted_to_steps():
    config = Config()
    train = replace(config.train, batch_size=8, epochs=3, steps=None, eval_every=0.5, keep_every=2)
    length = run_length(replace(config, train=train), 40)
    assert (length.steps, length.eval_every, length.keep_every, length.epoch) == (15, 2, 10, 5.0)
    assert [step for step in range(1, 16) if length.is_milestone(step)] == [2, 4, 6, 8, 10, 12, 14, 15]
    assert run_length(replace(config, train=replace(train, steps=7)), 40).steps == 7
