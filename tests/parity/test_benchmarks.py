"""The benchmark: results are compared before timing, the sides alternate, and the report describes the machine."""

import functools
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import jax
import numpy as np
import pytest

import fcn_jax
from fcn_jax.cli import bench as cli_bench
from fcn_jax.cli.process import guarded
from fcn_jax.compare import bench_rows as rows
from fcn_jax.compare import jax_adapter
from fcn_jax.compare.bench import Row, Runner, alternate, differences, make_settings, pipeline_rates, run_row
from fcn_jax.compare.report import bench_tables, matmul_rate, pool_sum
from fcn_jax.models import kernels, summarize

SMOKE = make_settings("cpu", smoke=True)


class Bench:
    """Fake sides that compute nothing, log their calls and advance a fake clock."""

    def __init__(self, seconds, values, broken=()):
        self.now, self.log, self.seconds, self.values, self.broken = 0.0, [], seconds, values, broken

    def runner(self, name):
        def call():
            if name in self.broken:
                raise RuntimeError(f"{name} is out of memory\nand more")
            self.now += self.seconds[name]
            self.log.append(name)

        return Runner(call, lambda out: None, lambda out: {"out": {"": np.array([3.0, self.values[name]])}})

    def run(self, variants=("a", "b"), **settings):
        row = Row("row", "operators", lambda _: (lambda: self.runner("jax"), self.runner), {"out": 1e-6}, variants)
        torch = SimpleNamespace(meter=lambda: lambda: None)
        with mock.patch("time.perf_counter", lambda: self.now):
            return run_row(row, replace(SMOKE, **settings), torch)


def test_sides_alternate_and_every_other_round_is_reversed():
    assert list(alternate(["ours", "a", "b"], 3)) == ["ours", "a", "b", "b", "a", "ours", "ours", "a", "b"]
    bench = Bench({"jax": 2.0, "a": 1.0, "b": 3.0}, {"jax": 4.0, "a": 4.0, "b": 4.0})
    result = bench.run(rounds=4)
    # Two warm-up calls each, one to find the number of calls per sample, then the rounds.
    assert bench.log == ["jax"] * 2 + ["a"] * 2 + ["b"] * 2 + ["jax", "a", "b"] + ["jax", "a", "b", "b", "a", "jax"] * 2
    assert result.status == "ok"
    assert result.ours.samples_s == [2.0] * 4
    assert result.theirs[0] == "a" and result.theirs[1].median_s == 1.0  # torch's fastest variant counts


def test_short_calls_are_repeated_to_fill_a_sample():
    bench = Bench({"jax": 0.125, "a": 4.0}, {"jax": 4.0, "a": 4.0})
    result = bench.run(("a",), rounds=3, sample_seconds=2.0)
    assert result.sides["jax"].calls == 16 and result.sides["a"].calls == 1
    assert result.sides["jax"].samples_s == [0.125] * 3
    assert result.sides["jax"].first_s == 0.125


@pytest.mark.parametrize("value", [4.1, math.nan])
def test_a_side_with_other_results_is_not_timed(value):
    bench = Bench({"jax": 1.0, "a": 1.0, "b": 1.0}, {"jax": 4.0, "a": 4.0, "b": value})
    result = bench.run()
    assert result.status == "wrong" and result.ours is None and result.theirs is None
    assert bench.log == ["jax"] * 2 + ["a"] * 2 + ["b"] * 2
    assert result.worst[0] == "out" and not result.worst[1] < 1e-2
    assert "WRONG" in [cell for table in bench_tables([result], "") for c in table.columns for cell in c.cells]


def test_a_failing_torch_variant_is_named_and_the_others_are_timed():
    bench = Bench({"jax": 1.0, "b": 1.0}, {"jax": 4.0, "b": 4.0}, broken=("a",))
    result = bench.run()
    assert result.status == "ok" and result.theirs[0] == "b" and result.notes == ["a: a is out of memory"]
    for broken in (("a", "b"), ("jax",)):
        bench = Bench({"jax": 1.0, "a": 1.0, "b": 1.0}, {"jax": 4.0, "a": 4.0, "b": 4.0}, broken)
        result = bench.run()
        assert result.status == "failed" and result.ours is None and len(result.notes) == len(broken)


def test_each_quantity_is_compared_by_one_norm_over_its_arrays():
    ours = {"update": {"w": np.array([3.0, 4.0]), "b": np.array([1e-9])}, "loss": {"": np.array(2.0)}}
    theirs = {"update": {"w": np.array([3.0, 4.5]), "b": np.array([-1e-9])}, "loss": {"": np.array(2.0)}}
    assert differences(ours, theirs) == {"update": pytest.approx(0.5 / math.hypot(3, 4.5)), "loss": 0.0}
    with pytest.raises(ValueError, match="'b'"):
        differences(ours, {**theirs, "update": {"w": np.zeros(2)}})
    with pytest.raises(ValueError, match="'statistics'"):
        differences({**ours, "statistics": {}}, theirs)


def test_flops_are_two_per_multiply_add_and_tripled_with_gradients():
    settings = make_settings("cpu")
    found = {row.name: row for row in [rows.matmul_row(settings), *rows.operator_rows(settings)]}
    assert found["matmul-4096"].flops == 2 * 4096**3
    # Batch 2 of 16 x 16 pixels, with 64 x 64 taps and 21 x 21 channels each.
    assert found["upsample-k64-s32"].flops == 3 * 2 * 2 * 16 * 16 * 64 * 64 * 21 * 21
    assert found["conv-128x128-64-128-dw"].flops == 2 * 2 * 128 * 128 * 9 * 64 * 128
    assert found["pool-256x256x64"].flops is None
    assert [name for name in found if name.startswith("conv")][-1] == "conv-32x32-512-512-dw"
    networks = {row.name: row for row in rows.network_rows(SMOKE)}
    model = fcn_jax.create_model("fcn8s_pad100", 21, encoder="vgg11", width=0.0625)
    forward = sum(row.flops for row in summarize(model, (64, 64), batch=2))
    assert networks["inference-fcn8s_pad100"].flops == forward
    assert networks["train-fcn8s_pad100"].flops == 3 * forward


# --- the command


def bench(*arguments):
    return guarded(cli_bench.main, [str(argument) for argument in arguments])


def test_run_records_times_errors_and_the_machine(tmp_path, capsys):
    only = ["upsample-k16-s8", "pool-4x4x32", "conv-8x8*dw", "encoder-vgg11", "train-fcn8s_resize"]
    arguments = ["--smoke", "--device", "cpu", "--rounds", 3, "--out", tmp_path / "new", "--only", *only]
    assert bench(*arguments) == 0
    content = json.loads((tmp_path / "new" / "bench.json").read_text())
    assert content["hardware"]["cpu"] and content["hardware"]["cores"] >= 1
    assert content["hardware"]["jax_devices"][0].startswith("cpu") and content["hardware"]["torch_threads"] >= 1
    assert {"python", "jax", "jaxlib", "flax", "torch", "numpy", "commit"} <= content["versions"].keys()
    assert {"date", "load_before", "load_after"} <= content.keys()
    assert content["command"][:3] == ["fcn-jax", "bench", "--smoke"] and content["settings"]["image_size"] == 64
    found = {row["name"]: row for row in content["rows"]}
    assert list(found)[:2] == ["matmul-256", "upsample-k16-s8"] and len(found) == 6
    for row in found.values():
        assert row["status"] == "ok"
        for side in row["sides"].values():
            assert len(side["samples_s"]) == 3 and min(side["samples_s"]) == side["min_s"] <= side["median_s"]
            assert side["first_s"] > 0
    train = found["train-fcn8s_resize"]
    assert set(train["sides"]) == {"jax", "contiguous", "channels_last"}
    assert set(train["errors"]["contiguous"]) == {"loss", "update", "statistics"}
    # At least the parameters and the momentum, of 2 x 10^5 numbers each.
    assert train["sides"]["jax"]["planned_bytes"] > 4 * 2 * 2e5
    fastest = min(side["median_s"] for side in found["matmul-256"]["sides"].values())
    assert content["matmul_flops_per_s"] == pytest.approx(2 * 256**3 / fastest)
    printed = capsys.readouterr().out
    assert "train-fcn8s_resize" in printed and "smoke run" in printed


def test_a_wrong_gradient_of_an_operator_gives_exit_code_1(tmp_path, capsys, monkeypatch):
    right = rows.transposed_conv
    wrong = jax.custom_vjp(lambda x, kernel: right(x, kernel, 8, 4))
    wrong.defvjp(
        lambda x, kernel: jax.vjp(lambda x, kernel: right(x, kernel, 8, 4), x, kernel),
        lambda vjp, g: (vjp(g)[0], 1.01 * vjp(g)[1]),
    )
    monkeypatch.setattr(rows, "transposed_conv", lambda x, kernel, *_: wrong(x, kernel))
    only = ["upsample-k16-s8", "pool-4x4x32"]
    assert bench("--smoke", "--device", "cpu", "--out", tmp_path / "b.json", "--only", *only) == 1
    found = {row["name"]: row for row in json.loads((tmp_path / "b.json").read_text())["rows"]}
    row = found["upsample-k16-s8"]
    assert row["status"] == "wrong" and all(side["samples_s"] == [] for side in row["sides"].values())
    # The planted error is 1 %; the operators compute in float32.
    assert row["errors"]["contiguous"]["dw"] == pytest.approx(0.01, rel=1e-3)
    assert row["errors"]["contiguous"]["out"] < 1e-5
    assert found["pool-4x4x32"]["status"] == "ok"  # the other rows still run
    printed = capsys.readouterr().out
    assert "WRONG" in printed and "not timed: upsample-k16-s8 (wrong)" in printed


def test_a_step_that_sums_the_loss_instead_of_averaging_gives_exit_code_1(capsys, monkeypatch):
    step = jax_adapter.make_train_step
    monkeypatch.setattr(jax_adapter, "make_train_step", lambda *a, **k: step(*a, **k, reduction="sum"))
    assert bench("--smoke", "--device", "cpu", "--only", "train-fcn8s_resize") == 1
    assert "train-fcn8s_resize (wrong)" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.filterwarnings("default:Guards may run slower:RuntimeWarning")  # torch.compile of Python 3.13.0
def test_gpu_settings_run_on_the_cpu_in_a_smoke_run(tmp_path, capsys):
    only = ["upsample-k16-s8", "pool-4x4x32", "inference-fcn8s_resize"]
    assert bench("--smoke", "--device", "gpu", "--out", tmp_path, "--only", *only) == 0
    content = json.loads((tmp_path / "bench.json").read_text())
    assert content["settings"]["kind"] == "gpu" and content["settings"]["on_gpu"] is False
    network = content["rows"][-1]
    assert network["dtype"] == "bfloat16"
    assert set(network["sides"]) == {"jax", "channels_last", "channels_last compiled"}
    assert 1e-4 < network["errors"]["channels_last"]["logits"] < 5e-2  # rounding of bfloat16
    assert "no GPU here" in capsys.readouterr().out


@pytest.mark.slow
def test_without_torch_only_our_side_is_timed_and_the_pools_are_summed(capsys, monkeypatch):
    results = []
    monkeypatch.setattr(cli_bench, "run_row", lambda *args: results.append(run_row(*args)) or results[-1])
    assert bench("--smoke", "--against", "none", "--only", "pool-*") == 0
    assert all(list(result.sides) == ["jax"] and result.errors == {} for result in results)
    assert matmul_rate(results) > 0
    ours, theirs = pool_sum(results)
    assert ours == pytest.approx(sum(result.ours.median_s for result in results[1:])) and theirs is None
    assert pool_sum(results[:-1]) is None
    assert "pool-sum" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--device gpu", ["GPU", "--device cpu"]), ("--only pool-9", ["pool-9", "pool-256x256x64", "train-fcn8s"]),
        ("--only fcn9s", ["fcn9s", "fcn8s_ladder"]), ("--rounds 0", ["--rounds"]),
        ("--seconds nan", ["--seconds"]), ("--image-size 100", ["--image-size", "32"]),
        ("--smoke --only pool-4* --out /dev/null/b.json", ["/dev/null"]),
        ("--pipeline nosuch", ["nosuch", "camvid"]), ("--pipeline camvid", ["--data-dir"]),
        ("--data-dir x", ["--pipeline"]), ("--pipeline shapes --batch-size 2", ["--batch-size"]),
    ],
)  # fmt: skip
def test_invalid_arguments_give_one_line_and_exit_code_2(arguments, named, fails):
    fails(cli_bench.main, arguments.split(), *named)


def test_interrupting_a_benchmark_says_where_the_rows_are(monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_bench, "_rows", interrupted)
    assert bench("--smoke") == 130
    assert "finished rows are in --out" in capsys.readouterr().err


@pytest.mark.slow
def test_commands_run_without_the_data_libraries():
    code = """
import sys

absent = "grain tensorflow_datasets array_record orbax tensorboardX cv2 PIL tensorflow".split()
sys.modules.update(dict.fromkeys(absent))
import fcn_jax.cli.bench, fcn_jax.cli.parity
from fcn_jax.cli import main

assert not {"torch", "matplotlib"} & set(sys.modules)
parity = "parity fcn32s_resize --encoder vgg11 --width 0.03 --steps 0 --max-error 1e-3 --max-error-of layers"
code = main(parity.split()) or main("bench --smoke --device cpu --only pool-4x4*".split())
assert "msgspec" not in sys.modules
sys.exit(code)
"""
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "pool-4x4x32" in done.stdout, done.stderr


def test_plain_kernels_option_disables_the_cpu_kernels(monkeypatch, capsys):
    used = []
    right = kernels._row_phases
    monkeypatch.setattr(kernels, "_row_phases", lambda *args: used.append(0) or right(*args))
    arguments = ["--smoke", "--device", "cpu", "--against", "none", "--only", "upsample-k64*"]
    assert bench(*arguments, "--plain-kernels") == 0 and not used
    assert bench(*arguments) == 0 and used
    assert "upsample-k64" in capsys.readouterr().out


def check_pipeline(path, monkeypatch, capsys):
    """Measure an input pipeline; return the rates."""
    monkeypatch.setenv("HOME", str(path))  # the prepared copy is stored there
    assert bench("--smoke", "--pipeline", "shapes", "--out", path) == 0
    assert "images/s per core" in capsys.readouterr().out
    rates = json.loads((path / "bench.json").read_text())["pipeline"]
    assert all(rate["images_per_s"] > 0 for rate in rates)
    return rates


@pytest.mark.slow
def test_input_pipeline_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli_bench, "pipeline_rates", functools.partial(pipeline_rates, workers=(0,)))
    (rate,) = check_pipeline(tmp_path, monkeypatch, capsys)
    assert rate["workers"] == 0 and rate["images_per_core_s"] > 0
