"""Weights in and out: files and state dicts to variables, and back to torch."""

from fcn_jax.weights.export import check_suffix, nameless, save, to_torch
from fcn_jax.weights.fetch import PRETRAINED, fetch
from fcn_jax.weights.port import load, load_with_report
from fcn_jax.weights.published import LAYOUTS
from fcn_jax.weights.report import Info, Report, inspect, source_options
from fcn_jax.weights.source import Source, TensorInfo

__all__ = [
    "LAYOUTS",
    "PRETRAINED",
    "Info",
    "Report",
    "Source",
    "TensorInfo",
    "check_suffix",
    "fetch",
    "inspect",
    "load",
    "load_with_report",
    "nameless",
    "save",
    "source_options",
    "to_torch",
]
