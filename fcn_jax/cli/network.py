"""The command-line options that select a trained network, and its loading."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from fcn_jax import weights
from fcn_jax.errors import InputError
from fcn_jax.models.fcn import FCN
from fcn_jax.paths import to_path
from fcn_jax.pretrained import NetworkInfo, from_pretrained, is_hub_folder


@dataclass(frozen=True)
class NetworkArguments:
    """A trained network: either --run or --weights."""

    run: str | None = None
    """A run's folder, local or gs://BUCKET/..."""
    weights: str | None = None
    """Instead of --run: a weights file (.safetensors, .pth, .caffemodel), a published name (see `fcn-jax models`),
    or hf://OWNER/REPO[@REVISION]."""
    checkpoint: str = "best"
    """Checkpoint of a run: best (by mean IoU on the validation split), last, or a step number."""
    model: str | None = None
    """Name of the network, for weights that fit several (`fcn-jax models` lists the names)."""
    preprocessing: Literal["imagenet", "caffe"] | None = None
    """Preprocessing, for weights that do not state it, in place of their layout's."""


def open_network(given: NetworkArguments) -> tuple[FCN, dict[str, Any], NetworkInfo]:
    """Load the network, and print what had to be assumed."""
    if (given.run is None) == (given.weights is None):
        raise InputError("expected either --run RUN or --weights SOURCE; give exactly one of them")
    run = None if given.run is None else to_path(given.run, "--run")
    path = None if given.weights is None or weights.is_published(given.weights) else to_path(given.weights, "--weights")
    if path is not None and path.is_dir() and not is_hub_folder(path):
        raise InputError(f"{path} is a folder without exported weights; give a run as --run {path}")
    if given.weights is not None and given.checkpoint != "best":
        raise InputError(f"--checkpoint {given.checkpoint} belongs to a run; leave it out with --weights")
    if run is not None and not run.is_dir():
        what = "is a file" if run.is_file() else "does not exist"
        raise InputError(f"{run} {what}, not a run's folder; give the folder that training wrote, or --weights")
    source = str(given.run or given.weights)
    made = from_pretrained(source, model=given.model, preprocessing=given.preprocessing, checkpoint=given.checkpoint)
    for note in made[2].notes:
        print(f"note: {note}")
    return made
