"""Caffe files of the FCN authors' networks and of VGG: read without torch, written back bit for bit."""

import sys

import numpy as np
import pytest
from caffe_files import write_caffe
from small_networks import WIDTH, assert_same, build, create, zeros

from fcn_jax import weights
from fcn_jax.errors import InputError

NETWORKS = ("fcn32s_pad100", "fcn16s_pad100", "fcn8s_pad100", "fcn8s_pad100_atonce")
OPTIONS = {"encoder": "vgg16", "width": WIDTH}
# Layers with weights, in the order of voc-fcn8s-atonce/net.py.
CONVOLUTIONS = [f"conv{stage}_{i}" for stage, count in enumerate((2, 2, 3, 3, 3), 1) for i in range(1, count + 1)]
FINER = {
    "fcn32s_pad100": ["upscore"], "fcn16s_pad100": ["upscore2", "score_pool4", "upscore16"],
    "fcn8s_pad100": ["upscore2", "score_pool4", "upscore_pool4", "score_pool3", "upscore8"],
}  # fmt: skip
FINER["fcn8s_pad100_atonce"] = [*FINER["fcn8s_pad100"], "scale_pool4", "scale_pool3"]


@pytest.fixture(autouse=True)
def without_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)


def tensors_of(name):
    model, variables = build(name, **OPTIONS)
    arrays = weights.to_torch(model, variables, "pytorch-fcn")
    if "atonce" in name:
        arrays |= {"scale_pool4.weight": np.float32([0.01]), "scale_pool3.weight": np.float32([0.0001])}
    return model, variables, arrays


@pytest.mark.parametrize("name", NETWORKS)
def test_an_fcn_caffemodel_is_recognised_and_round_trips(name, tmp_path):
    model, variables, arrays = tensors_of(name)
    layers = {tensor.rpartition(".")[0] for tensor in arrays}
    assert layers == {*CONVOLUTIONS, "fc6", "fc7", "score_fr", *FINER[name]}
    path = write_caffe(tmp_path / "fcn.caffemodel", arrays)
    info = weights.inspect(path)
    assert (info.layout, info.preprocessing, info.fit.models) == ("pytorch-fcn", "caffe", (name,))
    loaded, report = weights.load_with_report(path, model, zeros(model))
    assert_same(loaded, variables)
    assert not report.left and set(report.ignored) == {name for name in arrays if name.startswith("scale")}
    back = weights.to_torch(model, loaded, "pytorch-fcn")
    assert write_caffe(tmp_path / "back.caffemodel", {**arrays, **back}).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("legacy", [True, False])
def test_a_vgg_caffemodel_fills_the_encoder(legacy, tmp_path):
    model, variables = build("fcn8s", **OPTIONS)
    own = weights.to_torch(model, variables)
    renamed = {name.removeprefix("vgg.").removeprefix("head."): value for name, value in own.items()}
    arrays = {name: value for name, value in renamed.items() if name.startswith(("conv", "fc"))}
    for layer in ("fc6", "fc7"):
        arrays[f"{layer}.weight"] = arrays[f"{layer}.weight"].reshape(len(arrays[f"{layer}.bias"]), -1)
    arrays |= {"fc8.weight": np.ones((10, 256), np.float32), "fc8.bias": np.ones(10, np.float32)}
    path = write_caffe(tmp_path / "VGG.caffemodel", arrays, legacy, linear=("fc6", "fc7", "fc8"))
    info = weights.inspect(path)
    assert (info.layout, info.variant, info.preprocessing) == ("caffe-vgg", "vgg16", "caffe")
    loaded, report = weights.load_with_report(path, model, zeros(model))
    assert all(name.startswith(("score", "upscore")) for name in report.left) and set(report.ignored) == {
        "fc8.weight",
        "fc8.bias",
    }
    for part in ("vgg", "head"):
        assert_same(loaded["params"][part], variables["params"][part])
    back = weights.to_torch(model, loaded, "caffe-vgg")
    assert all(np.array_equal(back[name], arrays[name]) for name in back) and "fc6.weight" in back


def test_other_skip_scales_are_rejected(tmp_path):
    model, _, arrays = tensors_of("fcn8s_pad100_atonce")
    path = write_caffe(tmp_path / "fcn.caffemodel", {**arrays, "scale_pool3.weight": np.float32([0.001])})
    with pytest.raises(InputError, match="scale_pool3.weight is 0.001, the model has 0.0001"):
        weights.load(path, model, zeros(model))


def test_damaged_and_unsuitable_caffe_files_are_rejected(tmp_path):
    model, _, arrays = tensors_of("fcn32s_pad100")
    path = write_caffe(tmp_path / "fcn.caffemodel", arrays)
    content = path.read_bytes()
    cases = {
        content[:-7]: "not a whole Caffe file", b"name: 'net'": "a text file",
        b"PK\x03\x04": "a torch file", b"": "empty",
        b"\x0a\x03net": "not a Caffe file with weights", b"<html>": "web page",
    }  # fmt: skip
    for broken, message in cases.items():
        path.write_bytes(broken)
        with pytest.raises(InputError, match=f"fcn.caffemodel: .*{message}"):
            weights.load(path, model, zeros(model))
    for change, message in {
        "conv1_1.weight": "do not fit: conv1_1.weight is .*transposed", "other.weight": "unexpected: other.weight",
    }.items():  # fmt: skip
        value = np.asarray(arrays["conv1_1.weight"]).transpose(2, 3, 1, 0)
        write_caffe(path, {**arrays, change: value})
        with pytest.raises(InputError, match=message):
            weights.load(path, model, zeros(model))
    del arrays["fc7.weight"], arrays["fc7.bias"]
    with pytest.raises(InputError, match="are missing: head.fc7.weight"):
        weights.load(write_caffe(path, arrays), create("fcn32s_pad100", **OPTIONS), zeros(model))
    write_caffe(path, {"bn.weight": np.ones(3), "bn.bias": np.ones(3), "bn.count": np.ones(1)})
    with pytest.raises(InputError, match="'bn' has 3 blobs"):
        weights.inspect(path)
