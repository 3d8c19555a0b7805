"""Fully convolutional networks for semantic segmentation, in JAX and Flax.

Long, Shelhamer & Darrell, "Fully Convolutional Networks for Semantic Segmentation", CVPR 2015 and PAMI 2017.
"""

from fcn_jax import losses, metrics, optim, weights
from fcn_jax.evaluation.evaluate import Views
from fcn_jax.models import create_model, init_variables
from fcn_jax.models.kernels import cpu_kernels
from fcn_jax.preprocessing import normalize
from fcn_jax.pretrained import NetworkInfo, from_pretrained, predict
from fcn_jax.step import make_train_step, new_state

__all__ = [
    "NetworkInfo",
    "Views",
    "cpu_kernels",
    "create_model",
    "from_pretrained",
    "init_variables",
    "losses",
    "make_train_step",
    "metrics",
    "new_state",
    "normalize",
    "optim",
    "predict",
    "weights",
]
__version__ = "0.1.0"
