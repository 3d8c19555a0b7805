"""Weight layouts: the original torch modules are ported, compared in float64, and written back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_sources as sources
from layout_cases import CASES, check_classifier, check_encoder, check_port, forward, in_float64, state_of
from small_networks import WIDTH as W
from small_networks import build, zeros

from fcn_jax import weights
from fcn_jax.errors import InputError
from fcn_jax.models.vgg import ENCODERS, adaptive_average_pool


@pytest.mark.parametrize(
    "case", ["pytorch-fcn at once", "tramac 8s aux", "pochih 8s", "fcn1", "fanrencli 16s", "boostcamp 8s"]
)
def test_a_published_network_is_recognised_with_equal_logits_and_round_trips(case):
    check_port(case)


@pytest.mark.parametrize(("source", "norm", "size"), [("torchvision", "batch", (75, 106)), ("timm", None, (224, 224))])
def test_a_ported_classifier_gives_the_original_logits(source, norm, size):
    check_classifier(source, "vgg11", norm, size)


@pytest.mark.parametrize("size", [(7, 7), (14, 21), (1, 3), (10, 8), (15, 6)])
def test_adaptive_pooling_equals_torch(size):
    x = np.random.default_rng(0).normal(size=(2, *size, 3))
    theirs = forward(torch.nn.AdaptiveAvgPool2d((7, 7)), x)
    np.testing.assert_allclose(adaptive_average_pool(jnp.asarray(x), (7, 7)), theirs, rtol=0, atol=1e-15)  # rounding


@pytest.mark.parametrize(
    ("case", "name", "options", "named"),
    [
        ("pytorch-fcn 8s", "fcn8s_pad100", {"pool": "floor"}, "pool='floor'"),
        ("pytorch-fcn 8s", "fcn8s_pad100", {"skip_scales": (0.5, 0.25)}, r"skip_scales=\(0.5, 0.25\)"),
        ("pytorch-fcn 8s", "fcn16s_pad100", {}, "stride=16"), ("pytorch-fcn 8s", "fcn8s", {}, "family SameFCN"),
        ("fanrencli 32s", "fcn32s_pad100", {"pool": "floor"}, r"crop=\(5, 9, 19\)"),
        ("fanrencli 16s", "fcn16s_pad100", {"pool": "floor"}, "skip_bias=True"),
        ("boostcamp 8s", "fcn8s", {}, "fc6_kernel=7"), ("tramac 8s aux", "fcn8s_resize", {}, "aux_head=False"),
        ("pochih 8s", "fcn8s_ladder", {"encoder": "vgg19"}, "encoder='vgg19'"),
        ("fcn1", "fcn8s_ladder", {"encoder": "vgg13"}, "stride=8"),
    ],
)  # fmt: skip
def test_a_mismatched_model_is_rejected_with_the_matching_call(case, name, options, named):
    state = state_of(CASES[case][0]())
    with pytest.raises(InputError, match=f"the model, which has {named}.*use create_model") as caught:
        weights.load(state, in_float64(name, **options), {})
    assert f"({case.partition(' ')[0]})" in str(caught.value) and weights.inspect(state).fit.call in str(caught.value)


def test_a_stage_starts_from_a_published_coarser_network():
    model = in_float64("fcn16s_pad100")
    state, new = state_of(sources.PytorchFCN(32, 3, W)), ["score_pool4.*", "upscore2.*", "upscore16.*"]
    _, report = weights.load_with_report(state, model, zeros(model), new, ["upscore.*"])
    assert set(report.left.values()) == {"missing, allowed"} and "head.fc6.weight" in report.filled


@pytest.mark.parametrize(
    ("layout", "name", "options", "message"),
    [
        *(
            (layout, "fcn8s", {}, f"layout '{layout}' has names for a")
            for layout in ("pytorch-fcn", "pochih", "tramac")
        ),
        *(
            (f"{source}-vgg", "fcn_resnet50", {"encoder": "resnet50"}, "not for a DilatedFCN")
            for source in ("torchvision", "timm", "johnson", "caffe")
        ),
        ("fanrencli", "fcn8s_pad100", {}, "pool='ceil'"),
        ("pytorch-fcn", "fcn8s_pad100", {"encoder_norm": "batch"}, "no name for vgg.bn1_1.bias"),
        ("pytorch-fcn", "fcn8s_pad100", {"skip_scales": (0.5, 0.25)}, r"has skip_scales=\(0.5, 0.25\)"),
        ("fcn1", "fcns_ladder", {"encoder": "vgg11"}, "encoder='vgg11'"),
    ],
)
def test_a_network_without_equivalent_cannot_be_written_in_a_layout(layout, name, options, message):
    model = in_float64(name, **options)
    with pytest.raises(InputError, match=message):
        weights.to_torch(model, zeros(model), layout)


def test_duplicate_tensors_must_be_equal_and_one_is_enough():
    state, model = state_of(sources.randomise(sources.Tramac(16, 3, W))), in_float64("fcn16s_resize")
    whole = weights.load(state, model, zeros(model))
    half = {name: value for name, value in state.items() if not name.startswith("pretrained.")}
    loaded, report = weights.load_with_report(half, model, zeros(model))
    assert report.filled["vgg.conv5_1.weight"] == "pool5.0.weight"
    jax.tree.map(np.testing.assert_array_equal, whole, loaded)
    state["pool4.2.weight"][0, 0, 0, 0] += 1
    with pytest.raises(InputError, match=r"pool4.2.weight and pretrained.2.weight should be equal but differ"):
        weights.load(state, model, zeros(model))


@pytest.mark.parametrize("norm", [None, "batch"])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_torchvision_encoder_is_recognised(encoder, norm):
    with torch.device("meta"):
        state = sources.TorchvisionVGG(encoder, norm is not None, W, 10).state_dict()
    info = weights.inspect(state)
    assert (info.layout, info.preprocessing) == ("torchvision-vgg", "imagenet")
    assert info.variant == encoder + ("_bn" if norm else "")


@pytest.mark.parametrize("layout", ["torchvision-vgg", "johnson-vgg", "timm-vgg"])
def test_a_classifier_fills_encoder_fc6_and_fc7_and_round_trips(layout):
    check_encoder(layout, "vgg11", "batch")


@pytest.mark.parametrize(
    ("options", "has_fc"),
    [({}, True), ({"fc6_kernel": 1}, False), ({"fc6_kernel": 3, "fc_features": 32}, False), ({"fc6_kernel": 3}, False)]
    + [({"fc_features": 16}, False), ({"name": "fcn8s_resize"}, False)],
)
def test_weights_in_the_torchvision_layout_load_into_torchvision(options, has_fc):
    model, variables = build(**options)
    arrays = weights.to_torch(model, variables, "torchvision-vgg")
    state = {name: torch.from_numpy(value) for name, value in arrays.items()}
    taken = sources.TorchvisionVGG("vgg11", False, W, 10).load_state_dict(state, strict=False)
    assert not taken.unexpected_keys
    assert set(taken.missing_keys) >= {"classifier.6.weight"} and ("classifier.3.weight" in arrays) == has_fc
    left_out = weights.left_out(model, variables, "torchvision-vgg")
    assert {"head.fc6.weight", "head.fc7.bias"}.isdisjoint(left_out) == (has_fc or "name" in options)
    assert any(name.startswith(("score_fr.", "head.score.")) for name in left_out)


def test_the_report_lists_removed_wrappers_and_array_conversions(tmp_path):
    module = sources.randomise(sources.PytorchFCN(32, 3, W))
    state = {f"module.{name}": value for name, value in module.state_dict().items()}
    # As pytorch-fcn's trainer writes it: the best score is a NumPy scalar.
    checkpoint = {"epoch": 3, "arch": "FCN32s", "model_state_dict": state, "best_mean_iu": np.float64(0.6)}
    path, model = tmp_path / "model_best.pth.tar", build("fcn32s_pad100", encoder="vgg16")[0]
    for zipped in (True, False):
        torch.save(checkpoint, path, _use_new_zipfile_serialization=zipped)
        _, report = weights.load_with_report(path, model, zeros(model))
        assert report.unwrapped == weights.inspect(path).unwrapped == ("model_state_dict", "module.")
    assert report.converted["upscore32.weight"] == "in out h w to h w in out, 64x64x3x3, float64 to float32"
    assert report.converted["head.fc7.bias"] == "as it is, float64 to float32"
