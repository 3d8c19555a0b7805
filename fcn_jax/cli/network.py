"""The options by which commands name a trained network, and the network that they name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from fcn_jax import weights
from fcn_jax.errors import InputError
from fcn_jax.models.fcn import FCN
from fcn_jax.paths import to_path
from fcn_jax.pretrained import NetworkInfo, from_pretrained


@dataclass(frozen=True)
class NetworkArguments:
    """A run's network or published weights; one of the two."""

    run: str | None = None
    """A run's folder, on a disk or gs://BUCKET/..."""
    weights: str | None = None
    """In its place a weights file (.safetensors, .pth, .caffemodel), a published name (`fcn-jax models` lists them), or
    hf://OWNER/REPO[@REVISION]."""
    checkpoint: str = "best"
    """Of a run: best (by mean IoU on the validation split), last, or a step's number."""
    model: str | None = None
    """A name from the catalogue, for weights that may belong to several networks."""
    preprocessing: Literal["imagenet", "caffe"] | None = None
    """For weights that do not say it."""


def open_network(given: NetworkArguments) -> tuple[FCN, dict[str, Any], NetworkInfo]:
    """Open the network and print what was assumed of it."""
    if (given.run is None) == (given.weights is None):
        raise InputError("expected one of --run RUN and --weights SOURCE; give the network in one way")
    if given.run is not None and (given.model or given.preprocessing):
        raise InputError("a run says its own network and preprocessing; leave out --model and --preprocessing")
    run = None if given.run is None else to_path(given.run, "--run")
    path = None if given.weights is None or weights.is_published(given.weights) else to_path(given.weights, "--weights")
    if given.weights is not None and given.checkpoint != "best" and not (path and path.is_dir()):
        raise InputError(f"--checkpoint {given.checkpoint} belongs to a run; leave it out with --weights")
    if run is not None and not run.is_dir():
        what = "is a file" if run.is_file() else "is not there"
        raise InputError(f"{run} {what} and is no run; give the folder that training wrote, or --weights")
    source = str(given.run or given.weights)
    made = from_pretrained(source, model=given.model, preprocessing=given.preprocessing, checkpoint=given.checkpoint)
    for note in made[2].notes:
        print(f"note: {note}")
    return made
