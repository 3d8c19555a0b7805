"""Averages over an image's mirror image and scales are what they say, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trees

import fcn_jax
from fcn_jax.errors import InputError
from fcn_jax.evaluation.evaluate import PLAIN, Views, make_predictor
from fcn_jax.preprocessing import normalize


@pytest.fixture(scope="module")
def network():
    model = fcn_jax.create_model(
        "fcn8s_resize", 4, encoder="vgg11", width=0.05, head_features=32, dtype=jnp.float64, param_dtype=jnp.float64
    )
    variables = fcn_jax.init_variables(model, jax.random.key(0))
    leaves, tree = jax.tree.flatten(variables["params"])
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [x + 0.3 * jax.random.normal(k, x.shape, x.dtype) * (x.ndim > 1) for k, x in zip(keys, leaves, strict=True)]
    return model, {**variables, "params": jax.tree.unflatten(tree, noisy)}


def _images():
    return np.stack([trees.picture(i, (5, 6)) for i in range(2)]).repeat(12, 1).repeat(12, 2)  # 60 x 72


def _softmax(logits):
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def test_the_class_is_that_of_the_mean_softmax(network):
    model, variables = network
    images = np.asarray(normalize(_images(), "imagenet", jnp.float64))

    def of(x):
        return np.asarray(model.apply(variables, x, train=False))

    small = np.asarray(jax.image.resize(images, (2, 45, 54, 3), "bilinear"))
    back = (2, 60, 72, 4)
    parts = [
        of(images),
        of(images[:, :, ::-1])[:, :, ::-1],
        np.asarray(jax.image.resize(of(small), back, "bilinear")),
        np.asarray(jax.image.resize(of(small[:, :, ::-1]), back, "bilinear"))[:, :, ::-1],
    ]
    chosen = {
        PLAIN: parts[:1],
        Views(flip=True): parts[:2],
        Views(scales=(0.75,)): parts[2:3],
        Views(scales=(1.0, 0.75), flip=True): parts,
    }
    found = {views: make_predictor(model, "imagenet", views=views)(variables, _images(), (60, 72)) for views in chosen}
    for views, logits in chosen.items():
        np.testing.assert_array_equal(found[views], np.mean([_softmax(x) for x in logits], axis=0).argmax(-1))
    assert len({x.tobytes() for x in found.values()}) == 4  # otherwise nothing was averaged


def test_with_flip_an_image_and_its_mirror_image_are_segmented_alike(network):
    model, variables = network
    images = _images()
    for flip in (True, False):
        predict = make_predictor(model, "imagenet", views=Views(flip=flip))
        there = predict(variables, images, (60, 72))
        back = predict(variables, images[:, :, ::-1], (60, 72))[:, :, ::-1]
        assert np.array_equal(there, back) == flip


def test_an_image_whose_labels_have_another_size(network):
    model, variables = network
    predict = make_predictor(model, "imagenet", views=Views(scales=(0.5, 1.0), flip=True))
    assert predict(variables, _images(), (50, 91)).shape == (2, 50, 91)


@pytest.mark.parametrize("scales", [(), (0.0,), (0.01,), (1.0, -1.0), (9.0,), (float("nan"),)])
def test_scales_out_of_range(scales):
    with pytest.raises(InputError, match="scales"):
        Views(scales=scales)


def test_names():
    assert str(PLAIN) == "plain" and str(Views(flip=True)) == "2 views: flip"
    assert str(Views(scales=(0.5,))) == "1 view: scales 0.5"
    assert str(Views(scales=(0.75, 1.0), flip=True)) == "4 views: scales 0.75 1, flip"
