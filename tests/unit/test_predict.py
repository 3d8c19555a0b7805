import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fcn_jax
from fcn_jax.evaluation.evaluate import evaluate, make_predictor
from fcn_jax.evaluation.predict import context, make_image_predictor
from fcn_jax.preprocessing import MEAN_COLOURS, normalize

NAMES = ["fcn8s", "fcn32s", "fcn8s_pad100", "fcn16s_ladder", "fcns_ladder", "fcn8s_resize", "fcn32s_resize"]


def _network(name):
    options = {"fc_features": 4} if "_" not in name or "pad100" in name else {}
    if "resize" in name:
        options = {"head_features": 64}  # of few features, all positive, one class would win everywhere
    model = fcn_jax.create_model(
        name, 3, encoder="vgg11", width=0.05, dtype=jnp.float64, param_dtype=jnp.float64, **options
    )
    variables = fcn_jax.init_variables(model, jax.random.key(0))
    leaves, tree = jax.tree.flatten(variables["params"])
    keys = jax.random.split(jax.random.key(1), len(leaves))
    # kernels alone: a bias at the end would decide the class everywhere
    noisy = [x + 0.3 * jax.random.normal(k, x.shape, x.dtype) * (x.ndim > 1) for k, x in zip(keys, leaves, strict=True)]
    return model, {**variables, "params": jax.tree.unflatten(tree, noisy)}


def _image(height, width):
    """Blocks of colour, so that the classes differ from place to place."""
    blocks = np.random.default_rng(0).integers(0, 256, (height // 40 + 1, width // 40 + 1, 3), np.uint8)
    return blocks.repeat(40, 0).repeat(40, 1)[:height, :width]


@pytest.mark.parametrize(("name", "width"), [*((name, 70) for name in NAMES), ("fcn16s", 680)])
def test_tiles_give_the_classes_of_the_whole_image(name, width):
    model, variables = _network(name)
    image = _image(2 * context(model) + 210, width)
    whole = make_image_predictor(model, "imagenet", whole_pixels=10**9)(variables, image)
    tiled = make_image_predictor(model, "imagenet", whole_pixels=0, tile=96)(variables, image)
    assert len(np.unique(whole)) > 1
    # float64: classes could differ only where two logits agree to 1e-12
    np.testing.assert_array_equal(tiled, whole)


def test_the_context_is_needed(monkeypatch):
    model, variables = _network("fcn8s")
    image = _image(600, 70)
    whole = make_image_predictor(model, "imagenet")(variables, image)
    monkeypatch.setattr("fcn_jax.evaluation.predict.context", lambda model: 0)
    assert np.any(make_image_predictor(model, "imagenet", whole_pixels=0, tile=96)(variables, image) != whole)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (31, 33)])
@pytest.mark.parametrize("name", ["fcn8s", "fcn8s_pad100", "fcns_ladder", "fcn8s_resize"])
def test_small_images_are_served(name, size):
    model, variables = _network(name)
    assert make_image_predictor(model, "caffe")(variables, np.zeros((*size, 3), np.uint8)).shape == size


def test_scores_are_counted_at_the_labels_size_and_padding_rows_do_not_count():
    calls = []

    def predict(variables, images, size):
        calls.append((images.shape, size))
        return np.ones((len(images), *size), np.uint8)

    batches = [
        {
            "image": np.zeros((2, 8, 8, 3), np.uint8),
            "label": np.array([[[1, 0, 255]], [[0, 0, 0]]], np.uint8),
            "name": ("a", "fill"),
            "valid": np.array([True, False]),
        }
    ]
    result = evaluate(predict, {}, batches, 2, samples_at={0})
    np.testing.assert_array_equal(result.confusion, [[0, 1], [0, 1]])
    assert calls == [((2, 8, 8, 3), (1, 3))] and result.images == 1
    assert [sample.name for sample in result.samples] == ["a"]


def test_a_batch_over_devices_predicts_what_one_device_does():
    from fcn_jax.training.devices import make_mesh

    model, variables = _network("fcn8s")
    images = np.random.default_rng(0).integers(0, 256, (8, 40, 40, 3), np.uint8)
    one = make_predictor(model, "imagenet")(variables, images, (20, 30))
    eight = make_predictor(model, "imagenet", make_mesh(jax.devices()))(variables, images, (20, 30))
    assert one.shape == (8, 20, 30) and one.dtype == np.uint8
    np.testing.assert_array_equal(one, eight)


def test_preprocessing_by_hand():
    red = np.array([[[[255, 0, 0]]]], np.uint8)
    np.testing.assert_allclose(
        normalize(red, "imagenet")[0, 0, 0], [(1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225], rtol=1e-6
    )
    np.testing.assert_allclose(normalize(red, "caffe")[0, 0, 0], [-104.00699, -116.66877, 255 - 122.67892], rtol=1e-6)
    assert MEAN_COLOURS == {"imagenet": (124, 116, 104), "caffe": (123, 117, 104)}
    with pytest.raises(ValueError, match="imagenet, caffe"):
        normalize(red, "vgg")
