"""`fcn-jax compile RECIPE|NETWORK --target TARGET`: compile for a TPU or GPU without having one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from fcn_jax.cli.process import OutputPath, check_file
from fcn_jax.compare import compile as compiling
from fcn_jax.compare.report import save_json
from fcn_jax.config import Config, ModelConfig
from fcn_jax.data import camvid, shapes, voc
from fcn_jax.devices import groups
from fcn_jax.errors import InputError, unknown
from fcn_jax.models.catalog import MODELS
from fcn_jax.recipes import RECIPES
from fcn_jax.training.config_checks import check_config


@dataclass(frozen=True)
class CompileArguments:
    """Compile the training step for a TPU or GPU, without having one.

    Memory, FLOPs, bytes and collective operations are the compiler's plan for one device; cycles are its estimates.
    """

    target: str
    """Chip and topology: v5e:2x2, v5p:2x2x2, v6e:2x2, h100:8, cpu:8."""
    image_size: tuple[int, int] | None = None
    """Height and width; by default the recipe's crop or input size, or 512 512."""
    batch_size: int | None = None
    """Global batch size; by default the recipe's, or eight per device for a network."""
    num_classes: int | None = None
    """Number of classes; by default that of the recipe's data set, or 21 for a network."""
    inference: bool = False
    """Compile prediction on one device instead of the training step."""
    max_batch: bool = False
    """Find the largest batch that fits into memory; each attempt is a compilation."""
    out: OutputPath | None = None
    """FILE.json for the numbers."""
    text: OutputPath | None = None
    """File for the compiled program."""
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)
    """Any field of the recipe, as in train.py."""


def main(arguments: Sequence[str]) -> int:
    """Compile and print; the exit code."""
    name, *rest = list(arguments) or ["--help"]
    if name in RECIPES:
        config = RECIPES[name].config
    elif name in MODELS:
        config = Config(model=ModelConfig(name=name))
    elif name in ("-h", "--help"):
        config, rest = Config(), ["--help"]
    else:
        raise unknown("recipe or network", name, [*RECIPES, *MODELS])
    default = CompileArguments(target=tyro.MISSING, config=config)
    given = tyro.cli(CompileArguments, prog=f"fcn-jax compile {name}", default=default, args=rest)
    target = compiling.open_target(given.target)
    config = given.config
    count = groups(target.mesh(config, given.inference))
    if config.devices not in (None, len(target.devices)):
        raise InputError(
            f"--target {target.name} has {len(target.devices)} devices; leave out --devices {config.devices}"
        )
    if config.data.channels is not None:
        raise InputError(f"only RGB images are planned; leave out --data.channels {config.data.channels}")
    check_config(config)
    size = given.image_size or config.data.crop_size or config.data.input_size or (512, 512)
    if min(size) < 1:
        raise InputError(f"expected --image-size of at least 1 1, got {size[0]} {size[1]}")
    unit = count * (1 if given.inference else config.train.accumulate)
    batch_size = given.batch_size
    if batch_size is None and name in RECIPES:
        batch_size = config.train.eval_batch_size if given.inference else config.train.batch_size
    elif batch_size is None:
        batch_size = 8 * unit
    if batch_size < 1 or batch_size % unit:
        raise InputError(
            f"expected --batch-size to be a multiple of {unit}, of devices x accumulated parts, got {batch_size}"
        )
    classes = given.num_classes
    if classes is None:
        classes = _classes(config) if name in RECIPES else 21
    work = compiling.Work(config, classes, size, batch_size, given.inference)
    for flag, file in (("--out", given.out), ("--text", given.text)):
        if file is not None:
            check_file(file, flag)  # before minutes of compiling
    console = Console(highlight=False, width=None if Console().is_terminal else 132)
    if given.max_batch:
        if not target.chip.memory:
            raise InputError(f"target {target.name} has no memory of its own; choose a TPU or GPU for --max-batch")
        compiling.lower(work, target)  # raises any other error first
        most = compiling.largest(
            lambda batch: compiling.fits(replace(work, batch_size=batch), target), unit, batch_size
        )
        console.print(f"largest batch that fits: {most}, {most // count} on each device")
        if not most:
            return 1
        work = replace(work, batch_size=most)
    report = compiling.compile_work(work, target)
    _print(console, work, target, report)
    if given.text is not None:
        given.text.write_text(report.text)
    if given.out is not None:
        save_json(given.out, {"command": ["fcn-jax", "compile", *arguments], **compiling.to_json(work, target, report)})
    return 0


def _classes(config: Config) -> int:
    """Return the number of classes of a recipe's data set."""
    name = config.data.train.partition("/")[0]
    fixed = {"shapes": shapes.CLASSES, "camvid": camvid.CLASSES, "voc": voc.CLASSES, "sbd": voc.CLASSES}
    if name not in fixed:
        raise InputError(f"the classes of {config.data.train} are in its files; give --num-classes")
    return len(fixed[name])


def _print(console: Console, work: compiling.Work, target: compiling.Target, report: compiling.CompileReport) -> None:
    model, chip = work.config.model, target.chip
    what = "class maps" if work.inference else f"training step, {work.parallel}"
    sizes = f"{work.num_classes} classes, {model.dtype}, batch {work.batch_size}, {work.size[0]}x{work.size[1]}"
    console.print(
        f"{model.name}, {sizes}: {what}, for {target.name} ({len(target.devices)} x {target.devices[0].device_kind})"
    )
    if report.memory:
        parts = ", ".join(f"{name} {value / 2**30:.2f}" for name, value in report.memory.items() if name != "total")
        of_chip = f" of {chip.memory / 2**30:.0f}" if chip.memory else ""
        console.print(f"memory planned on a device: {report.memory['total'] / 2**30:.2f}{of_chip} GiB ({parts})")
    if report.flops is not None and report.bytes_accessed is not None:
        flops, read = report.flops / 1e12, report.bytes_accessed / 1e9
        console.print(f"on a device: {flops:.3f} TFLOP, {read:.2f} GB read and written")
    for note in report.notes:
        console.print(f"note: {note}")
    if report.cycles:
        _print_cycles(console, chip, report)
    for each in report.collectives:
        console.print(f"collective: {each['count']} {each['kind']} of {each['dtype']}, {each['bytes']:,} bytes")
    for each in report.products:
        default = each["precision"] == "DEFAULT" and "f32" in each["operands"]
        meaning = f" ({compiling.DEFAULT_PRECISION[target.platform]})" if default else ""
        what = f"{each['count']} {each['operation']} of {each['operands']}"
        console.print(f"products: {what}, {each['precision']}{meaning}")


def _print_cycles(console: Console, chip: compiling.Chip, report: compiling.CompileReport) -> None:
    total = sum(sum(each.values()) for each in report.cycles.values())
    table = Table(title="estimated cycles of a device, millions", title_justify="left")
    for column in ("layer", "forward", "backward", "share"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for layer, each in report.cycles.items():
        share = sum(each.values()) / total
        table.add_row(layer, f"{each['forward'] / 1e6:.2f}", f"{each['backward'] / 1e6:.2f}", f"{share:.1%}")
    table.add_section()
    table.add_row("all", *(f"{sum(each[way] for each in report.cycles.values()) / 1e6:.2f}" for way in each), "")
    console.print(table)
    floor = (report.flops or 0) / chip.flops_per_cycle
    console.print(
        f"estimated {total / 1e6:.1f} M cycles, without waiting for other chips; the matrix units alone, at their "
        f"bfloat16 rate: {floor / 1e6:.1f} M"
    )
    first = report.largest[0]
    console.print(f"largest: {first['cycles'] / 1e6:.2f} M, {first['instruction']}, {first['operation']}")
