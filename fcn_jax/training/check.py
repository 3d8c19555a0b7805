"""The ranges of a run's numbers, checked before anything is read or written."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from fcn_jax.config import Config
from fcn_jax.errors import InputError
from fcn_jax.evaluation.padding import MULTIPLE

__all__ = ["check_config"]

# Least value of each number, and of each entry of a pair; None in the config is not checked.
_AT_LEAST: dict[str, float] = {
    "devices": 1,
    "data.base_size": 1,
    "data.crop_size": 1,
    "data.input_size": 1,
    "data.jitter": 0,
    "data.shapes_count": 1,
    "data.shapes_size": 16,
    "data.workers": 0,
    "loss.aux_weight": 0,
    "loss.weight_power": 0,
    "optim.bias_lr": 0,
    "optim.head_lr": 0,
    "optim.poly_power": 0,
    "optim.warmup_steps": 0,
    "train.accumulate": 1,
    "train.batch_size": 1,
    "train.eval_batch_size": 1,
    "train.keep_last": 1,
    "train.log_every": 1,
    "train.pictures_every": 1,
    "train.seed": 0,
    "train.steps": 1,
}
_LONGEST = 2**20  # pixels of a side; no memory holds such an image
_ABOVE_ZERO = ("data.scale", "optim.step_every", "train.epochs", "train.eval_every", "train.keep_every")


def check_config(config: Config) -> None:
    """Raise InputError for the first number that is out of its range, naming its flag."""
    for name, least in _AT_LEAST.items():
        _check(config, name, lambda number, least=least: number >= least, f">= {least:g}")
    for name in _ABOVE_ZERO:
        _check(config, name, lambda number: number > 0, "> 0")
    for name in ("data.base_size", "data.crop_size", "data.input_size", "data.shapes_size"):
        _check(config, name, lambda number: number <= _LONGEST, f"<= {_LONGEST}")
    multiple = config.data.eval_multiple
    if multiple != 1 and (multiple < 1 or multiple % MULTIPLE):
        raise InputError(f"expected --data.eval-multiple 1 or a multiple of {MULTIPLE}, got {multiple}")
    weights = config.loss.class_weights
    if not isinstance(weights, str) and not (all(0 <= w < math.inf for w in weights) and sum(weights) > 0):
        raise InputError(f"expected --loss.class-weights >= 0 and not all zero, got {weights}; or give 'median'")


def _check(config: Config, name: str, holds: Any, wanted: str) -> None:
    value: Any = config
    for part in name.split("."):
        value = {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}[part]
    numbers = value if isinstance(value, tuple) else () if value is None else (value,)
    # Larger numbers fit in no array, wherever they would come to one.
    if not all(-math.inf < number < 2**62 and holds(number) for number in numbers):
        flag = "--" + name.replace("_", "-")
        raise InputError(f"expected {flag} {wanted}, got {value}; `train.py RECIPE --help` shows its default")
