"""A network out of a run's folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from fcn_jax.config import Config
from fcn_jax.models import init_variables, model_from_config
from fcn_jax.models.fcn import FCN
from fcn_jax.training.check import check_config
from fcn_jax.training.checkpoint import load_variables
from fcn_jax.training.run import DatasetInfo, RunFolder

__all__ = ["Trained", "open_trained"]


@dataclass(frozen=True)
class Trained:
    """A model out of a run's folder."""

    config: Config
    dataset: DatasetInfo
    model: FCN
    variables: dict[str, Any]
    step: int


def open_trained(run: str | Path, which: str = "best") -> Trained:
    """Open a run's model at a checkpoint: "best" by mean IU, "last", or a step's number.

    Raises:
        InputError: no run, no such checkpoint, or one that does not fit.
    """
    folder = RunFolder(run)
    config, dataset = folder.read_config()
    check_config(config)
    model = model_from_config(config.model, len(dataset.class_names), config.train.remat)
    size = config.data.crop_size or config.data.input_size or (64, 64)
    like = jax.eval_shape(lambda key: init_variables(model, key, size), jax.random.key(0))
    like = {"params": like["params"], "batch_stats": like.get("batch_stats", {})}
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), like)
    variables, step = load_variables(folder.checkpoints, which, like)
    return Trained(config, dataset, model, variables, step)
