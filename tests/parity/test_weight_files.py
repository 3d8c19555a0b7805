"""Weight files: wrappers around state dicts, unsupported tensors, and bad files of every kind."""

import argparse
import collections
import datetime
import json
import os
import pathlib
import pickle
import re
import sys
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from fuzzing import Call
from small_networks import build

from fcn_jax import weights
from fcn_jax.compare import make_twin
from fcn_jax.errors import InputError

STATE = {"features.0.weight": torch.full((4, 3, 3, 3), 0.5), "features.0.bias": torch.zeros(4)}
PAGE = b"<!DOCTYPE html><html><body>Not found</body></html>"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


def refusal(source):
    """Return the one-line error for a source."""
    with pytest.raises(InputError) as caught:
        weights.inspect(source)
    message = str(caught.value)
    assert "\n" not in message and message.isprintable()
    if not isinstance(source, dict):
        assert message.startswith(str(source))
    return message


CODE = Call(os.system, "true")


def saved(value, **options):
    """Return a function that writes a file of torch.save."""
    return lambda path: torch.save(value, path, **options)


def old(value):
    """Return a function that writes a file of the format before torch 1.6."""
    return saved(value, _use_new_zipfile_serialization=False)


def cut(write, length):
    """Return a function that writes a file and cuts off its end."""

    def write_and_cut(path):
        write(path)
        path.write_bytes(path.read_bytes()[:-length])

    return write_and_cut


def compressed(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w/data.pkl", bytes(2**28))


def safe(path):
    safetensors.torch.save_file(STATE, path)


OTHER = r"holds something other than tensors \(%s\); if you trust it, load it with torch and save model.state_dict\(\)$"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("w.pth", None, "no such file"),
        ("w.h5", bytes(range(256)), "expected a .safetensors, .pth, .pt or .caffemodel file, got '.h5'"),
        *((name, b"", "the file is empty") for name in ("w.pth", "w.safetensors")),
        *((name, b"\n" + PAGE, "a web page") for name in ("w.pth", "w.safetensors")),
        ("w.pth", b"\xef\xbb\xbf\r\n" + PAGE.upper(), "a web page"),
        ("w.pth", b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "a web page"),
        *((name, LFS, "a git-lfs pointer.*git lfs pull") for name in ("w.pth", "w.safetensors")),
        *((name, pathlib.Path.mkdir, "is a folder") for name in ("w.pth", "w.safetensors", "w")),
        ("w.pth", safe, "a safetensors file; give it the suffix .safetensors"),
        *(("w.safetensors", write(STATE), "a torch file .*; give it the suffix .pth") for write in (saved, old)),
        ("w.safetensors", bytes(range(256)), "not a whole safetensors file"),
        ("w.safetensors", cut(safe, 100), "not a whole safetensors file"),
        ("w.pth", bytes(range(256)), "holds something other than tensors, or is damaged \\(Unsupported operand 0\\)"),
        ("w.pth", cut(saved(STATE), 100), "not a whole torch file"),
        ("w.pth", cut(old({"a": torch.zeros(2000)}), 1000), "not a whole torch file"),
        ("w.pth", compressed, "a compressed archive"),
        ("w.pth", saved([torch.zeros(2)]), "expected a dict of tensors, got list"),
        ("w.pth", saved({}), "holds no tensors"),
        ("w.pth", saved({"names": "a"}), "expected arrays by name, got str under 'names'"),
        ("w.pth", saved({"a": bytearray(5)}), "holds bytearrays, which may be of any size"),
        *(("w.pth", write({"a": Call(bytearray, 2**40)}), "holds bytearrays, which may be") for write in (saved, old)),
        *(("w.pth", f(torch.nn.Linear(2, 2)), OTHER % "torch.nn.modules.linear.Linear") for f in (saved, old)),
        ("w.pth", pickle.dumps(CODE, 2), OTHER % "posix.system"),
        *(("w.pth", write({"a": torch.zeros(2), "b": CODE}), OTHER % "posix.system") for write in (saved, old)),
        ("w.pth", saved(STATE, pickle_protocol=4), "or is damaged \\(Unsupported operand 149\\); if you trust it"),
        ("w.pth", saved({"state_dict": STATE, "x": argparse.Namespace(lr=0.1)}), OTHER % "argparse.Namespace"),
        ("w.pth", old({"state_dict": STATE, "x": collections.defaultdict(list)}), OTHER % "collections.defaultdict"),
        ("w.pth", saved({"state_dict": STATE, "x": datetime.datetime(2020, 1, 1)}), OTHER % "datetime.datetime"),
        ("w.pth", saved({"state_dict": STATE, "x": np.array(["cat"])}), "holds something other than tensors"),
        ("w.pth", b"\x80\x02cos\na\x1b[2J\n.", r"holds something other than tensors \('os.a\\x1b\[2J'\)"),
        # Torch goes by the first bytes, which are a pickle, whatever follows.
        ("w.pth", pickle.dumps(CODE, 2) + LFS, OTHER % "posix.system"),
    ],
)  # fmt: skip
def test_a_bad_weight_file_gives_one_line_that_names_it(tmp_path, name, content, message):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        content(path)
    assert re.search(message, refusal(path)), refusal(path)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_torchscript_archive_is_recognised(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "w.pt")
    assert "a TorchScript archive; if you trust it, load it with torch.jit.load" in refusal(tmp_path / "w.pt")


def test_without_torch_the_message_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "w.pth").write_bytes(b"PK\x03\x04")
    model, variables = build("fcn32s_ladder")
    monkeypatch.setitem(sys.modules, "torch", None)
    for action in (
        lambda: weights.inspect(tmp_path / "w.pth"),
        lambda: weights.save(tmp_path / "x.pth", model, variables, None),
    ):
        with pytest.raises(InputError, match=r"(w.pth|x.pth): .*pip install fcn_jax\[torch\].*\.safet"):
            action()
    with pytest.raises(InputError, match=r"fcn_jax\[torch\]"):
        make_twin(model)


@pytest.mark.parametrize("length", [15392, 640, 0x4B50])
def test_a_header_length_that_looks_like_another_format_is_read(tmp_path, length):
    # 15392 is " <" in bytes, 640 the start of a pickle of protocol 2, 0x4B50 "PK".
    header = b'{"features.0.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    path = tmp_path / "w.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + header.ljust(length) + np.float32(2).tobytes())
    tensors = weights.open_source(path)
    np.testing.assert_array_equal(tensors.read("features.0.weight"), [2])


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        (torch.zeros(2).to(torch.float8_e4m3fn), "a tensor of float8_e4m3fn"),
        (torch.eye(2).to_sparse(), "a sparse_coo tensor of float32"),
        (torch.zeros(2, device="meta"), "a meta tensor of float32"),
    ],
)
def test_a_tensor_that_numpy_cannot_hold_is_rejected_by_name(tmp_path, tensor, kind):
    torch.save({"a.weight": tensor}, tmp_path / "w.pth")
    for source, origin in ((tmp_path / "w.pth", str(tmp_path / "w.pth")), ({"a.weight": tensor}, "the dict")):
        tensors = weights.open_source(source)
        with pytest.raises(InputError) as caught:
            tensors.read("a.weight")
        assert str(caught.value).startswith(f"{origin}: a.weight is {kind}, which NumPy cannot hold")


def test_a_float8_tensor_of_a_safetensors_file_is_rejected_by_name(tmp_path):
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file({"module.a": torch.zeros(2).to(torch.float8_e4m3fn), "module.b": torch.ones(2)}, path)
    tensors = weights.open_source(path)
    np.testing.assert_array_equal(tensors.read("b"), [1, 1])
    with pytest.raises(InputError, match="w.safetensors: a is a tensor of f8_e4m3, which NumPy cannot hold"):
        tensors.read("a")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_is_rejected_by_name():
    source = {"a": torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])}
    assert "got a nested tensor under 'a'" in refusal(source)


def test_negated_and_conjugated_views_are_read():
    turned = torch.tensor([1 + 2j, 3 - 1j]).conj()
    assert turned.imag.is_neg() and turned.is_conj()
    tensors = weights.open_source({"imag": turned.imag, "whole": turned})
    np.testing.assert_array_equal(tensors.read("imag"), [-2, 1])
    np.testing.assert_array_equal(tensors.read("whole"), [1 - 2j, 3 + 1j])


def test_a_dict_that_contains_itself_is_rejected(tmp_path):
    whole = {"state_dict": {}}
    whole["state_dict"]["model"] = whole
    torch.save(whole, tmp_path / "w.pth")
    assert "contains itself under" in refusal(tmp_path / "w.pth")


def test_numpy_values_beside_the_weights_are_ignored(tmp_path):
    arrays = [np.arange(3.0), np.array([[1, 2]], np.uint8), np.array([True]), np.array([1j], np.complex64)]
    scalars = [np.datetime64("2020-01-01"), np.float16(0.5), np.uint8(3), np.True_]
    checkpoint = {"state_dict": STATE, "x": [*arrays, *scalars, np.random.RandomState(0).get_state()]}
    path = tmp_path / "w.pth"
    for write in (saved(checkpoint), old(checkpoint)):
        write(path)
        assert weights.inspect(path).unwrapped == ("state_dict",)
    path.write_bytes(path.read_bytes().replace(b"numpy._core", b"numpy.core"))  # as NumPy 1 wrote it
    assert list(weights.inspect(path).tensors) == list(STATE)


@pytest.mark.parametrize(
    ("wrapper", "prefixes"),
    [("state_dict", ("module.",)), ("model_state_dict", ("_orig_mod.",)), ("model", ("module.", "_orig_mod."))]
    + [("state_dict", ("_orig_mod.", "module.")), ("state_dict", ("module.", "module."))],
)
def test_wrappers_and_prefixes_of_a_state_dict_are_removed_and_reported(tmp_path, wrapper, prefixes):
    state = {"".join(prefixes) + name: value for name, value in STATE.items()}
    writers = {"w.pth": saved({"epoch": 3, wrapper: state}), "old.pt": old({wrapper: state})}
    writers["w.safetensors"] = lambda path: safetensors.torch.save_file(state, path)
    for name, write in writers.items():
        write(tmp_path / name)
        info = weights.inspect(tmp_path / name)
        outer = () if name == "w.safetensors" else (wrapper,)
        assert (set(info.tensors), info.unwrapped) == (set(STATE), (*outer, *prefixes))
        value = weights.open_source(tmp_path / name).read("features.0.weight")
        np.testing.assert_array_equal(value, STATE["features.0.weight"])


@pytest.mark.parametrize(
    ("source", "message"),
    [(None, "got NoneType$"), (b"w.pth", "got bytes$"), (3, "got int$")]
    + [(torch.nn.Linear(2, 2), r"got Linear; give module.state_dict\(\)$")],
)
def test_a_source_of_another_type_is_rejected(source, message):
    with pytest.raises(InputError, match=f"^expected a path, .* or a dict of arrays, {message}"):
        weights.load(source, None, {})


def test_the_name_of_a_pretrained_encoder_is_a_valid_source(tmp_path, monkeypatch):
    torch.save(STATE, tmp_path / "fetched.pth")
    monkeypatch.setattr("fcn_jax.weights.sources.fetch", {"vgg16-imagenet": tmp_path / "fetched.pth"}.__getitem__)
    for source in ("vgg16-imagenet", pathlib.Path("vgg16-imagenet")):
        assert list(weights.inspect(source).tensors) == list(STATE)


def test_an_unknown_source_error_lists_pretrained_encoders(tmp_path):
    message = refusal(tmp_path / "runs" / "best")
    assert "no such file, and" in message and "published weights" in message and "vgg16-imagenet" in message


def test_a_path_too_long_for_the_system_is_reported():
    name = "x" * 300 + ".pth"
    reason = r"not a usable path \(File name too long\); give another"
    with pytest.raises(InputError, match=f"^weights '{name}': {reason}$"):
        weights.inspect(pathlib.Path(name))


NOT_SAVED = {"dtype": "bfloat16", "axis_name": "batch", "remat": True, "crop": [1, 1, 1], "width": 1e308}


def _model(**network):
    return {"model": json.dumps({"name": "fcn32s", "num_classes": 3, "options": {}} | network)}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        *(
            (_model(options={key: value}), "names a network that this version does not know")
            for key, value in NOT_SAVED.items()
        ),
        (_model(name="fcn9s"), "names a network that this version does not know"),
        *(
            ({"model": text}, "names a network that this version does not know")
            for text in ("{", "[]", '{"name": "fcn8s"}')
        ),
        (_model() | {"preprocessing": "rgb"}, "says preprocessing 'rgb', expected imagenet or caffe"),
        (_model() | {"preprocessing": ""}, "says preprocessing '', expected imagenet or caffe"),
    ],
)
def test_invalid_metadata_is_rejected(tmp_path, metadata, message):
    arrays = {"vgg.conv1_1.weight": torch.zeros(1, 3, 3, 3)}
    safetensors.torch.save_file(arrays, tmp_path / "w.safetensors", {"layout": "fcn_jax", **_model()})
    assert weights.inspect(tmp_path / "w.safetensors").fit.models == ("fcn32s",)
    safetensors.torch.save_file(arrays, tmp_path / "w.safetensors", {"layout": "fcn_jax", **metadata})
    assert f"its metadata {message}" in refusal(tmp_path / "w.safetensors")
