"""The command line `fcn-jax parity`: compare a network numerically with PyTorch or with other JAX settings."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import rich
import tyro

from fcn_jax import weights
from fcn_jax.cli.process import OutputPath, check_file, check_not_source, make_folder
from fcn_jax.compare.experiments import (
    Case,
    against_jax,
    against_record,
    against_torch,
    random_batch,
    random_variables,
    save_record,
)
from fcn_jax.compare.parity import PARTS, Part
from fcn_jax.compare.report import parity_tables, save_figure, save_json, summary_table
from fcn_jax.config import OptimConfig
from fcn_jax.errors import InputError
from fcn_jax.models import create_model
from fcn_jax.models.catalog import describe_model
from fcn_jax.models.fcn import FCN
from fcn_jax.training.distributed import digest
from fcn_jax.training.run import environment


@dataclass(frozen=True)
class ParityArguments:
    """Compare layers, gradients and training of a network with its PyTorch twin, or with other JAX settings."""

    model: tyro.conf.Positional[str]
    """Name of the network; `fcn-jax models` lists them."""
    against: str = "torch"
    """torch: the PyTorch twin. jax: pmap, mesh and one device, float32 and float64, precisions, upsampling, remat.
    FILE: what --save wrote, on another machine or with another JAX version, dtype or precision."""
    save: OutputPath | None = None
    """Only write the JAX results to FILE.safetensors, for a later --against; they include each step's parameters."""
    dtype: Literal["float64", "float32", "bfloat16"] = "float32"
    precision: Literal["default", "high", "highest"] = "highest"
    """Precision of JAX's products; on a CPU all three are the same."""
    steps: int = 20
    """Number of SGD steps to compare; 0: none."""
    devices: int | None = None
    """Devices over which JAX splits the batch; by default 1, or 2 with --against jax if there are two."""
    image_size: tuple[int, int] = (64, 64)
    """Height and width in pixels."""
    batch_size: int = 2
    num_classes: int | None = None
    """By default 21."""
    weights: str | None = None
    """A .safetensors, .pth or .caffemodel file of any known layout, or a published name; other parameters are random.
    The file's encoder, width and classes are the defaults of the options below."""
    encoder: Literal["vgg11", "vgg13", "vgg16", "vgg19"] | None = None
    """By default vgg16."""
    encoder_norm: Literal["batch"] | None = None
    width: float | None = None
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    max_error: float | None = None
    """Exit with code 1 if an error is larger. Errors of float32 and bfloat16 against torch are from float64,
    except those of the SGD steps."""
    max_error_of: tuple[Part, ...] = PARTS
    """The parts that --max-error applies to."""
    out: OutputPath | None = None
    """Folder for parity.json and parity.png."""
    seed: int = 0


def main(arguments: Sequence[str]) -> int:
    """Compare, print the tables and write the files; the exit code is 1 where an error is over ``--max-error``.

    Raises:
        InputError: the options do not fit.
    """
    given = tyro.cli(ParityArguments, prog="fcn-jax parity", args=list(arguments))
    _check(given)
    if given.out is not None:
        make_folder(given.out)  # before hours of computing
    if given.save is not None:
        check_file(given.save, "--save")
        check_not_source(given.save, given.weights, "--save")
    devices = _configure(given)
    model, variables = _make_model(given)
    images, labels = random_batch(given.image_size, model.num_classes, given.batch_size, given.seed)
    optim = OptimConfig(lr=given.lr, momentum=given.momentum, weight_decay=given.weight_decay)
    case = Case(model, variables, images, labels, given.dtype, given.steps, optim, given.max_error)
    about = _about(given, model, variables)
    if given.save is not None:
        save_record(case, given.save, about)
        print(f"{about['name']}: in {given.save}")
        return 0
    if given.against == "jax":
        reports = list(against_jax(case, devices))
    elif given.against == "torch":
        reports = [against_torch(case, devices)]
    else:
        reports = [against_record(case, Path(given.against), about)]
    if given.against != "jax":
        rich.print(*parity_tables(reports[0]))
        if reports[0].unmatched:
            rich.print("on one side only:", ", ".join(reports[0].unmatched))
    rich.print(summary_table(reports))
    if given.out is not None:
        record: dict[str, Any] = {"arguments": asdict(given) | {"out": str(given.out)}, "devices": devices}
        record |= {"versions": environment("torch"), "reports": [report.to_json() for report in reports]}
        save_json(given.out / "parity.json", record)
        save_figure(given.out / "parity.png", reports)
        print(f"numbers in {given.out / 'parity.json'}, figure in {given.out / 'parity.png'}")
    if given.max_error is None:
        return 0
    parts = itertools.product(reports, given.max_error_of)
    errors = {f"{r.ours} | {r.theirs}: {name}": e for r, part in parts for name, e in r.errors(part).items()}
    if not errors:
        raise InputError(f"nothing to compare in {', '.join(given.max_error_of)}; name other parts in --max-error-of")
    over = [f"{name} {error:.1e}" for name, error in errors.items() if not error <= given.max_error]
    for line in over[:10]:
        print(f"over {given.max_error:g}: {line}")
    if len(over) > 10:
        print(f"and {len(over) - 10} more")
    return 1 if over else 0


def _check(given: ParityArguments) -> None:
    against = None if given.against == "torch" else given.against
    several = {"--against": against, "--max-error": given.max_error, "--out": given.out, "--devices": given.devices}
    if given.save is not None and (useless := [name for name, value in several.items() if value is not None]):
        raise InputError(f"--save compares nothing and cannot be combined with {' or '.join(useless)}; leave one out")
    if given.save is not None and given.save.suffix != ".safetensors":
        raise InputError(f"--save {given.save}: expected a name that ends in .safetensors")
    if given.against not in ("torch", "jax") and (given.devices or 1) > 1:
        raise InputError(f"--against {given.against} supports only one device; leave --devices out")
    if given.steps < 0:
        raise InputError(f"expected --steps >= 0, got {given.steps}; 0 leaves training out")
    if not (given.lr > 0 and 0 <= given.momentum < 1 and given.weight_decay >= 0):
        raise InputError("expected --lr > 0, --momentum from 0 to below 1, and --weight-decay >= 0")
    if not 0 <= given.seed < 2**32:
        raise InputError(f"expected --seed from 0 to below 2**32, got {given.seed}")
    if given.devices is not None and given.devices < 1:
        raise InputError(f"expected --devices >= 1, got {given.devices}")
    if min(given.image_size) < 1 or given.batch_size < 1:
        raise InputError("expected --image-size and --batch-size of at least 1")
    if given.max_error is not None and not given.max_error >= 0:
        raise InputError(f"expected --max-error >= 0, got {given.max_error}; leave it out to compare without a limit")
    if given.batch_size % (given.devices or 1):
        raise InputError(
            f"--batch-size {given.batch_size} is not a multiple of {given.devices} devices; choose one that is"
        )


def _configure(given: ParityArguments) -> int:
    """Configure JAX before it is initialised, and return the number of devices."""
    if (given.devices or 1) > 1 and "device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # JAX is initialised already; its devices are fixed
            jax.config.update("jax_num_cpu_devices", given.devices)
    if given.dtype == "float64" or given.against == "jax":
        jax.config.update("jax_enable_x64", True)
    default = 2 if given.against == "jax" and len(jax.devices()) > 1 and given.batch_size % 2 == 0 else 1
    return default if given.devices is None else given.devices


def _about(given: ParityArguments, model: FCN, variables: Any) -> dict[str, Any]:
    """Describe the computation. Only the device, dtype, precision and JAX version, in ``name``, may differ."""
    device = jax.devices()[0]
    name = f"{device.device_kind} {given.dtype} {given.precision}, jax {jax.__version__}"
    network, options = describe_model(model)
    about = {"name": name, "network": network, "num_classes": model.num_classes, "options": options}
    work = ("image_size", "batch_size", "steps", "seed", "lr", "momentum", "weight_decay")
    return about | {key: getattr(given, key) for key in work} | {"weights": f"checksum {digest(variables):08x}"}


def _make_model(given: ParityArguments) -> tuple[FCN, Any]:
    """Build the network from the options, with the weights file's as defaults, and load the weights."""
    options, num_classes = dict[str, Any](), None
    if given.weights is not None:
        options, num_classes = weights.source_options(weights.inspect(given.weights), given.model)
    chosen = {"encoder": given.encoder, "encoder_norm": given.encoder_norm, "width": given.width}
    options |= {name: value for name, value in chosen.items() if value is not None}
    classes = next(n for n in (given.num_classes, num_classes, 21) if n is not None)
    model = create_model(given.model, classes, precision=given.precision, **options)
    variables = random_variables(model, given.seed)
    return model, variables if given.weights is None else weights.load(given.weights, model, variables)
