"""What a run starts from: another network of the family, weights of a file, or random ones."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fcn_jax import weights
from fcn_jax.config import Config
from fcn_jax.errors import InputError
from fcn_jax.models import create_model, init_variables
from fcn_jax.models.catalog import describe_model
from fcn_jax.models.fcn import FCN, ScoreFCN
from fcn_jax.training.trained import open_trained
from fcn_jax.weights.names import COUNTER

__all__ = ["start"]

# What a network of another stride, or of other classes, has otherwise or not at all; all the rest has to be there.
_NEW = ("score_*", "upscore*", "classifier.*", "head.score.*", "aux.*")
# Options whose difference shows in the shapes, changes training alone, or goes with the stride.
_FREE = frozenset(
    {"encoder", "encoder_norm", "width", "fc_features", "fc6_kernel", "head_features", "aux_head"}
    | {"dropout", "dropout_rate", "crop", "skip_bias", "upsample_bias"}
)
# 'At once' needs scales far below 1: the reference has 0.01 and 0.0001.
_AT_ONCE = 0.1


def start(
    config: Config, model: FCN, resuming: bool = False, opened: Mapping[str, weights.Tensors] | None = None
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Make a run's first variables, and notes for its user: what they are from and what may go wrong with them.

    Args:
        config: ``init`` or ``init_from``; with neither, weights are random.
        model: the network to fill.
        resuming: a checkpoint will replace them, so that nothing is read.
        opened: sources that are open already, by their names in the config.

    Raises:
        InputError: both are given, or the weights do not fit the network, or its preprocessing.
    """
    size = config.data.crop_size or config.data.input_size or (64, 64)
    variables = init_variables(model, jax.random.key(config.train.seed), size)
    if config.init is not None and config.init_from is not None:
        raise InputError(
            f"both --init {config.init} and --init-from {config.init_from} are set; set one of them to None"
        )
    if resuming:
        return variables, ()
    if config.init_from is not None:
        return _carry_over(config, model, variables, config.init_from, opened or {})
    if config.init is not None:
        filled, report = weights.load_with_report((opened or {}).get(config.init, config.init), model, variables)
        _check_preprocessing(config, report.preprocessing, config.init)
        return filled, (_account(config.init, report), *_warnings(model, filled))
    if config.model.freeze_encoder:
        return variables, ("the encoder is frozen at its random start: give --init or --init-from",)
    return variables, ()


@dataclass(frozen=True)
class _Origin:
    """What is carried over."""

    tensors: weights.Source
    preprocessing: str | None
    model: FCN | None
    """The network that it is of, where that is known."""


def _carry_over(
    config: Config, model: FCN, variables: dict[str, Any], given: str, opened: Mapping[str, weights.Tensors]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Take by name what another network of the family has; allow for new scores and upsampling."""
    origin = _open(given, model, opened)
    if origin.model is not None and type(origin.model) is not type(model):
        names = [describe_model(network)[0] for network in (origin.model, model)]
        raise InputError(f"--init-from {given}: {names[0]} is of another family than {names[1]}; choose one of its own")
    _check_preprocessing(config, origin.preprocessing, given)
    try:
        filled, report = weights.load_with_report(origin.tensors, model, variables, _NEW, ["*"])
    except InputError as error:
        what = str(error).removeprefix("the dict: ").partition("; ")[0]
        raise InputError(
            f"--init-from {given}: {what}; give both networks the same encoder, width and features"
        ) from error
    return filled, (_account(given, report), *_differences(origin.model, model), *_warnings(model, filled))


def _open(given: str, model: FCN, opened: Mapping[str, weights.Tensors]) -> _Origin:
    """Open a run or a file; a published network's tensors come back under our names."""
    path = Path(given)
    if path.is_dir():
        trained = open_trained(given, "best")
        tensors = weights.to_torch(trained.model, trained.variables)
        return _Origin(tensors, trained.config.data.preprocessing, trained.model)
    if not path.exists() and given not in weights.PRETRAINED:
        raise InputError(f"--init-from {given}: no such run or file; train the run that it names first, or give a file")
    source = opened[given] if given in opened else weights.open_source(given)
    info = weights.inspect(source)
    if info.fit is None:
        return _Origin(source, info.preprocessing, None)
    # The names of a published network depend on its stride, so it is read as what it is first.
    name, classes = info.fit.models[0], info.fit.num_classes or model.num_classes
    own = create_model(name, classes, **info.fit.options)
    if type(own) is not type(model):
        return _Origin(source, info.preprocessing, own)
    same = {name: getattr(model, name) for name in ("width", "fc_features", "head_features") if hasattr(model, name)}
    own = create_model(name, classes, **{**same, **info.fit.options})
    shapes = jax.eval_shape(partial(init_variables, own), jax.random.key(0))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return _Origin(weights.to_torch(own, weights.load(source, own, zeros)), info.preprocessing, own)


def _account(given: str, report: weights.Report) -> str:
    new, unused = _layers(report.left, report.filled), _layers(report.ignored, report.filled.values())
    return f"from {given}: {len(report.filled)} arrays; new: {new}; unused: {unused}"


def _layers(names: Iterable[str], others: Collection[str]) -> str:
    """Join names by layer; of a layer that ``others`` has a part of, tell the part."""
    parts = {name.rpartition(".")[0] for name in others}
    told = (
        name if name.rpartition(".")[0] in parts else name.rpartition(".")[0]
        for name in names
        if not name.endswith(COUNTER)
    )
    return ", ".join(dict.fromkeys(told)) or "nothing"


def _differences(source: FCN | None, model: FCN) -> tuple[str, ...]:
    """Warn of what the two networks compute otherwise with the same weights."""
    if source is None:
        return ()
    theirs, ours = describe_model(source)[1], describe_model(model)[1]
    differs = [f"{key} {theirs[key]} (here {ours[key]})" for key in ours.keys() - _FREE if theirs[key] != ours[key]]
    return (f"the weights come from a network with {', '.join(sorted(differs))}",) if differs else ()


def _warnings(model: FCN, variables: dict[str, Any]) -> tuple[str, ...]:
    """Warn where an 8s has untrained scores on a trained encoder.

    At-once scales (the reference's voc-fcn8s-atonce), or score layers that a 16s has trained, keep the features of
    pool3, which are far larger, from drowning the rest; batch norm makes them of one size.
    """
    if not isinstance(model, ScoreFCN) or model.stride != 8 or model.encoder_norm is not None:
        return ()
    untrained = not np.any(variables["params"]["score_fr"]["kernel"])  # zero is where score layers start
    if not untrained or max(model.skip_scales) <= _AT_ONCE:
        return ()
    return (
        "an 8s that starts from an encoder alone learns little: train a 32s and a 16s before and give --init-from, "
        "or set --model.skip-scales 0.01 0.0001",
    )


def _check_preprocessing(config: Config, expected: str | None, source: str) -> None:
    if expected is not None and expected != config.data.preprocessing:
        raise InputError(
            f"{source} expects {expected} preprocessing, the run has {config.data.preprocessing}; "
            f"set --data.preprocessing {expected}"
        )
