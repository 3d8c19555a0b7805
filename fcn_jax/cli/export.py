"""`fcn-jax export`: a run's weights to a file that PyTorch, or another run, can read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from fcn_jax import weights
from fcn_jax.cli.process import make_folder
from fcn_jax.models.fcn import FCN
from fcn_jax.training.run import open_run


@dataclass(frozen=True)
class ExportArguments:
    """Write a run's weights to a file that PyTorch, or another run, can read."""

    run: Path
    """The run's folder."""
    out: Path
    """A .safetensors or .pth file."""
    checkpoint: str = "best"
    """best (by mean IoU on the validation split), last, or a step's number."""
    layout: str = "fcn_jax"
    """Whose names to write: fcn_jax (those of the PyTorch twin), or those of a PyTorch project."""


def main(arguments: Sequence[str]) -> int:
    """Write the file; the exit code."""
    given = tyro.cli(ExportArguments, prog="fcn-jax export", args=list(arguments))
    weights.check_suffix(given.out)
    run = open_run(given.run, given.checkpoint)
    make_folder(given.out.parent)
    weights.save(given.out, run.model, run.variables, run.config.data.preprocessing, given.layout)
    what = f"{run.config.model.name} of {given.run}, step {run.step}, in the names of {given.layout}: {given.out}"
    print_written(what, run.model, run.variables, given.layout)
    return 0


def print_written(what: str, model: FCN, variables: Mapping[str, Any], layout: str) -> None:
    """Print what was written, and which parameters no network of the layout takes."""
    print(what)
    left_out = weights.left_out(model, variables, layout)
    if left_out:
        print(f"not written, since no network of {layout} takes them: {', '.join(left_out)}")
