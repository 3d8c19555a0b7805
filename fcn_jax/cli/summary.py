"""`fcn-jax summary`: the layer table of a network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from fcn_jax.errors import InputError
from fcn_jax.models import create_model, summarize
from fcn_jax.models.catalog import describe_model
from fcn_jax.pretrained import from_pretrained


@dataclass(frozen=True)
class SummaryArguments:
    """Print the layers of a network: output shapes, parameters, FLOPs."""

    model: tyro.conf.Positional[str | None] = None
    """Name of the network; `fcn-jax models` lists them."""
    weights: str | None = None
    """Instead of a name, show the network of a weights file, a published name or hf://OWNER/REPO."""
    image_size: tuple[int, int] = (500, 500)
    """Height and width in pixels."""
    num_classes: int | None = None
    """By default 21."""
    encoder: Literal["vgg11", "vgg13", "vgg16", "vgg19"] | None = None
    """By default vgg16, or the ResNet in the network's name."""
    encoder_norm: Literal["batch"] | None = None
    width: float | None = None
    """By default 1."""


def main(arguments: Sequence[str]) -> int:
    """Print the table; the exit code."""
    given = tyro.cli(SummaryArguments, prog="fcn-jax summary", args=list(arguments))
    chosen = {"encoder": given.encoder, "encoder_norm": given.encoder_norm}
    sizes: dict[str, Any] = {"num_classes": given.num_classes, "width": given.width, **chosen}
    if given.weights is not None:
        if said := [f"--{name.replace('_', '-')}" for name, value in sizes.items() if value is not None]:
            raise InputError(f"--weights determines {' '.join(said)}; leave that out")
        model = from_pretrained(given.weights, model=given.model)[0]
    elif given.model is not None:
        options = {name: value for name, value in sizes.items() if value is not None}
        model = create_model(given.model, **{"num_classes": 21, **options})
    else:
        raise InputError("expected a network's name or --weights SOURCE; `fcn-jax models` lists the names")
    height, width = given.image_size
    if min(given.image_size) < 1:
        raise InputError(f"expected --image-size of at least 1 1, got {height} {width}")
    rows = summarize(model, given.image_size)
    table = Table(title=f"{describe_model(model)[0]}, {model.encoder}, image {height}x{width}")
    for column in ("layer", "kind", "output b h w c"):
        table.add_column(column, overflow="fold")
    table.add_column("parameters", justify="right")
    table.add_column("MFLOPs", justify="right")
    for row in rows:
        shape = " ".join(map(str, row.shape))
        table.add_row(row.path, row.kind, shape, f"{row.parameters:,}", f"{row.flops / 1e6:,.1f}")
    table.add_section()
    parameters, flops = sum(row.parameters for row in rows), sum(row.flops for row in rows)
    table.add_row("total", "", "", f"{parameters:,}", f"{flops / 1e6:,.1f}")
    Console().print(table)
    return 0
