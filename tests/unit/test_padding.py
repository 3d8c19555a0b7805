"""Images laid into larger arrays keep the logits that they have alone, in every family and at any size."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trees

import fcn_jax
from fcn_jax.compare.experiments import random_variables
from fcn_jax.config import DataConfig
from fcn_jax.data.datasets import load
from fcn_jax.data.pipeline import make_eval_batches
from fcn_jax.evaluation.evaluate import evaluate, make_predictor
from fcn_jax.evaluation.padding import map_sizes, padded_logits
from fcn_jax.models.catalog import MODELS
from fcn_jax.training.devices import make_mesh

SIZES = ((33, 70), (64, 96), (1, 95), (50, 3))
# Those of stride 8 and less have all the maps that the coarser ones have.
CASES = {name: {} for name, spec in MODELS.items() if spec.stride <= 8} | {
    "fcn8s with batch norm": {"encoder_norm": "batch"},
    "fcn8s_ladder with batch norm": {"encoder_norm": "batch"},
    "fcn16s_resize with batch norm": {"encoder_norm": "batch"},
    "fcn8s with 1x1 fc6": {"fc6_kernel": 1},
}


@pytest.mark.parametrize("case", CASES)
def test_logits_in_a_larger_array_are_those_of_the_image_alone(case):
    name, options = case.split()[0], CASES[case]
    dtypes = {"dtype": jnp.float64, "param_dtype": jnp.float64}
    model = fcn_jax.create_model(name, 3, encoder="vgg11", width=0.03, **dtypes, **options)
    variables = jax.tree.map(jnp.float64, random_variables(model))
    rng = np.random.default_rng(0)
    images = rng.normal(size=(len(SIZES), 96, 128, 3))  # noise beyond the edges, which must not be read
    padded = jax.jit(lambda v, x, e: padded_logits(model, v, x, e))(variables, images, jnp.asarray(SIZES, jnp.int32))
    apply = jax.jit(model.apply)  # four programs in place of one for each operation and size
    for row, (h, w) in enumerate(SIZES):
        alone = np.asarray(apply(variables, images[row : row + 1, :h, :w]))[0]
        found = np.asarray(padded)[row, :h, :w]
        # the same sums, blocked otherwise; positions of `resize` are float32's in one and float64's in the other
        assert np.linalg.norm(found - alone) <= 1e-12 * np.linalg.norm(alone), (h, w)


def test_floor_pooling_with_a_margin_keeps_them_too():
    model = fcn_jax.create_model(
        "fcn8s_pad100", 3, encoder="vgg11", width=0.03, pool="floor", dtype=jnp.float64, param_dtype=jnp.float64
    )
    served = [n for n in range(60, 129) if model.serves(n)]
    side, whole = served[0], next(n for n in served if n % 32 == 0)
    variables = jax.tree.map(jnp.float64, random_variables(model))
    images = np.random.default_rng(0).normal(size=(1, whole, whole, 3))
    padded = padded_logits(model, variables, images, jnp.asarray([[side, side]], jnp.int32))
    alone = model.apply(variables, images[:, :side, :side])
    np.testing.assert_allclose(padded[:, :side, :side], alone, rtol=0, atol=1e-12 * float(jnp.abs(alone).max()))


@pytest.mark.parametrize("name", MODELS)
def test_sides_of_an_array_tell_its_maps_apart(name):
    model = fcn_jax.create_model(name, 3, encoder="vgg11", width=0.03)
    for n in range(32, 1100, 32):
        for sizes, of_arrays in zip(map_sizes(model, n), map_sizes(model, np.array([n])), strict=True):
            assert len(set(sizes)) == len(sizes)
            assert [int(side[0]) for side in of_arrays] == sizes


@pytest.mark.parametrize("name", ["fcn8s", "fcn8s_resize"])
def test_scores_of_a_set_of_many_sizes_are_the_same_laid_out_or_not(name, tmp_path):
    rng = np.random.default_rng(0)
    for index in range(6):
        size = tuple(int(n) for n in rng.integers(20, 90, 2))
        trees.write_image(tmp_path / f"val/images/{index}.png", trees.picture(index, size))
        trees.write_mask(tmp_path / f"val/masks/{index}.png", trees.mask(index, 3, size))
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    config = DataConfig(dir=str(tmp_path), cache_dir=str(tmp_path / "cache"), val="folder/val")
    split = load(config.val, config)
    model = fcn_jax.create_model(name, 3, encoder="vgg11", width=0.03, encoder_norm="batch")
    variables = jax.tree.map(jnp.float32, random_variables(model))
    predict = make_predictor(model, "imagenet", make_mesh(jax.devices()[:2]))
    shapes, found = [], []
    for multiple in (1, 64):
        batches = list(make_eval_batches(split, dataclasses.replace(config, eval_multiple=multiple), 2))
        shapes.append({batch["image"].shape for batch in batches})
        found.append(evaluate(predict, variables, batches, 3, range(6)))
    assert len(shapes[0]) == 6 and len(shapes[1]) <= 4
    assert found[0].confusion.sum() == found[1].confusion.sum()
    # float32: a pixel whose two best classes are level may change sides
    assert np.abs(found[0].confusion - found[1].confusion).sum() <= 1e-3 * found[0].confusion.sum()
    assert {sample.image.shape for sample in found[0].samples} == {sample.image.shape for sample in found[1].samples}
