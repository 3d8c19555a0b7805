"""`fcn-jax export`: a trained network as weights, as a program that runs without fcn_jax, or for the hub."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro

from fcn_jax import export, weights
from fcn_jax.cli.network import NetworkArguments, open_network
from fcn_jax.cli.process import OutputPath, check_not_source, make_folder
from fcn_jax.errors import InputError
from fcn_jax.models.catalog import describe_model
from fcn_jax.models.fcn import FCN
from fcn_jax.paths import to_path
from fcn_jax.pretrained import NetworkInfo, check_hub_folder, write_hub_files

Format = Literal["safetensors", "pth", "onnx", "stablehlo", "hub"]
FILES = ("safetensors", "pth", "onnx", "stablehlo")


@dataclass(frozen=True)
class ExportArguments:
    """Write a trained network's weights, or a program that runs without fcn_jax."""

    out: OutputPath
    """The file, or the folder of --format hub."""
    network: Annotated[NetworkArguments, tyro.conf.arg(name="")] = field(default_factory=NetworkArguments)
    format: Format | None = None
    """safetensors, pth: weights. onnx, stablehlo: a program with the weights inside, which is run and compared with the
    network before it is written. hub: a folder with model.safetensors, config.json and a model card, which
    `hf upload OWNER/REPO FOLDER` uploads and --weights hf://OWNER/REPO reads. By default the suffix of --out."""
    layout: str = "fcn_jax"
    """Names of the weights: fcn_jax (those of the PyTorch twin), or those of a PyTorch project."""
    image_size: tuple[int, int] | None = None
    """Height and width of a program's images. ONNX needs it, and so do networks that interpolate; other StableHLO
    programs take any size. By default the size that the network resizes its images to, if it does."""
    preprocess: bool = False
    """A program takes RGB images as they are read, uint8, rather than normalised float32 images."""
    argmax: bool = False
    """A program returns classes, uint8 (b, h, w), rather than logits, float32 (b, h, w, classes)."""


def main(arguments: Sequence[str]) -> int:
    """Write the file; the exit code."""
    given = tyro.cli(ExportArguments, prog="fcn-jax export", args=list(arguments))
    form = given.format or _format_of(given.out)
    is_hub, is_program = form == "hub", form in ("onnx", "stablehlo")
    file = given.out / "model.safetensors" if is_hub else given.out
    if not is_hub and _format_of(file) != form:
        raise InputError(f"{file}: expected a name that ends in .{form}, as --format says")
    if (is_hub or is_program) and given.layout != "fcn_jax":
        raise InputError(f"--format {form} has the names of fcn_jax; leave out --layout {given.layout}")
    if given.image_size and min(given.image_size) < 1:
        raise InputError(f"--image-size {given.image_size[0]} {given.image_size[1]}: expected two positive numbers")
    if not is_program and (given.image_size or given.preprocess or given.argmax):
        raise InputError(f"--image-size, --preprocess and --argmax are of programs; {form} has weights alone")
    if given.network.weights is not None:
        for source in (Path(given.network.weights), Path(given.network.weights, file.name)):
            check_not_source(file, source)
    if is_hub:
        check_hub_folder(given.out)
    make_folder(file.parent)
    model, variables, info = open_network(given.network)
    step = "" if info.step is None else f", step {info.step}"
    what = f"{describe_model(model)[0]} of {info.source}{step}"
    if is_program:
        size = given.image_size or info.input_size
        options = {"preprocess": given.preprocess, "argmax": given.argmax, "size": size}
        names = tuple(info.class_names)
        program = export.make_program(model, variables, info.preprocessing, **options, class_names=names)
        _print_program(what, file, program, export.write(file, program, form))
        return 0
    if not isinstance(info.preprocessing, str):
        raise InputError(
            f"{info.source} takes images with {len(info.preprocessing.mean)} channels, and {form} cannot say how they "
            "are normalised; use --format onnx or stablehlo"
        )
    classes = {"class_names": info.class_names, "palette": info.palette, "input_size": info.input_size}
    said = info.preprocessing if info.preprocessing_known else None
    weights.save(file, model, variables, said, given.layout, classes if info.named else None)
    if is_hub:
        write_hub_files(given.out, model, info, _scores(given.network.run, info))
    print_written(f"{what}, in the names of {given.layout}: {given.out}", model, variables, given.layout)
    return 0


def _format_of(file: Path) -> str:
    """Return the format that the suffix of a file's name says."""
    suffix = {".pt": "pth"}.get(file.suffix, file.suffix[1:])
    if suffix not in FILES:
        raise InputError(
            f"{file}: expected a name that ends in {', '.join(f'.{name}' for name in FILES)}; or --format hub"
        )
    return suffix


def _print_program(what: str, file: Path, program: export.Program, difference: float) -> None:
    h, w = program.size or ("h", "w")
    images = f"images {program.dtype} (b, {h}, {w}, {program.channels})"
    if not program.preprocess:
        images += f", normalised by {program.preprocessing}"
    classes = program.model.num_classes
    result = f"classes uint8 (b, {h}, {w})" if program.argmax else f"logits float32 (b, {h}, {w}, {classes})"
    print(f"{what}: {file}, {file.stat().st_size / 1e6:.1f} MB; {images} -> {result}")
    compared = "how far the chosen class lies below the largest logit" if program.argmax else "largest difference"
    print(f"compared with the network on random images: {compared} {difference:.1e}")
    if file.suffix == ".stablehlo":
        until = datetime.date.today() + datetime.timedelta(days=182)
        print(
            f"for {', '.join(export.PLATFORMS)}; JAX reads it for six months after releasing {jax.__version__}, "
            f"not beyond {until}: export again then"
        )


def _scores(run: str | None, info: NetworkInfo) -> dict[str, Any]:
    """Return the scores for a model card: those of RUN/eval.json where it is of this step, or the published one."""
    if run is None:
        return {"published mean IoU": info.score} if info.score else {}
    try:
        saved = json.loads((to_path(run, "--run") / "eval.json").read_text())
        if saved["step"] != info.step:
            return {}
        return {"split": saved["split"], **{name: saved["scores"][name] for name in ("mean_iu", "pixel_accuracy")}}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def print_written(what: str, model: FCN, variables: Mapping[str, Any], layout: str) -> None:
    """Print what was written, and which parameters no network of the layout takes."""
    print(what)
    left_out = weights.left_out(model, variables, layout)
    if left_out:
        print(f"not written, since no network of {layout} takes them: {', '.join(left_out)}")
