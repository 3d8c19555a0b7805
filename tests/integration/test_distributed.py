"""One run in two processes on the CPU. tests/slow/test_distributed_all.py has the longer tests."""

import jax
import numpy as np
import pytest
from launch import address, assert_equal_runs, start, train

import fcn_jax
from fcn_jax.config import Config, DataConfig
from fcn_jax.data import datasets
from fcn_jax.data.io import encode_label, palette
from fcn_jax.data.pipeline import make_eval_batches
from fcn_jax.errors import InputError
from fcn_jax.evaluation.evaluate import evaluate, make_predictor
from fcn_jax.training import distributed
from fcn_jax.training import run as runs
from fcn_jax.training.distributed import digest, from_writer, gather, processes, together, writer_first


def test_two_processes_give_the_result_of_one(reference, tmp_path):
    run = tmp_path / "run"
    codes, outputs = train(run)
    assert codes == [0, 0], outputs
    assert "best checkpoint" in outputs[0] and "best checkpoint" not in outputs[1]
    assert_equal_runs(run, reference)


def test_an_address_without_listener_is_reported(monkeypatch):
    monkeypatch.setattr(distributed, "_START", 0.2)
    with pytest.raises(InputError, match="did not find each other"), processes(address(), 2, 1):
        pass


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((None, 2, None), "--distributed HOST:PORT"), (("auto", None, 1), "--distributed HOST:PORT"),
        (("somewhere", 2, 0), "auto or HOST:PORT, got somewhere"), (("host:99999", 2, 0), "a port is in"),
        (("host:1234", 2, None), "needs --num-processes and --process-id"),
        (("host:1234", 2, 2), "--num-processes 2 --process-id 2"),
        (("host:1234", 0, 0), "--num-processes 0 --process-id 0"),
    ],
)  # fmt: skip
def test_invalid_distributed_options_are_rejected(given, message):
    with pytest.raises(InputError, match=message), processes(*given):
        pass


def test_a_run_folder_that_is_not_shared_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "_SHOWN_AFTER", 0.2)
    folder = runs.RunFolder(tmp_path / "run", writes=False)
    with pytest.raises(InputError, match="on a shared disk"):
        folder.start(Config(), runs.DatasetInfo("folder", ("a",), ((0, 0, 0),)))
    folder.append({"step": 1})
    assert not folder.path.exists()


def test_auto_without_a_cluster_environment_is_reported(tmp_path):
    process = start(["--run", tmp_path / "run", "--distributed", "auto"], 1)
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 2 and "no SLURM, TPU pod, Kubernetes or Open MPI" in printed
    assert "Traceback" not in printed


def test_one_process_needs_no_communication():
    with processes(None):
        assert gather([1, 2]).tolist() == [[1, 2]] and from_writer(None) is None
        assert together(lambda: 3) == writer_first(lambda: 3) == 3
    with pytest.raises(KeyError), processes(None):
        raise KeyError("goes its usual way")


def test_a_digest_detects_a_change_of_one_bit():
    tree = {"a": np.zeros((2, 3), np.float32), "b": np.ones(2, np.float32)}
    other = {**tree, "b": np.nextafter(tree["b"], np.float32(2))}
    assert digest(tree) == digest(jax.tree.map(jax.numpy.asarray, tree)) != digest(other)


@pytest.mark.parametrize("count", [2, 3])
def test_evaluation_shares_of_processes_add_up_to_the_whole(count):
    sizes = [(20, 30), (33, 40), (20, 30), (64, 64), (40, 33)]
    rng = np.random.default_rng(0)
    drawn = [(rng.integers(0, 256, (*size, 3), np.uint8), rng.integers(0, 4, size, np.uint8)) for size in sizes]
    records = [{"image": encode_label(x), "label": encode_label(y), "name": str(i)} for i, (x, y) in enumerate(drawn)]
    split = datasets.Split("made", "up", ("a", "b", "c", "d"), palette(4), records)
    model = fcn_jax.create_model("fcn32s", 4, encoder="vgg11", width=0.03, fc_features=8, fc6_kernel=1)
    variables = fcn_jax.init_variables(model, jax.random.key(0))
    predict = make_predictor(model, "imagenet")

    def score(**share):
        batches = make_eval_batches(split, DataConfig(eval_multiple=64), 2, **share)
        return evaluate(predict, variables, batches, 4)

    whole = score()
    parts = [score(process_index=index, process_count=count) for index in range(count)]
    np.testing.assert_array_equal(sum(part.confusion for part in parts), whole.confusion)
    assert [part.images for part in parts] == [len(sizes[index::count]) for index in range(count)]
    assert score(process_index=7, process_count=8).images == 0
