"""Encoders by name, the initial weights of a run, and `fcn-jax port`."""

import hashlib
import json

import numpy as np
import pytest
import safetensors
import torch
import torch_sources as sources
from small_networks import WIDTH as W
from small_networks import assert_same, build, create, zeros

import fcn_jax
from fcn_jax import weights
from fcn_jax.cli.port import main as port_command
from fcn_jax.config import Config, DataConfig, TrainConfig
from fcn_jax.errors import InputError
from fcn_jax.models.catalog import MODELS
from fcn_jax.models.resnet import RESNETS
from fcn_jax.models.vgg import ENCODERS
from fcn_jax.training.config_checks import check_config
from fcn_jax.training.trainer import starting_variables


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A file with a narrow VGG-11 of torchvision, and its state dict."""
    state = sources.randomise(sources.TorchvisionVGG("vgg11", False, W, 10)).float().state_dict()
    path = tmp_path_factory.mktemp("encoder") / "vgg11.pth"
    torch.save(state, path)
    return path, state


# --- encoders by name


def published(address, digest):
    return weights.Pretrained("vgg11", address, "ImageNet", "", "", f"sha256:{digest}")


@pytest.fixture
def hub(encoder, tmp_path, monkeypatch):
    """A separate cache of torch.hub, and a pretrained encoder `tiny` that is served from a file."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    content = encoder[0].read_bytes()
    served = tmp_path / f"vgg11-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    served.write_bytes(content)
    monkeypatch.setitem(weights.PRETRAINED, "tiny", published(served.as_uri(), served.stem.rpartition("-")[2]))
    return served, tmp_path / "home/hub/checkpoints" / served.name


def test_an_encoder_by_name_is_downloaded_once_checked_and_loaded(hub, encoder):
    served, cached = hub
    model = create("fcn32s_pad100")
    loaded = weights.load("tiny", model, zeros(model))
    kernel = weights.to_torch(model, loaded, "torchvision-vgg")["features.0.weight"]
    np.testing.assert_array_equal(kernel, encoder[1]["features.0.weight"])
    assert cached.is_file()
    served.unlink()
    assert weights.fetch("tiny") == cached  # from the cache
    cached.write_bytes(cached.read_bytes()[:-1])
    with pytest.raises(InputError, match="its sha256 is .*expected .*remove it"):
        weights.fetch("tiny")


def test_a_download_with_another_checksum_is_rejected(hub):
    served, cached = hub
    served.write_bytes(b"<html>moved</html>")
    with pytest.raises(InputError, match="tiny: file:.*: its sha256 is .* not the published file"):
        weights.fetch("tiny")
    assert not cached.exists()


def test_without_network_the_message_names_url_and_location(hub, monkeypatch):
    monkeypatch.setitem(weights.PRETRAINED, "far", published("http://127.0.0.1:9/vgg16-00000000.pth", "0"))
    with pytest.raises(InputError, match=r"far: http://127.0.0.1:9/vgg16-00000000.pth cannot be fetched .*put it at /"):
        weights.inspect("far")
    with pytest.raises(InputError, match="unknown name of published weights 'vgg16-imagnet'; choose one of: fcn32s"):
        weights.inspect("vgg16-imagnet")


def test_pretrained_names_match_networks_and_checksums():
    for name, entry in weights.PRETRAINED.items():
        kind = name.partition("-")[0]
        assert entry.is_encoder == (kind in RESNETS or kind.removesuffix("_bn") in ENCODERS)
        assert entry.is_encoder or entry.network in MODELS and entry.network.startswith(kind.partition("_")[0])
        if entry.address.endswith(".pth"):  # torchvision and jcjohnson put the start of the digest into the name
            assert entry.digest == f"sha256:{entry.address[-12:-4]}"


# --- starting a run


@pytest.fixture
def uncompiled(monkeypatch):
    """Initialise with zeros, as score layers are anyway, so that no initialisation is compiled."""
    monkeypatch.setattr("fcn_jax.training.trainer.init_variables", lambda model, *rest: zeros(model))


def begin(name="fcn8s", init=None, init_from=None, preprocessing="imagenet", num_classes=6, **options):
    """Return the model of a run, its initial variables, and its notes in one line."""
    model = create(name, num_classes, **options)
    data = DataConfig(preprocessing=preprocessing, crop_size=(32, 32))
    text = [None if given is None else str(given) for given in (init, init_from)]
    variables, notes = starting_variables(Config(init=text[0], init_from=text[1], data=data), model)
    return model, variables, " ".join(notes)


def test_an_8s_started_from_an_encoder_warns_unless_scaled_or_staged(uncompiled, encoder, tmp_path):
    warning = "an FCN-8s with new score layers learns little"
    encoder, coarse = encoder[0], tmp_path / "32s.safetensors"
    _, _, notes = begin(init=encoder)
    assert warning in notes and "new: score_fr, score_pool3, score_pool4, upscore2" in notes
    assert "unused: classifier.6" in notes
    assert warning not in begin(init=encoder, skip_scales=(0.01, 0.0001))[2]
    assert warning not in begin("fcn16s", init=encoder)[2]
    assert warning not in begin("fcn8s_resize", init=encoder)[2]
    model, variables, notes = begin("fcn32s", init=encoder)
    assert warning not in notes
    weights.save(coarse, model, variables, "imagenet")
    # A whole network whose score layers are still zero counts as an encoder.
    assert warning in begin(init_from=coarse)[2]
    variables["params"]["score_fr"]["kernel"] = np.ones_like(variables["params"]["score_fr"]["kernel"])
    weights.save(coarse, model, variables, "imagenet")
    _, staged, notes = begin(init_from=coarse)
    assert warning not in notes and f"from {coarse}" in notes and "unused: upscore32" in notes
    assert_same(staged["params"]["vgg"], variables["params"]["vgg"])
    assert warning in begin(init_from=coarse, num_classes=4)[2]  # other classes need new score layers
    with pytest.raises(InputError, match="both --init .* and --init-from"):
        check_config(Config(init=str(encoder), init_from=str(coarse), train=TrainConfig(steps=1)))
    for given in ({"init": encoder}, {"init_from": coarse}):
        with pytest.raises(InputError, match="expects imagenet preprocessing, but the run has caffe"):
            begin(**given, preprocessing="caffe")


def test_initial_weights_are_opened_once(uncompiled, hub, monkeypatch):
    fetched = []
    monkeypatch.setattr("fcn_jax.weights.sources.fetch", lambda name: fetched.append(name) or weights.fetch(name))
    assert "from tiny: " in begin("fcn32s", init="tiny")[2] and fetched == ["tiny"]
    assert "from tiny: " in begin("fcn32s", init_from="tiny")[2]
    assert fetched == ["tiny"] * 2


def test_a_stage_starts_from_a_file_of_another_project(uncompiled, tmp_path):
    file = tmp_path / "boostcamp.pth"
    state = sources.randomise(sources.Boostcamp(32, 21, W)).float().state_dict()
    torch.save(state, file)
    _, variables, notes = begin("fcn16s", init_from=file, encoder="vgg16", fc6_kernel=1)
    # The file has 21 classes and the model 6, so only the score layers are new.
    assert "new: score_fr, " in notes and "vgg." not in notes and "head." not in notes
    fc7 = np.asarray(variables["params"]["head"]["fc7"]["kernel"]).transpose(3, 2, 0, 1)
    np.testing.assert_array_equal(fc7, state["fc7.0.weight"])
    message = r"--init-from .*boostcamp.pth: .*fc6.weight is 256x32x1x1, .* needs 256x32x3x3"
    with pytest.raises(InputError, match=message):
        begin("fcn16s", init_from=file, encoder="vgg16", fc6_kernel=3)
    with pytest.raises(InputError, match="--init-from .*fcn32s is of another family than fcn16s_resize"):
        begin("fcn16s_resize", init_from=file)


def test_transfer_between_networks_reports_their_differences(uncompiled, tmp_path):
    file = tmp_path / "atonce.safetensors"
    weights.save(file, *build("fcn8s_pad100_atonce", 6), None)
    _, _, notes = begin("fcn8s_pad100", init_from=file)
    assert "from a network with skip_scales (0.01, 0.0001) (here (1.0, 1.0))" in notes
    with pytest.raises(InputError, match="fcn8s_pad100_atonce is of another family than fcn8s;"):
        begin("fcn8s", init_from=file)
    with pytest.raises(InputError, match="no such run or file; train that run first"):
        begin("fcn8s", init_from="runs/voc-paper-32s")
    with pytest.raises(InputError, match="holds vgg11, the model has vgg13; give both networks the same encoder"):
        begin("fcn8s_pad100", init_from=file, encoder="vgg13")


# --- fcn-jax port


def run_port(capsys, *arguments):
    assert port_command([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def test_port_writes_a_loadable_file_and_a_report(tmp_path, capsys):
    state = sources.randomise(sources.Fanrencli(16, 3, W)).float().state_dict()
    torch.save({"state_dict": state}, tmp_path / "a.pth")
    out = tmp_path / "new"
    text = run_port(capsys, tmp_path / "a.pth", "--model", "fcn16s_pad100", "--width", W, "--out", out)
    for word in ("fanrencli", "state_dict", "conv15.weight", "head.fc7.weight", "left", "nothing"):
        assert word in text, text
    model = create("fcn16s_pad100", encoder="vgg16", pool="floor", skip_bias=False)
    variables = weights.load(out / "weights.safetensors", model, zeros(model))
    back = weights.to_torch(model, variables, "fanrencli")
    assert_same(back, {name: value.numpy() for name, value in state.items()})
    report = json.loads((out / "report.json").read_text())
    assert report["filled"]["score_fr.bias"] == "score_fr.bias" and report["left"] == {}


def test_port_round_trips_torchvision_weights(encoder, tmp_path, capsys, fails):
    file, state = encoder
    before = file.read_bytes()
    command = [file, "--model", "fcn8s", "--width", W, "--num-classes", "5", "--out"]
    fails(port_command, [*command, file], "is the source")
    assert file.read_bytes() == before
    assert "preprocessing caffe" in run_port(capsys, *command, tmp_path / "out", "--preprocessing", "caffe")
    assert json.loads((tmp_path / "out/report.json").read_text())["preprocessing"] == "caffe"
    ours, back = tmp_path / "fcn8s.safetensors", tmp_path / "back.safetensors"
    text = run_port(capsys, *command, ours)
    assert "encoder vgg11" in text and "score_fr.weight" in text and "classifier.6.weight" in text
    assert weights.inspect(ours).preprocessing == "imagenet"
    text = run_port(capsys, ours, "--layout", "torchvision-vgg", "--out", back)
    assert "not written, since no network of torchvision-vgg takes them: score_fr.bias" in text
    with safetensors.safe_open(back, framework="numpy") as written:
        assert written.metadata()["layout"] == "torchvision-vgg"
        for name in state.keys() - {"classifier.6.weight", "classifier.6.bias"}:
            np.testing.assert_array_equal(written.get_tensor(name), state[name])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("nosuch.pth --model fcn8s", ["nosuch.pth", "no such file"]), ("a.pth --model fcn9s", ["fcn9s", "fcn8s"]),
        ("a.pth --model fcn8s", ["create_model('fcn32s_pad100', 3)"]),
        ("a.pth --model fcn32s_pad100 --out x.npz", ["x.npz", ".safetensors", ".pth"]),
        ("a.pth --model fcn32s_pad100 --width 1", ["conv1_1.weight is 4x3x3x3"]),
        ("a.pth --model fcn32s_pad100 --layout caffe", ["caffe", "pochih"]),
        ("a.pth --model fcn32s_pad100 --num-classes 0", ["num_classes in 1 ... 255"]),
    ],
)  # fmt: skip
def test_port_mistakes_give_one_line(tmp_path, monkeypatch, fails, arguments, named):
    monkeypatch.chdir(tmp_path)
    torch.save(sources.PytorchFCN(32, 3, W).state_dict(), "a.pth")
    fails(port_command, ["--out", "x.safetensors", "--width", W, *arguments.split()], *named)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


def test_our_own_file_describes_its_network_and_is_rejected_by_another(tmp_path):
    file = tmp_path / "a.safetensors"
    model, variables = build("fcn8s_pad100", 4, pool="floor", fc_features=24, skip_scales=(0.5, 0.25))
    weights.save(file, model, variables, "caffe")
    info = weights.inspect(file)
    assert info.fit.models == ("fcn8s_pad100",) and info.fit.num_classes == 4
    assert fcn_jax.create_model("fcn8s_pad100", 4, **info.fit.options) == model
    other = model.clone(pool="ceil")  # same shapes, another computation
    with pytest.raises(InputError, match="pool='ceil'; use create_model.'fcn8s_pad100', 4,.*pool='floor'"):
        weights.load(file, other, variables)
    weights.load(file, model.clone(dropout_rate=0.1, remat=True), variables)
    weights.load(file, other, variables, allow_missing=["score_*"])  # then only names count
    # The file contains the name and the options of the network.
    assert port_command([str(file), "--out", str(tmp_path / "b.pth")]) == 0
    twin = fcn_jax.compare.make_twin(model)
    twin.load_state_dict(torch.load(tmp_path / "b.pth"), strict=True)
