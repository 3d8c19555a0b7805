"""Exported programs give the network's own numbers, in processes that cannot import fcn_jax."""

import json
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from small_networks import make_network

from fcn_jax import export, weights
from fcn_jax.cli.export import main
from fcn_jax.errors import InputError
from fcn_jax.preprocessing import Standardize, normalize

FLOAT32 = {"dtype": np.float32, "param_dtype": np.float32}
FIXED = {"fcn8s_resize", "fcn_resnet50"}
FAMILIES = ["fcn8s", "fcn8s_pad100", "fcn8s_ladder", "fcn8s_resize", "fcn_resnet50"]
QUICK = {("fcn8s_pad100", "stablehlo")}
CASES = [
    pytest.param(family, form, marks=[] if (family, form) in QUICK else pytest.mark.slow)
    for family in FAMILIES
    for form in ("onnx", "stablehlo")
]
# Reads what the export wrote as its users do.
RUN = """
import sys
sys.modules["fcn_jax"] = None
import numpy as np
file, images, out = sys.argv[1:]
images = np.load(images)
if file.endswith(".onnx"):
    import onnxruntime
    session = onnxruntime.InferenceSession(file)
    result = session.run(None, {session.get_inputs()[0].name: images})[0]
else:
    from jax import export
    result = export.deserialize(bytearray(open(file, "rb").read())).call(images)
np.save(out, result)
"""


def run_alone(file, images):
    np.save(file.parent / "images.npy", images)
    arguments = [str(file), str(file.parent / "images.npy"), str(file.parent / "out.npy")]
    subprocess.run([sys.executable, "-c", RUN, *arguments], check=True, cwd=file.parent)
    return np.load(file.parent / "out.npy")


@pytest.mark.filterwarnings("default")  # of jax2onnx and what it imports
@pytest.mark.parametrize(("family", "form"), CASES)
def test_a_program_equals_the_network_without_this_package(family, form, tmp_path, capsys):
    if form == "onnx":
        pytest.importorskip("jax2onnx")  # make test-slow has it in an environment of its own
    model, variables = make_network(family, 5, **FLOAT32)
    weights.save(tmp_path / "w.safetensors", model, variables, "caffe")
    fixed = form == "onnx" or family in FIXED
    size = (75, 101) if fixed else (97, 66)  # of another size than the export was checked with
    command = ["--weights", tmp_path / "w.safetensors", "--out", tmp_path / f"p.{form}", "--preprocess"]
    assert main([*map(str, command), *(["--image-size", "75", "101"] if fixed else [])]) == 0
    printed = capsys.readouterr().out
    assert "images uint8 (b, " in printed and "largest difference" in printed

    images = np.random.default_rng(1).integers(0, 256, (3, *size, 3), np.uint8)
    expected = model.apply(variables, normalize(images, "caffe"))
    # Two programs sum in different orders in float32.
    error = np.abs(run_alone(tmp_path / f"p.{form}", images) - expected).max() / max(1, np.abs(expected).max())
    assert error < 1e-5 and np.std(expected) > 0
    if form == "onnx":
        import onnxruntime

        metadata = onnxruntime.InferenceSession(tmp_path / "p.onnx").get_modelmeta().custom_metadata_map
        assert len(json.loads(metadata["class_names"])) == 5 and metadata["preprocessing"] == "none"


def test_argmax_and_sixteen_bit_channels_go_into_the_program(tmp_path):
    model, variables = make_network("fcn8s", 5, False, **FLOAT32)
    own = Standardize((1000.0, 2000.0, 500.0), (700.0, 900.0, 300.0), 16)
    program = export.make_program(model, variables, own, preprocess=True, argmax=True)
    assert export.write(tmp_path / "p.stablehlo", program, "stablehlo") < 1e-5
    images = np.random.default_rng(0).integers(0, 4000, (2, 64, 40, 3), np.uint16)
    logits = np.asarray(model.apply(variables, normalize(images, own)))
    found = run_alone(tmp_path / "p.stablehlo", images)
    assert found.dtype == np.uint8 and len(np.unique(found)) > 1
    chosen = np.take_along_axis(logits, found[..., None].astype(int), -1)[..., 0]
    assert (logits.max(-1) - chosen).max() < 1e-4  # of equal logits either may win


@pytest.mark.parametrize("name", ["fcn8s", "fcn8s_ladder", "fcn8s_resize"])
def test_a_program_multiplies_in_float32_on_every_platform(name):
    program = export.make_program(*make_network(name, 5, False), "imagenet", size=(64, 64))
    text = jax.jit(program).lower(np.zeros((1, 64, 64, 3), np.float32)).as_text()
    products = [line for line in text.splitlines() if re.search(r"stablehlo\.(convolution|dot_general)", line)]
    assert len(products) > 10 and all("HIGHEST" in line and "DEFAULT" not in line for line in products)


@pytest.mark.parametrize(("argmax", "broken"), [(False, "reversed"), (True, "reversed"), (False, "nan")])
def test_a_program_that_differs_is_not_written(argmax, broken, tmp_path, monkeypatch):
    model, variables = make_network("fcn8s", 5, False, **FLOAT32)
    program = export.make_program(model, variables, "imagenet", argmax=argmax)
    wrong = jax.tree.map(
        lambda x: x * np.nan if broken == "nan" else np.ascontiguousarray(x[..., ::-1]), program.variables
    )
    other = export.to_stablehlo(export.make_program(model, wrong, "imagenet", argmax=argmax))
    monkeypatch.setattr(export, "to_stablehlo", lambda program: other)
    with pytest.raises(InputError, match="p.stablehlo is not written: the exported program differs"):
        export.write(tmp_path / "p.stablehlo", program, "stablehlo")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_one_line(tmp_path, fails, monkeypatch):
    for family in ("fcn32s", "fcn32s_resize"):
        model, variables = make_network(family, 5, **FLOAT32)
        weights.save(tmp_path / f"{family}.safetensors", model, variables, "caffe")

    def refused(family, out, *rest):
        fails(main, ["--weights", tmp_path / f"{family}.safetensors", "--out", tmp_path / out, *rest[:-1]], rest[-1])

    refused("fcn32s_resize", "p.stablehlo", "--image-size HEIGHT WIDTH")
    refused("fcn32s", "p.bin", ".onnx")
    refused("fcn32s", "p.onnx", "--format", "pth", "ends in .pth")
    refused("fcn32s", "p.stablehlo", "--image-size", "0", "5", "--image-size 0 5: expected two positive numbers")
    refused("fcn32s", "p.pth", "--argmax", "--argmax are of programs")
    refused("fcn32s", "p.onnx", "--layout", "pytorch-fcn", "leave out --layout")
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    refused("fcn32s", "p.onnx", "--image-size", "64", "64", "pip install 'fcn_jax[onnx]'")
    assert {file.suffix for file in tmp_path.iterdir()} == {".safetensors"}

    hub = tmp_path / "hub"
    assert main(["--weights", str(tmp_path / "fcn32s.safetensors"), "--format", "hub", "--out", str(hub)]) == 0
    fails(main, ["--weights", hub, "--out", hub / "model.safetensors"], "is the source and would be overwritten")
