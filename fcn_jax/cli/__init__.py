"""The command line `fcn-jax COMMAND`: a module for each command, imported when it is called."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from fcn_jax.errors import unknown

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "train": "train a recipe, or resume a run",
    "eval": "score a run or published weights on a split of a data set",
    "predict": "label maps and overlays of images",
    "report": "one HTML file about one or several runs: curves, classes, best and worst images",
    "data": "check a data set and show what is in it",
    "models": "the networks and the published weights by name",
    "summary": "the layers of a network: output shapes, parameters, FLOPs",
    "port": "convert weights of PyTorch projects, and say what became of each tensor",
    "export": "write a trained network as ONNX, StableHLO, safetensors, PyTorch weights or a folder for the hub",
    "parity": "compare a network with PyTorch or with itself, layer by layer and step by step",
    "bench": "measure speed against PyTorch, after checking that both compute the same",
    "compile": "memory, FLOPs, collectives and estimated cycles of a step on a TPU or GPU that need not be there",
    "cache": "show or empty the prepared copies of data sets and the compiled programs",
}
"""What each module of this package does; its ``main(arguments)`` returns the exit code."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``fcn-jax COMMAND ...``; the exit code, 2 for a user's mistake."""
    from fcn_jax.cli.process import guarded

    return guarded(_dispatch, sys.argv[1:] if arguments is None else arguments)


def _dispatch(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: fcn-jax COMMAND ...; `fcn-jax COMMAND --help` explains one\n")
        for name, purpose in COMMANDS.items():
            print(f"  {name:10}{purpose}")
        return 0
    if arguments[0] not in COMMANDS:
        raise unknown("command", arguments[0], COMMANDS)
    return importlib.import_module(f"fcn_jax.cli.{arguments[0]}").main(arguments[1:])
