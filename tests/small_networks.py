"""Small networks of ours with variables that are all different, without compiling an initialisation."""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

import fcn_jax

WIDTH = 0.0625


@cache
def shapes(model):
    """The shapes of a network's variables."""
    return jax.eval_shape(lambda: fcn_jax.init_variables(model, jax.random.key(0)))


def zeros(model):
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes(model))


def create(name="fcn32s", num_classes=3, **options):
    return fcn_jax.create_model(name, num_classes, **{"encoder": "vgg11", "width": WIDTH, **options})


def build(name="fcn32s", num_classes=3, seed=0, **options):
    """Return a network and its variables."""
    model, rng = create(name, num_classes, **options), np.random.default_rng(seed)
    values = jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.05, 0.15, leaf.shape), leaf.dtype), shapes(model))
    return model, values


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)
