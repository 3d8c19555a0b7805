"""Class maps of single images: tiles, padding to few shapes, and evaluation over a split."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inference_cases import check_tiles, color_blocks
from small_networks import make_network

import fcn_jax
from fcn_jax.errors import InputError
from fcn_jax.evaluation import evaluate as evaluate_module
from fcn_jax.evaluation import predict as predict_module
from fcn_jax.evaluation.boundary import boundary_counts
from fcn_jax.evaluation.evaluate import Views, evaluate, make_predictor
from fcn_jax.evaluation.predict import context, make_image_predictor
from fcn_jax.preprocessing import MEAN_COLOURS, normalize


@pytest.fixture
def traced(monkeypatch):
    """Shapes for which a network was traced and compiled, and shapes of merged maps."""
    shapes = []

    def recording_normalize(images, *arguments):
        shapes.append(images.shape)
        return normalize(images, *arguments)

    right_merge = predict_module.merge_padded_maps

    def recording_merge(model, maps, extents):
        shapes.append(("merge", *maps[0].shape))
        return right_merge(model, maps, extents)

    monkeypatch.setattr(evaluate_module, "normalize", recording_normalize)
    monkeypatch.setattr(predict_module, "normalize", recording_normalize)
    monkeypatch.setattr(predict_module, "merge_padded_maps", recording_merge)
    return shapes


@pytest.mark.parametrize(("name", "width"), [("fcn8s_pad100", 70), ("fcn8s_resize", 20)])
def test_tiled_prediction_equals_that_of_the_whole_image(name, width):
    check_tiles(name, width)


def test_the_softmax_of_a_bfloat16_network_is_float32_also_from_tiles():
    dtypes = {"dtype": jnp.bfloat16, "param_dtype": jnp.float32}
    model, variables = make_network("fcn32s_resize", biases=False, **dtypes)
    predict = make_image_predictor(model, "imagenet", output="probabilities", whole_pixels=0, tile=96)
    found = predict(variables, color_blocks(600, 70))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-5)


@pytest.mark.slow
def test_tiles_without_context_give_other_classes(monkeypatch):
    model, variables = make_network("fcn8s", biases=False)
    image = color_blocks(600, 70)
    whole = make_image_predictor(model, "imagenet")(variables, image)
    monkeypatch.setattr(predict_module, "context", lambda model: 0)
    assert np.any(make_image_predictor(model, "imagenet", whole_pixels=0, tile=96)(variables, image) != whole)


@pytest.mark.parametrize("name", ["fcn8s", "fcn8s_resize"])
def test_images_of_many_sizes_compile_few_programs_with_the_same_classes(name, traced):
    model, variables = make_network(name, biases=False)
    predict = make_image_predictor(model, "imagenet")
    apply = jax.jit(model.apply)
    for seed, size in enumerate([(1, 1), (33, 60), (65, 61), (127, 50)]):
        image = color_blocks(*size, seed)
        alone = np.argmax(apply(variables, normalize(image[None], "imagenet", jnp.float64)), -1)[0]
        np.testing.assert_array_equal(predict(variables, image), alone)
    assert traced == [(1, 64, 64, 3), (1, 128, 64, 3)]


def test_tiles_of_many_images_share_one_compiled_program(traced):
    model, variables = make_network("fcn32s_resize", biases=False)
    predict = make_image_predictor(model, "imagenet", whole_pixels=0, tile=32)
    side = 2 * context(model) + 32
    for height, width in ((side + 1, 40), (side + 40, 64), (side + 33, 10)):
        predict(variables, color_blocks(height, width))
    heights = {-(-height // 64) * 2 for height in (side + 1, side + 40, side + 33)}
    assert traced == [(1, side, 64, 3), *(("merge", 1, height, 2, 3) for height in sorted(heights))]


def test_an_unsupported_size_is_an_error_and_unusual_crops_are_not_padded(traced):
    model, variables = make_network("fcn8s", pool="floor")
    with pytest.raises(InputError, match="multiples of 32 with pool='floor', got 33x64"):
        make_image_predictor(model, "imagenet")(variables, np.zeros((33, 64, 3), np.uint8))
    # FCN-32s with floor pooling turns 26 pixels into 64, enough for a crop at 35. It turns 64 into 96, too few.
    options = {"encoder": "vgg11", "width": 0.05, "pool": "floor", "crop": (5, 9, 35)}
    model = fcn_jax.create_model("fcn32s_pad100", 3, **options)
    variables = fcn_jax.init_variables(model, jax.random.key(0), (26, 26))
    assert make_image_predictor(model, "imagenet")(variables, np.zeros((26, 26, 3), np.uint8)).shape == (26, 26)
    assert traced == [(1, 26, 26, 3)]


def test_scores_are_computed_at_label_size_without_padding_rows():
    calls = []

    def predict(variables, images, size):
        calls.append((images.shape, size))
        return np.ones((len(images), *size), np.uint8)

    labels = np.array([[[1, 0, 255]], [[0, 0, 0]]], np.uint8)
    batch = {"image": np.zeros((2, 8, 8, 3), np.uint8), "label": labels, "name": ("a", "fill")}
    result = evaluate(predict, {}, [{**batch, "valid": np.array([True, False])}], 2, samples_at={0})
    np.testing.assert_array_equal(result.confusion, [[0, 1], [0, 1]])
    assert calls == [((2, 8, 8, 3), (1, 3))] and result.images == 1
    assert [sample.name for sample in result.samples] == ["a"]
    twice = evaluate(predict, {}, [{**batch, "valid": np.array([True, True])}] * 2, 2, boundary_pixels=1)
    each = [boundary_counts(label, np.ones_like(label), 2, 1) for label in labels]
    np.testing.assert_array_equal(twice.boundary, 2 * (each[0] + each[1]))


def test_prediction_of_a_batch_is_the_same_on_one_and_many_devices():
    from fcn_jax.devices import make_mesh

    model, variables = make_network("fcn8s", biases=False)
    images = np.random.default_rng(0).integers(0, 256, (8, 40, 40, 3), np.uint8)
    one = make_predictor(model, "imagenet")(variables, images, (20, 30))
    eight = make_predictor(model, "imagenet", make_mesh(jax.devices()))(variables, images, (20, 30))
    assert one.shape == (8, 20, 30) and one.dtype == np.uint8
    np.testing.assert_array_equal(one, eight)


@pytest.mark.parametrize("name", ["fcn8s", "fcn8s_resize"])
def test_prediction_of_an_image_split_over_devices_equals_one_device(name):
    from fcn_jax.devices import make_mesh

    model, variables = make_network(name, biases=False)
    image = np.random.default_rng(0).integers(0, 256, (150, 40, 3), np.uint8)
    one = make_image_predictor(model, "imagenet", output="probabilities")(variables, image)
    mesh = make_mesh(jax.devices()[:4], 1, 4)
    four = make_image_predictor(model, "imagenet", output="probabilities", mesh=mesh, whole_pixels=1500)(
        variables, image
    )
    assert four.shape == (150, 40, model.num_classes)
    np.testing.assert_allclose(four, one, rtol=1e-10)  # sums in another order


@pytest.mark.parametrize("name", ["fcn8s", "fcn8s_resize"])
def test_averaged_views_of_a_single_image_equal_those_of_evaluation(name):
    model, variables = make_network(name, biases=False)
    image = np.random.default_rng(0).integers(0, 256, (400, 50, 3), np.uint8)
    views = Views((0.75, 1.0), flip=True)
    expected = make_predictor(model, "imagenet", views=views, output="probabilities")(variables, image[None], (400, 50))
    whole = make_image_predictor(model, "imagenet", output="probabilities", views=views)(variables, image)
    np.testing.assert_array_equal(whole, expected[0])
    pair = make_image_predictor(model, "imagenet", output="confidence", views=views)(variables, image)
    np.testing.assert_array_equal(pair[..., 0], expected[0].argmax(-1))
    np.testing.assert_allclose(pair[..., 1], expected[0].max(-1), rtol=1e-6)
    flipped = make_image_predictor(model, "imagenet", output="probabilities", views=Views(flip=True))
    np.testing.assert_allclose(flipped(variables, image), flipped(variables, image[:, ::-1])[:, ::-1], rtol=1e-6)


@pytest.mark.parametrize("width", [40, 20])
def test_tiles_with_flipped_views_equal_the_whole_image(width):
    model, variables = make_network("fcn32s", biases=False)
    image = np.random.default_rng(0).integers(0, 256, (900, width, 3), np.uint8)
    options = {"output": "probabilities", "views": Views((1.0,), flip=True)}
    whole = make_image_predictor(model, "imagenet", **options)(variables, image)
    tiled = make_image_predictor(model, "imagenet", **options, whole_pixels=1000, tile=64)(variables, image)
    np.testing.assert_allclose(tiled, whole, rtol=1e-6)  # tiles split rows only, as do those of mirror images


def test_preprocessing_by_hand():
    red = np.array([[[[255, 0, 0]]]], np.uint8)
    # normalize returns float32.
    np.testing.assert_allclose(
        normalize(red, "imagenet")[0, 0, 0], [(1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225], rtol=1e-6
    )
    np.testing.assert_allclose(normalize(red, "caffe")[0, 0, 0], [-104.00699, -116.66877, 255 - 122.67892], rtol=1e-6)
    assert MEAN_COLOURS == {"imagenet": (124, 116, 104), "caffe": (123, 117, 104)}
    with pytest.raises(ValueError, match="imagenet, caffe"):
        normalize(red, "vgg")
