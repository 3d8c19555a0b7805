"""The instrument itself: its measures by hand, a fault that it has to find, and what the command answers with."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import fcn_jax
from fcn_jax import compare as numerics
from fcn_jax import weights
from fcn_jax.cli import parity as cli_parity
from fcn_jax.cli.parity import main as parity_command
from fcn_jax.cli.process import guarded
from fcn_jax.compare import compare_arrays, error_norm, first_over, measure, ulp_distance
from fcn_jax.compare.experiments import (
    Case,
    against_jax,
    against_torch,
    cancelled_biases,
    random_batch,
    random_variables,
)
from fcn_jax.compare.jax_side import dilated_upsampling
from fcn_jax.compare.parity_report import save_figure, summary_table, tables
from fcn_jax.config import OptimConfig
from fcn_jax.errors import InputError

ROOT = Path(__file__).parents[2]
SIZE = (64, 48)
TINY = {"encoder": "vgg11", "width": 0.03}
COMMAND = ["--encoder", "vgg11", "--width", "0.03", "--num-classes", "3", "--steps", "2", "--image-size", "64", "48"]


def build(name, dtype=jnp.float64, **options):
    model = fcn_jax.create_model(name, 3, dtype=dtype, param_dtype=dtype, **TINY, **options)
    variables = jax.tree.map(lambda x: jnp.asarray(x, dtype), random_variables(model))
    return model, variables, *random_batch(SIZE, 3)


# --- measures


def test_the_error_norm_is_the_difference_over_the_size_of_theirs():
    assert error_norm(np.array([3.0, 4.0]), np.array([3.0, 0.0])) == pytest.approx(4 / 3)
    assert error_norm(np.array([3.0, 4.0]), np.array([3.0, 0.0]), scale=8.0) == 0.5
    assert error_norm(np.zeros(2), np.zeros(2)) == 0
    assert error_norm(np.ones(2), np.zeros(2)) == np.inf
    assert np.isnan(error_norm(np.array([np.nan]), np.ones(1)))
    with pytest.raises(InputError, match="one shape"):
        error_norm(np.zeros(2), np.zeros((2, 1)))


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, jnp.bfloat16])
def test_ulps_count_the_numbers_between(dtype):
    def ulp(x, y):
        return int(ulp_distance(np.asarray([x], dtype), np.asarray([y], dtype))[0])

    tiny = jnp.finfo(dtype).smallest_subnormal
    eps = float(jnp.finfo(dtype).eps)
    assert ulp(1, 1) == 0
    assert ulp(1, 1 + eps) == 1 == ulp(1 + eps, 1)
    assert ulp(1, 1 - eps / 2) == 1  # below a power of two numbers are twice as dense
    assert ulp(1, 2) == round(1 / eps) == ulp(-1, -2)
    assert ulp(0.0, -0.0) == 0
    assert ulp(-tiny, tiny) == 2  # through zero
    assert ulp(-2, -1 - eps) == round(1 / eps) - 1
    assert ulp(np.nan, 1) == 2**64 - 1
    assert ulp(np.nan, np.nan) == 0
    assert ulp(jnp.finfo(dtype).max, np.inf) == 1


def test_ulps_agree_with_nextafter_and_do_not_overflow():
    x = np.array([1.5, -3e-310, 7e300])
    y = x
    for _ in range(5):
        y = np.nextafter(y, np.inf)
    np.testing.assert_array_equal(ulp_distance(x, y), 5)
    largest = np.array([np.finfo(np.float64).max])
    assert int(ulp_distance(largest, -largest)[0]) == 2 * (0x7FF0000000000000 - 1)


def test_measuring_rounds_to_the_coarser_dtype():
    found = measure(np.array([[1.0, 2.0, 4.0]]), np.array([[1.0, 2.0, 4.0 + 1e-9]], np.float32))
    assert found.shape == (1, 3)
    assert (found.ulp_median, found.ulp_max, found.max_abs) == (0, 0, 0)
    found = measure(np.array([1.0, 2.0, 3.0], np.float32), np.array([1.0, 2.0, 3.0 + 2**-20], np.float32))
    assert (found.ulp_median, found.ulp_max, found.max_abs) == (0, 4, 2**-20)
    with pytest.raises(InputError, match="one dtype"):
        ulp_distance(np.zeros(1), np.zeros(1, np.float32))


def test_a_cancelled_gradient_is_measured_by_the_whole_one():
    rows = compare_arrays(
        {"w": np.array([3.0, 4.0]), "b": np.array([1e-17])},
        {"w": np.array([3.0, 4.0]), "b": np.array([-1e-17])},
        cancelled=["b"],
    )
    assert [row.error for row in rows] == [0, pytest.approx(2e-17 / 5)]
    assert [row.of_global for row in rows] == [False, True]


def test_a_row_that_is_not_a_number_is_over_every_threshold():
    good, bad = {"a": np.ones(1), "b": np.ones(1)}, {"a": np.ones(1), "b": np.array([np.nan])}
    assert first_over(compare_arrays(bad, good), 1e9) == "b"


# --- against torch


def sides(name, **options):
    model, variables, images, labels = build(name, **options)
    twin = numerics.make_twin(model)
    arrays = weights.to_torch(model, variables)
    twin.load_state_dict({key: torch.from_numpy(np.array(value)) for key, value in arrays.items()})
    return model, variables, twin, images, labels


@pytest.mark.parametrize(
    ("name", "options"),
    [("fcn32s", {"encoder_norm": "batch"}), ("fcn8s_ladder", {}), ("fcn8s_resize", {"aux_head": True})],
)
def test_float64_agrees_in_every_part_and_along_sgd(name, options):
    case = Case(*build(name, **options), "float64", steps=4, optim=OptimConfig(lr=0.02))
    report = against_torch(case)
    # the same sums in another order; the batch norms of narrow layers amplify 2e-16 to 1e-12
    for part in ("layers", "loss", "gradients", "statistics", "steps"):
        assert report.worst(part)[1] <= 1e-10, (part, report.worst(part))
    assert report.unmatched == []
    assert [row.step for row in report.steps] == [1, 2, 3, 4]
    assert report.steps[-1].moved > 1e-4
    assert report.steps[-1].theirs != report.steps[0].theirs
    assert [row.name for row in report.layers["train"]][-1] == "logits"
    assert {row.name for row in report.gradients if row.of_global} == set(cancelled_biases(case.model))
    first = next(row.name for row in report.gradients)
    assert first == "vgg.conv1_1.weight"  # in the order of the layers


def test_a_broken_layer_is_the_first_over_the_threshold():
    model, variables, twin, images, labels = sides("fcn32s")
    with torch.no_grad():
        twin.vgg.conv4_1.weight[0, 0, 1, 1] += 0.01
    ours = numerics.make_jax_side(model, variables)
    theirs = numerics.make_torch_side(twin, dtype="float64")
    report = numerics.compare(ours, theirs, images, labels, threshold=1e-9)
    for rows in report.layers.values():
        assert first_over(rows, 1e-9) == "vgg.conv4_1"
    assert report.to_json()["first_over"] == {"eval": "vgg.conv4_1", "train": "vgg.conv4_1"}
    printed = [[str(cell) for cell in table.columns[0]._cells] for table in tables(report)]
    assert [cell for cells in printed for cell in cells if "first over" in cell] == [
        "vgg.conv4_1  <- first over 1e-09",
        "vgg.conv4_1  <- first over 1e-09",
    ]


def test_a_wrong_statistic_shows_in_eval_mode_only():
    model, variables, twin, images, labels = sides("fcn32s_resize")
    with torch.no_grad():
        twin.head.bn.running_var *= 1.5
    report = numerics.compare(
        numerics.make_jax_side(model, variables), numerics.make_torch_side(twin, dtype="float64"), images, labels
    )
    assert first_over(report.layers["eval"], 1e-9) == "head.bn"
    assert first_over(report.layers["train"], 1e-9) is None
    assert report.worst("statistics")[0] == "head.bn.running_var"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_below_float64_the_report_tells_which_side_is_off(dtype, tmp_path):
    report = against_torch(Case(*build("fcn32s_resize"), dtype, steps=1))
    rows = [*report.layers["train"], *report.gradients]
    assert all(row.ours_off is not None and row.theirs_off is not None for row in rows)
    assert all(row.noise is not None for row in report.gradients)
    # the roundings of the dtype, amplified by batch norms; never zero, since the reference is finer
    low, high = {"float32": (1e-9, 1e-5), "bfloat16": (1e-4, 0.5)}[dtype]
    assert low < report.layers["train"][-1].ours_off < high
    assert report.layers["train"][-1].theirs_off > low
    save_figure(tmp_path / "new" / "parity.png", [report])
    assert (tmp_path / "new" / "parity.png").read_bytes().startswith(b"\x89PNG")


def test_several_devices_equal_torch_with_the_whole_batch():
    report = against_torch(Case(*build("fcn32s_resize"), "float64", steps=2), devices=2)
    # the order of sums over examples beside that within them
    assert max(report.worst(part)[1] for part in ("layers", "gradients", "statistics", "steps")) <= 1e-10


# --- against jax


def test_every_way_to_compute_it_is_compared():
    case = Case(*build("fcn32s", precision="highest"), "float64", steps=2)
    reports = {f"{report.ours} | {report.theirs}": report for report in against_jax(case)}
    assert list(reports) == [
        "pmap x 2 | one device",
        "mesh x 2 | one device",
        "float32 | float64",
        "default | highest",
        "high | highest",
        "polyphase | dilated",
        "remat | kept",
    ]
    for name, report in reports.items():
        limit = 1e-3 if name == "float32 | float64" else 1e-10
        for part in ("layers", "loss", "gradients", "steps"):
            assert report.worst(part)[1] <= limit, (name, part, report.worst(part))
    # they were computed otherwise
    assert reports["float32 | float64"].worst("layers")[1] > 1e-8
    assert reports["polyphase | dilated"].worst("layers")[1] > 0
    assert summary_table(list(reports.values())).row_count == 7


def test_every_transposed_convolution_can_be_dilated():
    model, variables, images, _ = build("fcn32s_ladder")  # five of them, with output padding
    polyphase, dilated = (
        numerics.make_jax_side(model, variables, interceptor=interceptor).layers(images, True)
        for interceptor in (None, dilated_upsampling)
    )
    rows = compare_arrays(dilated, polyphase)
    # sums in another order, amplified by the batch norms of narrow layers; they were computed otherwise
    assert 0 < max(row.error for row in rows if row.name.startswith("deconv")) <= 1e-10


def test_a_batch_that_does_not_split_is_refused():
    model, variables, images, labels = build("fcn32s")
    with pytest.raises(InputError, match="3 devices"):
        next(against_jax(Case(model, variables, images, labels), devices=3))
    with pytest.raises(InputError, match="devices"):
        numerics.make_jax_side(model, variables, devices=99)


# --- the command


def parity(*arguments):
    return guarded(parity_command, [str(argument) for argument in arguments])


def test_the_exit_code_follows_the_limit(tmp_path, capsys):
    out, file = tmp_path / "out", tmp_path / "w.safetensors"
    model, variables, *_ = build("fcn32s")
    weights.save(file, model, variables, "imagenet")
    arguments = ["fcn32s", *COMMAND, "--dtype", "float64"]
    assert parity(*arguments, "--weights", file, "--max-error", 1e-9, "--out", out) == 0
    content = json.loads((out / "parity.json").read_text())
    assert content["arguments"]["model"] == "fcn32s" and {"jax", "torch"} <= content["versions"].keys()
    report = content["reports"][0]
    assert report["layers"]["train"][0]["name"] == "vgg.conv1_1" and len(report["steps"]) == 2
    assert (out / "parity.png").stat().st_size > 10_000
    capsys.readouterr()
    assert parity(*arguments, "--steps", 0, "--max-error", 1e-30, "--max-error-of", "layers", "statistics") == 1
    printed = capsys.readouterr().out
    assert "over 1e-30: jax | torch: vgg.conv" in printed and ".weight" not in printed.rpartition("over")[2]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["fcn9s"], ["fcn9s", "fcn8s"]),
        (["fcn8s", "--dtype", "float8"], ["float8"]),
        (["fcn8s", "--steps", "-1"], ["--steps"]),
        (["fcn8s", "--image-size", "0", "5"], ["--image-size"]),
        (["fcn8s", "--devices", "3"], ["3 devices", "--batch-size"]),
        (["fcn8s", *COMMAND, "--devices", "99", "--batch-size", "99"], ["99"]),
        (["fcn8s", "--max-error", "nan"], ["--max-error"]),
        (["fcn8s", *COMMAND, "--weights", "nosuch.pth"], ["nosuch.pth"]),
        (["fcn8s_resize", *COMMAND, "--batch-size", "1", "--image-size", "32", "32"], ["larger image"]),
    ],
)
def test_mistakes_give_one_line_and_code_2(arguments, named, capsys):
    assert parity(*arguments) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and len(error.splitlines()) == 1, error
    for word in named:
        assert word in error, error


def test_a_file_that_says_its_network_needs_no_options(tmp_path, capsys):
    options = {"encoder": "vgg11", "width": 0.03, "fc6_kernel": 3, "fc_features": 5}
    model = fcn_jax.create_model("fcn32s", 4, **options)
    weights.save(tmp_path / "w.safetensors", model, random_variables(model), None)
    arguments = ["fcn32s", "--weights", tmp_path / "w.safetensors", "--steps", 0, "--image-size", 33, 32]
    assert parity(*arguments, "--max-error", 1e-4, "--max-error-of", "layers") == 0
    assert parity("fcn32s", *COMMAND, "--steps", 0, "--max-error", 1e-4, "--max-error-of", "statistics") == 2
    assert "nothing was compared of statistics" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_computed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli_parity, "against_torch", lambda *_: pytest.fail("it was computed"))
    (tmp_path / "file").write_text("")
    assert parity("fcn32s", *COMMAND, "--out", tmp_path / "file/out") == 2
    assert "name a folder that can be written to" in capsys.readouterr().err


# --- somebody else's model


def test_the_example_of_the_docs_runs():
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/numerics.md").read_text(), re.DOTALL)
    names = {}
    exec(compile(example, "docs/numerics.md", "exec"), names)
    report = names["report"]
    assert report.worst("layers")[1] < 1e-10 and report.worst("gradients")[1] < 1e-10
    assert report.worst("steps")[1] < 1e-10
    assert not report.unmatched


def test_any_two_callables_that_name_their_layers_can_be_compared():
    def double(x):
        return {"double": 2 * x, "square": 4 * x * x}

    def broken(x):
        return {"double": 2 * x, "square": 4 * x * x + 1}

    rows = numerics.compare_layers(double, broken, np.arange(4.0))
    assert [row.name for row in rows] == ["double", "square"]
    assert first_over(rows, 1e-9) == "square"
    side = numerics.Side("mine", lambda images, train: double(images))
    other = dataclasses.replace(side, layers=lambda images, train: broken(images))
    report = numerics.compare(side, other, np.arange(4.0), np.zeros(4), steps=3)
    assert (report.loss, report.gradients, report.steps) == (None, [], [])
