"""The parity comparison: its measures by hand, faults that it must find, and the command `fcn-jax parity`."""

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
from fcn_jax.cli.process import guarded
from fcn_jax.compare import compare_arrays, error_norm, experiments, first_over, measure, ulp_distance
from fcn_jax.compare.experiments import Case, against_jax, against_torch, random_batch
from fcn_jax.compare.jax_adapter import dilated_upsampling
from fcn_jax.compare.parity import compare_predictions
from fcn_jax.compare.report import parity_tables, save_figure
from fcn_jax.compare.torch_adapter import load_twin
from fcn_jax.config import OptimConfig
from fcn_jax.errors import InputError

ROOT = Path(__file__).parents[2]
PARTS = ("layers", "loss", "gradients", "statistics", "steps")
OPTIM = OptimConfig(lr=0.02)  # shared, so that equal programs are compiled once
SMALL_HEAD = {"fc_features": 8, "fc6_kernel": 3}
COMMAND = "fcn32s_resize --encoder vgg11 --width 0.03 --num-classes 3 --image-size 64 48".split()


def build(name, **options):
    """Return a tiny network in float64, as the command builds it, its weights, images and labels."""
    options |= {"dtype": jnp.float64, "param_dtype": jnp.float64, "precision": "highest"}
    model = fcn_jax.create_model(name, 3, encoder="vgg11", width=0.03, **options)
    variables = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), experiments.random_variables(model))
    return model, variables, *random_batch((64, 48), 3)


# --- measures


def test_error_norm_is_relative_to_the_norm_of_the_reference():
    assert error_norm(np.array([3.0, 4.0]), np.array([3.0, 0.0])) == pytest.approx(4 / 3)
    assert error_norm(np.array([3.0, 4.0]), np.array([3.0, 0.0]), scale=8.0) == 0.5
    assert error_norm(np.zeros(2), np.zeros(2)) == 0
    assert error_norm(np.ones(2), np.zeros(2)) == np.inf
    assert np.isnan(error_norm(np.array([np.nan]), np.ones(1)))
    with pytest.raises(InputError, match="one shape"):
        error_norm(np.zeros(2), np.zeros((2, 1)))


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, jnp.bfloat16])
def test_ulp_distance_counts_steps_between_floats(dtype):
    def ulp(x, y):
        return int(ulp_distance(np.asarray([x], dtype), np.asarray([y], dtype))[0])

    tiny = jnp.finfo(dtype).smallest_subnormal
    eps = float(jnp.finfo(dtype).eps)
    assert ulp(1, 1) == 0
    assert ulp(1, 1 + eps) == 1 == ulp(1 + eps, 1)
    assert ulp(1, 1 - eps / 2) == 1  # below a power of two, floats are twice as dense
    assert ulp(1, 2) == round(1 / eps) == ulp(-1, -2)
    assert ulp(0.0, -0.0) == 0
    assert ulp(-tiny, tiny) == 2  # through zero
    assert ulp(-2, -1 - eps) == round(1 / eps) - 1
    assert ulp(np.nan, 1) == 2**64 - 1
    assert ulp(np.nan, np.nan) == 0
    assert ulp(jnp.finfo(dtype).max, np.inf) == 1


def test_ulp_distance_agrees_with_nextafter_and_does_not_overflow():
    x = np.array([1.5, -3e-310, 7e300])
    y = x
    for _ in range(5):
        y = np.nextafter(y, np.inf)
    np.testing.assert_array_equal(ulp_distance(x, y), 5)
    largest = np.array([np.finfo(np.float64).max])
    assert int(ulp_distance(largest, -largest)[0]) == 2 * (0x7FF0000000000000 - 1)
    with pytest.raises(InputError, match="one dtype"):
        ulp_distance(np.zeros(1), np.zeros(1, np.float32))


def test_measuring_rounds_to_the_coarser_dtype():
    found = measure(np.array([[1.0, 2.0, 4.0]]), np.array([[1.0, 2.0, 4.0 + 1e-9]], np.float32))
    assert found.shape == (1, 3)
    assert (found.ulp_median, found.ulp_max, found.max_abs) == (0, 0, 0)
    found = measure(np.array([1.0, 2.0, 3.0], np.float32), np.array([1.0, 2.0, 3.0 + 2**-20], np.float32))
    assert (found.ulp_median, found.ulp_max, found.max_abs) == (0, 4, 2**-20)


def test_a_cancelled_gradient_is_relative_to_the_norm_of_the_whole_gradient():
    ours, theirs = ({"w": np.array([3.0, 4.0]), "b": np.array([x])} for x in (1e-17, -1e-17))
    rows = compare_arrays(ours, theirs, cancelled=["b"])
    assert [row.error for row in rows] == [0, pytest.approx(2e-17 / 5)]
    assert [row.of_global for row in rows] == [False, True]


def test_nan_exceeds_every_threshold():
    good, bad = {"a": np.ones(1), "b": np.ones(1)}, {"a": np.ones(1), "b": np.array([np.nan])}
    assert first_over(compare_arrays(bad, good), 1e9) == "b"


def test_comparison_without_gradients_lists_unmatched_names():
    side = numerics.Side("mine", lambda images, train: {"double": 2 * images, "square": images**2, "mine": images})
    other = numerics.Side("other", lambda images, train: {"double": 2 * images, "square": images**2 + 1})
    report = numerics.compare(side, other, np.arange(4.0), np.zeros(4), steps=3)
    assert (report.loss, report.gradients, report.steps, report.unmatched) == (None, [], [], ["mine"])
    assert first_over(report.layers["eval"], 1e-9) == "square"


# --- against torch, with one batch norm network; tests/slow/test_numerics_all.py has others


@pytest.fixture(scope="module")
def network():
    return build("fcn32s", encoder_norm="batch", **SMALL_HEAD)


@pytest.fixture(scope="module")
def our_side(network):
    return numerics.make_jax_side(*network[:2], OPTIM)


@pytest.fixture(scope="module")
def report(network):
    return against_torch(Case(*network, "float64", steps=4, optim=OPTIM))


def check_agreement(report, model):
    """Check that all parts of a report in float64, of four steps, agree."""
    # Sums in another order; the batch norms of narrow layers amplify 2e-16 to 1e-12.
    for part in PARTS:
        assert report.worst(part)[1] <= 1e-10, (part, report.worst(part))
    assert report.unmatched == []
    assert [row.step for row in report.steps] == [1, 2, 3, 4]
    assert report.steps[-1].moved > 1e-4
    assert report.steps[-1].theirs != report.steps[0].theirs
    assert [row.name for row in report.layers["train"]][-1] == "logits"
    assert {row.name for row in report.gradients if row.of_global} == set(experiments.cancelled_biases(model))
    assert report.gradients[0].name == "vgg.conv1_1.weight"  # in the order of the layers


def test_float64_agrees_with_torch_in_every_part_and_over_sgd_steps(report, network):
    check_agreement(report, network[0])


def test_a_broken_layer_is_the_first_over_the_threshold(network, our_side):
    twin = load_twin(*network[:2])
    with torch.no_grad():
        twin.vgg.conv4_1.weight[0, 0, 1, 1] += 0.01
    report = numerics.compare(our_side, numerics.make_torch_side(twin, dtype="float64"), *network[2:], threshold=1e-9)
    assert report.to_json()["first_over"] == {"eval": "vgg.conv4_1", "train": "vgg.conv4_1"}
    printed = [str(cell) for table in parity_tables(report) for cell in table.columns[0].cells]
    assert [cell for cell in printed if "first over" in cell] == ["vgg.conv4_1  <- first over 1e-09"] * 2


def test_a_wrong_statistic_shows_in_eval_mode_only(network, our_side):
    twin = load_twin(*network[:2])
    with torch.no_grad():
        twin.vgg.bn3_2.running_var *= 1.5
    report = numerics.compare(our_side, numerics.make_torch_side(twin, dtype="float64"), *network[2:])
    assert first_over(report.layers["eval"], 1e-9) == "vgg.bn3_2"
    assert first_over(report.layers["train"], 1e-9) is None
    assert report.worst("statistics")[0] == "vgg.bn3_2.running_var"


def check_low_precision(dtype, path):
    """Check the columns against float64, and the figure."""
    report = against_torch(Case(*build("fcn32s_resize"), dtype, steps=1))
    rows = [*report.layers["train"], *report.gradients]
    assert all(row.ours_off is not None and row.theirs_off is not None for row in rows)
    assert all(row.noise is not None for row in report.gradients)
    # Batch norms amplify the rounding of the dtype. It is never zero, as the reference is more precise.
    low, high = {"float32": (1e-9, 1e-5), "bfloat16": (1e-4, 0.5)}[dtype]
    assert low < report.layers["train"][-1].ours_off < high
    assert report.layers["train"][-1].theirs_off > low
    save_figure(path / "new" / "parity.png", [report])
    assert (path / "new" / "parity.png").read_bytes().startswith(b"\x89PNG")


def test_float32_report_shows_the_error_of_each_side(tmp_path):
    check_low_precision("float32", tmp_path)


@pytest.mark.slow
def test_several_devices_equal_torch_with_the_whole_batch(network):
    report = against_torch(Case(*network, "float64", steps=1), devices=2)
    # Sums in another order, also over examples.
    assert max(report.worst(part)[1] for part in PARTS) <= 1e-10


# --- against jax; every pair is in tests/slow/test_numerics_all.py


def test_dilated_transposed_convolutions_equal_polyphase_ones():
    model, variables, images, _ = build("fcn32s_ladder")  # five of them, with output padding
    polyphase, dilated = (
        numerics.make_jax_side(model, variables, interceptor=interceptor).layers(images, True)
        for interceptor in (None, dilated_upsampling)
    )
    rows = compare_arrays(dilated, polyphase)
    # Sums in another order, amplified by the batch norms of narrow layers. Zero would mean one implementation.
    assert 0 < max(row.error for row in rows if row.name.startswith("deconv")) <= 1e-10


def test_invalid_devices_mode_and_dtype_are_rejected(network):
    with pytest.raises(InputError, match="3 devices"):
        next(against_jax(Case(*network), devices=3))
    with pytest.raises(InputError, match="devices"):
        numerics.make_jax_side(*network[:2], devices=99)
    with pytest.raises(InputError, match="unknown parallel 'tmap'; choose one of: pmap, mesh"):
        numerics.make_jax_side(*network[:2], mode="tmap")
    with pytest.raises(InputError, match="unknown dtype 'float16'"):
        numerics.make_torch_side(torch.nn.Conv2d(3, 3, 1), dtype="float16")


# --- the command


def parity(*arguments):
    return guarded(cli_parity.main, [str(argument) for argument in arguments])


def test_parity_command_reports_on_a_weight_file_with_network_metadata(network, tmp_path):
    out, file = tmp_path / "out", tmp_path / "w.safetensors"
    weights.save(file, *network[:2], "imagenet")
    options = ["--dtype", "float64", "--lr", 0.02, "--steps", 2, "--image-size", 64, 48, "--out", out]
    assert parity("fcn32s", "--weights", file, *options, "--max-error", 1e-9) == 0
    content = json.loads((out / "parity.json").read_text())
    assert content["arguments"]["model"] == "fcn32s" and {"jax", "torch"} <= content["versions"].keys()
    report = content["reports"][0]
    assert report["layers"]["train"][0]["name"] == "vgg.conv1_1" and len(report["steps"]) == 2
    assert (out / "parity.png").stat().st_size > 10_000


def test_exit_code_depends_on_the_limit_and_the_selected_parts(report, monkeypatch, capsys):
    monkeypatch.setattr(cli_parity, "against_torch", lambda *_: report)
    assert parity(*COMMAND, "--max-error", 1e-10) == parity(*COMMAND) == 0
    capsys.readouterr()
    assert parity(*COMMAND, "--max-error", 1e-30, "--max-error-of", "layers", "statistics") == 1
    printed = capsys.readouterr().out
    assert "over 1e-30: jax | torch: vgg.conv" in printed and ".weight" not in printed.rpartition("over")[2]
    assert re.search(r"and \d+ more", printed)
    monkeypatch.setattr(cli_parity, "against_torch", lambda *_: dataclasses.replace(report, statistics=[]))
    assert parity(*COMMAND, "--max-error", 1e-4, "--max-error-of", "statistics") == 2
    assert "nothing to compare in statistics" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["fcn9s"], ["fcn9s", "fcn8s"]), (["fcn8s", "--steps", "-1"], ["--steps"]),
        (["fcn8s", "--image-size", "0", "5"], ["--image-size"]), (["fcn8s", "--max-error", "nan"], ["--max-error"]),
        (["fcn8s", "--devices", "3"], ["3 devices", "--batch-size"]),
        (["fcn8s", "--devices", "0", "--against", "jax"], ["--devices >= 1"]), (["fcn8s", "--seed", "-1"], ["--seed"]),
        (["fcn8s", "--lr", "-1"], ["--lr > 0"]), (["fcn8s", "--seed", "4294967296"], ["2**32"]),
        ([*COMMAND, "--devices", "99", "--batch-size", "99"], ["99"]),
        ([*COMMAND, "--weights", "nosuch.pth"], ["nosuch.pth"]),
        ([*COMMAND, "--batch-size", "1", "--image-size", "32", "32"], ["larger image"]),
    ],
)  # fmt: skip
def test_invalid_arguments_give_one_line_and_exit_code_2(arguments, named, fails):
    fails(cli_parity.main, arguments, *named)


def test_a_saved_record_is_compared_and_one_of_another_setup_is_rejected(tmp_path, fails, capsys):
    saved = tmp_path / "a" / "cpu.safetensors"
    command = [*COMMAND, "--steps", 2]
    assert parity(*command, "--dtype", "float64", "--save", saved) == 0
    assert parity(*command, "--dtype", "float64", "--against", saved, "--max-error", 0) == 0
    assert parity(*command, "--against", saved, "--out", tmp_path / "b") == 0
    assert "pixel agreement" in capsys.readouterr().out
    (report,) = json.loads((tmp_path / "b/parity.json").read_text())["reports"]
    assert 0 < report["worst"]["layers"][1] < 1e-5 and 0 < report["worst"]["steps"][1] < 1e-3
    assert report["theirs"].endswith(f"float64 highest, jax {jax.__version__}") and len(report["steps"]) == 2
    assert report["predictions"]["eval"]["agreement"] > 0.99
    fails(cli_parity.main, [*command, "--seed", 1, "--against", saved], "seed 0 (here 1)")
    fails(cli_parity.main, [*command, "--save", saved, "--against", saved], "--save", "--against")
    assert saved.stat().st_mode & 0o044 == (tmp_path / "b/parity.json").stat().st_mode & 0o044  # others may read both
    folder = tmp_path / "folder.safetensors"
    folder.mkdir()
    fails(cli_parity.main, [*command, "--save", folder], folder, "is a folder")
    fails(
        cli_parity.main,
        [*COMMAND, "--steps", 0, "--save", "/proc/x.safetensors"],
        "/proc/x.safetensors: cannot be written",
    )
    given = ["--weights", saved, "--save", saved]
    fails(cli_parity.main, ["fcn32s", *given], "is the source and would be overwritten; choose another --save")
    fails(cli_parity.main, ["fcn32s", "--save", tmp_path / "w.pth"], "w.pth: expected a name that ends in .safetensors")
    fails(cli_parity.main, [*command, "--against", saved, "--devices", 2], "--devices")
    (tmp_path / "other").write_text("no record")
    fails(cli_parity.main, [*command, "--against", tmp_path / "other"], "other", "--save", "torch or jax")


def test_predictions_are_compared_by_class_and_kl_divergence():
    ours, theirs = np.log([[0.5, 0.5], [0.9, 0.1]]), np.log([[0.25, 0.75], [0.8, 0.2]])
    found = compare_predictions(ours, theirs + 3.0)  # the softmax is invariant to a constant
    each = [0.25 * np.log(0.5) + 0.75 * np.log(1.5), 0.8 * np.log(8 / 9) + 0.2 * np.log(2)]
    assert found.agreement == 0.5
    assert (found.kl_mean, found.kl_max) == pytest.approx((np.mean(each), max(each)))


def test_an_unwritable_folder_is_reported_before_computing(tmp_path, fails, monkeypatch):
    monkeypatch.setattr(cli_parity, "against_torch", lambda *_: pytest.fail("the comparison was run"))
    (tmp_path / "file").write_text("")
    out = ["--out", tmp_path / "file/out"]
    fails(cli_parity.main, [*COMMAND, *out], "name a writable folder")


@pytest.mark.slow
def test_the_example_in_the_docs_runs():
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/numerics.md").read_text(), re.DOTALL)
    names = {}
    exec(compile(example, "docs/numerics.md", "exec"), names)
    report = names["report"]
    assert all(report.worst(part)[1] < 1e-10 for part in ("layers", "gradients", "steps"))
    assert not report.unmatched
