"""The networks: pure modules, no file access."""

from fcn_jax.models.catalog import MODELS, create_model, init_variables, model_from_config
from fcn_jax.models.summary import LayerRow, summarize
from fcn_jax.models.vgg import VGGClassifier

__all__ = ["MODELS", "LayerRow", "VGGClassifier", "create_model", "init_variables", "model_from_config", "summarize"]
