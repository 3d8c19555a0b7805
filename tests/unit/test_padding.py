"""Padding an image does not change its logits. tests/slow covers all networks and options."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trees
from inference_cases import check_padding
from small_networks import create, make_network

import fcn_jax
from fcn_jax.config import DataConfig
from fcn_jax.data.datasets import load
from fcn_jax.data.pipeline import make_eval_batches
from fcn_jax.devices import make_mesh
from fcn_jax.evaluation.evaluate import evaluate, make_predictor
from fcn_jax.models.catalog import MODELS
from fcn_jax.models.fcn import map_sides, serves


@pytest.mark.parametrize(
    ("name", "options", "sizes"),
    [(name, {"encoder_norm": "batch"}, ((33, 70), (1, 95))) for name in ("fcn8s", "fcn8s_ladder")]
    + [(name, {}, ((33, 70), (50, 3))) for name in ("fcn8s_pad100", "fcn8s_resize", "fcn_resnet50")],
)
def test_padding_does_not_change_the_logits_of_an_image(name, options, sizes):
    check_padding(name, sizes, **options)


def test_padding_does_not_change_the_logits_with_floor_pooling():
    model = fcn_jax.create_model("fcn8s_pad100", 3, encoder="vgg11", pool="floor")
    served = [n for n in range(60, 129) if serves(model, n)]
    side, whole = served[0], next(n for n in served if n % 32 == 0)
    check_padding("fcn8s_pad100", ((side, side),), (whole, whole), pool="floor")


@pytest.mark.parametrize("name", MODELS)
def test_feature_maps_of_a_network_have_distinct_sides(name):
    model = create(name, 3, width=0.03)
    for n in range(32, 1100, 32):
        for sides, of_arrays in zip(map_sides(model, n), map_sides(model, np.array([n])), strict=True):
            assert len(set(sides)) == len(sides)
            assert [int(side[0]) for side in of_arrays] == sides


def test_scores_of_images_of_many_sizes_do_not_depend_on_padding(tmp_path):
    rng = np.random.default_rng(0)
    for index in range(4):
        size = tuple(int(n) for n in rng.integers(20, 90, 2))
        trees.write_image(tmp_path / f"val/images/{index}.png", trees.picture(index, size))
        trees.write_mask(tmp_path / f"val/masks/{index}.png", trees.mask(index, 3, size))
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    config = DataConfig(dir=str(tmp_path), cache_dir=str(tmp_path / "cache"), val="folder/val")
    split = load(config.val, config)
    dtypes = {"dtype": jnp.float32, "param_dtype": jnp.float32}
    model, variables = make_network("fcn8s_resize", width=0.03, encoder_norm="batch", **dtypes)
    predict = make_predictor(model, "imagenet", make_mesh(jax.devices()[:2]))
    shapes, found = [], []
    for multiple in (1, 64):
        batches = list(make_eval_batches(split, dataclasses.replace(config, eval_multiple=multiple), 2))
        shapes.append({batch["image"].shape for batch in batches})
        found.append(evaluate(predict, variables, batches, 3, range(4)))
    assert len(shapes[0]) == 4 and len(shapes[1]) < 4
    assert found[0].confusion.sum() == found[1].confusion.sum()
    # Rounding in float32 may change the class of a pixel whose two best classes are almost equal.
    assert np.abs(found[0].confusion - found[1].confusion).sum() <= 1e-3 * found[0].confusion.sum()
    assert {sample.image.shape for sample in found[0].samples} == {sample.image.shape for sample in found[1].samples}
