"""The command lines: `fcn-jax COMMAND`, and what train.py and eval.py call."""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import cv2
import jax
import tyro
from rich.console import Console
from rich.table import Table

from fcn_jax.cli.bench import bench as run_benchmark
from fcn_jax.cli.parity import ParityArguments
from fcn_jax.cli.parity import parity as compare
from fcn_jax.cli.port import ExportArguments, PortArguments, export
from fcn_jax.cli.port import port as convert
from fcn_jax.cli.process import Output, guarded, keep_compiled
from fcn_jax.config import Config
from fcn_jax.data.datasets import load
from fcn_jax.data.labels import decode_image
from fcn_jax.data.pipeline import make_eval_batches
from fcn_jax.data.transforms import resize_image
from fcn_jax.errors import InputError, unknown
from fcn_jax.evaluation.evaluate import PLAIN, Views, evaluate, make_predictor, spread
from fcn_jax.evaluation.figures import overlay, save_confusion, save_palette_png, save_panel, save_predictions
from fcn_jax.evaluation.predict import make_image_predictor
from fcn_jax.evaluation.report import score_table
from fcn_jax.models import create_model, summarize
from fcn_jax.recipes import DEFAULT_RECIPE, RECIPES
from fcn_jax.training.devices import make_mesh
from fcn_jax.training.distributed import is_writer, processes
from fcn_jax.training.loop import train
from fcn_jax.training.run import RunFolder, write_whole
from fcn_jax.training.trained import open_trained

__all__ = ["main", "run_eval", "run_port", "run_train"]

Arguments = Sequence[str]
_ABOUT = f"Train a recipe; without one, {DEFAULT_RECIPE}. Any field of it can be overridden."


@dataclass(frozen=True)
class EvalArguments:
    """Score a trained run."""

    run: Path
    """The run's folder."""
    checkpoint: str = "best"
    """best (by mean IU on the validation split), last, or a step's number."""
    split: str | None = None
    """DATASET/SPLIT; by default the run's validation split."""
    dir: str | None = None
    """Folder of the data set, where it is not where it was in training."""
    batch_size: int | None = None
    """Images at once; by default as in training, which gives the same numbers to the last digit."""
    flip: bool = False
    """Average the softmax of the image and of its mirror image."""
    scales: tuple[float, ...] = (1.0,)
    """Average the softmax of the image at these scales, as in 0.75 1 1.25."""


@dataclass(frozen=True)
class PredictArguments:
    """Write a label map and an overlay for each image."""

    images: tyro.conf.Positional[tuple[Path, ...]]
    """Image files of any size."""
    run: Path
    """The run's folder."""
    out: Path
    """Folder to write to."""
    checkpoint: str = "best"
    """best, last, or a step's number."""


@dataclass(frozen=True)
class SummaryArguments:
    """Print the layer table of a network."""

    model: tyro.conf.Positional[str]
    """A name from the catalogue."""
    image_size: tuple[int, int] = (500, 500)
    """Height and width in pixels."""
    num_classes: int = 21
    encoder: Literal["vgg11", "vgg13", "vgg16", "vgg19"] = "vgg16"
    encoder_norm: Literal["batch"] | None = None
    width: float = 1.0


def _plain(message: str) -> str:
    """Make one line of the parser's boxed message: what is wrong, without the help that follows it."""
    lines = [re.sub(r"[│─╭╮╰╯]", " ", line).strip() for line in message.splitlines()]
    wrong: list[str] = []
    for line in lines[1:]:  # the first is the box's title
        if line.startswith(("Perhaps", "Argument helptext", "For full helptext")):
            break
        if line:
            wrong.append(line)
    return f"{' '.join(wrong)}; --help lists what there is"


def _parse(parse: Callable[..., Any], arguments: Arguments, **options: Any) -> Any:
    """Parse a command line; what it cannot read becomes an InputError of one line."""
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            return parse(args=list(arguments), **options)
    except SystemExit as stop:
        if stop.code:
            raise InputError(_plain(message.getvalue())) from None
        raise


def run_train(arguments: Arguments) -> int:
    """Train: [RECIPE] [--field value ...]; without a recipe, `shapes`."""
    if not arguments or arguments[0].startswith("-") and arguments[0] not in ("-h", "--help"):
        arguments = [DEFAULT_RECIPE, *arguments]
    if not arguments[0].startswith("-") and arguments[0] not in RECIPES:
        raise unknown("recipe", arguments[0], RECIPES)
    recipes = {name: (f"{recipe.source}. Score: {recipe.score}", recipe.config) for name, recipe in RECIPES.items()}
    config: Config = _parse(
        lambda args: tyro.extras.overridable_config_cli(recipes, prog="train.py", description=_ABOUT, args=args),
        arguments,
    )
    recipe = RECIPES[arguments[0]]
    # It would take SIGTERM for itself.
    jax.config.update("jax_enable_preemption_service", False)
    with processes(config.distributed, config.num_processes, config.process_id):
        console = Console(quiet=not is_writer(), file=cast(Any, Output()))
        console.print(f"{recipe.name}: {recipe.source}; score there: {recipe.score}", highlight=False)
        train(replace(config, process_id=None), console)
    return 0


def run_eval(arguments: Arguments) -> int:
    """Evaluate a run; prints the scores and writes them to RUN/eval.json."""
    given: EvalArguments = _parse(lambda args: tyro.cli(EvalArguments, prog="eval.py", args=args), arguments)
    if given.batch_size is not None and given.batch_size < 1:
        raise InputError(f"expected --batch-size >= 1, got {given.batch_size}; leave it out for training's")
    trained = open_trained(given.run, given.checkpoint)
    data = trained.config.data if given.dir is None else replace(trained.config.data, dir=given.dir)
    name = given.split or data.val
    split = load(name, data)
    if split.class_names != trained.dataset.class_names:
        raise InputError(
            f"{name} has other classes than {given.run} was trained on; choose a split of {trained.dataset.name}"
        )
    views = Views(given.scales, given.flip)
    if views != PLAIN:
        data = replace(data, eval_multiple=1)  # an image that is padded has no mirror image
    mesh = make_mesh(jax.devices()[: trained.config.devices])
    batches = make_eval_batches(split, data, given.batch_size or trained.config.train.eval_batch_size)
    predict = make_predictor(trained.model, data.preprocessing, mesh, views)
    result = evaluate(predict, trained.variables, batches, split.num_classes, spread(len(split)))
    Console().print(score_table(result.scores, split.class_names, f"step {trained.step}, {name}, {views}"))
    folder = RunFolder(given.run)
    content = {
        "scores": result.scores.to_json(),
        "class_names": split.class_names,
        "confusion": result.confusion.tolist(),
        "split": name,
        "views": str(views),
        "images": result.images,
        "step": trained.step,
    }
    write_whole(folder.path / "eval.json", json.dumps(content, indent=2) + "\n")
    save_confusion(folder.figures / "eval_confusion.png", result.confusion, split.class_names)
    save_panel(folder.figures / "eval_panel.png", result.samples, split.palette, split.class_names)
    save_predictions(folder.figures / "eval_predictions.png", result.samples, split.palette, split.class_names)
    print(f"scores in {folder.path / 'eval.json'}, figures in {folder.figures}")
    return 0


def run_predict(arguments: Arguments) -> int:
    """Predict images with a run's model."""
    given: PredictArguments = _parse(
        lambda args: tyro.cli(PredictArguments, prog="fcn-jax predict", args=args), arguments
    )
    if not given.images:
        raise InputError("no image given; name one or more image files")
    outputs = [(given.out / f"{image.stem}.png", given.out / f"{image.stem}_overlay.png") for image in given.images]
    _check_outputs(given.images, [path for pair in outputs for path in pair])
    trained = open_trained(given.run, given.checkpoint)
    data = trained.config.data
    by_size = make_predictor(trained.model, data.preprocessing)
    any_size = make_image_predictor(trained.model, data.preprocessing)
    try:
        given.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {given.out}: {error.strerror}; name a folder that can be written to") from error
    for path, (out, overlay_out) in zip(given.images, outputs, strict=True):
        image = decode_image(_read(path), str(path))
        if data.input_size is None:
            labels = any_size(trained.variables, image)
        else:
            labels = by_size(trained.variables, resize_image(image, data.input_size)[None], image.shape[:2])[0]
        save_palette_png(out, labels, trained.dataset.palette)
        blended = overlay(image, labels, trained.dataset.palette, trained.dataset.class_names, path.name)
        if not cv2.imwrite(str(overlay_out), cv2.cvtColor(blended, cv2.COLOR_RGB2BGR)):
            raise InputError(f"{overlay_out} could not be written; check the disk")
        print(f"{path}: {image.shape[0]}x{image.shape[1]} -> {out}")
    return 0


def _check_outputs(images: Sequence[Path], outputs: Sequence[Path]) -> None:
    """Raise InputError where an output would overwrite another one or an input."""
    if len(set(outputs)) < len(outputs):
        raise InputError("two of the images share a name and would overwrite each other; predict them into two folders")
    inputs = {image.resolve() for image in images}
    for path in outputs:
        if path.resolve() in inputs:
            raise InputError(f"{path} is one of the images and would be overwritten; choose another --out")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; name an image file") from error


def run_summary(arguments: Arguments) -> int:
    """Print a network's layers: output shapes, parameters, FLOPs."""
    given: SummaryArguments = _parse(
        lambda args: tyro.cli(SummaryArguments, prog="fcn-jax summary", args=args), arguments
    )
    model = create_model(
        given.model, given.num_classes, encoder=given.encoder, encoder_norm=given.encoder_norm, width=given.width
    )
    if min(given.image_size) < 1:
        raise InputError(f"expected --image-size of at least 1 1, got {given.image_size[0]} {given.image_size[1]}")
    rows = summarize(model, given.image_size)
    table = Table(title=f"{given.model}, {given.encoder}, image {given.image_size[0]}x{given.image_size[1]}")
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


def run_port(arguments: Arguments) -> int:
    """Convert weights of torch projects to a file of ours, or back, and say what became of each tensor."""
    given: PortArguments = _parse(lambda args: tyro.cli(PortArguments, prog="fcn-jax port", args=args), arguments)
    convert(given)
    return 0


def run_export(arguments: Arguments) -> int:
    """Write a run's weights to a .safetensors or .pth file, in our names or a torch project's."""
    export(_parse(lambda args: tyro.cli(ExportArguments, prog="fcn-jax export", args=args), arguments))
    return 0


def run_parity(arguments: Arguments) -> int:
    """Compare a network with PyTorch or with itself, layer by layer and step by step."""
    return compare(_parse(lambda args: tyro.cli(ParityArguments, prog="fcn-jax parity", args=args), arguments))


def run_bench(arguments: Arguments) -> int:
    """Measure speed side by side with PyTorch, after checking that both compute the same."""
    return run_benchmark(arguments)


COMMANDS: dict[str, Callable[[Arguments], int]] = {
    "train": run_train,
    "eval": run_eval,
    "predict": run_predict,
    "summary": run_summary,
    "port": run_port,
    "export": run_export,
    "parity": run_parity,
    "bench": run_bench,
}


def _dispatch(arguments: Arguments) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: fcn-jax COMMAND ...; `fcn-jax COMMAND --help` explains one\n")
        for name, command in COMMANDS.items():
            print(f"  {name:10}{(command.__doc__ or '').splitlines()[0]}")
        return 0
    if arguments[0] not in COMMANDS:
        raise unknown("command", arguments[0], COMMANDS)
    return COMMANDS[arguments[0]](arguments[1:])


def main() -> int:
    """Run `fcn-jax COMMAND ...`."""
    keep_compiled()
    return guarded(_dispatch, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
