"""Fully convolutional networks for semantic segmentation, in JAX and Flax.

Long, Shelhamer & Darrell, "Fully Convolutional Networks for Semantic Segmentation", CVPR 2015 and PAMI 2017.
"""

from fcn_jax import metrics, weights
from fcn_jax.models import create_model, init_variables

__all__ = ["create_model", "init_variables", "metrics", "weights"]
__version__ = "0.1.0"
