"""Averages over mirror images and scales against a computation by hand, and the names of their files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trees
from scipy.special import softmax
from small_networks import make_network

from fcn_jax.errors import InputError
from fcn_jax.evaluation.evaluate import PLAIN, Views, make_predictor
from fcn_jax.evaluation.report import evaluation_name
from fcn_jax.preprocessing import normalize


@pytest.fixture(scope="module")
def network():
    return make_network("fcn8s_resize", 4, biases=False, head_features=16)


def _images():
    return np.stack([trees.picture(i, (5, 6)) for i in range(2)]).repeat(12, 1).repeat(12, 2)  # 60 x 72


def test_the_class_is_the_argmax_of_the_mean_softmax(network):
    model, variables = network
    images = np.asarray(normalize(_images(), "imagenet", jnp.float64))
    apply = jax.jit(model.apply)

    def of(x):
        return np.asarray(apply(variables, x))

    small = np.asarray(jax.image.resize(images, (2, 45, 54, 3), "bilinear"))
    back = (2, 60, 72, 4)
    parts = [
        of(images),
        of(images[:, :, ::-1])[:, :, ::-1],
        np.asarray(jax.image.resize(of(small), back, "bilinear")),
        np.asarray(jax.image.resize(of(small[:, :, ::-1]), back, "bilinear"))[:, :, ::-1],
    ]
    chosen = {PLAIN: parts[:1], Views(flip=True): parts[:2], Views(scales=(0.75,)): parts[2:3]}
    chosen[Views(scales=(1.0, 0.75), flip=True)] = parts
    found = {views: make_predictor(model, "imagenet", views=views)(variables, _images(), (60, 72)) for views in chosen}
    for views, logits in chosen.items():
        np.testing.assert_array_equal(found[views], np.mean([softmax(x, -1) for x in logits], axis=0).argmax(-1))
    assert len({x.tobytes() for x in found.values()}) == 4  # otherwise nothing was averaged


def test_with_flip_an_image_and_its_mirror_image_get_the_same_classes(network):
    model, variables = network
    images = _images()
    for flip in (True, False):
        predict = make_predictor(model, "imagenet", views=Views(flip=flip))
        there = predict(variables, images, (60, 72))
        back = predict(variables, images[:, :, ::-1], (60, 72))[:, :, ::-1]
        assert np.array_equal(there, back) == flip


def test_predictions_have_the_size_of_the_labels(network):
    model, variables = network
    predict = make_predictor(model, "imagenet", views=Views(scales=(0.5, 1.0), flip=True))
    assert predict(variables, _images(), (50, 91)).shape == (2, 50, 91)


@pytest.mark.parametrize("scales", [(), (0.0,), (0.01,), (1.0, -1.0), (9.0,), (float("nan"),)])
def test_scales_out_of_range_are_rejected(scales):
    with pytest.raises(InputError, match="scales"):
        Views(scales=scales)


def test_evaluations_are_named_by_split_and_views():
    every = Views(scales=(0.75, 1.0, 1.25), flip=True)
    assert str(PLAIN) == "plain" and str(Views(flip=True)) == "2 views: flip"
    assert str(Views(scales=(0.5,))) == "1 view: scales 0.5"
    assert str(every) == "6 views: scales 0.75 1 1.25, flip"
    assert evaluation_name("camvid/val", PLAIN, "camvid/val") == "eval"
    assert evaluation_name("camvid/test", PLAIN, "camvid/val") == "eval_camvid-test"
    assert evaluation_name("camvid/val", Views(flip=True), "camvid/val") == "eval_camvid-val_flip"
    assert evaluation_name("camvid/test", every, "camvid/val") == "eval_camvid-test_flip_scales-0.75-1-1.25"
