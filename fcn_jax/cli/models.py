"""`fcn-jax models`: list the networks and the published weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tyro
from rich.console import Console
from rich.table import Table

from fcn_jax.models import MODELS, create_model, summarize
from fcn_jax.weights import PRETRAINED


@dataclass(frozen=True)
class ModelsArguments:
    """List the networks, and the published weights that --weights, --init and --init-from take by name."""


def main(arguments: Sequence[str]) -> int:
    """Print the tables; the exit code."""
    tyro.cli(ModelsArguments, prog="fcn-jax models", args=list(arguments))
    console = Console(width=None if Console().is_terminal else 180)
    networks = Table(title="networks, 21 classes, image 500x500", title_justify="left")
    for column in ("name", "what", "parameters", "GFLOPs"):
        networks.add_column(column, justify="right" if column in ("parameters", "GFLOPs") else "left")
    for name, spec in MODELS.items():
        rows = summarize(create_model(name, 21), (500, 500))
        parameters, flops = sum(row.parameters for row in rows), sum(row.flops for row in rows)
        networks.add_row(name, spec.summary, f"{parameters / 1e6:.1f} M", f"{flops / 1e9:.0f}")
    console.print(networks)
    published = Table(title="published weights", title_justify="left")
    for column in ("name", "network", "preprocessing", "trained on", "score", "licence", "address"):
        published.add_column(column, overflow="fold")
    for name, entry in PRETRAINED.items():
        network = f"encoder {entry.network}" if entry.is_encoder else entry.network
        preprocessing = "caffe" if name.endswith("-caffe") else "imagenet"
        published.add_row(name, network, preprocessing, entry.data, entry.score, entry.licence, entry.address)
    console.print(published)
    return 0
