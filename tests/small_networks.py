"""Small networks with distinct random variables, without compiling an initialisation."""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

import fcn_jax
from fcn_jax.compare.experiments import random_variables

WIDTH = 0.0625
FLOAT64 = {"dtype": jnp.float64, "param_dtype": jnp.float64}


@cache
def shapes(model):
    """Return the shapes of a network's variables."""
    return jax.eval_shape(lambda: fcn_jax.init_variables(model, jax.random.key(0)))


def zeros(model):
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes(model))


def create(name="fcn32s", num_classes=3, **options):
    default = {} if "resnet" in name else {"encoder": "vgg11"}
    return fcn_jax.create_model(name, num_classes, **{**default, "width": WIDTH, **options})


def build(name="fcn32s", num_classes=3, seed=0, **options):
    """Return a network and its variables."""
    model, rng = create(name, num_classes, **options), np.random.default_rng(seed)
    values = jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.05, 0.15, leaf.shape), leaf.dtype), shapes(model))
    return model, values


def make_network(name, num_classes=3, biases=True, **options):
    """Return a network, in float64 by default, and variables that preserve the scale of activations.

    With ``biases=False`` biases are zero, as with random ones a single class would win everywhere.
    """
    model = create(name, num_classes, **{"width": 0.05, **FLOAT64, **options})

    def convert(path, leaf):
        return jnp.asarray(leaf * (biases or path[-1].key != "bias"), model.param_dtype)

    return model, jax.tree_util.tree_map_with_path(convert, random_variables(model))


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)
