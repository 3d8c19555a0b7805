"""Variables to torch's names and axes, and to a file."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
from flax import traverse_util

from fcn_jax.errors import InputError, unknown
from fcn_jax.models.fcn import FCN
from fcn_jax.weights.layouts import LAYOUTS, Preprocessing, pair_up
from fcn_jax.weights.names import COUNTER, list_parameters, to_torch_axes

__all__ = ["save", "to_torch"]


def to_torch(model: FCN, variables: Mapping[str, Any], layout: str | None = None) -> dict[str, np.ndarray]:
    """Return the variables under torch's names and axes, in the layout's order.

    Args:
        model: the network that the variables belong to.
        variables: {"params": ...[, "batch_stats": ...]}.
        layout: a key of ``LAYOUTS``; by default our own, the names of ``numerics.torch_twin``. An encoder's layout
            holds only what it has names for.

    Returns:
        Name -> array, with the counter ``num_batches_tracked`` (0) of every batch norm.

    Raises:
        InputError: unknown layout.
    """
    name = "fcn_jax" if layout is None else layout
    if name not in LAYOUTS:
        raise unknown("layout", name, LAYOUTS)
    flat = traverse_util.flatten_dict(dict(variables))
    arrays: dict[str, np.ndarray] = {}
    for parameter, row in pair_up(LAYOUTS[name], model, list_parameters(variables)):
        value = np.asarray(flat[parameter.path])
        arrays[f"{row.theirs}.{parameter.leaf}"] = to_torch_axes(parameter, value, row.linear)
        if parameter.leaf == "running_var":
            arrays[f"{row.theirs}.{COUNTER}"] = np.zeros((), np.int64)
    return arrays


def save(
    path: str | os.PathLike[str], model: FCN, variables: Mapping[str, Any], preprocessing: Preprocessing | None
) -> None:
    """Write the variables to a .safetensors file in our own layout; readable by torch users as it is.

    Args:
        path: the file; it appears whole or not at all.
        model: the network that the variables belong to; its options go into the metadata.
        variables: {"params": ...[, "batch_stats": ...]}.
        preprocessing: what images the weights were trained on.

    Raises:
        InputError: another suffix, or unknown preprocessing.
    """
    import safetensors.numpy

    path = Path(path)
    if path.suffix != ".safetensors":
        raise InputError(f"{path}: expected a name that ends in .safetensors")
    known = get_args(Preprocessing)
    if preprocessing is not None and preprocessing not in known:
        raise unknown("preprocessing", preprocessing, known)
    metadata = {"format": "pt", "layout": "fcn_jax", "model": json.dumps(_describe(model), sort_keys=True)}
    if preprocessing is not None:
        metadata["preprocessing"] = preprocessing
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        safetensors.numpy.save_file(to_torch(model, variables), part, metadata)
        os.replace(part, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)


def _describe(model: FCN) -> dict[str, Any]:
    """Return the network's family and the options that are plain values."""
    options = {
        field.name: getattr(model, field.name)
        for field in dataclasses.fields(model)
        if field.name not in ("parent", "name", "dtype", "param_dtype", "precision", "axis_name", "remat")
    }
    return {"family": type(model).__name__, **options}
