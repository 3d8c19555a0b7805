"""Variables to torch's names and axes, and to a file."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from fcn_jax.errors import InputError, first_line, unknown
from fcn_jax.models.catalog import describe_model
from fcn_jax.models.fcn import FCN
from fcn_jax.weights.layouts import Network, Preprocessing, check_fit, pair_up
from fcn_jax.weights.names import COUNTER, list_parameters, to_torch_axes
from fcn_jax.weights.published import LAYOUTS

__all__ = ["check_suffix", "nameless", "save", "to_torch"]

_SUFFIXES = (".safetensors", ".pth", ".pt")


def to_torch(model: Network, variables: Mapping[str, Any], layout: str | None = None) -> dict[str, np.ndarray]:
    """Return the variables under torch's names and axes, in the layout's order.

    Args:
        model: the network that the variables belong to.
        variables: {"params": ...[, "batch_stats": ...]}.
        layout: a key of ``LAYOUTS``; by default our own, the names of ``compare.twins``. An encoder's layout
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
    left_out = nameless(model, variables, name)
    if left_out and not chosen.encoder_only:
        raise InputError(f"layout {name!r} has no name for {', '.join(sorted(left_out)[:8])}; use our own")
    for parameter, row in pairs:
        value = np.asarray(flat[parameter.path])
        arrays[f"{row.theirs}.{parameter.leaf}"] = to_torch_axes(parameter, value, row.linear)
        if parameter.leaf == "running_var":
            arrays[f"{row.theirs}.{COUNTER}"] = np.zeros((), np.int64)
    if chosen.fit is not None:
        check_fit(f"layout {name!r}", chosen.fit({key: value.shape for key, value in arrays.items()}), model, False)
    return arrays


def nameless(model: Network, variables: Mapping[str, Any], layout: str) -> list[str]:
    """List the parameters that an encoder's layout has no names for, so that ``to_torch`` leaves them out."""
    parameters = list_parameters(variables)
    named = {parameter.name for parameter, _ in pair_up(LAYOUTS[layout], model, parameters)}
    return [parameter.name for parameter in parameters if parameter.name not in named]


def check_suffix(path: Path) -> None:
    """Raise InputError for a file that ``save`` does not write."""
    if path.suffix not in _SUFFIXES:
        raise InputError(f"{path}: expected a name that ends in {', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}")


def save(
    path: str | os.PathLike[str],
    model: Network,
    variables: Mapping[str, Any],
    preprocessing: str | None,
    layout: str = "fcn_jax",
) -> None:
    """Write the variables to a .safetensors file, readable by torch users as it is, or to a state dict of torch's.

    Args:
        path: ends in .safetensors, or in .pth or .pt (torch is needed); it appears whole or not at all.
        model: the network that the variables belong to. A .safetensors file holds its name and options too.
        variables: {"params": ...[, "batch_stats": ...]}.
        preprocessing: what images the weights were trained on, "imagenet" or "caffe"; None: not known. Only a
            .safetensors file says it on.
        layout: a key of ``LAYOUTS``, see ``to_torch``.

    Raises:
        InputError: another suffix, unknown preprocessing, a layout that does not fit, or torch is missing.
    """
    path = Path(path)
    check_suffix(path)
    known = get_args(Preprocessing)
    if preprocessing is not None and preprocessing not in known:
        raise unknown("preprocessing", preprocessing, known)
    arrays = to_torch(model, variables, layout)
    if not arrays:
        raise InputError(f"{path}: layout {layout!r} has names for nothing in these variables; give all of them")
    part = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        _write(part, arrays, _metadata(model, preprocessing, layout))
        os.replace(part, path)
    except ImportError as error:
        raise InputError(
            f"{path}: torch files need torch: pip install fcn_jax[torch], or name a .safetensors file"
        ) from error
    except (OSError, RuntimeError) as error:  # RuntimeError: torch could not write
        raise InputError(f"{path}: cannot be written: {first_line(error)}") from error
    finally:
        with contextlib.suppress(OSError):  # what went wrong before is what matters
            part.unlink(missing_ok=True)


def _metadata(model: Network, preprocessing: str | None, layout: str) -> dict[str, str]:
    metadata = {"format": "pt", "layout": layout}
    if isinstance(model, FCN):
        name, options = describe_model(model)
        metadata["model"] = json.dumps({"name": name, "num_classes": model.num_classes, "options": options})
    if preprocessing is not None:
        metadata["preprocessing"] = preprocessing
    return metadata


def _write(path: Path, arrays: Mapping[str, np.ndarray], metadata: dict[str, str]) -> None:
    if path.suffix == ".safetensors":
        import safetensors.numpy

        try:
            safetensors.numpy.save_file(dict(arrays), path, metadata)
        except safetensors.SafetensorError as error:
            raise OSError(str(error)) from error
        return
    import torch

    # bfloat16, which NumPy lacks, goes by its bits.
    tensors = {
        name: torch.from_numpy(value.view(np.int16).copy()).view(torch.bfloat16)
        if value.dtype == jnp.bfloat16
        else torch.from_numpy(value.copy())
        for name, value in arrays.items()
    }
    torch.save(tensors, path)
