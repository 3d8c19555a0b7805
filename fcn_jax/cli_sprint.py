"""The command line `fcn-jax sprint`; `python -m fcn_jax.cli_sprint` is the same where less is installed.

It trains a recipe from memory, scores it, and leaves a folder of small files. It needs jax, flax, optax, NumPy and
OpenCV (Pillow, too, for JPEG images); curves and confusion matrices are drawn where matplotlib is.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import shlex
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import cv2

from fcn_jax.arguments import Parser, override
from fcn_jax.benchmarks.machine import describe
from fcn_jax.config import Config
from fcn_jax.data.memory import MemorySplit, read
from fcn_jax.errors import InputError, Stopped, unknown
from fcn_jax.evaluation.evaluate import PLAIN, Evaluation, Views
from fcn_jax.evaluation.figures import save_confusion, save_curves, save_montage
from fcn_jax.process import guarded, keep_compiled
from fcn_jax.recipes import RECIPES
from fcn_jax.runs import seconds_since_start, write_whole
from fcn_jax.training.in_memory import Row, check_in_memory, make_score, train_in_memory

__all__ = ["main", "sprint"]

_VIEWS = (PLAIN, Views(flip=True), Views(scales=(0.75, 1.0, 1.25), flip=True))
_RESULTS = "results.json"


def _parser() -> Parser:
    parser = Parser(
        "fcn-jax sprint",
        description="Train a recipe from memory, score it, and write scores, curves and pictures to a folder.",
        epilog="Any field of the recipe can be set as in train.py, e.g. --train.epochs 20 --optim.lr 0.1",
        allow_abbrev=False,
    )
    parser.add_argument("recipe", help=f"one of: {', '.join(RECIPES)}")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder for what is written")
    parser.add_argument(
        "--test",
        metavar="DATASET/SPLIT",
        help="also score this split at the end: once for each result that is reported",
    )
    return parser


def sprint(arguments: Sequence[str]) -> int:
    """Train, score, write.

    Raises:
        InputError: the options do not fit, the data cannot be read, nothing can be written, or the loss is not finite.
        Stopped: by Ctrl-C.
    """
    if arguments and arguments[0].startswith("-") and arguments[0] not in ("-h", "--help"):
        raise InputError(f"expected a recipe before {arguments[0]}, as in: fcn-jax sprint camvid --out DIR")
    given, fields = _parser().parse_known_args(list(arguments))
    if given.recipe not in RECIPES:
        raise unknown("recipe", given.recipe, RECIPES)
    recipe = RECIPES[given.recipe].config
    # A recipe's workers are processes of another pipeline.
    config = override(replace(recipe, data=replace(recipe.data, workers=0)), fields)
    check_in_memory(config)
    if _holds_scores(given.out):
        raise InputError(f"--out {given.out} holds the results of another run; name a new folder")
    try:
        return _sprint(config, given.out, given.test, shlex.join(["fcn-jax", "sprint", *arguments]))
    except KeyboardInterrupt:
        kept = f"rows up to the last validation are in {given.out}, nothing else"
        raise Stopped(f"stopped; {kept}, and the same command starts anew", signal.SIGINT) from None


def _sprint(config: Config, out: Path, test: str | None, command: str) -> int:
    cv2.setNumThreads(1)  # images are shared out to threads, not the parts of one
    out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "command": command,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **describe(against_torch=False),
        "config": asdict(config),
        "scores": {},
    }
    names = [config.data.val, *([test] if test else [])]
    train, *splits = (read(name, config.data) for name in (config.data.train, *names))
    for name, split in zip((config.data.train, *names), (train, *splits), strict=True):
        if split.class_names != train.class_names:
            raise InputError(f"{config.data.train} and {name} have different classes; choose splits that share them")
        if split.skipped:
            say(f"note: {name}: {len(split.skipped)} images are left out, as {split.skipped[0]}")
    _save(out, record)  # a folder that cannot be written to shows now
    devices = ", ".join(record["hardware"]["jax_devices"])
    say(f"{len(train)} images to train on, in {config.model.dtype} on {devices}")

    def keep(rows: Sequence[Row]) -> None:
        write_whole(out / "metrics.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows))

    score = make_score(config, train.num_classes)
    trained = train_in_memory(config, train, splits[0], score, say, keep)
    record |= {"steps": trained.steps, "images_per_second": trained.images_per_second}
    record["seconds"] = {"in_steps": trained.seconds, "until_trained": seconds_since_start()}
    _save(out, record)
    for name, split in zip(names, splits, strict=True):
        # Of many sizes, each would be compiled for each of the views.
        found = {
            views: score(trained.variables, split, views) for views in (_VIEWS[:1] if split.many_sizes else _VIEWS)
        }
        record["scores"][name] = {
            str(views): {**each.scores.to_json(), "confusion": each.confusion.tolist()} for views, each in found.items()
        }
        record["seconds"]["until_scored"] = seconds_since_start()
        _save(out, record)
        for views, each in found.items():
            say(f"{name}, {views}: mean IU {each.scores.mean_iu:.4f}, pixels {each.scores.pixel_accuracy:.4f}")
        _write_split(out, name.replace("/", "-"), split, found)
    if _can_draw():
        save_curves(out / "curves.png", trained.rows)
    else:
        say("note: matplotlib is not installed: no curves.png, no confusion matrices; the numbers are in the files")
    rate = "" if trained.images_per_second is None else f"{trained.images_per_second:.1f} images/s; "
    say(f"{rate}{seconds_since_start():.0f} s in all; results in {out}")
    return 0


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


def _can_draw() -> bool:
    try:
        return importlib.util.find_spec("matplotlib") is not None
    except ValueError:  # a module that is put out of reach
        return False


def _holds_scores(out: Path) -> bool:
    try:
        return bool(json.loads((out / _RESULTS).read_text())["scores"])
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _save(out: Path, record: Mapping[str, Any]) -> None:
    write_whole(out / _RESULTS, json.dumps(record, indent=2) + "\n")


def _write_split(out: Path, name: str, split: MemorySplit, found: Mapping[Views, Evaluation]) -> None:
    with (out / f"{name}_iu.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["class", *map(str, found)])
        for index, class_name in enumerate(split.class_names):
            writer.writerow([class_name, *(f"{each.scores.per_class_iu[index]:.6f}" for each in found.values())])
    save_montage(out / f"{name}_panel.png", found[PLAIN].samples, split.palette)
    if _can_draw():
        save_confusion(out / f"{name}_confusion.png", found[PLAIN].confusion, split.class_names)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; a user's mistake becomes one line on stderr and exit code 2."""
    keep_compiled()
    return guarded(sprint, sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    sys.exit(main())
