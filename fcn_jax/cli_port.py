"""The command line `fcn-jax port`: weights of torch projects to a file of ours, or back, and what became of each."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import tyro
from rich.console import Console
from rich.table import Table

from fcn_jax import weights
from fcn_jax.errors import InputError, unknown
from fcn_jax.models import create_model, init_variables

__all__ = ["PortArguments", "port"]


@dataclass(frozen=True)
class PortArguments:
    """Convert weights of another project to a file of ours, or ours to another's names; prints what became of all."""

    source: tyro.conf.Positional[Path]
    """A .safetensors, .pth or .pt file in any layout that is known."""
    model: str
    """A name from the catalogue. Options that the source's network has, say its encoder, are taken from there."""
    out: Path
    """A .safetensors file, or a folder for weights.safetensors and report.json."""
    num_classes: int | None = None
    """By default the source's, or 21 where it has none."""
    encoder: Literal["vgg11", "vgg13", "vgg16", "vgg19"] | None = None
    encoder_norm: Literal["batch"] | None = None
    width: float = 1.0
    layout: str = "fcn_jax"
    """Whose names to write: fcn_jax, or those of a torch project."""
    allow_missing: tuple[str, ...] = ()
    """Patterns of parameters that may keep their initial values, e.g. 'score_*'."""
    allow_unexpected: tuple[str, ...] = ()
    """Patterns of tensors that may go unused."""
    seed: int = 0
    """Of the initial values of what the source has not."""


def port(given: PortArguments) -> None:
    """Convert, write, and print the report.

    Raises:
        InputError: the source or the options do not fit.
    """
    file = given.out if given.out.suffix else given.out / "weights.safetensors"
    if file.suffix != ".safetensors":
        raise InputError(f"{given.out}: expected a name that ends in .safetensors, or a folder")
    if given.layout not in weights.LAYOUTS:
        raise unknown("layout", given.layout, weights.LAYOUTS)
    info = weights.inspect(given.source)
    options, num_classes = _source_options(info, given.model)
    if given.encoder is not None:
        options |= {"encoder": given.encoder, "encoder_norm": given.encoder_norm}
    elif given.encoder_norm is not None:
        options["encoder_norm"] = given.encoder_norm
    model = create_model(given.model, given.num_classes or num_classes or 21, width=given.width, **options)
    variables = init_variables(model, jax.random.key(given.seed))
    variables, report = weights.load_with_report(
        given.source, model, variables, given.allow_missing, given.allow_unexpected
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    weights.save(file, model, variables, info.preprocessing, given.layout)
    if file.parent == given.out:
        (given.out / "report.json").write_text(json.dumps(asdict(report), indent=2) + "\n")
    _print_report(given.source, info, report)
    print(f"{given.model} in the names of {given.layout}: {file}")


def _source_options(info: weights.Info, name: str) -> tuple[dict[str, Any], int | None]:
    """Return the options of the source's network, as far as it says them, and its number of classes."""
    if info.fit is not None:
        return (dict(info.fit.options) if name in info.fit.models else {}), info.fit.num_classes
    encoder, _, norm = (info.variant or "vgg16").partition("_")
    return {"encoder": encoder, "encoder_norm": "batch" if norm else None}, None


def _print_report(source: Path, info: weights.Info, report: weights.Report) -> None:
    console = Console(soft_wrap=True, highlight=False)
    what = [f"layout {report.layout}", f"encoder {info.variant}", f"preprocessing {report.preprocessing or 'not said'}"]
    what += [f"taken off: {' '.join(report.unwrapped)}"] if report.unwrapped else []
    console.print(f"{source}: {', '.join(what)}", markup=False)
    table = Table(title=f"filled: {len(report.filled)}")
    for column in ("parameter", "from", "how"):
        table.add_column(column, overflow="fold")
    for name, theirs in report.filled.items():
        table.add_row(name, theirs, report.converted[name])
    console.print(table)
    for title, rows in (("left at initialisation", report.left), ("not used", report.ignored)):
        console.print(f"{title}: {len(rows) or 'nothing'}", markup=False)
        for name, why in rows.items():
            console.print(f"  {name}: {why}", markup=False)
