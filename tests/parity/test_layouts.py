"""Every published layout: the torch module as its source has it, ported, compared in float64, and written back."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import torch
import torch_sources as sources

import fcn_jax
from fcn_jax import weights
from fcn_jax.cli.port import main as port_command
from fcn_jax.cli.process import guarded
from fcn_jax.errors import InputError
from fcn_jax.models import VGGClassifier
from fcn_jax.models.classifier import adaptive_average_pool

W, N = 0.0625, 3
HEAD = {"head_features": 8}  # a quarter of pool5's 32 channels

# case -> (torch module, layout, model, options, preprocessing, (height, width)); the sources run at these sizes
CASES = {
    "pytorch-fcn 32s": (lambda: sources.PytorchFCN(32, N, W), "pytorch-fcn", "fcn32s_pad100", {}, "caffe", (33, 47)),
    "pytorch-fcn 16s": (lambda: sources.PytorchFCN(16, N, W), "pytorch-fcn", "fcn16s_pad100", {}, "caffe", (40, 38)),
    "pytorch-fcn 8s": (lambda: sources.PytorchFCN(8, N, W), "pytorch-fcn", "fcn8s_pad100", {}, "caffe", (37, 61)),
    "pytorch-fcn 8s at once": (
        lambda: sources.PytorchFCN(8, N, W, at_once=True),
        "pytorch-fcn",
        "fcn8s_pad100_atonce",
        {},
        "caffe",
        (35, 40),
    ),
    "tramac 32s": (lambda: sources.Tramac(32, N, W), "tramac", "fcn32s_resize", {}, "imagenet", (65, 50)),
    "tramac 16s": (lambda: sources.Tramac(16, N, W), "tramac", "fcn16s_resize", {}, "imagenet", (65, 50)),
    "tramac 8s": (lambda: sources.Tramac(8, N, W), "tramac", "fcn8s_resize", {}, "imagenet", (65, 50)),
    "tramac 8s aux": (
        lambda: sources.Tramac(8, N, W, aux=True),
        "tramac",
        "fcn8s_resize",
        {"aux_head": True},
        "imagenet",
        (50, 65),
    ),
    "pochih 32s": (lambda: sources.Pochih(32, N, W), "pochih", "fcn32s_ladder", {}, None, (64, 32)),
    "pochih 16s": (lambda: sources.Pochih(16, N, W), "pochih", "fcn16s_ladder", {}, None, (64, 32)),
    "pochih 8s": (lambda: sources.Pochih(8, N, W), "pochih", "fcn8s_ladder", {}, None, (64, 32)),
    "pochih s": (
        lambda: sources.Pochih("s", N, W, "vgg19"),
        "pochih",
        "fcns_ladder",
        {"encoder": "vgg19"},
        None,
        (64, 32),
    ),
    "fcn1": (lambda: sources.FCN1(N, W), "fcn1", "fcns_ladder", {"encoder": "vgg13"}, None, (32, 64)),
    "fanrencli 32s": (
        lambda: sources.Fanrencli(32, N, W),
        "fanrencli",
        "fcn32s_pad100",
        {"pool": "floor", "crop": (5, 9, 6)},
        None,
        (52, 40),
    ),
    "fanrencli 16s": (
        lambda: sources.Fanrencli(16, N, W),
        "fanrencli",
        "fcn16s_pad100",
        {"pool": "floor", "skip_bias": False},
        None,
        (52, 58),
    ),
    "fanrencli 8s": (
        lambda: sources.Fanrencli(8, N, W),
        "fanrencli",
        "fcn8s_pad100",
        {"pool": "floor"},
        None,
        (52, 58),
    ),
    "boostcamp 32s": (lambda: sources.Boostcamp(32, N, W), "boostcamp", "fcn32s", {"fc6_kernel": 1}, None, (64, 32)),
    "boostcamp 16s": (lambda: sources.Boostcamp(16, N, W), "boostcamp", "fcn16s", {"fc6_kernel": 1}, None, (64, 32)),
    "boostcamp 8s": (lambda: sources.Boostcamp(8, N, W), "boostcamp", "fcn8s", {"fc6_kernel": 1}, None, (64, 32)),
}


def zeros(model, size=(64, 64)):
    shapes = jax.eval_shape(lambda: fcn_jax.init_variables(model, jax.random.key(0), size))
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def make(name, **options):
    return fcn_jax.create_model(name, N, **{"width": W, "dtype": jnp.float64, "param_dtype": jnp.float64, **options})


def state_of(module):
    return {name: value.numpy().copy() for name, value in module.state_dict().items()}


def error(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def forward(module, x):
    with torch.no_grad():
        return module(torch.from_numpy(x).permute(0, 3, 1, 2)).numpy()


def assert_same_state(ours, theirs):
    assert list(ours) == list(theirs)  # in the source's order too
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_a_published_network_is_recognised_computes_the_same_and_goes_back_bit_for_bit(case):
    build, layout, name, options, preprocessing, size = CASES[case]
    module = sources.randomise(build())
    state = state_of(module)
    info = weights.inspect(state)
    assert (info.layout, info.preprocessing) == (layout, preprocessing)
    assert info.variant == options.get("encoder", "vgg16")
    assert name in info.fit.models and info.fit.num_classes == N
    model = make(name, **options)
    variables, report = weights.load_with_report(state, model, zeros(model))
    assert not report.left
    assert set(report.filled.values()) | set(report.ignored) == set(state)
    x = np.random.default_rng(0).normal(size=(1, *size, 3))
    ours = np.asarray(jax.jit(model.apply)(variables, x)).transpose(0, 3, 1, 2)
    theirs = forward(module, x)
    assert ours.shape == theirs.shape
    assert error(ours, theirs) < 1e-12  # float64, some twenty layers
    back = weights.to_torch(model, variables, layout)
    assert_same_state(back, state)
    build().double().load_state_dict({key: torch.from_numpy(value.copy()) for key, value in back.items()}, strict=True)


@pytest.mark.parametrize("case", CASES)
def test_the_call_that_an_unfit_model_is_answered_with_makes_the_network(case):
    build, layout, name, options, _, _ = CASES[case]
    state = state_of(sources.randomise(build()))
    wrong = make("fcn16s_ladder" if "ladder" not in name else "fcn8s")
    with pytest.raises(InputError, match="weights of another network than the model, which has family") as caught:
        weights.load(state, wrong, zeros(wrong))
    message = str(caught.value)
    assert layout in message and "\n" not in message
    call = re.search(rf"create_model\('{name}', {N}(.*?)\)(?: or|$)", message)
    assert call, message
    given = eval(f"dict({call[1].lstrip(', ')})")
    model = fcn_jax.create_model(name, N, width=W, **given)
    assert weights.load_with_report(state, model, zeros(model))[1].layout == layout
    assert model == fcn_jax.create_model(name, N, width=W, **options)


@pytest.mark.parametrize(
    ("case", "name", "options", "named"),
    [
        ("pytorch-fcn 8s", "fcn8s_pad100", {"pool": "floor"}, "pool='floor'"),
        ("pytorch-fcn 8s", "fcn16s_pad100", {}, "stride=16"),
        ("fanrencli 32s", "fcn32s_pad100", {"pool": "floor"}, r"crop=\(5, 9, 19\)"),
        ("fanrencli 16s", "fcn16s_pad100", {"pool": "floor"}, "skip_bias=True"),
        ("boostcamp 8s", "fcn8s", {}, "fc6_kernel=7"),
        ("pochih 8s", "fcn8s_ladder", {"encoder": "vgg19"}, "encoder='vgg19'"),
        ("fcn1", "fcn8s_ladder", {"encoder": "vgg13"}, "stride=8"),
        ("tramac 8s aux", "fcn8s_resize", {}, "aux_head=False"),
    ],
)
def test_a_model_that_would_compute_something_else_is_refused(case, name, options, named):
    state = state_of(sources.randomise(CASES[case][0]()))
    model = make(name, **options)
    with pytest.raises(InputError, match=f"the model, which has {named}.*use create_model"):
        weights.load(state, model, zeros(model))


def test_a_stage_starts_from_a_published_coarser_network():
    state = state_of(sources.randomise(sources.PytorchFCN(32, N, W)))
    model = make("fcn16s_pad100")
    new = ["score_pool4.*", "upscore2.*", "upscore16.*"]
    _, report = weights.load_with_report(state, model, zeros(model), new, ["upscore.*"])
    assert set(report.left.values()) == {"missing, allowed"} and "head.fc6.weight" in report.filled


@pytest.mark.parametrize(
    ("layout", "name"), [("pytorch-fcn", "fcn8s"), ("pochih", "fcn8s"), ("tramac", "fcn8s_ladder")]
)
def test_a_layout_of_another_family_has_no_names_for_the_network(layout, name):
    model = make(name)
    with pytest.raises(InputError, match=f"layout '{layout}' has names for a"):
        weights.to_torch(model, zeros(model), layout)


@pytest.mark.parametrize(
    ("layout", "name", "options", "message"),
    [
        ("fanrencli", "fcn8s_pad100", {}, "pool='ceil'"),
        ("pytorch-fcn", "fcn8s_pad100", {"encoder_norm": "batch"}, "no name for vgg.bn1_1.bias"),
        ("fcn1", "fcns_ladder", {"encoder": "vgg11"}, "encoder='vgg11'"),
    ],
)
def test_a_network_that_the_source_does_not_have_is_not_written_in_its_names(layout, name, options, message):
    model = make(name, **options)
    with pytest.raises(InputError, match=message):
        weights.to_torch(model, zeros(model), layout)


def test_copies_that_differ_are_an_error_that_names_both():
    state = state_of(sources.randomise(sources.Tramac(8, N, W)))
    model = make("fcn8s_resize")
    state["pool4.2.weight"][0, 0, 0, 0] += 1
    with pytest.raises(InputError, match=r"pool4.2.weight and pretrained.19.weight should be equal and differ"):
        weights.load(state, model, zeros(model))


def test_one_of_the_copies_is_enough():
    state = state_of(sources.randomise(sources.Tramac(16, N, W)))
    model = make("fcn16s_resize")
    whole = weights.load(state, model, zeros(model))
    half = {name: value for name, value in state.items() if not name.startswith("pretrained.")}
    _, report = weights.load_with_report(half, model, zeros(model))
    assert report.filled["vgg.conv5_1.weight"] == "pool5.0.weight"
    jax.tree.map(np.testing.assert_array_equal, whole, weights.load(half, model, zeros(model)))


@pytest.mark.parametrize("norm", [None, "batch"])
@pytest.mark.parametrize("encoder", ["vgg11", "vgg16"])
@pytest.mark.parametrize("source", ["torchvision", "timm"])
def test_a_ported_classifier_gives_the_sources_logits(source, encoder, norm):
    kind = {"torchvision": sources.TorchvisionVGG, "timm": sources.TimmVGG}[source]
    module = sources.randomise(kind(encoder, norm is not None, W, 10))
    options = {"encoder": encoder, "encoder_norm": norm, "width": W, "fc_features": 256}
    state = state_of(module)
    x = np.random.default_rng(0).normal(size=(2, 224, 224, 3))
    theirs = forward(module, x)
    for dtype, tolerance in ((jnp.float64, 1e-11), (jnp.float32, 1e-5)):
        model = VGGClassifier(10, dtype=dtype, param_dtype=dtype, **options)
        variables, report = weights.load_with_report(state, model, zeros(model))
        assert not report.left and report.layout == f"{source}-vgg"
        ours = np.asarray(jax.jit(model.apply)(variables, x.astype(dtype)))
        assert error(ours, theirs) < tolerance
        if dtype == jnp.float64:
            assert_same_state(weights.to_torch(model, variables, f"{source}-vgg"), state)


def test_the_classifier_takes_other_sizes_as_torchvision_does():
    module = sources.randomise(sources.TorchvisionVGG("vgg11", False, W, 10))
    model = VGGClassifier(10, "vgg11", None, W, 256, dtype=jnp.float64, param_dtype=jnp.float64)
    variables = weights.load(state_of(module), model, zeros(model))
    x = np.random.default_rng(0).normal(size=(1, 75, 330, 3))
    assert error(np.asarray(model.apply(variables, x)), forward(module, x)) < 1e-11


@pytest.mark.parametrize("size", [(7, 7), (14, 21), (1, 3), (10, 8), (15, 6)])
def test_adaptive_pooling_is_torchs(size):
    x = np.random.default_rng(0).normal(size=(2, *size, 3))
    theirs = forward(torch.nn.AdaptiveAvgPool2d((7, 7)), x).transpose(0, 2, 3, 1)
    np.testing.assert_allclose(adaptive_average_pool(jnp.asarray(x), (7, 7)), theirs, rtol=0, atol=1e-15)


@pytest.mark.parametrize(("norm", "name"), [(None, "fcn8s_pad100"), ("batch", "fcn8s")])
def test_timm_encoders_go_into_fcns_with_fc6_and_fc7(norm, name):
    module = sources.randomise(sources.TimmVGG("vgg16", norm is not None, W, 10))
    model = make(name, encoder_norm=norm)
    variables, report = weights.load_with_report(state_of(module), model, zeros(model))
    assert report.filled["head.fc6.weight"] == "pre_logits.fc1.weight" and "head.fc.weight" in report.ignored
    kernel = variables["params"]["head"]["fc6"]["kernel"]
    np.testing.assert_array_equal(kernel, module.pre_logits.fc1.weight.detach().permute(2, 3, 1, 0))


def test_the_report_says_what_was_taken_off_and_how_arrays_were_turned(tmp_path):
    module = sources.randomise(sources.PytorchFCN(32, N, W))
    state = {f"module.{name}": value for name, value in module.state_dict().items()}
    # As pytorch-fcn's trainer writes it, its best score as a NumPy number.
    checkpoint = {"epoch": 3, "arch": "FCN32s", "model_state_dict": state, "best_mean_iu": np.float64(0.6)}
    path = tmp_path / "model_best.pth.tar"
    model = make("fcn32s_pad100", param_dtype=jnp.float32, dtype=jnp.float32)
    for zipped in (True, False):
        torch.save(checkpoint, path, _use_new_zipfile_serialization=zipped)
        _, report = weights.load_with_report(path, model, zeros(model))
        assert report.unwrapped == weights.inspect(path).unwrapped == ("model_state_dict", "module.")
    assert report.converted["upscore32.weight"] == "in out h w to h w in out, 64x64x3x3, float64 to float32"
    assert report.converted["head.fc7.bias"] == "as it is, float64 to float32"


def run_port(capsys, *arguments):
    code = guarded(port_command, [str(argument) for argument in arguments])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_port_writes_a_file_that_loads_and_a_report_of_both_sides(tmp_path, capsys):
    module = sources.randomise(sources.Fanrencli(16, N, W).float()).float()
    torch.save({"state_dict": module.state_dict()}, tmp_path / "a.pth")
    out = tmp_path / "new"
    code, text, _ = run_port(capsys, tmp_path / "a.pth", "--model", "fcn16s_pad100", "--width", W, "--out", out)
    assert code == 0
    for word in ("fanrencli", "state_dict", "conv15.weight", "head.fc7.weight", "left", "nothing"):
        assert word in text, text
    model = make("fcn16s_pad100", pool="floor", skip_bias=False, dtype=jnp.float32, param_dtype=jnp.float32)
    variables = weights.load(out / "weights.safetensors", model, zeros(model))
    assert_same_state(weights.to_torch(model, variables, "fanrencli"), state_of(module))
    report = json.loads((out / "report.json").read_text())
    assert report["filled"]["score_fr.bias"] == "score_fr.bias" and report["left"] == {}


def test_port_takes_torchvision_weights_and_gives_them_back(tmp_path, capsys):
    module = sources.randomise(sources.TorchvisionVGG("vgg13", True, W, 10)).float()
    torch.save(module.state_dict(), tmp_path / "vgg13_bn.pth")
    ours, back = tmp_path / "fcn8s.safetensors", tmp_path / "back.safetensors"
    options = ["--model", "fcn8s", "--width", W, "--num-classes", "5"]
    code, text, _ = run_port(capsys, tmp_path / "vgg13_bn.pth", *options, "--out", ours)
    assert code == 0 and "vgg13_bn" in text and "score_fr.weight" in text and "classifier.6.weight" in text
    assert weights.inspect(ours).preprocessing == "imagenet"
    code, _, _ = run_port(capsys, ours, *options, "--layout", "torchvision-vgg", "--out", back)
    assert code == 0
    with safetensors.safe_open(back, framework="numpy") as file:
        assert file.metadata()["layout"] == "torchvision-vgg"
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, value in state_of(module).items():
        assert name.startswith("classifier.6") or np.array_equal(stored[name], value)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nosuch.pth", "--model", "fcn8s", "--out", "x.safetensors"], ["nosuch.pth", "no such file"]),
        (["a.pth", "--model", "fcn8s", "--out", "x.safetensors"], ["create_model('fcn32s_pad100', 3)"]),
        (["a.pth", "--model", "fcn9s", "--out", "x.safetensors"], ["fcn9s", "fcn8s"]),
        (["a.pth", "--model", "fcn32s_pad100", "--out", "x.npz"], ["x.npz", ".safetensors", ".pth"]),
        (
            ["a.pth", "--model", "fcn32s_pad100", "--width", "1", "--out", "x.safetensors"],
            ["conv1_1.weight is 4x3x3x3"],
        ),
        (["a.pth", "--model", "fcn32s_pad100", "--layout", "caffe", "--out", "x.safetensors"], ["caffe", "pochih"]),
    ],
)
def test_port_answers_mistakes_in_one_line(tmp_path, monkeypatch, capsys, arguments, named):
    monkeypatch.chdir(tmp_path)
    torch.save(sources.PytorchFCN(32, N, W).state_dict(), "a.pth")
    width = [] if "--width" in arguments else ["--width", W]
    code, _, text = run_port(capsys, *arguments, *width)
    assert code == 2 and len(text.strip().splitlines()) == 1, text
    for word in named:
        assert word in text
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]
