"""What a run starts from: another network of the family, weights of a file, or random ones."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from fcn_jax import weights
from fcn_jax.config import Config
from fcn_jax.errors import InputError
from fcn_jax.models import MODELS, create_model, init_variables
from fcn_jax.models.fcn import FCN, ScoreFCN
from fcn_jax.training.trained import open_trained
from fcn_jax.weights.names import COUNTER

__all__ = ["start"]

# What a network of another stride, or of other classes, has otherwise or not at all; all the rest has to be there.
_NEW = ("score_*", "upscore*", "classifier.*", "head.score.*", "aux.*")


def start(config: Config, model: FCN, resuming: bool = False) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Make a run's first variables, and notes for its user: what they are from and what may go wrong with them.

    Args:
        config: ``init_from`` goes before ``init``, that before random weights.
        model: the network to fill.
        resuming: a checkpoint will replace them, so that nothing is read.

    Raises:
        InputError: the weights do not fit the network, or its preprocessing.
    """
    size = config.data.crop_size or config.data.input_size or (64, 64)
    variables = init_variables(model, jax.random.key(config.train.seed), size)
    if resuming:
        return variables, ()
    if config.init_from is not None:
        return _carry_over(config, model, variables, config.init_from)
    if config.init is not None:
        _check_preprocessing(config, weights.inspect(config.init).preprocessing, config.init)
        filled, report = weights.load_with_report(config.init, model, variables)
        return filled, _notes(config.init, model, report)
    if config.model.freeze_encoder:
        return variables, ("the encoder is frozen at its random start: give --init or --init-from",)
    return variables, ()


def _carry_over(
    config: Config, model: FCN, variables: dict[str, Any], given: str
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Take by name what another network of the family has; allow for new scores and upsampling."""
    try:
        source, preprocessing = _open(given, model)
        filled, report = weights.load_with_report(source, model, variables, _NEW, ["*"])
    except InputError as error:
        raise InputError(f"--init-from {given}: {error}") from error
    _check_preprocessing(config, preprocessing, given)
    return filled, _notes(given, model, report)


def _open(given: str, model: FCN) -> tuple[weights.Source, str | None]:
    """Return a run's or a file's weights, in our names where the network is known, and their preprocessing."""
    if Path(given).is_dir():
        trained = open_trained(given, "best")
        return weights.to_torch(trained.model, trained.variables), trained.config.data.preprocessing
    info = weights.inspect(given)
    if info.fit is None or MODELS[info.fit.models[0]].family is not type(model):  # the second is refused in loading
        return given, info.preprocessing
    # The names of a published network depend on its stride: it is read as what it is first.
    same = {name: getattr(model, name) for name in ("width", "fc_features", "head_features") if hasattr(model, name)}
    classes = info.fit.num_classes or model.num_classes
    own = create_model(info.fit.models[0], classes, **{**same, **info.fit.options})
    shapes = jax.eval_shape(partial(init_variables, own), jax.random.key(0))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return weights.to_torch(own, weights.load(given, own, zeros)), info.preprocessing


def _notes(origin: str, model: FCN, report: weights.Report) -> tuple[str, ...]:
    what = f"from {origin}: {len(report.filled)} arrays; new: {_layers(report.left)}; unused: {_layers(report.ignored)}"
    # At-once scales (the reference's voc-fcn8s-atonce), or score layers that a 16s has trained, keep the features of
    # pool3, which are far larger, from drowning the rest; batch norm makes them of one size.
    bare = weights.LAYOUTS[report.layout].encoder_only
    unscaled = isinstance(model, ScoreFCN) and model.stride == 8 and set(model.skip_scales) == {1.0}
    if bare and unscaled and model.encoder_norm is None:
        return what, (
            "an 8s that starts from an encoder alone learns little: train a 32s and a 16s before and give --init-from, "
            "or set --model.skip-scales 0.01 0.0001"
        )
    return (what,)


def _layers(names: Iterable[str]) -> str:
    modules = (name.rpartition(".")[0] for name in names if not name.endswith(COUNTER))
    return ", ".join(dict.fromkeys(modules)) or "nothing"


def _check_preprocessing(config: Config, expected: str | None, source: str) -> None:
    if expected is not None and expected != config.data.preprocessing:
        raise InputError(
            f"{source} expects {expected} preprocessing, the run has {config.data.preprocessing}; "
            f"set --data.preprocessing {expected}"
        )
