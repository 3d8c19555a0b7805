"""Small networks with random weights, for tests."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

import fcn_jax
from fcn_jax.compare.experiments import random_variables

FLOAT64 = {"dtype": jnp.float64, "param_dtype": jnp.float64}


def make_network(name: str, num_classes: int = 3, biases: bool = True, **options: Any) -> tuple[Any, Any]:
    """Make a network of width 0.05 on VGG-11, in float64 by default, and its random variables.

    Without ``biases`` they are zero: of random ones, one class would win everywhere.
    """
    model = fcn_jax.create_model(name, num_classes, **{"encoder": "vgg11", "width": 0.05, **FLOAT64, **options})

    def convert(path: Any, leaf: Any) -> jax.Array:
        return jnp.asarray(leaf * (biases or path[-1].key != "bias"), model.param_dtype)

    return model, jax.tree_util.tree_map_with_path(convert, random_variables(model))
