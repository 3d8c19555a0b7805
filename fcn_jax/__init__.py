"""Fully convolutional networks for semantic segmentation, in JAX and Flax.

Long, Shelhamer & Darrell, "Fully Convolutional Networks for Semantic Segmentation", CVPR 2015 and PAMI 2017.
"""

from fcn_jax.models import create_model, init_variables

__all__ = ["create_model", "init_variables"]
__version__ = "0.1.0"
