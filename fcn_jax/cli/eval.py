"""`fcn-jax eval` and eval.py: score a trained network on a split."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from rich.console import Console

from fcn_jax.cli.network import NetworkArguments, open_network
from fcn_jax.cli.process import OutputPath, make_folder
from fcn_jax.config import Config, DataConfig
from fcn_jax.data.datasets import load
from fcn_jax.data.pipeline import make_eval_batches
from fcn_jax.devices import check_height, height_unit, make_mesh, pick_mesh
from fcn_jax.errors import InputError
from fcn_jax.evaluation.boundary import boundary_iou
from fcn_jax.evaluation.evaluate import PLAIN, Views, evaluate, make_predictor, spread
from fcn_jax.evaluation.figures import save_class_scores, save_confusion, save_panel, save_predictions
from fcn_jax.evaluation.report import evaluation_name, score_table
from fcn_jax.metrics import mean_of_defined, plain
from fcn_jax.models.fcn import check_size
from fcn_jax.paths import write_whole
from fcn_jax.preprocessing import preprocessing_of
from fcn_jax.pretrained import NetworkInfo
from fcn_jax.training.run import RunFolder
from fcn_jax.training.trainer import check_bits


@dataclass(frozen=True)
class EvalArguments:
    """Score a trained network. RUN/eval.json is for the validation split; other splits and views have own files."""

    network: Annotated[NetworkArguments, tyro.conf.arg(name="")] = field(default_factory=NetworkArguments)
    split: str | None = None
    """DATASET/SPLIT; by default the run's validation split."""
    out: OutputPath | None = None
    """Folder for the scores and figures; by default the run's. With --weights and no --out only a table is printed."""
    dir: str | None = None
    """Folder of the data set; by default as in training."""
    mesh: str | None = None
    """Mesh axes over which images are split, as in training, e.g. data=2,space=2; by default data over all devices."""
    batch_size: int | None = None
    """Images per batch; by default as in training, which reproduces its scores exactly."""
    boundary: int | None = None
    """Also compute boundary IoU: the IoU of the pixels within this distance (pixels) of each class's boundary."""
    flip: bool = False
    """Average the softmax over the image and its mirror image."""
    scales: tuple[float, ...] = (1.0,)
    """Average the softmax over the image at these scales, as in 0.75 1 1.25."""


def main(arguments: Sequence[str]) -> int:
    """Evaluate a run, print the scores and write them to a file; the exit code."""
    given = tyro.cli(EvalArguments, prog="eval.py", args=list(arguments))
    if given.batch_size is not None and given.batch_size < 1:
        raise InputError(f"expected --batch-size >= 1, got {given.batch_size}; leave it out to use that of training")
    if given.boundary is not None and not 1 <= given.boundary <= 1000:
        raise InputError(f"expected --boundary in 1 ... 1000 pixels, got {given.boundary}")
    views = Views(given.scales, given.flip)
    if given.out is not None:
        make_folder(given.out)
    model, variables, info = open_network(given.network)
    folder = given.network.run
    options: dict[str, Any] = {"preprocessing": info.preprocessing, "input_size": info.input_size}
    config = Config(data=DataConfig(**options)) if folder is None else RunFolder(folder).read_config()[0]
    if folder is None and given.split is None:
        raise InputError("weights do not come with a validation split; give --split DATASET/SPLIT, or a run as --run")
    data = config.data if given.dir is None else replace(config.data, dir=given.dir)
    name = given.split or data.val
    split = load(name, data)
    _check_classes(name, split.class_names, info)
    check_bits(config, split)
    if views != PLAIN:
        data = replace(data, eval_multiple=1)  # the mirror image of a padded image is padded on the wrong side
    mesh = make_mesh(jax.devices()[: config.devices]) if given.mesh is None else pick_mesh(given.mesh)
    unit = height_unit(mesh)
    if views != PLAIN or data.input_size is not None:  # images that are not padded
        check_height((data.input_size or split.image_size or (None,))[0], mesh, "leave space out")
        unit = 1
    elif unit > 1 and split.image_size is not None:
        check_size(model, split.image_size)  # before padding hides it
    batches = make_eval_batches(split, data, given.batch_size or config.train.eval_batch_size, divisor=unit)
    predict = make_predictor(model, preprocessing_of(data), mesh, views)
    result = evaluate(predict, variables, batches, split.num_classes, spread(len(split)), given.boundary)
    by_class = {"IoU": result.scores.per_class_iu, "Dice": result.scores.per_class_dice}
    if result.boundary is not None:
        by_class["boundary IoU"] = boundary_iou(result.boundary)
    of = info.source if info.step is None else f"step {info.step}"
    title = f"{of}, {name}, {views}"
    Console().print(score_table(result.scores, split.class_names, title, by_class.get("boundary IoU")))
    out = given.out or folder
    if out is None:
        return 0
    file = evaluation_name(name, views, None if folder is None else config.data.val)
    content = {
        "scores": result.scores.to_json(),
        "boundary": _boundary(given.boundary, by_class.get("boundary IoU")),
        "class_names": split.class_names,
        "confusion": result.confusion.tolist(),
        "split": name,
        "views": str(views),
        "images": result.images,
        "source": info.source,
        "step": info.step,
    }
    results = RunFolder(out)
    write_whole(results.local / f"{file}.json", json.dumps(content, indent=2) + "\n")
    figures = results.figures
    save_confusion(figures / f"{file}_confusion.png", result.confusion, split.class_names)
    save_class_scores(figures / f"{file}_classes.png", split.class_names, by_class)
    save_panel(figures / f"{file}_panel.png", result.samples, split.palette, split.class_names)
    save_predictions(figures / f"{file}_predictions.png", result.samples, split.palette, split.class_names)
    results.upload()
    print(f"scores in {results.path / file}.json, figures in {results.path / figures.name}")
    return 0


def _boundary(pixels: int | None, iou: np.ndarray | None) -> dict[str, Any] | None:
    if iou is None:
        return None
    return {"pixels": pixels, "mean_iu": plain(mean_of_defined(iou)), "per_class_iu": plain(iou)}


def _check_classes(name: str, found: tuple[str, ...], info: NetworkInfo) -> None:
    expected = info.class_names
    if found == expected or (not info.named and len(found) == len(expected)):
        return
    pairs = enumerate(zip(found, expected, strict=False)) if info.named else ()
    differs = [f"class {index} is {a!r} here and {b!r} in the network" for index, (a, b) in pairs if a != b]
    if len(found) != len(expected):
        differs.append(f"{len(found)} classes here and {len(expected)} in the network")
    more = f" and {len(differs) - 3} more" if len(differs) > 3 else ""
    raise InputError(
        f"{name} has other classes than {info.source} was trained on: {', '.join(differs[:3])}{more}; "
        "give a split, or a list of classes, with the network's names in its order"
    )
