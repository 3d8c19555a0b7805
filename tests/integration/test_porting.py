"""From torchvision's file to a training run and back: docs/porting.md as it stands, with a narrower network."""

import hashlib
import json
import re
import shlex
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import torch_sources as sources
import trees

import fcn_jax
from fcn_jax import cli, weights
from fcn_jax.compare.experiments import random_variables
from fcn_jax.config import Config, DataConfig
from fcn_jax.errors import InputError
from fcn_jax.training.start import start
from fcn_jax.training.trained import open_trained

DOCS = (Path(__file__).parents[2] / "docs/porting.md").read_text()
W = 0.0625
VOC = {"train": ["2007_000001", "2007_000002"], "val": ["2007_000101"]}
# What makes each command small; nothing of what it does changes.
SMALL = {
    "port": ["--width", str(W)],
    "train": ["--model.width", str(W), "--train.steps", "2", "--devices", "1", "--data.cache-dir", "cache"],
    "export": [],
    "parity": ["--width", str(W), "--steps", "0", "--image-size", "32", "32"],
}
COMMANDS = {"train": cli.run_train, "port": cli.run_port, "export": cli.run_export, "parity": cli.run_parity}


def run(line):
    words = shlex.split(line)
    assert words[:2] == ["python", "train.py"] or words[0] == "fcn-jax", line
    name = "train" if words[0] == "python" else words[1]
    return COMMANDS[name]([*words[2:], *SMALL[name]])


def vgg16(tmp_path):
    module = sources.randomise(sources.TorchvisionVGG("vgg16", False, W, 10)).float()
    torch.save(module.state_dict(), tmp_path / "vgg16.pth")
    return module.state_dict()


def test_every_command_of_the_guide_works_and_the_last_weights_are_the_trained_ones(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    original = vgg16(tmp_path)
    trees.sbd(tmp_path / "VOC", {"train": VOC["train"], "val": []})
    trees.voc(tmp_path / "VOC", "2011", {"val": VOC["val"], "train": []})
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", DOCS, re.DOTALL | re.MULTILINE)
    lines = [line for kind, block in blocks if not kind for line in block.splitlines()]
    assert len(lines) == 7
    for line in lines:
        assert run(line) == 0, line
    out = " ".join(capsys.readouterr().out.split())
    assert "new: score_pool4, upscore16, upscore2; unused: upscore32" in out
    assert "new: score_pool3, upscore8, upscore_pool4; unused: upscore16" in out

    trained = open_trained("runs/voc-paper-8s")
    again = weights.load("again/weights.safetensors", trained.model, jax.tree.map(np.zeros_like, trained.variables))
    jax.tree.map(np.testing.assert_array_equal, again["params"], trained.variables["params"])
    assert weights.inspect("again/weights.safetensors").preprocessing == "imagenet"
    # The encoder came all the way from torchvision's file; the paper's rates hardly move it in six steps.
    first = np.asarray(trained.variables["params"]["vgg"]["conv1_1"]["kernel"]).transpose(3, 2, 0, 1)
    np.testing.assert_allclose(first, original["features.0.weight"].numpy(), atol=1e-3)
    assert np.asarray(trained.variables["params"]["score_pool3"]["bias"]).any()
    # and pytorch-fcn's own class takes the exported file
    sources.PytorchFCN(8, 21, W).load_state_dict(torch.load("fcn8s.pth"), strict=True)

    (example,) = [block for kind, block in blocks if kind == "python"]
    exec(compile(example, "docs/porting.md", "exec"), {})


# --- encoders by name


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """torch.hub's cache in a folder of its own, and a pretrained encoder by the name of `tiny`, served from a file."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    state = vgg16(tmp_path)
    digest = hashlib.sha256((tmp_path / "vgg16.pth").read_bytes()).hexdigest()
    served = (tmp_path / "vgg16.pth").rename(tmp_path / f"vgg16-{digest[:8]}.pth")
    monkeypatch.setitem(weights.PRETRAINED, "tiny", served.as_uri())
    return state, served, tmp_path / "home/hub/checkpoints" / served.name


def test_an_encoder_by_name_is_fetched_once_checked_and_loaded(hub, capsys):
    state, served, cached = hub
    model = fcn_jax.create_model("fcn32s_pad100", 3, width=W)
    variables = fcn_jax.init_variables(model, jax.random.key(0))
    loaded = weights.load("tiny", model, variables)
    np.testing.assert_array_equal(
        weights.to_torch(model, loaded, "torchvision-vgg")["features.0.weight"], state["features.0.weight"]
    )
    assert cached.is_file()
    served.unlink()
    assert weights.fetch("tiny") == cached  # no network is needed again
    cached.write_bytes(cached.read_bytes()[:-1])
    with pytest.raises(InputError, match="its SHA-256 is .*expected .*remove it"):
        weights.fetch("tiny")


def test_a_download_that_is_not_the_published_file_is_refused(hub):
    _, served, cached = hub
    served.write_bytes(b"<html>moved</html>")
    with pytest.raises(InputError, match="tiny: file:.* cannot be fetched .*hash"):
        weights.fetch("tiny")
    assert not cached.exists()


def test_without_a_network_the_message_names_address_and_place(hub, monkeypatch):
    monkeypatch.setitem(weights.PRETRAINED, "far", "http://127.0.0.1:9/vgg16-00000000.pth")
    with pytest.raises(InputError, match=r"far: http://127.0.0.1:9/vgg16-00000000.pth cannot be fetched .*put it at /"):
        weights.inspect("far")
    with pytest.raises(InputError, match="unknown pretrained encoder 'vgg16-imagnet'; choose one of: vgg11-imagenet"):
        weights.inspect("vgg16-imagnet")


def test_fetching_without_torch_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match=r"vgg16-imagenet: .*pip install fcn_jax\[torch\].*\.safetensors"):
        weights.fetch("vgg16-imagenet")


def test_every_name_says_encoder_and_hash():
    for name, url in weights.PRETRAINED.items():
        encoder = name.partition("-")[0]
        assert re.fullmatch(rf"https://.*/{encoder}-[0-9a-f]{{8}}\.pth", url), url


def test_the_caffe_weights_are_told_from_torchvisions(tmp_path):
    module = sources.randomise(sources.TorchvisionVGG("vgg16", False, W, 10)).float()
    old = {"classifier.0": "classifier.1", "classifier.3": "classifier.4"}  # dropout before each layer
    state = {
        f"{old.get(name.rpartition('.')[0], name.rpartition('.')[0])}.{name.rpartition('.')[2]}": value
        for name, value in module.state_dict().items()
    }
    info = weights.inspect(state)
    assert (info.layout, info.variant, info.preprocessing) == ("johnson-vgg", "vgg16", "caffe")
    model = fcn_jax.create_model("fcn32s_pad100", 3, width=W)
    loaded = weights.load(state, model, fcn_jax.init_variables(model, jax.random.key(0)))
    back = weights.to_torch(model, loaded, "johnson-vgg")
    assert set(state) - set(back) == {"classifier.6.weight", "classifier.6.bias"}
    for name, value in back.items():
        np.testing.assert_array_equal(value, state[name])


# --- starting a run


def begin(name="fcn8s", init=None, init_from=None, preprocessing="imagenet", num_classes=6, **options):
    """Return a run's first variables and its notes, in one line."""
    model = fcn_jax.create_model(name, num_classes, width=W, **options)
    data = DataConfig(preprocessing=preprocessing, crop_size=(32, 32))
    text = [None if given is None else str(given) for given in (init, init_from)]
    variables, notes = start(Config(init=text[0], init_from=text[1], data=data), model)
    return model, variables, " ".join(notes)


def test_an_8s_from_a_bare_encoder_is_warned_of_unless_scaled_or_staged(tmp_path):
    vgg16(tmp_path)
    warning = "an 8s that starts from an encoder alone learns little"
    encoder, coarse = tmp_path / "vgg16.pth", tmp_path / "32s.safetensors"
    _, _, notes = begin(init=encoder)
    assert warning in notes and "new: score_fr, score_pool3, score_pool4, upscore2" in notes
    assert "unused: classifier.6" in notes
    assert warning not in begin(init=encoder, skip_scales=(0.01, 0.0001))[2]
    assert warning not in begin("fcn16s", init=encoder)[2]
    assert warning not in begin("fcn8s_resize", init=encoder)[2]
    model, variables, notes = begin("fcn32s", init=encoder)
    assert warning not in notes
    weights.save(coarse, model, variables, "imagenet")
    # a whole file whose scores are all at their start is an encoder all the same
    assert warning in begin(init_from=coarse)[2]
    score = np.ones_like(variables["params"]["score_fr"]["kernel"])
    variables["params"]["score_fr"]["kernel"] = score
    weights.save(coarse, model, variables, "imagenet")
    _, staged, notes = begin(init_from=coarse)
    assert warning not in notes and f"from {coarse}" in notes and "unused: upscore32" in notes
    jax.tree.map(np.testing.assert_array_equal, staged["params"]["vgg"], variables["params"]["vgg"])
    assert warning in begin(init_from=coarse, num_classes=4)[2]  # other classes: its scores are new again
    with pytest.raises(InputError, match="both --init .* and --init-from"):
        begin(init=encoder, init_from=coarse)
    with pytest.raises(InputError, match="expects imagenet preprocessing, the run has caffe"):
        begin(init_from=coarse, preprocessing="caffe")


def test_a_stage_starts_from_a_file_of_another_project(tmp_path):
    file = tmp_path / "boostcamp.pth"
    module = sources.randomise(sources.Boostcamp(32, 21, W)).float()
    torch.save(module.state_dict(), file)
    _, variables, notes = begin("fcn16s", init_from=file, fc6_kernel=1)
    # six classes where the file has twenty-one: every score is new, the features are not
    assert "new: score_fr, " in notes and "vgg." not in notes and "head." not in notes
    fc7 = np.asarray(variables["params"]["head"]["fc7"]["kernel"]).transpose(3, 2, 0, 1)
    np.testing.assert_array_equal(fc7, module.state_dict()["fc7.0.weight"])
    with pytest.raises(
        InputError, match=r"--init-from .*boostcamp.pth: .*fc6.weight is 256x32x1x1, .* needs 256x32x3x3"
    ):
        begin("fcn16s", init_from=file, fc6_kernel=3)
    with pytest.raises(InputError, match="--init-from .*fcn32s is of another family than fcn16s_resize"):
        begin("fcn16s_resize", init_from=file)


def test_carrying_over_says_what_the_networks_compute_otherwise(tmp_path):
    model = fcn_jax.create_model("fcn8s_pad100_atonce", 6, encoder="vgg11", width=W)
    variables = random_variables(model)
    weights.save(tmp_path / "atonce.safetensors", model, variables, None)
    _, _, notes = begin("fcn8s_pad100", init_from=tmp_path / "atonce.safetensors", encoder="vgg11")
    assert "from a network with skip_scales (0.01, 0.0001) (here (1.0, 1.0))" in notes
    with pytest.raises(InputError, match="fcn8s_pad100_atonce is of another family than fcn8s;"):
        begin("fcn8s", init_from=tmp_path / "atonce.safetensors", encoder="vgg11")
    with pytest.raises(InputError, match="no such run or file; train the run"):
        begin("fcn8s", init_from="runs/voc-paper-32s")
    with pytest.raises(InputError, match="holds vgg11, the model has vgg16; give both networks the same encoder"):
        begin("fcn8s_pad100", init_from=tmp_path / "atonce.safetensors")


# --- what goes out


def test_other_scales_than_the_sources_are_not_written_in_its_names(tmp_path):
    model = fcn_jax.create_model("fcn8s_pad100", 3, width=W, skip_scales=(0.5, 0.25))
    variables = random_variables(model)
    with pytest.raises(InputError, match=r"layout 'pytorch-fcn': .* has skip_scales=\(0.5, 0.25\)"):
        weights.to_torch(model, variables, "pytorch-fcn")
    for scales in ((1.0, 1.0), (0.01, 0.0001)):
        assert weights.to_torch(model.clone(skip_scales=scales), variables, "pytorch-fcn")


def test_port_keeps_its_source_and_reports_what_it_wrote(tmp_path, capsys):
    vgg16(tmp_path)
    file = tmp_path / "vgg16.pth"
    before = file.read_bytes()
    command = [str(file), "--model", "fcn32s", "--width", str(W)]
    assert cli.guarded(cli.run_port, [*command, "--out", str(file)]) == 2
    assert "is the source" in capsys.readouterr().err and file.read_bytes() == before
    assert cli.run_port([*command, "--preprocessing", "caffe", "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out/report.json").read_text())["preprocessing"] == "caffe"
    assert "preprocessing caffe" in capsys.readouterr().out
    back = ["--layout", "torchvision-vgg", "--out", str(tmp_path / "back.pth")]
    assert cli.run_port([str(tmp_path / "out/weights.safetensors"), *back]) == 0
    assert "not written, since no network of torchvision-vgg takes them: score_fr.bias" in capsys.readouterr().out
    assert cli.guarded(cli.run_port, [*command, "--num-classes", "0", "--out", str(tmp_path / "x")]) == 2


@pytest.mark.parametrize("name", ["nodir/x.safetensors", "vgg16.pth/x.safetensors", f"{300 * 'x'}.safetensors"])
def test_a_file_that_cannot_be_written_is_one_line(tmp_path, name):
    (tmp_path / "vgg16.pth").write_bytes(b"a file, no folder")
    model = fcn_jax.create_model("fcn32s_ladder", 3, encoder="vgg11", width=0.03)
    with pytest.raises(InputError, match="cannot be written"):
        weights.save(tmp_path / name, model, random_variables(model), None)


# --- our own files know their network


def test_our_own_file_tells_its_network_and_is_refused_by_another(tmp_path, capsys):
    model = fcn_jax.create_model("fcn8s_pad100", 4, width=W, pool="floor", fc_features=24, skip_scales=(0.5, 0.25))
    variables = fcn_jax.init_variables(model, jax.random.key(0))
    weights.save(tmp_path / "a.safetensors", model, variables, "caffe")
    info = weights.inspect(tmp_path / "a.safetensors")
    assert info.fit.models == ("fcn8s_pad100",) and info.fit.num_classes == 4
    assert fcn_jax.create_model("fcn8s_pad100", 4, **info.fit.options) == model
    # same shapes, another computation
    other = model.clone(pool="ceil")
    with pytest.raises(InputError, match="pool='ceil'; use create_model.'fcn8s_pad100', 4,.*pool='floor'"):
        weights.load(tmp_path / "a.safetensors", other, variables)
    weights.load(tmp_path / "a.safetensors", model.clone(dropout_rate=0.1, remat=True), variables)
    weights.load(tmp_path / "a.safetensors", other, variables, allow_missing=["score_*"])  # by name, then
    # neither its name nor its options have to be said again
    assert cli.run_port([str(tmp_path / "a.safetensors"), "--out", str(tmp_path / "b.pth")]) == 0
    twin = fcn_jax.compare.make_twin(model)
    twin.load_state_dict(torch.load(tmp_path / "b.pth"), strict=True)


@pytest.mark.parametrize(
    "model", ["{", "[]", '{"name": "fcn9s", "num_classes": 3, "options": {}}', '{"name": "fcn8s"}']
)
def test_a_file_whose_metadata_is_damaged_is_one_line(tmp_path, model):
    import safetensors.numpy

    arrays = {"vgg.conv1_1.weight": np.zeros((1, 3, 3, 3), np.float32)}
    safetensors.numpy.save_file(arrays, tmp_path / "a.safetensors", {"layout": "fcn_jax", "model": model})
    with pytest.raises(InputError, match="a.safetensors: its metadata describes no network"):
        weights.inspect(tmp_path / "a.safetensors")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_torch_file_of_ours_keeps_every_bit(tmp_path, dtype):
    model = fcn_jax.create_model("fcn32s_ladder", 3, encoder="vgg11", width=W, param_dtype=dtype)
    variables = fcn_jax.init_variables(model, jax.random.key(0))
    weights.save(tmp_path / "a.pth", model, variables, None)
    assert str(torch.load(tmp_path / "a.pth")["vgg.conv1_1.weight"].dtype) == f"torch.{dtype}"
    back = weights.load(tmp_path / "a.pth", model, jax.tree.map(np.zeros_like, variables))
    jax.tree.map(np.testing.assert_array_equal, back, variables)
