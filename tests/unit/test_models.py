"""Construction of networks: names, options, supported sizes, initial values, frozen stages, layer table."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_networks import create

import fcn_jax
from fcn_jax.errors import InputError
from fcn_jax.models import MODELS, summarize
from fcn_jax.models.fcn import encoder_stage, serves
from fcn_jax.models.upsample import bilinear_kernel

TINY = {"width": 0.02}
SIZES = [(1, 1), (1, 70), (31, 32), (33, 65), (64, 96), (101, 7)]


def tiny(name, num_classes=3, **options):
    return create(name, num_classes, **{**TINY, **options})


def train(model, variables, images):
    """Return logits and new statistics in training."""
    return model.apply(variables, images, train=True, rngs={"dropout": jax.random.key(1)}, mutable=["batch_stats"])


@pytest.fixture(scope="module")
def images():
    return jnp.asarray(np.random.default_rng(0).normal(size=(2, 40, 33, 3)), jnp.float32)


def test_all_families_and_strides_have_names():
    expected = {f"fcn{s}s{family}" for s in (32, 16, 8) for family in ("", "_pad100", "_ladder", "_resize")}
    assert set(MODELS) == expected | {"fcn8s_pad100_atonce", "fcns_ladder", "fcn_resnet50", "fcn_resnet101"}


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(InputError, match="unknown model 'fcn8'") as caught:
        fcn_jax.create_model("fcn8", 21)
    assert all(name in str(caught.value) for name in MODELS)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fcn8s", {"crop": (5, 9, 31)}, "unknown option of fcn8s 'crop'"),
        ("fcn8s_pad100", {"fc6_kernel": 1}, "unknown option of fcn8s_pad100 'fc6_kernel'"),
        ("fcn8s_ladder", {"dropout_rate": 0.5}, "unknown option of fcn8s_ladder 'dropout_rate'"),
        ("fcn8s_resize", {"fc_features": 64}, "unknown option of fcn8s_resize 'fc_features'"),
        ("fcn8s", {"encoder": "vgg12"}, "vgg11, vgg13, vgg16, vgg19"), ("fcn8s", {"pool": "same"}, "ceil, floor"),
        ("fcn_resnet50", {"encoder": "vgg16"}, "resnet50, resnet101"), ("fcn8s", {"encoder": "resnet50"}, "vgg11"),
        ("fcn_resnet50", {"encoder_norm": None}, "unknown option"), ("fcn8s", {"freeze_stages": 6}, "in 0 ... 5"),
        ("fcn8s", {"encoder_norm": "group"}, "unknown encoder_norm 'group'"),
        ("fcn8s", {"width": 0}, "expected 0 < width <= 64"), ("fcn8s", {"width": "a"}, "width"),
        ("fcn8s", {"width": float("nan")}, "width"), ("fcn8s", {"fc_features": 1.5}, "fc_features"),
        ("fcn8s", {"dropout_rate": 1.0}, "expected 0 <= dropout_rate < 1"),
        ("fcn8s", {"fc_features": 0}, r"expected fc_features in 1 \.\.\. 1048576"),
        ("fcn8s", {"num_classes": 0}, "num_classes in 1 ... 255, got 0"),
        *(("fcn8s", {"num_classes": value}, "num_classes") for value in ("21", 2.5, True, 300)),
        ("fcn8s_pad100", {"skip_scales": 0.1}, "skip_scales"), ("fcn8s_pad100", {"crop": (5, 9)}, "crop"),
        ("fcn8s_pad100", {"crop": (5, 9, -40)}, "crop"),
    ],
)  # fmt: skip
def test_an_invalid_model_option_is_named(name, options, message):
    with pytest.raises(InputError, match=message):
        fcn_jax.create_model(name, **{"num_classes": 21, **options})


@pytest.mark.parametrize("name", MODELS)
def test_logits_have_the_size_of_the_image_at_every_size(name):
    model = tiny(name)
    variables = jax.eval_shape(lambda: fcn_jax.init_variables(model, jax.random.key(0)))
    for size in SIZES:
        logits = jax.eval_shape(model.apply, variables, jax.ShapeDtypeStruct((2, *size, 3), jnp.float32))
        assert logits.shape == (2, *size, 3)


@pytest.mark.parametrize("name", ["fcn32s_ladder", "fcn8s_pad100"])
def test_a_single_pixel_gives_finite_logits(name):
    model = tiny(name)
    variables = fcn_jax.init_variables(model, jax.random.key(0), (1, 1))
    assert np.isfinite(jax.jit(model.apply)(variables, jnp.ones((1, 1, 1, 3)))).all()


@pytest.mark.parametrize("name", ["fcn32s_pad100", "fcn16s_pad100", "fcn8s_pad100", "fcn8s_pad100_atonce"])
def test_pad100_with_ceil_pooling_supports_every_side(name):
    model = tiny(name)
    assert [n for n in range(1, 1300) if not serves(model, n)] == []
    assert not serves(model, 0)


def test_pad100_with_floor_pooling_supports_only_some_sides():
    # FCN-32s with crop 19: the output is too small for 434 of the sides 32 ... 1199, VOC sides among them.
    model = tiny("fcn32s_pad100", pool="floor")
    short = [n for n in range(32, 1200) if not serves(model, n)]
    assert len(short) == 434 and {375, 500} <= set(short)
    # Fanrencli's crop of 6 fits side 500: 698 -> 349, 174, 87, 43, 21, fc6 15, and (15 + 1) 32 = 512 >= 6 + 500.
    assert serves(tiny("fcn32s_pad100", pool="floor", crop=(5, 9, 6)), 500)


def test_an_unsupported_size_error_lists_supported_sizes():
    model = tiny("fcn32s_pad100", pool="floor")
    with pytest.raises(InputError, match=r"height 500 is not supported .* near 500: \[") as caught:
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 500, 501, 3)))
    near = [int(n) for n in str(caught.value).split("near 500: [")[1].split("]")[0].split(",")]
    assert near and all(serves(model, n) for n in near)


def test_same_padding_with_floor_pooling_supports_multiples_of_32():
    model = tiny("fcn8s", pool="floor")
    shape = jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.zeros((1, 64, 96, 3)))[0].shape
    assert shape == (1, 64, 96, 3)
    with pytest.raises(InputError, match="multiples of 32 with pool='floor', got 64x97"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 97, 3)))


def test_score_layers_start_at_zero_and_upsampling_as_bilinear():
    params = fcn_jax.init_variables(tiny("fcn8s"), jax.random.key(0))["params"]
    for name in ("score_fr", "score_pool4", "score_pool3"):
        assert not params[name]["kernel"].any() and not params[name]["bias"].any()
    for name, k in (("upscore2", 4), ("upscore_pool4", 4), ("upscore8", 16)):
        expected = bilinear_kernel(k)[:, :, None, None] * np.eye(3)
        np.testing.assert_array_equal(params[name]["kernel"], expected.astype(np.float32))
    assert params["vgg"]["conv1_1"]["kernel"].any()


def test_the_same_key_gives_the_same_variables_at_any_image_size():
    model = tiny("fcn8s_resize", encoder_norm="batch")
    small, large = (fcn_jax.init_variables(model, jax.random.key(1), size) for size in ((32, 32), (50, 70)))
    jax.tree.map(np.testing.assert_array_equal, small, large)


@pytest.mark.parametrize("stages", [2, 5])
def test_frozen_stages_get_no_gradient_and_keep_their_statistics(images, stages):
    model = tiny("fcn8s_ladder", encoder_norm="batch", freeze_stages=stages)
    variables = fcn_jax.init_variables(model, jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.1, variables["params"])  # zero score layers would block all gradients

    def loss(params):
        out, new = train(model, {**variables, "params": params}, images)
        return jnp.sum(out**2), new["batch_stats"]

    gradient, statistics = jax.jit(jax.grad(loss, has_aux=True))(params)
    for name, leaves in gradient.pop("vgg").items():
        assert any(g.any() for g in leaves.values()) == (encoder_stage(("vgg", name)) > stages)
    assert any(g.any() for g in jax.tree.leaves(gradient))
    before = variables["batch_stats"]["vgg"]
    moved = {
        encoder_stage(("vgg", name))
        for name, new in statistics["vgg"].items()
        if (new["mean"] != before[name]["mean"]).any()
    }
    assert moved == set(range(stages + 1, 6))
    # The decoder's batch norms still use batch statistics.
    assert (statistics["bn1"]["mean"] != variables["batch_stats"]["bn1"]["mean"]).any()


def test_remat_of_the_encoder_changes_neither_names_nor_values(images):
    def run(remat):
        options = {"encoder_norm": "batch", "dtype": jnp.float64, "param_dtype": jnp.float64, "width": 0.05}
        model = tiny("fcn32s_resize", remat=remat, **options)
        variables = fcn_jax.init_variables(model, jax.random.key(0))

        def loss(params):
            out, new = train(model, {**variables, "params": jax.tree.map(lambda x: x + 0.01, params)}, images)
            return jnp.sum(out**2), new

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])

    # The compiler may fuse operations differently, which changes the rounding.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10), run(True), run(False))


def test_bfloat16_computes_with_float32_parameters(images):
    model = tiny("fcn8s_ladder", encoder_norm="batch", dtype=jnp.bfloat16)
    variables = fcn_jax.init_variables(model, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(np.float32)}
    logits, updated = jax.jit(functools.partial(train, model))(variables, images)
    assert logits.dtype == jnp.bfloat16 and np.isfinite(logits.astype(np.float32)).all()
    assert {leaf.dtype for leaf in jax.tree.leaves(updated)} == {np.dtype(np.float32)}


@pytest.mark.parametrize("name", ["fcn8s_resize", "fcn_resnet50"])
def test_auxiliary_logits_are_returned_in_training_only(name):
    model = create(name, aux_head=True)
    x = jnp.zeros((2, 40, 33, 3))
    variables = jax.eval_shape(lambda: fcn_jax.init_variables(model, jax.random.key(0)))
    assert "aux" in variables["params"]
    assert jax.eval_shape(model.apply, variables, x).shape == (2, 40, 33, 3)
    (logits, aux), _ = jax.eval_shape(functools.partial(train, model), variables, x)
    assert logits.shape == aux.shape == (2, 40, 33, 3)


def test_layer_table_by_hand():
    rows = summarize(fcn_jax.create_model("fcn8s_pad100", 21), (500, 375))
    table = {row.path: row for row in rows}
    assert rows[0].path == "vgg/conv1_1"
    # 500 + 2 * 100 - 2 = 698 rows; 3 * 3 * 3 products and the bias for each of the 64 channels.
    first = table["vgg/conv1_1"]
    assert (first.shape, first.parameters) == ((1, 698, 573, 64), 3 * 3 * 3 * 64 + 64)
    assert first.flops == 698 * 573 * 64 * (2 * 27 + 1)
    assert table["head/fc6"].parameters == 7 * 7 * 512 * 4096 + 4096
    # Side 698 -> 349, 175, 88, 44, 22 -> 16; 573 -> 287, 144, 72, 36, 18 -> 12, upsampled to 34 x 26.
    assert table["head/fc6"].shape == (1, 16, 12, 4096)
    assert table["upscore2"].shape == (1, 34, 26, 21)
    assert table["upscore2"].flops == 2 * 16 * 12 * 4 * 4 * 21 * 21
    # VGG-16 convolutions 14 714 688, fc6 102 764 544, fc7 16 781 312, scores 86 037 + 10 773 + 5 397, upsampling
    # 2 * 7 056 + 112 896.
    assert sum(row.parameters for row in rows) == 134_489_759
