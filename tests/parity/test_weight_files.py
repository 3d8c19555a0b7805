"""Files of weights: those that are read in spite of what lies around the tensors, and every way in which one is bad."""

import argparse
import collections
import datetime
import json
import os
import pathlib
import pickle
import shlex
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch

import fcn_jax
from fcn_jax import weights
from fcn_jax.compare import make_twin
from fcn_jax.errors import InputError
from fcn_jax.weights import open_source

STATE = {"features.0.weight": torch.full((4, 3, 3, 3), 0.5), "features.0.bias": torch.zeros(4)}


def build(name="fcn32s", **options):
    """Return a small model and variables that are all different from their initial values."""
    model = fcn_jax.create_model(name, 3, **{"encoder": "vgg11", "width": 0.0625, **options})
    shapes = jax.eval_shape(lambda: fcn_jax.init_variables(model, jax.random.key(0)))
    rng = np.random.default_rng(0)
    return model, jax.tree.map(lambda s: jnp.asarray(rng.uniform(0.5, 1.5, size=s.shape) * 0.1, s.dtype), shapes)


def refusal(source):
    """Return the one line with which a source is refused."""
    with pytest.raises(InputError) as caught:
        weights.inspect(source)
    message = str(caught.value)
    assert "\n" not in message
    if not isinstance(source, dict):
        assert message.startswith(str(source))
    return message


def run_command(message):
    """Run the command that a message ends in."""
    command = shlex.split(message[message.index("python -c") :])
    subprocess.run([sys.executable, *command[1:]], check=True, capture_output=True)


class _Code:
    def __reduce__(self):
        return os.system, ("true",)


def _write(path, kind):
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "html":
        path.write_bytes(b"\n<!DOCTYPE html><html><body>Not found</body></html>")
    elif kind == "html with a BOM":
        path.write_bytes(b"\xef\xbb\xbf\r\n<HTML><body>Not found</body></html>")
    elif kind == "xml":
        path.write_bytes(b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>")
    elif kind == "lfs":
        path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n")
    elif kind == "folder":
        path.mkdir()
    elif kind == "noise":
        path.write_bytes(bytes(range(256)))
    elif kind == "code":
        path.write_bytes(pickle.dumps(_Code()))
    elif kind == "code in a state dict":
        torch.save({"a": torch.zeros(2), "b": _Code()}, path)
    elif kind == "old code":
        torch.save({"a": torch.zeros(2), "b": _Code()}, path, _use_new_zipfile_serialization=False)
    elif kind == "whole model":
        torch.save(torch.nn.Linear(2, 2), path)
    elif kind == "old whole model":
        torch.save(torch.nn.Linear(2, 2), path, _use_new_zipfile_serialization=False)
    elif kind == "truncated old":
        torch.save({"a": torch.zeros(2000)}, path, _use_new_zipfile_serialization=False)
        path.write_bytes(path.read_bytes()[:-1000])
    elif kind == "safetensors":
        safetensors.torch.save_file(STATE, path)
    elif kind == "zip":
        torch.save(STATE, path)
    elif kind == "old":
        torch.save(STATE, path, _use_new_zipfile_serialization=False)
    elif kind == "truncated":
        _write(path, "safetensors" if path.suffix == ".safetensors" else "zip")
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "list":
        torch.save([torch.zeros(2)], path)
    elif kind == "no tensors":
        torch.save({}, path)
    elif kind == "text":
        torch.save({"names": "a"}, path)


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("w.pth", "absent", "no such file"),
        ("w.h5", "noise", "expected a .safetensors, .pth or .pt file, got '.h5'"),
        ("w.pth", "empty", "the file is empty"),
        ("w.safetensors", "empty", "the file is empty"),
        ("w.pth", "html", "a web page"),
        ("w.safetensors", "html", "a web page"),
        ("w.pth", "html with a BOM", "a web page"),
        ("w.safetensors", "html with a BOM", "a web page"),
        ("w.pth", "xml", "a web page"),
        ("w.pth", "lfs", "a pointer of git-lfs.*git lfs pull"),
        ("w.safetensors", "lfs", "a pointer of git-lfs.*git lfs pull"),
        ("w.pth", "folder", "is a folder"),
        ("w.safetensors", "folder", "is a folder"),
        ("w", "folder", "is a folder"),
        ("w.pth", "safetensors", "a safetensors file; give it the suffix .safetensors"),
        ("w.safetensors", "zip", "a torch file .*; give it the suffix .pth"),
        ("w.safetensors", "old", "a torch file .*; give it the suffix .pth"),
        ("w.pth", "noise", "not a torch file"),
        ("w.safetensors", "noise", "not a whole safetensors file"),
        ("w.pth", "truncated", "not a whole torch file"),
        ("w.safetensors", "truncated", "not a whole safetensors file"),
        ("w.pth", "code", r"would run code when it is read \(posix.system\); do not open it"),
        ("w.pth", "code in a state dict", r"would run code when it is read \(posix.system\); do not open it"),
        ("w.pth", "old code", r"would run code when it is read \(posix.system\); do not open it"),
        ("w.pth", "whole model", r"a whole pickled model \(torch.nn.modules.linear.Linear\).*python -c \"import torch"),
        ("w.pth", "old whole model", r"a whole pickled model \(torch.nn.modules.linear.Linear\).*python -c \"import"),
        ("w.pth", "truncated old", "not a whole torch file"),
        ("w.pth", "list", "expected a dict of tensors, got list"),
        ("w.pth", "no tensors", "holds no tensors"),
        ("w.pth", "text", "expected arrays by name, got str under 'names'"),
    ],
)
def test_a_bad_file_is_one_line_that_names_it(tmp_path, name, kind, message):
    path = tmp_path / name
    _write(path, kind)
    with pytest.raises(InputError, match=message) as caught:
        weights.inspect(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_a_torch_file_without_torch_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "w.pth").write_bytes(b"PK\x03\x04")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match=r"pip install fcn_jax\[torch\].*\.safetensors"):
        weights.inspect(tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"fcn_jax\[torch\]"):
        make_twin(build()[0])


@pytest.mark.parametrize("length", [15392, 640, 0x4B50])
def test_a_header_length_that_looks_like_another_file_is_read(tmp_path, length):
    # 15392 is " <" in bytes, 640 the start of a pickle of protocol 2, 0x4B50 "PK".
    header = b'{"features.0.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    path = tmp_path / "w.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + header.ljust(length) + np.float32(2).tobytes())
    tensors = open_source(path)
    np.testing.assert_array_equal(tensors.read("features.0.weight"), [2])


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        (torch.zeros(2).to(torch.float8_e4m3fn), "a tensor of float8_e4m3fn"),
        (torch.eye(2).to_sparse(), "a sparse_coo tensor of float32"),
        (torch.zeros(2, device="meta"), "a meta tensor of float32"),
    ],
)
def test_a_tensor_that_numpy_cannot_hold_is_refused_by_name(tmp_path, tensor, kind):
    torch.save({"a.weight": tensor}, tmp_path / "w.pth")
    for source, origin in ((tmp_path / "w.pth", str(tmp_path / "w.pth")), ({"a.weight": tensor}, "the dict")):
        tensors = open_source(source)
        with pytest.raises(InputError) as caught:
            tensors.read("a.weight")
        assert str(caught.value).startswith(f"{origin}: a.weight is {kind}, which NumPy cannot hold")


def test_a_float8_tensor_of_a_safetensors_file_is_refused_by_name(tmp_path):
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file({"module.a": torch.zeros(2).to(torch.float8_e4m3fn), "module.b": torch.ones(2)}, path)
    tensors = open_source(path)
    np.testing.assert_array_equal(tensors.read("b"), [1, 1])
    with pytest.raises(InputError, match="w.safetensors: a is a tensor of f8_e4m3, which NumPy cannot hold"):
        tensors.read("a")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_is_refused_by_name():
    source = {"a": torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])}
    assert "got a nested tensor under 'a'" in refusal(source)


def test_tensors_kept_as_negated_or_conjugated_views_are_read():
    turned = torch.tensor([1 + 2j, 3 - 1j]).conj()
    assert turned.imag.is_neg() and turned.is_conj()
    tensors = open_source({"imag": turned.imag, "whole": turned})
    np.testing.assert_array_equal(tensors.read("imag"), [-2, 1])
    np.testing.assert_array_equal(tensors.read("whole"), [1 - 2j, 3 + 1j])


@pytest.mark.parametrize("keys", [["model"], ["state_dict", "model"]])
def test_a_dict_that_contains_itself_is_refused(tmp_path, keys):
    innermost = whole = {}
    for key in keys[:-1]:
        innermost[key] = {}
        innermost = innermost[key]
    innermost[keys[-1]] = whole
    torch.save(whole, tmp_path / "w.pth")
    assert "contains itself under" in refusal(tmp_path / "w.pth")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "beside",
    [
        np.arange(3.0),
        np.array([[1, 2]], np.uint8),
        np.array([True]),
        np.array([1j], np.complex64),
        np.datetime64("2020-01-01"),
        np.float16(0.5),
        np.uint8(3),
        np.True_,
        np.random.RandomState(0).get_state(),
    ],
)
def test_numpy_values_beside_the_weights_do_not_matter(tmp_path, beside, zipped):
    torch.save({"state_dict": STATE, "x": beside}, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    assert weights.inspect(tmp_path / "w.pth").unwrapped == ("state_dict",)
    if not zipped:  # as NumPy 1 wrote it
        (tmp_path / "w.pth").write_bytes((tmp_path / "w.pth").read_bytes().replace(b"numpy._core", b"numpy.core"))
        assert list(weights.inspect(tmp_path / "w.pth").tensors) == list(STATE)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("beside", "name"),
    [
        (argparse.Namespace(lr=0.1), "argparse.Namespace"),
        (collections.defaultdict(list, a=[1]), "collections.defaultdict"),
        (pathlib.PurePosixPath("a"), "pathlib.PurePosixPath"),
        (datetime.datetime(2020, 1, 1), "datetime.datetime"),
        (frozenset([1]), "builtins.frozenset"),
        (InputError("a"), "fcn_jax.errors.InputError"),
    ],
)
def test_objects_beside_the_weights_are_named_and_no_attack(tmp_path, beside, name, zipped):
    torch.save({"state_dict": STATE, "x": beside}, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    message = refusal(tmp_path / "w.pth")
    message = message.replace("pathlib._local.", "pathlib.")  # where it lies in Python 3.13
    assert f"holds Python objects ({name}) beside the weights, which are not read" in message
    assert "if you trust the file" in message and "python -c" in message


@pytest.mark.parametrize(
    ("name", "checkpoint"),
    [
        ("a.pth", {"state_dict": STATE, "x": argparse.Namespace()}),
        ("it's $HOME.pt", {"model": STATE, "model_state_dict": None, "x": argparse.Namespace()}),
        ("top.pth", STATE | {"x": argparse.Namespace(), "model": "vgg"}),
        ("objects.pth", {"state_dict": STATE, "x": np.array([None])}),
        ("strings.pth", {"state_dict": STATE, "x": np.array(["cat", "dog"])}),
        ("whole.pth.tar", {"model": torch.nn.Sequential(torch.nn.Linear(2, 2)), "x": 1}),
        ("net.pth", torch.nn.Sequential(torch.nn.Linear(2, 2))),
    ],
)
def test_the_command_of_a_refusal_writes_a_file_that_is_read(tmp_path, name, checkpoint):
    torch.save(checkpoint, tmp_path / name)
    run_command(refusal(tmp_path / name))
    out = tmp_path / f"{name.split('.')[0]}.state.pth"
    expected = list(STATE) if isinstance(checkpoint, dict) and "whole" not in name else ["0.weight", "0.bias"]
    assert list(weights.inspect(out).tensors) == expected


def test_a_state_dict_of_a_newer_pickle_protocol_is_converted_by_its_command(tmp_path):
    torch.save(STATE, tmp_path / "w.pth", pickle_protocol=4)
    message = refusal(tmp_path / "w.pth")
    assert "a pickle of a newer protocol" in message
    run_command(message)
    assert list(weights.inspect(tmp_path / "w.state.pth").tensors) == list(STATE)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_torchscript_archive_is_told_and_converted_by_its_command(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "w.pt")
    message = refusal(tmp_path / "w.pt")
    assert "a TorchScript archive" in message and "torch.jit.load" in message
    run_command(message)
    assert list(weights.inspect(tmp_path / "w.state.pth").tensors) == ["weight", "bias"]


class _Call:
    """Pickled as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(
    ("call", "name"),
    [
        (_Call(os.system, "true"), "posix.system"),
        (_Call(eval, "1"), "builtins.eval"),
        (_Call(subprocess.Popen, "true"), "subprocess.Popen"),
    ],
)
@pytest.mark.parametrize(
    "beside",
    [
        {"m": torch.nn.Linear(2, 2)},
        {"x": argparse.Namespace()},
        # Names that are met again come from the memo.
        {"posix": "system", "builtins": "eval", "subprocess": "Popen", "state_dict": STATE},
        {},
    ],
    ids=lambda beside: "-".join(beside),
)
@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_told_whatever_lies_beside_it(tmp_path, call, name, protocol, beside, zipped):
    checkpoint = {**beside, "e": call}
    options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": zipped}
    torch.save(checkpoint, tmp_path / "w.pth", **options)
    message = refusal(tmp_path / "w.pth")
    assert f"would run code when it is read ({name}); do not open it" in message and "python -c" not in message


def _pushed(text):
    return b"\x8c" + bytes([len(text)]) + text


@pytest.mark.parametrize(
    ("code", "name"),
    [
        # The names pushed and memoised, other strings pushed and popped, the names fetched.
        (_pushed(b"posix") + b"\x94" + _pushed(b"system") + b"\x94" + b"0h\x00h\x01" + b"\x93", "posix.system"),
        (_pushed(b"posix") + _pushed(b"x") + b"0" + _pushed(b"system") + b"\x93", "posix.system"),
        (b"(" + _pushed(b"x") + b"1" + _pushed(b"posix") + b"2" + b"0" + _pushed(b"system") + b"\x93", "posix.system"),
        (_pushed(b"posix") + b"q\x07" + _pushed(b"system") + b"r\x00\x01\x00\x00" + b"00h\x07j\x00\x01\x00\x00\x93",
         "posix.system"),
        (_pushed(b"posix") + b"](K\x01e0" + _pushed(b"system") + b"\x93", "posix.system"),  # a list filled between them
        # Reached through a module of torch's or of plain data.
        (_pushed(b"torch") + _pushed(b"os.system") + b"\x93", "torch.os.system"),
        (_pushed(b"pathlib") + _pushed(b"os.system") + b"\x93", "pathlib.os.system"),
        (_pushed(b"collections") + _pushed(b"_sys.modules") + b"\x93", "collections._sys.modules"),
        # A module's name that only running the pickle tells: str("posix").
        (b"cbuiltins\nstr\n" + _pushed(b"posix") + b"\x85R" + _pushed(b"system") + b"\x93", "?.?"),
        # As Python 2 named it.
        (b"ccommands\ngetoutput\n", "subprocess.getoutput"),
        (b"c__builtin__\nexecfile\n", "builtins.execfile"),
        # Still one line, and nothing that a terminal acts on.
        (_pushed(b"os") + _pushed(b"a\nb\x1b[2J") + b"\x93", r"'os.a\nb\x1b[2J'"),
    ],
)  # fmt: skip
def test_code_is_told_however_it_is_named(tmp_path, code, name):
    path = tmp_path / "w.pth"
    path.write_bytes(b"\x80\x04" + b"ctorch.nn.modules.linear\nLinear\n0" + code + b".")
    assert f"would run code when it is read ({name}); do not open it" in refusal(path)


def test_what_torch_reads_is_what_is_checked(tmp_path):
    # Torch goes by the first bytes: a pickle, and behind it an archive with nothing bad in it.
    torch.save(torch.nn.Linear(2, 2), tmp_path / "a.pth")
    path = tmp_path / "w.pth"
    path.write_bytes(pickle.dumps(_Code()) + (tmp_path / "a.pth").read_bytes())
    assert "posix.system" in refusal(path)


@pytest.mark.parametrize(
    "prefixes",
    [("_orig_mod.",), ("module.", "_orig_mod."), ("_orig_mod.", "module."), ("module.", "module.")],
)
def test_prefixes_of_wrappers_are_taken_off_and_told(tmp_path, prefixes):
    state = {"".join(prefixes) + name: value for name, value in STATE.items()}
    torch.save({"state_dict": state}, tmp_path / "w.pth")
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    for name, wrapper in (("w.pth", ("state_dict",)), ("w.safetensors", ())):
        info = weights.inspect(tmp_path / name)
        assert (set(info.tensors), info.unwrapped) == (set(STATE), (*wrapper, *prefixes))
        np.testing.assert_array_equal(
            open_source(tmp_path / name).read("features.0.weight"), STATE["features.0.weight"]
        )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "got NoneType$"),
        (b"w.pth", "got bytes$"),
        (3, "got int$"),
        (torch.nn.Linear(2, 2), r"got Linear; give module.state_dict\(\)$"),
    ],
)
def test_a_source_of_another_type_is_refused(source, message):
    model, variables = build()
    with pytest.raises(InputError, match=f"^expected a path, .* or a dict of arrays, {message}"):
        weights.load(source, model, variables)


def test_a_path_that_equals_the_name_of_a_pretrained_encoder_is_that_encoder(tmp_path, monkeypatch):
    torch.save(STATE, tmp_path / "fetched.pth")
    monkeypatch.setattr("fcn_jax.weights.sources.fetch", {"vgg16-imagenet": tmp_path / "fetched.pth"}.__getitem__)
    for source in ("vgg16-imagenet", pathlib.Path("vgg16-imagenet")):
        assert list(weights.inspect(source).tensors) == list(STATE)


def test_a_name_that_is_neither_a_file_nor_a_pretrained_encoder_says_both(tmp_path):
    message = refusal(tmp_path / "runs" / "best")
    assert "no such file, and" in message and "pretrained encoder" in message and "vgg16-imagenet" in message


def test_a_path_that_the_system_refuses_is_one_line():
    assert "cannot be read: File name too long" in refusal("x" * 300 + ".pth")


def _save_with(path, **metadata):
    """Write a file of ours and overwrite some of its metadata."""
    model, variables = build()
    weights.save(path, model, variables, "caffe")
    with safetensors.safe_open(path, framework="numpy") as file:
        arrays, kept = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    network = json.loads(kept["model"])
    network["options"].update(metadata.pop("options", {}))
    safetensors.numpy.save_file(arrays, path, {**kept, "model": json.dumps(network), **metadata})


@pytest.mark.parametrize(
    "options",
    [{"dtype": "bfloat16"}, {"axis_name": "batch"}, {"remat": True}, {"crop": [1, 1, 1]}, {"width": 1e308}],
)
def test_metadata_with_options_that_save_does_not_write_is_refused(tmp_path, options):
    _save_with(tmp_path / "w.safetensors", options=options)
    assert "its metadata describes no network that this version knows" in refusal(tmp_path / "w.safetensors")


@pytest.mark.parametrize("said", ["rgb", ""])
def test_metadata_with_an_unknown_preprocessing_is_refused(tmp_path, said):
    _save_with(tmp_path / "w.safetensors", preprocessing=said)
    assert f"its metadata says preprocessing {said!r}, expected imagenet or caffe" in refusal(
        tmp_path / "w.safetensors"
    )


def test_the_bias_of_a_layer_whose_weight_does_not_fit_is_left_too():
    model, variables = build()
    arrays = weights.to_torch(model, variables, "torchvision-vgg")
    arrays["classifier.0.weight"] = arrays["classifier.0.weight"][:, : 32 * 9]  # of a 3x3 fc6
    loaded, report = weights.load_with_report(arrays, model, jax.tree.map(jnp.zeros_like, variables))
    assert not loaded["params"]["head"]["fc6"]["bias"].any()
    assert report.left["head.fc6.bias"] == report.ignored["classifier.0.bias"] == "its weight does not fit"
    assert "head.fc6.bias" not in report.filled and "head.fc7.bias" in report.filled


def test_negative_variances_are_refused_by_name():
    model, variables = build(encoder_norm="batch")
    source = weights.to_torch(model, variables)
    source["vgg.bn2_1.running_var"][1] = -1e-3
    with pytest.raises(InputError, match="vgg.bn2_1.running_var holds negative variances"):
        weights.load(source, model, variables)


def test_numbers_beyond_the_range_of_the_parameters_are_refused_by_name():
    model, variables = build()
    source = {name: value.astype(np.float64) for name, value in weights.to_torch(model, variables).items()}
    source["head.fc7.weight"][0, 0] = 1e300
    with pytest.raises(InputError, match="head.fc7.weight holds float64 numbers beyond the range of float32"):
        weights.load(source, model, variables)
