"""Compilation for accelerators: figures parsed from the programs, and the all-reduces of a training step."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from jax.experimental import topologies

from fcn_jax.chips import CHIPS
from fcn_jax.cli import compile as cli_compile
from fcn_jax.compare import compile as compiling
from fcn_jax.compare.compile import count_collectives, count_products, estimated_cycles, largest
from fcn_jax.config import Config, ModelConfig
from fcn_jax.models import init_variables

# `make` installs the compilers here. In the environment itself they would make JAX search for a TPU at every start.
COMPILERS = Path(sys.prefix) / "compilers"
SMALL = ModelConfig("fcn32s", encoder="vgg11", width=0.1, fc_features=64, fc6_kernel=3)

HLO = """
  %all-reduce.11 = (f32[3,3,3,64]{3,2,1,0}, f32[], /*index=2*/bf16[8]{0}) all-reduce(%a, %b, %c), channel_id=1, \
replica_groups={{0,1}}, to_apply=%add
  %get-tuple-element.1 = f32[] get-tuple-element(%all-reduce.11), index=1
  ROOT %psum.2 = f32[31]{0} all-reduce(%d), channel_id=2, replica_groups={{0}}, to_apply=%add
  %psum.3 = f32[31]{0} all-reduce(%d), channel_id=2, replica_groups=[1,2]<=[2], to_apply=%add
  %ag = (f32[4]{0}, f32[8]{0}) all-gather-start(%e), replica_groups={{0,1}}, dimensions={0}
  %ag.1 = f32[8]{0} all-gather-done(%ag)
  %cp = pred[16]{0} collective-permute(%f), source_target_pairs={{0,1},{1,0}}
"""


def test_collectives_are_parsed_from_the_hlo_text():
    assert [tuple(each.values()) for each in count_collectives(HLO)] == [
        ("all-gather", "f32", 1, 32),
        ("all-reduce", "bf16", 1, 2 * 8),
        ("all-reduce", "f32", 2, 4 * (3 * 3 * 3 * 64 + 1 + 31)),  # an all-reduce over one device is not counted
        ("collective-permute", "pred", 1, 16),
    ]


def test_products_are_counted_by_dtype_and_precision():
    def function(x, y, kernel):
        x = jax.lax.conv(x, kernel, (1, 1), "SAME")
        return x @ y, jax.numpy.matmul(y, y, precision="highest"), (y @ y).astype("bfloat16") @ y.astype("bfloat16")

    x, y = jax.ShapeDtypeStruct((1, 2, 4, 4), "float32"), jax.ShapeDtypeStruct((4, 4), "float32")
    kernel = jax.ShapeDtypeStruct((2, 2, 3, 3), "float32")
    text = jax.jit(function).lower(x, y, kernel).as_text()
    assert [tuple(each.values()) for each in count_products(text)] == [
        ("convolution", "f32", "DEFAULT", 1),
        ("dot_general", "bf16", "DEFAULT", 1),
        ("dot_general", "f32", "DEFAULT", 2),
        ("dot_general", "f32", "HIGHEST", 1),
    ]


CYCLES = """
%body { %x = f32[1]{0} add(%a, %a), backend_config={"estimated_cycles":"99"} }
ENTRY %main (a: f32[1]) -> f32[1] {
  %fusion.1 = (bf16[8]{0}) fusion(%a), metadata={op_name="jit(f)/jvp(FCN)/vgg/conv1_2/conv"}, \
backend_config={"estimated_cycles":"10"}
  %fusion.2 = f32[8]{0} fusion(%a), metadata={op_name="jit(f)/transpose(jvp(FCN))/vgg/conv1_2.max_pool/x"}, \
backend_config={"estimated_cycles":"7"}
  ROOT %copy.3 = f32[8]{0} copy(%a), metadata={op_name="jit(f)/jvp()/reduce_sum"}, \
backend_config={"estimated_cycles":"5"}
}
"""


def test_estimated_cycles_are_added_up_by_layer():
    cycles, rows = estimated_cycles(CYCLES, ["conv1_1", "conv1_2"])
    assert cycles == {"conv1_2": {"forward": 10, "backward": 7}, "other": {"forward": 5, "backward": 0}}
    assert [(row["cycles"], row["instruction"]) for row in rows] == [(10, "fusion.1"), (7, "fusion.2"), (5, "copy.3")]


@pytest.mark.parametrize("most", [0, 1, 5, 8, 13])
def test_the_largest_batch_is_found_by_bisection(most):
    for start in (4, 20):
        assert largest(lambda batch: batch <= 4 * most, unit=4, start=start) == 4 * most


WITHOUT_NORM = [pytest.param(None, mode, marks=pytest.mark.slow) for mode in ("pmap", "mesh")]


@pytest.mark.parametrize(("norm", "mode"), [("batch", "pmap"), ("batch", "mesh"), *WITHOUT_NORM])
def test_a_step_all_reduces_only_the_gradient_and_batch_statistics(norm, mode):
    config = Config(model=replace(SMALL, encoder_norm=norm), parallel=mode)
    target = compiling.Target("cpu:2", CHIPS["cpu"], jax.devices()[:2])
    work = compiling.Work(config, 5, (32, 32), batch_size=4)
    found = compiling.compile_work(work, target).collectives
    variables = jax.eval_shape(lambda: init_variables(work.model, jax.random.key(0)))
    parameters = sum(x.size for x in jax.tree.leaves(variables["params"]))
    # Loss and weight are two numbers. Each batch norm channel adds four: mean, variance and their gradients.
    channels = sum(x.size for x in jax.tree.leaves(variables.get("batch_stats", {}))) // 2
    assert [(each["kind"], each["dtype"]) for each in found] == [("all-reduce", "f32")]
    assert found[0]["bytes"] == 4 * (parameters + 2 + 4 * channels)


MISTAKES = [
    ("fcn9s --target cpu:2", ["fcn9s", "fcn8s"]), ("fcn8s --target v9", ["v9", "v5e:2x2", "h100:8"]),
    ("fcn8s --target v5e:4", ["v5e:4", "v5e:2x2"]), ("fcn8s --target cpu:2 --batch-size 3", ["--batch-size", "2", "3"]),
    ("fcn8s --target cpu:2 --max-batch", ["cpu:2", "--max-batch"]), ("fcn8s --target v5e:0x0", ["v5e:0x0", "v5e:2x2"]),
    ("fcn8s --target cpu:2 --image-size 0 5", ["--image-size", "0 5"]),
    ("fcn8s --target cpu:2 --num-classes 0", ["num_classes", "0"]),
    ("fcn8s --target cpu:2 --devices 1", ["--devices 1", "2 devices"]),
    ("own --target cpu:2 --num-classes 2 --data.channels 5", ["--data.channels 5"]),
    ("fcn8s --target cpu:2 --out /", ["/", "folder"]),
    ("fcn8s --target cpu:2 --train.accumulate 0", ["--train.accumulate"]), ("fcn8s --target cpu:0", ["cpu:0", "cpu:8"]),
    ("voc-paper-8s --target cpu:2", ["--batch-size", "2", "got 1"]), ("scratch-fcn1 --target cpu:2", ["--num-classes"]),
]  # fmt: skip


@pytest.mark.parametrize(("command", "named"), MISTAKES)
def test_invalid_compile_commands_are_rejected(command, named, fails):
    fails(cli_compile.main, command.split(), *named)


@pytest.mark.parametrize(("target", "package"), [("v5e:2x2", "libtpu"), ("h100:8", "jax-cuda12-plugin")])
def test_a_missing_compiler_is_named(target, package, fails, monkeypatch):
    def missing(**_):
        raise NotImplementedError("topology not implemented")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    fails(cli_compile.main, ["fcn8s", "--target", target], package)


def test_a_recipe_compiles_with_its_batch_and_classes_and_accumulation_hides_flops(capsys):
    words = "--model.width 0.03 --model.fc-features 8 --image-size 32 32 --parallel mesh --train.accumulate 2".split()
    assert cli_compile.main(["camvid", "--target", "cpu:2", *words]) == 0
    printed = capsys.readouterr().out
    assert "11 classes" in printed and "batch 8" in printed and "no FLOPs" in printed


def test_only_out_of_memory_counts_as_not_fitting(monkeypatch):
    def compile_work(work, target):
        raise (compiling.DoesNotFit if work == "large" else compiling.InputError)("...")

    monkeypatch.setattr(compiling, "compile_work", compile_work)
    assert not compiling.fits("large", None)
    with pytest.raises(compiling.InputError):
        compiling.fits("wrong", None)


def run_command(*words, timeout=600):
    """Run `fcn-jax compile` where JAX finds the compilers; return what it printed."""
    environment = {**os.environ, "PYTHONPATH": f"{COMPILERS}:{os.environ.get('PYTHONPATH', '')}", "XLA_FLAGS": ""}
    code = "import sys; from fcn_jax.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "compile", *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return done.stdout


def needs(package):
    return pytest.mark.skipif(not (COMPILERS / package).exists(), reason=f"{package} is not in {COMPILERS}")


TPU, GPU = needs("libtpu"), needs("jax_plugins")
TINY = "--model.encoder vgg11 --model.width 0.03 --model.fc-features 8 --model.fc6-kernel 1 --image-size 32 32".split()
BFLOAT16 = ["--model.dtype", "bfloat16"]


def reduced(tmp_path, target, mode, *words, others=False):
    """Compile for a target; return the report and its largest all-reduce, the only collective unless `others`."""
    out = tmp_path / f"{mode}.json"
    printed = run_command("fcn8s", "--target", target, *BFLOAT16, "--parallel", mode, "--out", out, *words)
    assert "memory planned" in printed
    report = json.loads(out.read_text())
    found, *rest = sorted((c for c in report["collectives"] if c["kind"] == "all-reduce"), key=lambda c: -c["bytes"])
    assert others or report["collectives"] == [found]
    # With rows split over devices, XLA may also reduce small feature maps, in the layers' dtype.
    assert sum(each["bytes"] for each in rest) < found["bytes"] / 1000
    return report, found


@pytest.mark.parametrize(
    "target", [pytest.param("v5e:2x2", marks=TPU), pytest.param("h100:8", marks=[GPU, pytest.mark.slow])]
)
def test_gradients_of_a_bfloat16_network_are_summed_in_float32(target, tmp_path):
    report, by_pmap = reduced(tmp_path, target, "pmap", *TINY)
    _, on_mesh = reduced(tmp_path, target, "mesh", *TINY)
    assert by_pmap["dtype"] == on_mesh["dtype"] == "f32" and abs(on_mesh["bytes"] / by_pmap["bytes"] - 1) < 0.01
    if target == "v5e:2x2":
        assert set(report["cycles"]) >= {"conv1_1", "fc6", "upscore8", "other"}
        assert report["cycles"]["conv1_1"]["forward"] > 0 and report["cycles"]["fc6"]["backward"] > 0


@TPU
@pytest.mark.slow
@pytest.mark.parametrize("axes", ["data=2,fsdp=2", "data=1,fsdp=2,space=2", "data=1,space=4"])
def test_gradients_on_meshes_are_summed_in_float32(axes, tmp_path):
    size = ["--image-size", 128, 64, "--batch-size", 4, "--mesh", axes]
    _, by_pmap = reduced(tmp_path, "v5e:2x2", "pmap", *TINY)
    report, on_mesh = reduced(tmp_path, "v5e:2x2", "mesh", *TINY, *size, others=True)
    assert on_mesh["dtype"] == "f32" and on_mesh["bytes"] >= by_pmap["bytes"]
    kinds = {each["kind"] for each in report["collectives"]}
    assert ("collective-permute" in kinds) == ("space" in axes)


@TPU
@pytest.mark.slow
@pytest.mark.parametrize("target", ["v5p:2x2x1", "v6e:2x2"])
def test_programs_for_chips_with_sparsecores_are_parsed(target, tmp_path):
    report, reduce = reduced(tmp_path, target, "mesh", *TINY)
    assert reduce["dtype"] == "f32" and report["cycles"]["conv1_1"]["forward"] > 0


@TPU
@pytest.mark.slow
@pytest.mark.parametrize("network", ["fcn8s", "fcn8s_pad100", "fcn8s_ladder", "fcn8s_resize", "fcn_resnet50"])
def test_every_family_compiles_at_full_width(network, tmp_path):
    out = tmp_path / "report.json"
    run_command(network, "--target", "v5e:2x2", "--batch-size", 4, *BFLOAT16, "--out", out, timeout=1200)
    report = json.loads(out.read_text())
    assert report["memory"]["total"] < report["chip_memory"] and report["flops"] > 1e11
