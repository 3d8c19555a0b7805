"""Weights in and out: round trips, torchvision's layout, and tensors that are not those of the network."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import fcn_jax
from fcn_jax import weights
from fcn_jax.compare import make_twin
from fcn_jax.errors import InputError
from fcn_jax.models.classifier import VGGClassifier
from fcn_jax.models.vgg import ENCODERS, STAGE_CHANNELS, VGG

WIDTH = 0.0625


def build(name="fcn8s", num_classes=3, seed=0, **options):
    """Return a small model and variables that are all different from their initial values."""
    options = {"encoder": "vgg11", "width": WIDTH, **options}
    model = fcn_jax.create_model(name, num_classes, **options)
    shapes = jax.eval_shape(lambda: fcn_jax.init_variables(model, jax.random.key(0)))
    rng = np.random.default_rng(seed)
    return model, jax.tree.map(lambda s: jnp.asarray(rng.uniform(0.5, 1.5, size=s.shape) * 0.1, s.dtype), shapes)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def zeros(variables):
    return jax.tree.map(jnp.zeros_like, variables)


def torchvision_state(encoder="vgg11", norm=None, width=WIDTH, seed=0):
    """Make what ``torchvision.models.vgg*`` has, layer by layer as its ``make_layers`` and ``VGG.__init__`` do."""
    generator = torch.Generator().manual_seed(seed)
    layers, c_in = [], 3
    for convs, channels in zip(ENCODERS[encoder], STAGE_CHANNELS, strict=True):
        for _ in range(convs):
            c_out = round(channels * width)
            layers += [torch.nn.Conv2d(c_in, c_out, 3, padding=1)]
            layers += [torch.nn.BatchNorm2d(c_out)] if norm else []
            layers += [torch.nn.ReLU()]
            c_in = c_out
        layers += [torch.nn.MaxPool2d(2)]
    fc = round(4096 * width)
    net = torch.nn.ModuleDict(
        {
            "features": torch.nn.Sequential(*layers),
            "classifier": torch.nn.Sequential(
                torch.nn.Linear(c_in * 49, fc),
                torch.nn.ReLU(),
                torch.nn.Dropout(),
                torch.nn.Linear(fc, fc),
                torch.nn.ReLU(),
                torch.nn.Dropout(),
                torch.nn.Linear(fc, 10),
            ),
        }
    ).eval()
    state = net.state_dict()
    for value in state.values():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=generator) * 0.1)
    return net, state


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fcn8s", {"encoder_norm": "batch"}),
        ("fcn16s_pad100", {}),
        ("fcns_ladder", {}),
        ("fcn8s_resize", {"aux_head": True}),
    ],
)
def test_to_torch_and_back_is_exact_and_the_twin_takes_it(name, options):
    model, variables = build(name, **options)
    arrays = weights.to_torch(model, variables)
    twin = make_twin(model).eval()
    twin.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in arrays.items()}, strict=True)
    x = np.random.default_rng(1).normal(size=(1, 64, 64, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = twin(torch.from_numpy(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
    ours = np.asarray(jax.jit(model.apply)(variables, x))
    assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)  # float32 sums in another order
    assert_same(weights.load(arrays, model, zeros(variables)), variables)
    assert_same(weights.load(twin.state_dict(), model, zeros(variables)), variables)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_save_and_load_are_bit_identical(tmp_path, dtype):
    model, variables = build("fcn8s_ladder", encoder_norm="batch", param_dtype=jnp.dtype(dtype))
    path = tmp_path / "weights.safetensors"
    weights.save(path, model, variables, "caffe")
    assert_same(weights.load(path, model, zeros(variables)), variables)
    assert_same(weights.load(str(path), model, zeros(variables)), variables)
    info = weights.inspect(path)
    assert (info.layout, info.variant, info.preprocessing) == ("fcn_jax", "vgg11_bn", "caffe")
    assert info.tensors["vgg.conv1_1.weight"] == weights.TensorInfo((4, 3, 3, 3), dtype)
    assert os.listdir(tmp_path) == ["weights.safetensors"]


def test_saved_files_open_in_torch(tmp_path):
    import safetensors.torch

    model, variables = build("fcn32s_ladder")
    weights.save(tmp_path / "w.safetensors", model, variables, "imagenet")
    make_twin(model).load_state_dict(safetensors.torch.load_file(tmp_path / "w.safetensors"), strict=True)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_loading_changes_neither_the_given_variables_nor_their_dtypes(dtype):
    model, variables = build()
    before = zeros(variables)
    source = {k: v.astype(dtype) for k, v in weights.to_torch(model, variables).items()}
    loaded = weights.load(source, model, before)
    assert_same(before, zeros(variables))
    assert_same(loaded, variables)
    for value in source.values():
        value[...] = 7  # nor does the result change with the source
    assert_same(loaded, variables)


@pytest.mark.parametrize("wrap", ["state_dict", "model_state_dict", "model"])
def test_wrapped_state_dicts_with_module_prefix_are_unwrapped(tmp_path, wrap):
    model, variables = build("fcn32s")
    state = {f"module.{k}": torch.from_numpy(v.copy()) for k, v in weights.to_torch(model, variables).items()}
    torch.save({"epoch": 3, wrap: state}, tmp_path / "checkpoint.pth")
    assert_same(weights.load(tmp_path / "checkpoint.pth", model, zeros(variables)), variables)
    # The format before torch 1.6, and .pt
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert_same(weights.load(tmp_path / "old.pt", model, zeros(variables)), variables)


@pytest.mark.parametrize("norm", [None, "batch"])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_torchvision_encoders_are_recognised_and_round_trip(encoder, norm):
    _, state = torchvision_state(encoder, norm)
    info = weights.inspect(state)
    assert (info.layout, info.preprocessing) == ("torchvision-vgg", "imagenet")
    assert info.variant == encoder + ("_bn" if norm else "")
    model, variables = build("fcn8s", encoder=encoder, encoder_norm=norm)
    loaded, report = weights.load_with_report(state, model, variables)
    back = weights.to_torch(model, loaded, "torchvision-vgg")
    assert list(back) == [name for name in state if not name.startswith("classifier.6")]
    for name, value in back.items():
        np.testing.assert_array_equal(value, state[name])
    # Everything is accounted for, on both sides.
    assert set(report.filled) | set(report.left) == {k for k in weights.to_torch(model, variables) if "num_b" not in k}
    assert set(report.filled.values()) | set(report.ignored) == set(state)
    assert {"classifier.6.weight", "classifier.6.bias"} <= set(report.ignored)
    assert all(name.startswith(("score_", "upscore")) for name in report.left)
    for name in ("score_fr", "upscore8"):
        assert_same(loaded["params"][name], variables["params"][name])


def test_torchvision_fc6_reads_maps_in_the_order_channel_row_column():
    net, state = torchvision_state()
    model, variables = build("fcn32s_pad100")
    params = weights.load(state, model, variables)["params"]
    pool5 = np.random.default_rng(3).normal(size=(2, 7, 7, 32)).astype(np.float32)
    with torch.no_grad():
        flat = torch.flatten(torch.from_numpy(pool5).permute(0, 3, 1, 2), 1)
        theirs = net["classifier"][:5](flat).numpy()
    from fcn_jax.models.layers import FullyConvolutionalHead

    head = FullyConvolutionalHead(256, 7, "VALID", 0.5, "element", model.compute)
    ours = head.apply({"params": params["head"]}, pool5, False, jnp.arange(2))[:, 0, 0]
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)  # float32, positive sums of 1568 products


def test_torchvision_features_compute_what_torch_computes():
    net, state = torchvision_state("vgg13", "batch")
    model, variables = build("fcn32s_ladder", encoder="vgg13", encoder_norm="batch")
    loaded, report = weights.load_with_report(state, model, variables)
    assert {"classifier.0.weight", "classifier.3.bias", "classifier.6.bias"} <= set(report.ignored)
    x = np.random.default_rng(4).normal(size=(1, 64, 64, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = net["features"](torch.from_numpy(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
    given = {collection: loaded[collection]["vgg"] for collection in ("params", "batch_stats")}
    vgg = VGG(ENCODERS["vgg13"], model.compute, "batch", WIDTH, "floor")
    ours = vgg.apply(given, x, False)[-1]
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)  # ten layers in float32


@pytest.mark.parametrize("options", [{"fc_features": 16}, {"fc6_kernel": 1}])
def test_fc_layers_of_another_shape_are_left_and_the_report_says_so(options):
    _, state = torchvision_state()
    model, variables = build("fcn8s", **options)
    loaded, report = weights.load_with_report(state, model, variables)
    assert_same(loaded["params"]["head"]["fc6"], variables["params"]["head"]["fc6"])
    assert {"head.fc6.weight"} <= set(report.left) and {"classifier.0.weight"} <= set(report.ignored)
    assert "vgg.conv5_2.weight" in report.filled


@pytest.mark.parametrize("layout", ["torchvision-vgg", "fcn_jax"])
@pytest.mark.parametrize("norm", [None, "batch"])
def test_a_file_with_an_encoder_alone_fills_the_encoder_and_says_what_stays(layout, norm):
    _, state = torchvision_state(norm=norm)
    model, variables = build(encoder_norm=norm)
    features = {name: value for name, value in state.items() if name.startswith("features")}
    if layout == "fcn_jax":
        full = weights.to_torch(model, weights.load(state, model, variables))
        features = {name: value for name, value in full.items() if name.startswith("vgg.")}
    loaded, report = weights.load_with_report(features, model, variables)
    assert report.layout == layout
    assert_same(loaded["params"]["vgg"], weights.load(state, model, zeros(variables))["params"]["vgg"])
    assert_same(loaded["params"]["head"], variables["params"]["head"])
    assert {report.left[name] for name in ("head.fc6.weight", "head.fc7.bias", "score_fr.weight")} == {
        "the source holds an encoder alone"
    }


def test_a_file_that_lacks_some_of_what_is_beyond_the_encoder_is_an_error():
    _, state = torchvision_state()
    model, variables = build()
    without_fc6 = {name: value for name, value in state.items() if not name.startswith("classifier.0")}
    with pytest.raises(InputError, match=r"missing: head.fc6.weight \(classifier.0.weight\)"):
        weights.load(without_fc6, model, variables)
    _, report = weights.load_with_report(without_fc6, model, variables, allow_missing=["head.*"])
    assert report.left["head.fc6.bias"] == "missing, allowed"
    without_conv5_2 = {name: value for name, value in state.items() if "features.18." not in name}
    encoder = {name: value for name, value in without_conv5_2.items() if name.startswith("features")}
    with pytest.raises(InputError, match="vgg.conv5_2|no known layout|holds"):
        weights.load(encoder, model, variables)


def test_an_encoder_alone_is_no_whole_classifier():
    _, state = torchvision_state()
    features = {name: value for name, value in state.items() if name.startswith("features")}
    model = VGGClassifier(encoder="vgg11", width=WIDTH, fc_features=round(4096 * WIDTH))
    with pytest.raises(InputError, match="head.fc6.weight"):
        weights.load(features, model, fcn_jax.init_variables(model, jax.random.key(0)))


@pytest.mark.parametrize("options", [{"encoder": "vgg16"}, {"encoder_norm": "batch"}])
def test_another_encoders_weights_are_refused_with_the_options_that_fit(options):
    _, state = torchvision_state()
    model, variables = build(**options)
    with pytest.raises(InputError, match="holds vgg11, .*encoder='vgg11', encoder_norm=None"):
        weights.load(state, model, variables)


def test_another_width_is_refused_with_both_shapes():
    _, state = torchvision_state()
    model, variables = build(width=0.125)
    with pytest.raises(InputError, match=r"features.0.weight is 4x3x3x3, vgg.conv1_1.weight needs 8x3x3x3"):
        weights.load(state, model, variables)


def test_missing_and_unexpected_tensors_are_named_unless_allowed():
    model, variables = build("fcn32s")
    source = weights.to_torch(model, variables)
    bias = source.pop("score_fr.bias")
    with pytest.raises(InputError, match=r"1 tensor\(s\) are missing: score_fr.bias; .*allow_missing"):
        weights.load(source, model, variables)
    loaded, report = weights.load_with_report(source, model, zeros(variables), allow_missing=["score_*.bias"])
    assert not loaded["params"]["score_fr"]["bias"].any()
    assert report.left == {"score_fr.bias": "missing, allowed"}

    source |= {"score_fr.bias": bias, "extra.weight": bias}
    with pytest.raises(InputError, match=r"1 tensor\(s\) are unexpected: extra.weight; .*allow_unexpected"):
        weights.load(source, model, variables)
    loaded, report = weights.load_with_report(source, model, zeros(variables), allow_unexpected="extra.*")
    assert_same(loaded, variables)
    assert report.ignored == {"extra.weight": "unexpected, allowed"}


def test_a_wrong_shape_is_passed_over_only_where_both_sides_allow_it():
    model, variables = build("fcn32s", num_classes=5)
    other, theirs = build("fcn32s", num_classes=3)
    source = weights.to_torch(other, theirs)
    with pytest.raises(InputError, match="score_fr.weight is 3x256x1x1, score_fr.weight needs 5x256x1x1"):
        weights.load(source, model, variables)
    heads = ["score*", "upscore*"]
    with pytest.raises(InputError, match="do not fit"):
        weights.load(source, model, variables, allow_missing=heads)
    loaded = weights.load(source, model, variables, heads, heads)
    assert_same(loaded["params"]["score_fr"], variables["params"]["score_fr"])
    assert_same(loaded["params"]["head"], theirs["params"]["head"])


def test_staged_networks_hand_their_weights_on_by_name():
    coarse, source = build("fcn32s")
    fine, variables = build("fcn16s", seed=1)
    new = ("score_pool4.*", "upscore2.*", "upscore16.*")
    loaded = weights.load(weights.to_torch(coarse, source), fine, variables, new, ["upscore32.*"])
    assert_same(loaded["params"]["score_fr"], source["params"]["score_fr"])
    assert_same(loaded["params"]["upscore16"], variables["params"]["upscore16"])


def test_a_renamed_tensor_is_told_from_a_missing_one():
    model, variables = build("fcn32s")
    source = weights.to_torch(model, variables)
    source["vgg.convolution5_1.weight"] = source.pop("vgg.conv5_1.weight")
    with pytest.raises(InputError, match=r"missing: vgg.conv5_1.weight; .*rename vgg.convolution5_1.weight to vgg.co"):
        weights.load(source, model, variables)
    # Another shape is no renaming.
    source["vgg.convolution5_1.weight"] = np.zeros(3)
    with pytest.raises(InputError, match=r"missing: vgg.conv5_1.weight; where that is meant"):
        weights.load(source, model, variables)


def test_a_transposed_tensor_is_told_from_one_of_another_network():
    model, variables = build("fcn32s_pad100")
    source = weights.to_torch(model, variables)
    source["score_fr.weight"] = source["score_fr.weight"].swapaxes(0, 1)
    with pytest.raises(InputError, match=r"score_fr.weight is 256x3x1x1, .* needs 3x256x1x1 \(transposed\?\)"):
        weights.load(source, model, variables)
    # fc6 of another size is passed over in an encoder's file; transposed it is not.
    _, state = torchvision_state()
    state["classifier.0.weight"] = state["classifier.0.weight"].T
    with pytest.raises(InputError, match=r"classifier.0.weight is 1568x256, .* needs 256x32x7x7 \(transposed\?\)"):
        weights.load(state, model, variables)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused_by_name(bad):
    model, variables = build("fcn32s")
    source = {k: v.astype(np.float64) for k, v in weights.to_torch(model, variables).items()}
    source["head.fc7.weight"][0, 0] = bad
    with pytest.raises(InputError, match="head.fc7.weight holds NaN or infinity"):
        weights.load(source, model, variables)


def test_integers_are_refused_by_name():
    model, variables = build("fcn32s")
    source = weights.to_torch(model, variables)
    source["vgg.conv1_1.weight"] = source["vgg.conv1_1.weight"].astype(np.int8)
    with pytest.raises(InputError, match="vgg.conv1_1.weight holds int8"):
        weights.load(source, model, variables)


def test_an_unknown_layout_is_named_by_its_tensors():
    model, variables = build("fcn32s")
    source = {"backbone.stem.weight": np.zeros((3, 3))}
    with pytest.raises(
        InputError, match="no known layout has names like backbone.stem.weight; known: fcn_jax, timm-vgg, johnson"
    ):
        weights.load(source, model, variables)
    assert weights.inspect(source).layout is None
    with pytest.raises(InputError, match="unknown layout 'caffe'"):
        weights.to_torch(model, variables, "caffe")


def test_saving_refuses_what_cannot_be_read_back(tmp_path):
    model, variables = build("fcn32s")
    with pytest.raises(InputError, match="ends in .safetensors, .pth or .pt"):
        weights.save(tmp_path / "w.npz", model, variables, "caffe")
    with pytest.raises(InputError, match="unknown preprocessing 'rgb'; choose one of: imagenet, caffe"):
        weights.save(tmp_path / "w.safetensors", model, variables, "rgb")
    assert list(tmp_path.iterdir()) == []


def test_importing_and_loading_safetensors_needs_no_torch():
    code = (
        "import sys, fcn_jax.weights, fcn_jax.compare\n"
        "heavy = {'torch', 'grain', 'tensorflow_datasets', 'orbax', 'tyro', 'tensorflow'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
