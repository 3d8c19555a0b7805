"""Damaged checkpoints and full disks: a run resumes from an intact checkpoint or reports what is wrong."""

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import TINY, assert_same, in_folder, in_process, saved_state, saved_variables, signalling, train

from fcn_jax.errors import InputError, Stopped
from fcn_jax.paths import write_whole
from fcn_jax.training import loop
from fcn_jax.training.checkpoint import Checkpoints, load_variables, restore_newest


@pytest.fixture(scope="module")
def checkpoints_of_two_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    checkpoints = Checkpoints(folder, keep_last=2)
    for step in (2, 4):
        checkpoints.save(saved_state(step), {"data": {"step": step}, "unlogged": []}, 0.5)
    checkpoints.close()
    return folder


@pytest.fixture
def folder(checkpoints_of_two_steps, tmp_path):
    """A copy of the checkpoints, to be damaged."""
    return shutil.copytree(checkpoints_of_two_steps, tmp_path / "checkpoints")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


DAMAGES = {"flipped": flip, "cut short": lambda path: os.truncate(path, path.stat().st_size // 2), "gone": Path.unlink}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_file_of_the_newest_checkpoint_never_restores_a_wrong_state(
    damage, checkpoints_of_two_steps, tmp_path
):
    saved = checkpoints_of_two_steps
    files = [path.relative_to(saved) for path in sorted((saved / "4").rglob("*")) if path.is_file()]
    files = [path for path in files if (saved / path).stat().st_size]
    older = 0
    for number, file in enumerate(files):
        folder = tmp_path / str(number) / "checkpoints"
        shutil.copytree(saved, folder)
        DAMAGES[damage](folder / file)
        step, state, progress, _, notes = restore_newest(folder, saved_state(0))
        jax.tree.map(np.testing.assert_array_equal, state, saved_state(step))
        assert progress == {"data": {"step": step}, "unlogged": []}
        names = sorted(path.name for path in folder.iterdir())
        if step == 4:  # the file is not needed to restore
            assert names == ["2", "4"] and notes == ()
        else:
            older += 1
            assert names == ["2", "damaged-4"]
            (note,) = notes
            assert str(folder / "damaged-4") in note and "resuming from step 2" in note
    assert older >= 5 and len(files) > 20


def test_a_flipped_bit_that_the_format_does_not_check_is_detected(tmp_path):
    folder = tmp_path / "checkpoints"
    weights = np.random.default_rng(0).normal(size=(64, 1000)).astype(np.float32)  # too large for an index
    states = {step: saved_state(step).replace(params={"w": jnp.asarray(weights) + step}) for step in (2, 4)}
    checkpoints = Checkpoints(folder)
    for state in states.values():
        checkpoints.save(state, {"data": {}, "unlogged": []}, 0.5)
    checkpoints.close()
    shutil.copytree(folder, tmp_path / "whole")
    path = max((path for path in (folder / "4").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = path.read_bytes()
    noticed = []
    for number in range(0, len(content), len(content) // 20):
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "whole", folder)
        path.write_bytes(content[:number] + bytes([content[number] ^ 1]) + content[number + 1 :])
        restored = restore_newest(folder, states[2])
        jax.tree.map(np.testing.assert_array_equal, restored.state, states[restored.step])
        noticed += restored.notes
    assert sum("variables differ from what was saved" in note for note in noticed) >= 15


def test_without_an_intact_checkpoint_restoring_fails_and_changes_no_file(folder):
    for step in (2, 4):
        shutil.rmtree(folder / str(step) / "training")
    with pytest.raises(InputError, match="no checkpoint in .* can be read .*4: .*2: .*--run"):
        restore_newest(folder, saved_state(0))
    assert sorted(path.name for path in folder.iterdir()) == ["2", "4"]
    for path in (folder / "4" / "variables").rglob("d/*"):
        flip(path)
    with pytest.raises(InputError, match="4 is damaged"):
        load_variables(folder, "4", saved_variables())


def test_a_modified_score_is_detected(folder):
    (folder / "4" / "metrics" / "metrics").write_text('{"mean_iu": 0.9}')
    restored = restore_newest(folder, saved_state(0))
    assert restored.step == 2 and "damaged-4: metrics differ from what was saved" in restored.notes[0]


@pytest.mark.parametrize("damage", [flip, Path.unlink, lambda path: path.write_text('{"mean_iu": "high"}')])
def test_an_older_checkpoint_without_its_score_does_not_prevent_resuming(damage, folder):
    damage(folder / "2" / "metrics" / "metrics")
    restored = restore_newest(folder, saved_state(0))
    assert restored.step == 4 and "damaged-2: its score cannot be read" in restored.notes[0]
    checkpoints = Checkpoints(folder)
    checkpoints.save(saved_state(6), {"data": {}, "unlogged": []}, 0.7)
    checkpoints.save(saved_state(8), {"data": {}, "unlogged": []}, 0.6)
    checkpoints.close()
    assert load_variables(folder, "best", saved_variables())[1] == 6


@pytest.mark.slow
@pytest.mark.usefixtures("heard")
def test_a_run_with_a_damaged_checkpoint_resumes_to_the_same_result(undisturbed, tmp_path, monkeypatch):
    config = in_folder(tmp_path)
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        signalling(patched, loop.Logger, "step", signal.SIGTERM, lambda self, step, *rest: step == 11)
        train(config)
    folder = Path(config.run)
    shutil.rmtree(folder / "interrupted" / "11" / "progress")
    shutil.rmtree(folder / "checkpoints" / "8" / "variables")
    text = train(config)
    assert "damaged-11" in text and "damaged-8" in text and "at step 4" in text
    shutil.rmtree(folder / "checkpoints" / "damaged-8")
    shutil.rmtree(folder / "interrupted", ignore_errors=True)
    assert_same(config, undisturbed)
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(InputError, match="several validations and no checkpoint"):
        train(config)


# --- locations that cannot be written


@pytest.mark.slow
def test_a_failed_save_is_reported_and_earlier_checkpoints_stay_valid(undisturbed, tmp_path, monkeypatch):
    config = in_folder(tmp_path)
    checkpoints, aside = Path(config.run) / "checkpoints", tmp_path / "aside"

    def take_away(self, step, *rest):
        if step == 7:
            checkpoints.rename(aside)
            checkpoints.symlink_to("/proc")  # not writable, even for root
        return original(self, step, *rest)

    original = loop.Logger.step
    with monkeypatch.context() as patched, pytest.raises(InputError, match="could not be saved in .*checkpoints"):
        patched.setattr(loop.Logger, "step", take_away)
        train(config)
    checkpoints.unlink()
    aside.rename(checkpoints)
    assert "at step 4" in train(config)
    assert_same(config, undisturbed)


def test_a_report_that_cannot_be_written_does_not_fail_the_run(tmp_path):
    config = in_folder(tmp_path, train=replace(TINY.train, steps=1))
    (Path(config.run) / "examples.json").mkdir(parents=True)
    text = train(config)
    assert "best checkpoint: step" in text and "note: the report is incomplete (" in text


def test_a_file_is_written_whole_beside_its_neighbours(tmp_path):
    for name in ("a.partial", "a.json"):
        (tmp_path / name).write_text("before")
    write_whole(tmp_path / "a.json", "after \udc80")  # a file name that is not UTF-8 has such characters
    (tmp_path / "b.json").mkdir()
    with pytest.raises(OSError):
        write_whole(tmp_path / "b.json", "text")
    assert {file.name for file in tmp_path.iterdir()} == {"a.partial", "a.json", "b.json"}
    assert (tmp_path / "a.partial").read_text() == "before" and (tmp_path / "a.json").read_text() == "after \\udc80"


@pytest.mark.slow
def test_a_full_disk_gives_one_line_and_earlier_checkpoints_stay_valid(undisturbed, tmp_path):
    config = in_folder(tmp_path)
    code = (
        "import resource; original = loop.Logger.step\n"
        "def step(self, step, *rest):\n"
        "    if step == 7: resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), -1))\n"
        "    return original(self, step, *rest)\n"
        "loop.Logger.step = step\n"
        "sys.exit(guarded(run, []))"
    )
    for limit in ("10", "4096"):  # the first stops metrics.jsonl, the second a checkpoint
        process = in_process(code, config, limit)
        _, errors = process.communicate(timeout=120)
        lines = [line for line in errors.decode().splitlines() if not line.startswith(("W0", "I0", "E0"))]
        assert process.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: "), errors.decode()
        assert "saved before" in lines[0] and str(config.run) in lines[0]
    assert "at step 4" in train(config)
    assert_same(config, undisturbed)
