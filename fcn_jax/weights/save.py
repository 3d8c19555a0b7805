"""Convert variables to torch's names and axes, and save them to a file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from fcn_jax.errors import InputError, first_line, unknown
from fcn_jax.models.catalog import describe_model
from fcn_jax.models.fcn import FCN
from fcn_jax.models.layers import scaled
from fcn_jax.models.vgg import VGGClassifier
from fcn_jax.paths import replacing
from fcn_jax.preprocessing import PREPROCESSINGS
from fcn_jax.weights.layouts import LAYOUTS
from fcn_jax.weights.layouts.layout import Layout, Network, check_fit, pair_up
from fcn_jax.weights.names import COUNTER, Parameter, list_parameters, to_torch_axes
from fcn_jax.weights.sources import import_torch

_SUFFIXES = (".safetensors", ".pth", ".pt")


def to_torch(model: Network, variables: Mapping[str, Any], layout: str | None = None) -> dict[str, np.ndarray]:
    """Return a state dict, name -> array, in torch's axes and the layout's order, with duplicates and counters.

    Args:
        model: the network that the variables belong to.
        variables: {"params": ...[, "batch_stats": ...]}.
        layout: a key of ``LAYOUTS``; by default our own, the names of ``compare.twins``. An encoder's layout
            omits what ``left_out`` lists; any other accepts only networks that compute the same as its source.

    Raises:
        InputError: unknown layout, or one that the network does not fit.
    """
    name = "fcn_jax" if layout is None else layout
    if name not in LAYOUTS:
        raise unknown("layout", name, LAYOUTS)
    chosen = LAYOUTS[name]
    if chosen.families and not isinstance(model, chosen.families):
        families = " or ".join(family.__name__ for family in chosen.families)
        raise InputError(f"layout {name!r} has names for a {families}, not for a {type(model).__name__}")
    lost = left_out(model, variables, name)
    if lost and not chosen.encoder_only:
        raise InputError(f"layout {name!r} has no name for {', '.join(sorted(lost)[:8])}; use our own")
    flat = traverse_util.flatten_dict(dict(variables))
    arrays: dict[str, np.ndarray] = {}
    for parameter, theirs in _written(chosen, model, list_parameters(variables)):
        linear = chosen.linear is not None and theirs.startswith(chosen.linear)
        arrays[f"{theirs}.{parameter.leaf}"] = to_torch_axes(parameter, np.asarray(flat[parameter.path]), linear)
        if parameter.leaf == "running_var":
            arrays[f"{theirs}.{COUNTER}"] = np.zeros((), np.int64)
    if chosen.fit is not None:
        check_fit(f"layout {name!r}", chosen.fit({key: value.shape for key, value in arrays.items()}), model, False)
    return arrays


def left_out(model: Network, variables: Mapping[str, Any], layout: str) -> list[str]:
    """List the parameters that ``to_torch`` omits: those that an encoder's layout has no names for."""
    parameters = list_parameters(variables)
    written = {parameter.name for parameter, _ in _written(LAYOUTS[layout], model, parameters)}
    return [parameter.name for parameter in parameters if parameter.name not in written]


def _written(layout: Layout, model: Network, parameters: list[Parameter]) -> list[tuple[Parameter, str]]:
    """Pair the parameters that the layout has names for with its modules."""
    pairs = pair_up(layout, model, parameters)
    if not layout.encoder_only or isinstance(model, VGGClassifier):
        return pairs
    # A VGG of this width has fc6 and fc7 of a fixed size, and would reject a file with other shapes.
    has = (getattr(model, "fc6_kernel", None), getattr(model, "fc_features", None))
    is_vggs = has == (7, scaled(4096, model.width))
    return [pair for pair in pairs if is_vggs or not pair[0].module.startswith("head.")]


def check_suffix(path: Path) -> None:
    """Raise InputError for a file suffix that ``save`` does not support."""
    if path.suffix not in _SUFFIXES:
        raise InputError(f"{path}: expected a name that ends in {', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}")


def save(
    path: str | os.PathLike[str],
    model: Network,
    variables: Mapping[str, Any],
    preprocessing: str | None,
    layout: str = "fcn_jax",
    classes: Mapping[str, Any] | None = None,
) -> None:
    """Write the variables atomically to a .safetensors file or a torch state dict.

    Args:
        path: ends in .safetensors, or in .pth or .pt (torch is needed).
        model: the network that the variables belong to; a .safetensors file records its name and options.
        variables: {"params": ...[, "batch_stats": ...]}.
        preprocessing: "imagenet", "caffe" or None if unknown; recorded only in a .safetensors file.
        layout: a key of ``LAYOUTS``, see ``to_torch``.
        classes: "class_names", "palette" and "input_size" of the network, recorded only in a .safetensors file.

    Raises:
        InputError: unsupported suffix, unknown preprocessing, a layout that does not fit, or torch is missing.
    """
    path = Path(path)
    check_suffix(path)
    if preprocessing is not None and preprocessing not in PREPROCESSINGS:
        raise unknown("preprocessing", preprocessing, PREPROCESSINGS)
    if path.suffix != ".safetensors":
        import_torch(path)
    arrays = to_torch(model, variables, layout)
    if not arrays:
        raise InputError(f"{path}: layout {layout!r} has no name for any of these variables; pass all of them")
    metadata = {"format": "pt", "layout": layout} | ({"preprocessing": preprocessing} if preprocessing else {})
    if classes is not None:
        metadata["classes"] = json.dumps({**classes})
    if isinstance(model, FCN):
        name, options = describe_model(model)
        metadata["model"] = json.dumps({"name": name, "num_classes": model.num_classes, "options": options})
    write_arrays(path, arrays, metadata)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write arrays atomically to a .safetensors file, with its metadata, or to a torch file.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        with replacing(path) as part:
            _write(part, arrays, metadata)
            os.umask(mask := os.umask(0))  # safetensors creates files that only their owner can read
            part.chmod(0o666 & ~mask)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch could not write
        raise InputError(f"{path}: cannot be written: {first_line(error)}") from error


def _write(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    if path.suffix == ".safetensors":
        import safetensors.numpy

        try:
            return safetensors.numpy.save_file({**arrays}, path, {**metadata})
        except safetensors.SafetensorError as error:
            raise OSError(str(error)) from error
    torch = import_torch(path)

    def tensor(value: np.ndarray) -> Any:
        if value.dtype == jnp.bfloat16:  # torch does not take bfloat16 arrays, but their bits as int16
            return torch.from_numpy(value.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(value)

    torch.save({name: tensor(value) for name, value in arrays.items()}, path)
