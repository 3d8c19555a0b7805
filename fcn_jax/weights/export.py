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
from fcn_jax.weights.layouts import Network, Preprocessing, check_fit, pair_up
from fcn_jax.weights.names import COUNTER, list_parameters, to_torch_axes
from fcn_jax.weights.published import LAYOUTS

__all__ = ["save", "to_torch"]


def to_torch(model: Network, variables: Mapping[str, Any], layout: str | None = None) -> dict[str, np.ndarray]:
    """Return the variables under torch's names and axes, in the layout's order.

    Args:
        model: the network that the variables belong to.
        variables: {"params": ...[, "batch_stats": ...]}.
        layout: a key of ``LAYOUTS``; by default our own, the names of ``numerics.torch_twin``. An encoder's layout
            holds only what it has names for; any other takes only networks that compute what its source does.

    Returns:
        Name -> array, with duplicates where the layout has them and the counter ``num_batches_tracked`` (0: torch
        needs it only where momentum is None) of every batch norm.

    Raises:
        InputError: unknown layout, or one that the network does not fit.
    """
    name = "fcn_jax" if layout is None else layout
    if name not in LAYOUTS:
        raise unknown("layout", name, LAYOUTS)
    chosen, parameters = LAYOUTS[name], list_parameters(variables)
    if chosen.families and not isinstance(model, chosen.families):
        families = " or ".join(family.__name__ for family in chosen.families)
        raise InputError(f"layout {name!r} has names for a {families}, not for a {type(model).__name__}")
    flat = traverse_util.flatten_dict(dict(variables))
    arrays: dict[str, np.ndarray] = {}
    pairs = pair_up(chosen, model, parameters)
    nameless = {parameter.name for parameter in parameters} - {parameter.name for parameter, _ in pairs}
    if nameless and not chosen.encoder_only:
        raise InputError(f"layout {name!r} has no name for {', '.join(sorted(nameless)[:8])}; use our own")
    for parameter, row in pairs:
        value = np.asarray(flat[parameter.path])
        arrays[f"{row.theirs}.{parameter.leaf}"] = to_torch_axes(parameter, value, row.linear)
        if parameter.leaf == "running_var":
            arrays[f"{row.theirs}.{COUNTER}"] = np.zeros((), np.int64)
    if chosen.fit is not None:
        check_fit(f"layout {name!r}", chosen.fit({key: value.shape for key, value in arrays.items()}), model, False)
    return arrays


def save(
    path: str | os.PathLike[str],
    model: Network,
    variables: Mapping[str, Any],
    preprocessing: str | None,
    layout: str = "fcn_jax",
) -> None:
    """Write the variables to a .safetensors file; readable by torch users as it is.

    Args:
        path: the file; it appears whole or not at all.
        model: the network that the variables belong to; its options go into the metadata.
        variables: {"params": ...[, "batch_stats": ...]}.
        preprocessing: what images the weights were trained on, "imagenet" or "caffe"; None: not known.
        layout: a key of ``LAYOUTS``, see ``to_torch``.

    Raises:
        InputError: another suffix, unknown preprocessing, or a layout that does not fit.
    """
    import safetensors.numpy

    path = Path(path)
    if path.suffix != ".safetensors":
        raise InputError(f"{path}: expected a name that ends in .safetensors")
    known = get_args(Preprocessing)
    if preprocessing is not None and preprocessing not in known:
        raise unknown("preprocessing", preprocessing, known)
    metadata = {"format": "pt", "layout": layout, "model": json.dumps(_describe(model), sort_keys=True)}
    if preprocessing is not None:
        metadata["preprocessing"] = preprocessing
    arrays = to_torch(model, variables, layout)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        safetensors.numpy.save_file(arrays, part, metadata)
        os.replace(part, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)


def _describe(model: Network) -> dict[str, Any]:
    """Return the network's family and the options that are plain values."""
    options = {
        field.name: getattr(model, field.name)
        for field in dataclasses.fields(model)
        if field.name not in ("parent", "name", "dtype", "param_dtype", "precision", "axis_name", "remat")
    }
    return {"family": type(model).__name__, **options}
