"""Published networks, and checks that one of them is ported exactly. The slow tests check all of them."""

from __future__ import annotations

import re

import jax
import numpy as np
import torch
import torch_sources as sources
from small_networks import FLOAT64, assert_same, build, create, zeros
from small_networks import WIDTH as W

from fcn_jax import weights
from fcn_jax.models import VGGClassifier

N, FLOOR = 3, {"pool": "floor"}
PREPROCESSING = {"pytorch-fcn": "caffe", "tramac": "imagenet"}
# Layout and network -> (torch module, model, options, (height, width)). The originals run at these sizes.
CASES = {
    "pytorch-fcn 32s": (lambda: sources.PytorchFCN(32, N, W), "fcn32s_pad100", {}, (33, 47)),
    "pytorch-fcn 16s": (lambda: sources.PytorchFCN(16, N, W), "fcn16s_pad100", {}, (40, 38)),
    "pytorch-fcn 8s": (lambda: sources.PytorchFCN(8, N, W), "fcn8s_pad100", {}, (37, 61)),
    "pytorch-fcn at once": (lambda: sources.PytorchFCN(8, N, W, True), "fcn8s_pad100_atonce", {}, (35, 40)),
    "tramac 32s": (lambda: sources.Tramac(32, N, W), "fcn32s_resize", {}, (65, 50)),
    "tramac 16s": (lambda: sources.Tramac(16, N, W), "fcn16s_resize", {}, (65, 50)),
    "tramac 8s": (lambda: sources.Tramac(8, N, W), "fcn8s_resize", {}, (65, 50)),
    "tramac 8s aux": (lambda: sources.Tramac(8, N, W, True), "fcn8s_resize", {"aux_head": True}, (50, 65)),
    "pochih 32s": (lambda: sources.Pochih(32, N, W), "fcn32s_ladder", {}, (64, 32)),
    "pochih 16s": (lambda: sources.Pochih(16, N, W), "fcn16s_ladder", {}, (64, 32)),
    "pochih 8s": (lambda: sources.Pochih(8, N, W), "fcn8s_ladder", {}, (64, 32)),
    "pochih s": (lambda: sources.Pochih("s", N, W, "vgg19"), "fcns_ladder", {"encoder": "vgg19"}, (64, 32)),
    "fcn1": (lambda: sources.FCN1(N, W), "fcns_ladder", {"encoder": "vgg13"}, (32, 64)),
    "fanrencli 32s": (lambda: sources.Fanrencli(32, N, W), "fcn32s_pad100", FLOOR | {"crop": (5, 9, 6)}, (52, 40)),
    "fanrencli 16s": (lambda: sources.Fanrencli(16, N, W), "fcn16s_pad100", FLOOR | {"skip_bias": False}, (52, 58)),
    "fanrencli 8s": (lambda: sources.Fanrencli(8, N, W), "fcn8s_pad100", FLOOR, (52, 58)),
    "boostcamp 32s": (lambda: sources.Boostcamp(32, N, W), "fcn32s", {"fc6_kernel": 1}, (64, 32)),
    "boostcamp 16s": (lambda: sources.Boostcamp(16, N, W), "fcn16s", {"fc6_kernel": 1}, (64, 32)),
    "boostcamp 8s": (lambda: sources.Boostcamp(8, N, W), "fcn8s", {"fc6_kernel": 1}, (64, 32)),
}


def in_float64(name, **options):
    return create(name, N, **{"encoder": "vgg16", **FLOAT64, **options})


def state_of(module):
    return {name: value.numpy().copy() for name, value in module.state_dict().items()}


def error(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def forward(module, x):
    """Run a torch module on images (b, h, w, 3); return (b, h, w, c), or (b, c) from a classifier."""
    with torch.no_grad():
        y = module(torch.from_numpy(x).permute(0, 3, 1, 2))
    return (y.permute(0, 2, 3, 1) if y.ndim == 4 else y).numpy()


def assert_same_state(ours, theirs):
    assert list(ours) == list(theirs)  # in the original's order too
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


def check_port(case):
    """Check layout, suggested call, logits and bit-identical round trip of a published network."""
    build, name, options, size = CASES[case]
    layout = case.partition(" ")[0]
    module = sources.randomise(build())
    state = state_of(module)
    info = weights.inspect(state)
    assert (info.layout, info.preprocessing) == (layout, PREPROCESSING.get(layout))
    assert info.variant == options.get("encoder", "vgg16")
    assert name in info.fit.models and info.fit.num_classes == N
    call = re.search(rf"create_model\('{name}', {N}(.*?)\)(?: or|$)", info.fit.call)
    given = eval(f"dict({call[1].lstrip(', ')})")
    assert in_float64(name, **given) == in_float64(name, **options)
    model = in_float64(name, **options)
    variables, report = weights.load_with_report(state, model, zeros(model))
    assert not report.left
    assert set(report.filled.values()) | set(report.ignored) == set(state)
    x = np.random.default_rng(0).normal(size=(1, *size, 3))
    ours, theirs = np.asarray(jax.jit(model.apply)(variables, x)), forward(module, x)
    assert ours.shape == theirs.shape
    assert error(ours, theirs) < 1e-12  # rounding of float64, through some twenty layers
    back = weights.to_torch(model, variables, layout)
    assert_same_state(back, state)
    build().double().load_state_dict({key: torch.from_numpy(value.copy()) for key, value in back.items()}, strict=True)


def check_encoder(layout, encoder, norm):
    """Check that a classifier fills an FCN's encoder, fc6 and fc7, reports every tensor, and round-trips."""
    kind = sources.TimmVGG if layout == "timm-vgg" else sources.TorchvisionVGG
    state = state_of(sources.randomise(kind(encoder, norm is not None, W, 10)).float())
    if layout == "johnson-vgg":  # dropout comes before its layer and shifts the indices
        turned = {"classifier.0": "classifier.1", "classifier.3": "classifier.4"}
        names = {name: name.rpartition(".") for name in state}
        state = {f"{turned.get(names[k][0], names[k][0])}.{names[k][2]}": value for k, value in state.items()}
    model, variables = build("fcn8s", encoder=encoder, encoder_norm=norm)
    info = weights.inspect(state)
    assert (info.layout, info.preprocessing) == (layout, "caffe" if layout == "johnson-vgg" else "imagenet")
    assert info.variant == encoder + ("_bn" if norm else "")
    loaded, report = weights.load_with_report(state, model, variables)
    fc7 = {"timm-vgg": "pre_logits.fc2", "johnson-vgg": "classifier.4"}.get(layout, "classifier.3")
    assert report.filled["head.fc7.weight"] == f"{fc7}.weight"
    assert set(report.filled) | set(report.left) == {k for k in weights.to_torch(model, variables) if "num_b" not in k}
    assert all(name.startswith(("score_", "upscore")) for name in report.left)
    assert set(report.filled.values()) | set(report.ignored) == set(state)
    for layer in {name.partition(".")[0] for name in report.left}:
        assert_same(loaded["params"][layer], variables["params"][layer])
    back = weights.to_torch(model, loaded, layout)
    fc8 = {f"{'head.fc' if layout == 'timm-vgg' else 'classifier.6'}.{leaf}" for leaf in ("weight", "bias")}
    assert set(state) - set(back) == fc8 and fc8 <= set(report.ignored)
    assert_same(back, {name: state[name] for name in back})


def check_classifier(source, encoder, norm, size, dtypes=("float64",)):
    """Check that a ported classifier gives the original logits and round-trips bit for bit."""
    kind = {"torchvision": sources.TorchvisionVGG, "timm": sources.TimmVGG}[source]
    module = sources.randomise(kind(encoder, norm is not None, W, 10))
    state = state_of(module)
    x = np.random.default_rng(0).normal(size=(1, *size, 3))
    theirs = forward(module, x)
    for dtype in dtypes:
        model = VGGClassifier(10, encoder, norm, W, round(4096 * W), dtype=dtype, param_dtype=dtype)
        variables, report = weights.load_with_report(state, model, zeros(model))
        assert not report.left and report.layout == f"{source}-vgg"
        ours = np.asarray(jax.jit(model.apply)(variables, x.astype(dtype)))
        # Tens of roundings in float64. In float32, torch's fast convolutions add more.
        assert error(ours, theirs) < (1e-11 if dtype == "float64" else 1e-5)
        if dtype == "float64":
            assert_same_state(weights.to_torch(model, variables, f"{source}-vgg"), state)
