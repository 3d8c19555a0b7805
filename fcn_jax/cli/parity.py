"""The command line `fcn-jax parity`: a network against PyTorch, or against itself computed otherwise."""

from __future__ import annotations

import contextlib
import os
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import jax
import tyro
from rich.console import Console

from fcn_jax import weights
from fcn_jax.compare.compare import PARTS
from fcn_jax.compare.experiments import Case, against_jax, against_torch, random_batch, random_variables
from fcn_jax.compare.parity_report import save_figure, save_json, summary_table, tables
from fcn_jax.config import OptimConfig
from fcn_jax.errors import InputError
from fcn_jax.models import create_model
from fcn_jax.models.fcn import FCN
from fcn_jax.training.devices import pick_devices
from fcn_jax.training.run import environment

__all__ = ["ParityArguments", "parity"]


@dataclass(frozen=True)
class ParityArguments:
    """Compare a network with its PyTorch twin, or with itself computed otherwise: layers, gradients, training."""

    model: tyro.conf.Positional[str]
    """A name from the catalogue."""
    against: Literal["torch", "jax"] = "torch"
    """torch: the twin; jax: pmap, mesh and one device, float32 and float64, precisions, upsampling, remat."""
    dtype: Literal["float64", "float32", "bfloat16"] = "float32"
    precision: Literal["default", "high", "highest"] = "highest"
    """Of JAX's products; the CPU computes all three alike."""
    steps: int = 20
    """Steps of SGD; 0 leaves them out."""
    devices: int | None = None
    """Over how many devices JAX spreads the batch; by default 1, and 2 with --against jax where there are two."""
    image_size: tuple[int, int] = (64, 64)
    """Height and width in pixels."""
    batch_size: int = 2
    num_classes: int | None = None
    """By default 21."""
    weights: str | None = None
    """A .safetensors or .pth file of any known layout, or a pretrained encoder by name; what it lacks, and all without
    it, is drawn at random. What it says of its network (encoder, width ...) is the default below."""
    encoder: Literal["vgg11", "vgg13", "vgg16", "vgg19"] | None = None
    """By default vgg16."""
    encoder_norm: Literal["batch"] | None = None
    width: float | None = None
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    max_error: float | None = None
    """Exit with code 1 where an error is larger. Below float64 errors against torch are those from float64."""
    max_error_of: tuple[Literal["layers", "loss", "gradients", "statistics", "steps"], ...] = PARTS
    """What --max-error is put on."""
    out: Path | None = None
    """Folder for parity.json and parity.png."""
    seed: int = 0


def parity(given: ParityArguments) -> int:
    """Compare, print the tables and write what was asked for; the exit code, 1 where ``max_error`` is passed.

    Raises:
        InputError: the options do not fit.
    """
    _check_parity(given)
    _make_folder(given.out)
    devices = given.devices
    if devices is not None and devices > 1 and "device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # JAX runs already: it has the devices it has
            jax.config.update("jax_num_cpu_devices", devices)
    if given.dtype == "float64" or given.against == "jax":
        jax.config.update("jax_enable_x64", True)
    if devices is None:
        devices = 2 if given.against == "jax" and len(jax.devices()) > 1 and given.batch_size % 2 == 0 else 1
    pick_devices(devices)
    model = _make_model(given)
    variables = random_variables(model, given.seed)
    if given.weights is not None:
        variables = weights.load(given.weights, model, variables)
    images, labels = random_batch(given.image_size, model.num_classes, given.batch_size, given.seed)
    optim = OptimConfig(lr=given.lr, momentum=given.momentum, weight_decay=given.weight_decay)
    case = Case(model, variables, images, labels, given.dtype, given.steps, optim, given.max_error)
    console = Console()
    if given.against == "torch":
        reports = [against_torch(case, devices)]
        for table in tables(reports[0]):
            console.print(table)
        if reports[0].unmatched:
            console.print("on one side only:", ", ".join(reports[0].unmatched))
    else:
        reports = list(against_jax(case, devices))
    console.print(summary_table(reports))
    if given.out is not None:
        about: dict[str, Any] = {
            "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(given).items()}
        }
        about |= {"versions": environment(), "devices": devices}
        if given.against == "torch":
            about["versions"]["torch"] = metadata.version("torch")
        try:
            save_json(given.out / "parity.json", reports, about)
            save_figure(given.out / "parity.png", reports)
        except OSError as error:
            raise _unwritable(given.out, error) from error
        print(f"numbers in {given.out / 'parity.json'}, picture in {given.out / 'parity.png'}")
    if given.max_error is None:
        return 0
    passed = [
        f"{report.ours} | {report.theirs}: {name} {error:.1e}"
        for report in reports
        for part in given.max_error_of
        for name, error in report.errors(part).items()
        if not error <= given.max_error
    ]
    if not any(report.errors(part) for report in reports for part in given.max_error_of):
        raise InputError(f"nothing was compared of {', '.join(given.max_error_of)}; name other parts in --max-error-of")
    for line in passed[:10]:
        print(f"over {given.max_error:g}: {line}")
    if len(passed) > 10:
        print(f"and {len(passed) - 10} more")
    return 1 if passed else 0


def _make_model(given: ParityArguments) -> FCN:
    """Build the network: as the weights' file says it, where it does, and as the options say."""
    options: dict[str, Any] = {}
    num_classes = None
    if given.weights is not None:
        options, num_classes = weights.source_options(weights.inspect(given.weights), given.model)
    chosen = {"encoder": given.encoder, "encoder_norm": given.encoder_norm, "width": given.width}
    options |= {name: value for name, value in chosen.items() if value is not None}
    classes = next(n for n in (given.num_classes, num_classes, 21) if n is not None)
    return create_model(given.model, classes, precision=given.precision, **options)


def _make_folder(folder: Path | None) -> None:
    """Make what results go into before hours are spent on them."""
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path | None, error: OSError) -> InputError:
    return InputError(f"--out {folder}: {error.strerror}; name a folder that can be written to")


def _check_parity(given: ParityArguments) -> None:
    if given.steps < 0:
        raise InputError(f"expected --steps >= 0, got {given.steps}; 0 leaves training out")
    if min(given.image_size) < 1 or given.batch_size < 1:
        raise InputError("expected --image-size and --batch-size of at least 1")
    if given.max_error is not None and not given.max_error >= 0:
        raise InputError(f"expected --max-error >= 0, got {given.max_error}; leave it out to compare without a limit")
    if given.batch_size % (given.devices or 1):
        raise InputError(
            f"--batch-size {given.batch_size} does not split over {given.devices} devices; give a multiple"
        )
