"""Loading and saving weights: round trips, encoder-only files, tensors that do not match the model."""

import os

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
import torch_sources as sources
from small_networks import WIDTH, assert_same, build, zeros

from fcn_jax import weights
from fcn_jax.compare import make_twin
from fcn_jax.errors import InputError
from fcn_jax.models.vgg import VGGClassifier


def torchvision_state(norm=None):
    return sources.randomise(sources.TorchvisionVGG("vgg11", norm is not None, WIDTH, 10)).float().state_dict()


def only(state, prefix):
    return {name: value for name, value in state.items() if name.startswith(prefix)}


@pytest.mark.parametrize(
    ("name", "options"),
    [("fcn8s", {"encoder_norm": "batch"}), ("fcn16s_pad100", {}), ("fcns_ladder", {})]
    + [("fcn8s_resize", {"aux_head": True})],
)
def test_to_torch_and_back_is_exact_and_loads_into_the_twin(name, options):
    model, variables = build(name, **options)
    arrays = weights.to_torch(model, variables)
    twin = make_twin(model)
    twin.load_state_dict({k: torch.from_numpy(v) for k, v in arrays.items()}, strict=True)
    assert_same(weights.load(arrays, model, zeros(model)), variables)
    assert_same(weights.load(twin.state_dict(), model, zeros(model)), variables)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_save_and_load_are_bit_identical(tmp_path, dtype):
    model, variables = build("fcn8s_ladder", encoder_norm="batch", param_dtype=jnp.dtype(dtype))
    path, torch_path = tmp_path / "weights.safetensors", tmp_path / "weights.pth"
    weights.save(path, model, variables, "caffe")
    weights.save(torch_path, model, variables, None)
    assert sorted(os.listdir(tmp_path)) == ["weights.pth", "weights.safetensors"]
    for source in (path, str(path), torch_path):
        assert_same(weights.load(source, model, zeros(model)), variables)
    info = weights.inspect(path)
    assert (info.layout, info.variant, info.preprocessing) == ("fcn_jax", "vgg11_bn", "caffe")
    assert info.tensors["vgg.conv1_1.weight"] == weights.TensorInfo((4, 3, 3, 3), dtype)
    for state in (safetensors.torch.load_file(path), torch.load(torch_path)):
        assert str(state["vgg.conv1_1.weight"].dtype) == f"torch.{dtype}"
        make_twin(model.clone(param_dtype=jnp.float32)).load_state_dict(state, strict=True)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_loading_changes_neither_the_given_variables_nor_their_dtypes(dtype):
    model, variables = build()
    before = zeros(model)
    source = {k: v.astype(dtype) for k, v in weights.to_torch(model, variables).items()}
    loaded = weights.load(source, model, before)
    assert_same(before, zeros(model))
    assert_same(loaded, variables)
    for value in source.values():
        value[...] = 7  # the result shares no memory with the source
    assert_same(loaded, variables)


def test_an_open_source_is_read_without_reopening_its_file(tmp_path):
    model, variables = build()
    weights.save(tmp_path / "w.safetensors", model, variables, "caffe")
    source = weights.open_source(tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").unlink()
    assert weights.open_source(source) is source and weights.inspect(source).preprocessing == "caffe"
    assert_same(weights.load(source, model, zeros(model)), variables)


@pytest.mark.parametrize("options", [{"fc_features": 16}, {"fc6_kernel": 1}])
def test_fc_layers_of_another_shape_are_skipped_and_reported(options):
    model, variables = build("fcn8s", **options)
    loaded, report = weights.load_with_report(torchvision_state(), model, variables)
    assert_same(loaded["params"]["head"]["fc6"], variables["params"]["head"]["fc6"])
    assert {"head.fc6.weight"} <= set(report.left) and {"classifier.0.weight"} <= set(report.ignored)
    assert "vgg.conv5_2.weight" in report.filled


def test_a_bias_is_skipped_together_with_a_weight_of_another_shape():
    model, variables = build()
    arrays = weights.to_torch(model, variables, "torchvision-vgg")
    arrays["classifier.0.weight"] = arrays["classifier.0.weight"][:, : 32 * 9]  # of a 3x3 fc6
    loaded, report = weights.load_with_report(arrays, model, zeros(model))
    assert not loaded["params"]["head"]["fc6"]["bias"].any()
    assert report.left["head.fc6.bias"] == report.ignored["classifier.0.bias"] == "its weight does not fit"
    assert "head.fc6.bias" not in report.filled and "head.fc7.bias" in report.filled


@pytest.mark.parametrize("layout", ["torchvision-vgg", "fcn_jax"])
@pytest.mark.parametrize("norm", [None, "batch"])
def test_an_encoder_only_file_fills_the_encoder_and_reports_the_rest(layout, norm):
    model, variables = build("fcn8s", encoder_norm=norm)
    state = torchvision_state(norm)
    whole = weights.load(state, model, variables)
    if layout == "fcn_jax":
        state = weights.to_torch(model, whole)
    loaded, report = weights.load_with_report(only(state, ("features", "vgg.")), model, variables)
    assert report.layout == layout
    assert_same(loaded["params"]["vgg"], whole["params"]["vgg"])
    assert_same(loaded["params"]["head"], variables["params"]["head"])
    assert {report.left[name] for name in ("head.fc6.weight", "head.fc7.bias", "score_fr.weight")} == {
        "the source holds only an encoder"
    }


def test_a_file_with_only_a_part_of_the_head_is_an_error():
    state = torchvision_state()
    model, variables = build("fcn8s")
    without_fc6 = {name: value for name, value in state.items() if not name.startswith("classifier.0")}
    with pytest.raises(InputError, match=r"missing: head.fc6.weight \(classifier.0.weight\)"):
        weights.load(without_fc6, model, variables)
    _, report = weights.load_with_report(without_fc6, model, variables, allow_missing=["head.*"])
    assert report.left["head.fc6.bias"] == "missing, allowed"
    encoder = {name: value for name, value in only(state, "features").items() if "features.18." not in name}
    with pytest.raises(InputError, match="missing: vgg.conv5_2.weight"):
        weights.load(encoder, model, variables)


def test_a_classifier_cannot_be_loaded_from_an_encoder_only_file():
    model = VGGClassifier(encoder="vgg11", width=WIDTH, fc_features=round(4096 * WIDTH))
    with pytest.raises(InputError, match="head.fc6.weight"):
        weights.load(only(torchvision_state(), "features"), model, zeros(model))


@pytest.mark.parametrize("options", [{"encoder": "vgg16"}, {"encoder_norm": "batch"}])
def test_weights_of_another_encoder_are_rejected_with_matching_options(options):
    with pytest.raises(InputError, match="holds vgg11, .*encoder='vgg11', encoder_norm=None"):
        weights.load(torchvision_state(), build(**options)[0], {})


def test_weights_of_another_width_are_rejected_with_both_shapes():
    model, variables = build(width=0.125)
    with pytest.raises(InputError, match=r"features.0.weight is 4x3x3x3, vgg.conv1_1.weight needs 8x3x3x3"):
        weights.load(torchvision_state(), model, variables)


def test_missing_and_unexpected_tensors_are_named_unless_allowed():
    model, variables = build()
    source = weights.to_torch(model, variables)
    bias = source.pop("score_fr.bias")
    with pytest.raises(InputError, match=r"1 tensor\(s\) are missing: score_fr.bias; .*allow_missing"):
        weights.load(source, model, variables)
    loaded, report = weights.load_with_report(source, model, zeros(model), allow_missing=["score_*.bias"])
    assert not loaded["params"]["score_fr"]["bias"].any()
    assert report.left == {"score_fr.bias": "missing, allowed"}

    source |= {"score_fr.bias": bias, "extra.weight": bias}
    with pytest.raises(InputError, match=r"1 tensor\(s\) are unexpected: extra.weight; .*allow_unexpected"):
        weights.load(source, model, variables)
    loaded, report = weights.load_with_report(source, model, zeros(model), allow_unexpected="extra.*")
    assert_same(loaded, variables)
    assert report.ignored == {"extra.weight": "unexpected, allowed"}


def test_a_wrong_shape_is_skipped_only_if_allowed_on_both_sides():
    model, variables = build(num_classes=5)
    other, theirs = build(num_classes=3)
    source = weights.to_torch(other, theirs)
    with pytest.raises(InputError, match="score_fr.weight is 3x256x1x1, score_fr.weight needs 5x256x1x1"):
        weights.load(source, model, variables)
    heads = ["score*", "upscore*"]
    with pytest.raises(InputError, match="do not fit"):
        weights.load(source, model, variables, allow_missing=heads)
    loaded = weights.load(source, model, variables, heads, heads)
    assert_same(loaded["params"]["score_fr"], variables["params"]["score_fr"])
    assert_same(loaded["params"]["head"], theirs["params"]["head"])


def test_a_renamed_tensor_is_distinguished_from_a_missing_one():
    model, variables = build()
    source = weights.to_torch(model, variables)
    source["vgg.convolution5_1.weight"] = source.pop("vgg.conv5_1.weight")
    with pytest.raises(InputError, match=r"missing: vgg.conv5_1.weight; .*rename vgg.convolution5_1.weight to vgg.co"):
        weights.load(source, model, variables)
    # A tensor of another shape is not a renamed one.
    source["vgg.convolution5_1.weight"] = np.zeros(3)
    with pytest.raises(InputError, match=r"missing: vgg.conv5_1.weight; if that is intended"):
        weights.load(source, model, variables)


def test_a_transposed_tensor_is_recognised_as_such():
    model, variables = build("fcn32s_pad100")
    source = weights.to_torch(model, variables)
    source["score_fr.weight"] = source["score_fr.weight"].swapaxes(0, 1)
    with pytest.raises(InputError, match=r"score_fr.weight is 256x3x1x1, .* needs 3x256x1x1 \(transposed\?\)"):
        weights.load(source, model, variables)
    # In a classifier's file, fc6 of another size is skipped. A transposed fc6 is an error.
    state = torchvision_state()
    state["classifier.0.weight"] = state["classifier.0.weight"].T
    with pytest.raises(InputError, match=r"classifier.0.weight is 1568x256, .* needs 256x32x7x7 \(transposed\?\)"):
        weights.load(state, model, variables)


@pytest.mark.parametrize(
    ("tensor", "dtype", "value", "message"),
    [
        *(("head.fc7.weight", "float64", value, "holds NaN or infinity") for value in (np.nan, np.inf)),
        ("head.fc7.weight", "float64", 1e300, "holds float64 numbers beyond the range of float32"),
        ("vgg.conv1_1.weight", "int8", 1, "holds int8"),
        ("vgg.conv1_1.weight", "complex64", 1j, "holds complex64"),
        ("vgg.bn2_1.running_var", "float32", -1e-3, "holds negative variances"),
    ],
)
def test_invalid_values_and_dtypes_are_rejected_by_tensor_name(tensor, dtype, value, message):
    model, variables = build(encoder_norm="batch")
    source = weights.to_torch(model, variables)
    source[tensor] = source[tensor].astype(dtype)
    source[tensor].flat[1] = value
    with pytest.raises(InputError, match=f"{tensor} {message}"):
        weights.load(source, model, variables)


def test_an_unknown_layout_error_names_its_tensors():
    model, variables = build()
    source = {"backbone.stem.weight": np.zeros((3, 3))}
    message = "no known layout has names like backbone.stem.weight; known: fcn_jax, torchvision-fcn"
    with pytest.raises(InputError, match=message):
        weights.load(source, model, variables)
    assert weights.inspect(source).layout is None
    with pytest.raises(InputError, match="unknown layout 'caffe'"):
        weights.to_torch(model, variables, "caffe")


def test_saving_rejects_unknown_suffixes_and_preprocessing(tmp_path):
    model, variables = build()
    with pytest.raises(InputError, match="ends in .safetensors, .pth or .pt"):
        weights.save(tmp_path / "w.npz", model, variables, "caffe")
    with pytest.raises(InputError, match="unknown preprocessing 'rgb'; choose one of: imagenet, caffe"):
        weights.save(tmp_path / "w.safetensors", model, variables, "rgb")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["nodir/x.safetensors", "file/x.safetensors", f"{300 * 'x'}.safetensors"])
def test_an_unwritable_weight_file_is_an_error(tmp_path, name):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="cannot be written"):
        weights.save(tmp_path / name, *build("fcn32s_ladder"), None)
