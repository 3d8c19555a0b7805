"""`fcn-jax train` and train.py: [RECIPE] [--field value ...], or --resume RUN."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import jax
import tyro
from rich.console import Console

from fcn_jax.cli.process import Output
from fcn_jax.config import Config
from fcn_jax.errors import InputError, unknown
from fcn_jax.recipes import DEFAULT_RECIPE, RECIPES
from fcn_jax.training.distributed import is_writer, processes
from fcn_jax.training.loop import train
from fcn_jax.training.run import RunFolder, lengthened

_ABOUT = (
    f"Train a recipe, by default {DEFAULT_RECIPE}. Any field of it can be overridden. The same command again resumes "
    "the run. So does --resume RUN, which takes all settings from the run's config.json; with --train.steps or "
    "--train.epochs it also changes the length of the run."
)


def main(arguments: Sequence[str]) -> int:
    """Train; the exit code."""
    arguments = list(arguments)
    resumes = [index for index, argument in enumerate(arguments) if argument.partition("=")[0] == "--resume"]
    config, title = _config_of_run(arguments, resumes[0]) if resumes else config_of_recipe(arguments)
    jax.config.update("jax_enable_preemption_service", False)  # it would handle SIGTERM itself
    with processes(config.distributed, config.num_processes, config.process_id):
        console = Console(quiet=not is_writer(), file=cast(Any, Output()))
        console.print(title, highlight=False)
        train(replace(config, process_id=None), console, lengthen=bool(resumes))
    return 0


def config_of_recipe(arguments: list[str]) -> tuple[Config, str]:
    """Return the config that ``[RECIPE] [--field value ...]`` asks for, and a line about the recipe."""
    if not arguments or arguments[0].startswith("-") and arguments[0] not in ("-h", "--help"):
        arguments = [DEFAULT_RECIPE, *arguments]
    if not arguments[0].startswith("-") and arguments[0] not in RECIPES:
        raise unknown("recipe", arguments[0], RECIPES)
    recipes = {name: (f"{recipe.source}. Score: {recipe.score}", recipe.config) for name, recipe in RECIPES.items()}
    config = tyro.extras.overridable_config_cli(recipes, prog="train.py", description=_ABOUT, args=arguments)
    recipe = RECIPES[arguments[0]]
    return config, f"{recipe.name}: {recipe.source}; score: {recipe.score}"


def _config_of_run(arguments: list[str], index: int) -> tuple[Config, str]:
    """Return a run's config, with the fields that the other arguments override, and a title."""
    flag, _, run = arguments.pop(index).partition("=")
    if not run:
        if index == len(arguments) or arguments[index].startswith("-"):
            raise InputError(f"{flag} needs the folder of a run, as in {flag} runs/shapes")
        run = arguments.pop(index)
    before = replace(RunFolder(run).read_config()[0], run=run)
    config = tyro.cli(Config, default=before, prog=f"train.py --resume {run}", description=_ABOUT, args=arguments)
    if config.run != run:
        way_out = f"leave out --run {config.run}, or start it with the same weights: --init-from {run}"
        raise InputError(f"{flag} {run} continues that run; {way_out}")
    return lengthened(before, config), f"resuming {run}: {config.model.name} on {config.data.train}"
