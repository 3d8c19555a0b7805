"""Weights in and out: files and state dicts to variables, and back to torch."""

from fcn_jax.weights.export import save, to_torch
from fcn_jax.weights.port import load, load_with_report
from fcn_jax.weights.published import LAYOUTS
from fcn_jax.weights.report import Info, Report, inspect
from fcn_jax.weights.source import TensorInfo

__all__ = ["LAYOUTS", "Info", "Report", "TensorInfo", "inspect", "load", "load_with_report", "save", "to_torch"]
