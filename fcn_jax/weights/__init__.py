"""Load weights from files and state dicts into Flax variables, and save them, also for torch."""

from fcn_jax.weights.layouts import LAYOUTS
from fcn_jax.weights.load import (
    Info,
    Report,
    inspect,
    load,
    load_with_report,
    only_model,
    source_options,
    unknown_layout,
)
from fcn_jax.weights.pretrained import PRETRAINED, Pretrained, fetch, is_published
from fcn_jax.weights.save import check_suffix, left_out, save, to_torch
from fcn_jax.weights.sources import Source, TensorInfo, Tensors, open_source

__all__ = [
    "LAYOUTS",
    "PRETRAINED",
    "Info",
    "Pretrained",
    "Report",
    "Source",
    "TensorInfo",
    "Tensors",
    "check_suffix",
    "fetch",
    "inspect",
    "is_published",
    "left_out",
    "load",
    "load_with_report",
    "only_model",
    "open_source",
    "save",
    "source_options",
    "to_torch",
    "unknown_layout",
]
