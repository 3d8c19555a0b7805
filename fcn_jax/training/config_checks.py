"""Validate a config: the types of its fields, as read from JSON, and their ranges."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

from fcn_jax.config import Config, DataConfig, LossConfig
from fcn_jax.errors import InputError, first_line
from fcn_jax.evaluation.padding import MULTIPLE
from fcn_jax.paths import to_path
from fcn_jax.weights import is_published

_LONGEST = 2**20  # pixels per side; more than fits into memory
_SIDES = ("data.base_size", "data.crop_size", "data.input_size", "data.shapes_size")
_AT_LEAST_ONE = (
    *(
        "devices",
        "profile",
        "data.channels",
        "data.shapes_count",
        "train.accumulate",
        "train.batch_size",
        "train.eval_batch_size",
    ),
    *("train.keep_last", "train.log_every", "train.pictures_every", "train.steps", *_SIDES),
)
_AT_LEAST_ZERO = (
    *("data.jitter", "data.workers", "loss.aux_weight", "loss.weight_power", "optim.bias_lr", "optim.head_lr"),
    *("optim.poly_power", "optim.warmup_steps", "optim.weight_decay", "train.seed"),
)
_ABOVE_ZERO = (
    *("data.scale", "loss.hard_fraction", "optim.clip_norm", "optim.lr", "optim.step_every"),
    *("train.epochs", "train.eval_every", "train.keep_every"),
)
# Fields of the data and the data sets that use them.
_READERS = {"val_fraction": ("folder",), "mask_values": ("folder",), "classes": ("folder", "tfds")}
_PATHS = ("run", "init", "init_from", "data.dir", "data.cache_dir", "data.classes")


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return the fields of a config (or of its JSON) by dotted name, as in ``data.crop_size``."""
    values = config if isinstance(config, dict) else dataclasses.asdict(config)
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def convert(values: Any, cls: Any, where: str) -> Any:
    """Rebuild a dataclass from its ``dataclasses.asdict``, read back from JSON.

    Raises:
        InputError: unknown fields or values of the wrong type; the message begins with ``where``.
    """
    import msgspec  # imported here, as the benchmark runs without it

    try:
        converted = msgspec.convert(values, cls)
    except msgspec.ValidationError as error:
        what = first_line(error).replace("`", "").replace(" - at $", ": at $")
        raise InputError(f"{where}: {what}; restore the file or train again") from error
    unknown = sorted(flatten(values).keys() - flatten(converted).keys())
    if unknown:
        raise InputError(
            f"{where} has unknown fields {', '.join(unknown)}; it was written by another version of fcn_jax"
        )
    return converted


def config_from_json(values: Any, where: str = "config.json") -> Config:
    """Rebuild a config from its ``dataclasses.asdict``, read back from JSON.

    Raises:
        InputError: unknown fields or values of the wrong type.
    """
    return convert(values, Config, where)


def loss_terms(config: LossConfig) -> dict[str, float]:
    """Return the factor of each loss by name.

    Raises:
        InputError: a term that is not NAME:FACTOR, or given twice.
    """
    if not config.terms:
        return {config.kind: 1.0}
    found: dict[str, float] = {}
    for term in config.terms:
        name, _, factor = term.partition(":")
        number = float(factor) if re.fullmatch(r"\d*\.?\d*(e-?\d+)?", factor) and re.search(r"\d", factor) else 0.0
        if name in found or not 0 < number < math.inf:
            raise InputError(
                f"expected --loss.terms NAME:FACTOR ..., got {' '.join(config.terms)}; as in softmax:1 dice:0.5"
            )
        found[name] = number
    return found


def check_readers(data: DataConfig, *specs: str) -> None:
    """Raise InputError for a field that none of these data sets, DATASET/SPLIT, uses."""
    used = {spec.partition("/")[0] for spec in specs}
    for field, readers in _READERS.items():
        if getattr(data, field) is not None and used.isdisjoint(readers):
            raise InputError(f"--data.{field.replace('_', '-')} applies only to {' and '.join(readers)}; leave it out")


def check_config(config: Config) -> None:
    """Raise InputError, naming the flag, for the first value that is out of range or conflicts with another."""
    values = flatten(config)

    def check(name: str, holds: Any, expected: str) -> None:
        value = values[name]
        numbers = value if isinstance(value, tuple) else () if value is None else (value,)
        # Sizes and counts beyond 2^62 fit in no array's shape or index.
        most = math.inf if name.startswith("optim.") else 2**62
        if not all(-math.inf < number < most and holds(number) for number in numbers):
            flag = "--" + name.replace("_", "-")
            raise InputError(f"expected {flag} {expected}, got {value}; `train.py RECIPE --help` shows its default")

    for name in _AT_LEAST_ONE:
        check(name, lambda x: x >= 1, ">= 1")
    for name in _AT_LEAST_ZERO:
        check(name, lambda x: x >= 0, ">= 0")
    for name in _SIDES:
        check(name, lambda x: x <= _LONGEST, f"<= {_LONGEST}")
    for name in _ABOVE_ZERO:
        check(name, lambda x: x > 0, "> 0")
    check("loss.hard_fraction", lambda x: x <= 1, "<= 1")
    check("data.mask_values", lambda x: 0 <= x <= 255, "in 0 ... 255")
    if len(set(config.data.mask_values or ())) < len(config.data.mask_values or ()):
        raise InputError(
            f"expected --data.mask-values with a distinct value for each class, got {config.data.mask_values}"
        )
    if config.data.val_fraction is not None and config.data.train == "folder/all":
        raise InputError("--data.train folder/all holds the images that --data.val-fraction draws; give folder/train")
    if config.data.scale[0] > config.data.scale[1]:
        raise InputError(f"expected --data.scale SMALLEST LARGEST, got {config.data.scale}; give the smaller one first")
    check("optim.warmup_steps", lambda x: x < 2**31, "< 2**31")  # counters of steps are int32
    check("data.mean", lambda x: 0 <= x < 2**16, "in 0 ... 65535")
    check("data.std", lambda x: x > 0, "> 0")
    check("data.bits", lambda x: x in (8, 16), "8 or 16")
    for name in ("data.mean", "data.std", "data.bits"):
        if values[name] is not None and config.data.channels is None:
            raise InputError(f"--{name} applies only with --data.channels; give that as well")
        if isinstance(values[name], tuple) and len(values[name]) != config.data.channels:
            raise InputError(
                f"expected --{name} with one number per channel (--data.channels), got {len(values[name])}"
            )
    check("data.val_fraction", lambda x: 0 < x < 1, "between 0 and 1")
    check("optim.momentum", lambda x: 0 <= x < 1, "in 0 ... 1, below 1")
    check("data.eval_multiple", lambda x: x == 1 or (x > 0 and x % MULTIPLE == 0), f"1 or a multiple of {MULTIPLE}")
    loss_terms(config.loss)
    class_weights = config.loss.class_weights
    if not isinstance(class_weights, str):
        check("loss.class_weights", lambda x: x >= 0, ">= 0")
        if not sum(class_weights) > 0:
            raise InputError("expected --loss.class-weights that are not all zero; or give 'median'")
    if config.profile is not None and config.profile[0] > config.profile[1]:
        raise InputError(f"expected --profile FIRST LAST, got {config.profile}; give the earlier step first")
    if config.init is not None and config.init_from is not None:
        raise InputError(
            f"both --init {config.init} and --init-from {config.init_from} are set; set one of them to None"
        )
    for name in _PATHS:
        if values[name] is not None and not (name in ("init", "init_from") and is_published(values[name])):
            to_path(values[name], "--" + name.replace("_", "-"))
