"""`fcn-jax port`: convert weights of PyTorch and Caffe projects to our format, or back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Literal

import jax
import tyro
from rich.console import Console
from rich.table import Table

from fcn_jax import weights
from fcn_jax.cli.export import print_written
from fcn_jax.cli.process import OutputPath, check_not_source, make_folder
from fcn_jax.errors import InputError, unknown
from fcn_jax.models import create_model, init_variables


@dataclass(frozen=True)
class PortArguments:
    """Convert weights from another project's layout to ours, or to any other, and report on every parameter."""

    source: tyro.conf.Positional[str]
    """A .safetensors, .pth, .pt or .caffemodel file in any known layout, hf://OWNER/REPO, or a published name such
    as vgg16-imagenet."""
    out: OutputPath
    """A .safetensors or .pth file, or a folder for weights.safetensors and report.json."""
    model: str | None = None
    """Name of the network; by default the source's, if it determines one. Options such as the encoder are taken from
    the source."""
    num_classes: int | None = None
    """By default the source's, or 21 if it has no score layer."""
    encoder: Literal["vgg11", "vgg13", "vgg16", "vgg19"] | None = None
    encoder_norm: Literal["batch"] | None = None
    width: float | None = None
    layout: str = "fcn_jax"
    """Layout to write: fcn_jax, or that of a torch project."""
    preprocessing: Literal["imagenet", "caffe"] | None = None
    """Preprocessing that the weights were trained with, if the source does not state it or its layout's is wrong."""
    allow_missing: tuple[str, ...] = ()
    """Patterns of parameters that may keep their initial values, e.g. 'score_*'."""
    allow_unexpected: tuple[str, ...] = ()
    """Patterns of tensors that may go unused."""
    seed: int = 0
    """Random seed of the parameters that the source lacks."""


def main(arguments: Sequence[str]) -> int:
    """Convert, write, and print the report; the exit code."""
    given = tyro.cli(PortArguments, prog="fcn-jax port", args=list(arguments))
    file = given.out if given.out.suffix else given.out / "weights.safetensors"
    weights.check_suffix(file)
    check_not_source(file, given.source)
    if not 0 <= given.seed < 2**32:
        raise InputError(f"expected --seed from 0 to below 2**32, got {given.seed}")
    if given.layout not in weights.LAYOUTS:
        raise unknown("layout", given.layout, weights.LAYOUTS)
    source = weights.open_source(given.source)
    info = weights.inspect(source, given.preprocessing)
    name = given.model or weights.only_model(given.source, info)
    options, num_classes = weights.source_options(info, name)
    if given.encoder is not None:
        options |= {"encoder": given.encoder, "encoder_norm": given.encoder_norm}
    elif given.encoder_norm is not None:
        options["encoder_norm"] = given.encoder_norm
    if given.width is not None:
        options["width"] = given.width
    if given.num_classes is not None:
        num_classes = given.num_classes
    model = create_model(name, 21 if num_classes is None else num_classes, **options)
    init = partial(init_variables, model)
    # Shapes first: a file may state a network larger than any memory, and its tensors show whether that is true.
    key = jax.random.key(given.seed)
    variables, report = weights.load_with_report(
        source, model, jax.eval_shape(init, key), given.allow_missing, given.allow_unexpected
    )
    if report.left:
        initial = init(key)
        variables = jax.tree.map(
            lambda filled, value: value if isinstance(filled, jax.ShapeDtypeStruct) else filled, variables, initial
        )
    report = replace(report, preprocessing=info.preprocessing)
    make_folder(file.parent)
    classes = info.classes if model.num_classes == (info.fit and info.fit.num_classes) else None
    weights.save(file, model, variables, report.preprocessing, given.layout, classes)
    if file.parent == given.out:
        (given.out / "report.json").write_text(json.dumps(asdict(report), indent=2) + "\n")
    _print_report(given.source, info, report)
    print_written(f"{name} in the names of {given.layout}: {file}", model, variables, given.layout)
    return 0


def _print_report(source: str, info: weights.Info, report: weights.Report) -> None:
    console = Console(soft_wrap=True, highlight=False)
    what = [
        f"layout {report.layout}",
        f"encoder {info.variant}",
        f"preprocessing {report.preprocessing or 'not stated'}",
    ]
    what += [f"removed wrappers: {' '.join(report.unwrapped)}"] if report.unwrapped else []
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
