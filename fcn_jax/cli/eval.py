"""`fcn-jax eval` and eval.py: score a trained run on a split."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import tyro
from rich.console import Console

from fcn_jax.data.datasets import load
from fcn_jax.data.pipeline import make_eval_batches
from fcn_jax.errors import InputError
from fcn_jax.evaluation.evaluate import PLAIN, Views, evaluate, make_predictor, spread
from fcn_jax.evaluation.figures import save_confusion, save_panel, save_predictions
from fcn_jax.evaluation.report import evaluation_name, score_table
from fcn_jax.training.devices import make_mesh
from fcn_jax.training.run import RunFolder, open_run, write_whole


@dataclass(frozen=True)
class EvalArguments:
    """Score a trained run; each split and way of averaging has a file of its own, RUN/eval.json is the plain one."""

    run: Path
    """The run's folder."""
    checkpoint: str = "best"
    """best (by mean IoU on the validation split), last, or a step's number."""
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


def main(arguments: Sequence[str]) -> int:
    """Evaluate a run, print the scores and write them to a file; the exit code."""
    given = tyro.cli(EvalArguments, prog="eval.py", args=list(arguments))
    if given.batch_size is not None and given.batch_size < 1:
        raise InputError(f"expected --batch-size >= 1, got {given.batch_size}; leave it out for training's")
    views = Views(given.scales, given.flip)
    run = open_run(given.run, given.checkpoint)
    data = run.config.data if given.dir is None else replace(run.config.data, dir=given.dir)
    name = given.split or data.val
    split = load(name, data)
    _check_classes(name, split.class_names, str(given.run), run.dataset.class_names)
    if views != PLAIN:
        data = replace(data, eval_multiple=1)  # an image that is padded has no mirror image
    mesh = make_mesh(jax.devices()[: run.config.devices])
    batches = make_eval_batches(split, data, given.batch_size or run.config.train.eval_batch_size)
    predict = make_predictor(run.model, data.preprocessing, mesh, views)
    result = evaluate(predict, run.variables, batches, split.num_classes, spread(len(split)))
    Console().print(score_table(result.scores, split.class_names, f"step {run.step}, {name}, {views}"))
    folder = RunFolder(given.run)
    file = evaluation_name(name, views, run.config.data.val)
    content = {
        "scores": result.scores.to_json(),
        "class_names": split.class_names,
        "confusion": result.confusion.tolist(),
        "split": name,
        "views": str(views),
        "images": result.images,
        "step": run.step,
    }
    write_whole(folder.path / f"{file}.json", json.dumps(content, indent=2) + "\n")
    save_confusion(folder.figures / f"{file}_confusion.png", result.confusion, split.class_names)
    save_panel(folder.figures / f"{file}_panel.png", result.samples, split.palette, split.class_names)
    save_predictions(folder.figures / f"{file}_predictions.png", result.samples, split.palette, split.class_names)
    print(f"scores in {folder.path / file}.json, figures in {folder.figures}")
    return 0


def _check_classes(name: str, found: tuple[str, ...], run: str, expected: tuple[str, ...]) -> None:
    if found == expected:
        return
    pairs = enumerate(zip(found, expected, strict=False))
    differs = [f"class {index} is {a!r} here and {b!r} in the run" for index, (a, b) in pairs if a != b]
    if len(found) != len(expected):
        differs.append(f"{len(found)} classes here and {len(expected)} in the run")
    more = f" and {len(differs) - 3} more" if len(differs) > 3 else ""
    raise InputError(
        f"{name} has other classes than {run} was trained on: {', '.join(differs[:3])}{more}; "
        "give a split, or a list of classes, with the run's names in the run's order"
    )
