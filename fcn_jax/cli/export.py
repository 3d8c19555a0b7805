"""`fcn-jax export`: a trained network to a file that PyTorch, or another run, can read, or to a folder for the hub."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from fcn_jax import weights
from fcn_jax.cli.network import NetworkArguments, open_network
from fcn_jax.cli.process import make_folder
from fcn_jax.errors import InputError
from fcn_jax.models.catalog import describe_model
from fcn_jax.models.fcn import FCN
from fcn_jax.paths import to_path
from fcn_jax.pretrained import NetworkInfo, check_hub_folder, write_hub_files


@dataclass(frozen=True)
class ExportArguments:
    """Write a trained network's weights to a file that PyTorch, or another run, can read."""

    out: Path
    """A .safetensors or .pth file, or the folder of --format hub."""
    network: Annotated[NetworkArguments, tyro.conf.arg(name="")] = field(default_factory=NetworkArguments)
    format: Literal["file", "hub"] = "file"
    """hub: a folder with model.safetensors, config.json and a model card, which `hf upload OWNER/REPO FOLDER` uploads
    and --weights hf://OWNER/REPO reads."""
    layout: str = "fcn_jax"
    """Whose names to write: fcn_jax (those of the PyTorch twin), or those of a PyTorch project."""


def main(arguments: Sequence[str]) -> int:
    """Write the file; the exit code."""
    given = tyro.cli(ExportArguments, prog="fcn-jax export", args=list(arguments))
    is_hub = given.format == "hub"
    file = given.out / "model.safetensors" if is_hub else given.out
    weights.check_suffix(file)
    if is_hub and given.layout != "fcn_jax":
        raise InputError(f"--format hub has the names of fcn_jax; leave out --layout {given.layout}")
    if given.network.weights and file.exists() and file.resolve() == Path(given.network.weights).resolve():
        raise InputError(f"{file} is the source and would be overwritten; choose another --out")
    if is_hub:
        check_hub_folder(given.out)
    make_folder(file.parent)
    model, variables, info = open_network(given.network)
    if not isinstance(info.preprocessing, str):
        raise InputError(
            f"{info.source} is of images with {len(info.preprocessing.mean)} channels; no format holds them yet"
        )
    classes = {"class_names": info.class_names, "palette": info.palette, "input_size": info.input_size}
    said = info.preprocessing if info.preprocessing_known else None
    weights.save(file, model, variables, said, given.layout, classes if info.named else None)
    if is_hub:
        write_hub_files(given.out, model, info, _scores(given.network.run, info))
    step = "" if info.step is None else f", step {info.step}"
    what = f"{describe_model(model)[0]} of {info.source}{step}, in the names of {given.layout}: {given.out}"
    print_written(what, model, variables, given.layout)
    return 0


def _scores(run: str | None, info: NetworkInfo) -> dict[str, Any]:
    """Return the scores for a model card: those of RUN/eval.json where it is of this step, or the published one."""
    if run is None:
        return {"published mean IoU": info.score} if info.score else {}
    try:
        saved = json.loads((to_path(run, "--run") / "eval.json").read_text())
        if saved["step"] != info.step:
            return {}
        return {"split": saved["split"], **{name: saved["scores"][name] for name in ("mean_iu", "pixel_accuracy")}}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def print_written(what: str, model: FCN, variables: Mapping[str, Any], layout: str) -> None:
    """Print what was written, and which parameters no network of the layout takes."""
    print(what)
    left_out = weights.left_out(model, variables, layout)
    if left_out:
        print(f"not written, since no network of {layout} takes them: {', '.join(left_out)}")
