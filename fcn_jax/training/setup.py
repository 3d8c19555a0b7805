"""From a config to what a run works with: data, network, starting weights, step."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import optax

from fcn_jax.config import Config
from fcn_jax.data.datasets import Split, load
from fcn_jax.data.pipeline import class_frequencies
from fcn_jax.errors import InputError
from fcn_jax.evaluation.evaluate import Predictor, make_predictor
from fcn_jax.models import model_from_config
from fcn_jax.models.fcn import FCN
from fcn_jax.optim import make_optimizer, make_schedule
from fcn_jax.step import TrainState, new_state
from fcn_jax.training.build import Length, build_loss, build_step, check_share, run_length
from fcn_jax.training.check import check_config
from fcn_jax.training.devices import Parallel, make_parallel, pick_devices
from fcn_jax.training.distributed import check_same, digest, together, writer_first
from fcn_jax.training.start import start
from fcn_jax.weights import PRETRAINED, open_source

__all__ = ["Trainer", "make_trainer"]


@dataclass(frozen=True)
class Trainer:
    """What the loop works with."""

    model: FCN
    train: Split
    val: Split
    length: Length
    schedule: optax.Schedule
    parallel: Parallel
    predict: Predictor
    """On the devices of this process alone; takes the state's variables."""
    state: TrainState
    """The start, placed on the devices."""
    notes: tuple[str, ...]
    """What a user should know before it starts."""


# Where a machine keeps its data, and what the launch says of a process.
_OWN_FIELDS = ("data.dir", "data.cache_dir", "data.workers", "process_id")


def _shared(config: Config) -> dict[str, Any]:
    """Return what all processes of a run have to have in common, by name."""
    flat = {
        f"{room}.{name}" if isinstance(values, dict) else room: value
        for room, values in dataclasses.asdict(config).items()
        for name, value in (values.items() if isinstance(values, dict) else [(room, values)])
    }
    return {name: value for name, value in flat.items() if name not in _OWN_FIELDS}


def make_trainer(config: Config, resuming: bool = False) -> Trainer:
    """Prepare a run; nothing is written but the prepared copy of the data.

    Args:
        config: the whole run.
        resuming: a checkpoint will replace the starting weights, so those are not read.

    Raises:
        InputError: the config asks for something that cannot be.
    """
    check_config(config)
    check_same(_shared(config))
    train, val = writer_first(lambda: (load(config.data.train, config.data), load(config.data.val, config.data)))
    if train.class_names != val.class_names:
        raise InputError(
            f"{config.data.train} and {config.data.val} have different classes; choose splits that share them"
        )
    devices = pick_devices(config.devices)
    check_share(config, len(devices))
    length = run_length(config, len(train))
    model = model_from_config(config.model, train.num_classes, config.train.remat)
    named = [given for given in (config.init, config.init_from) if given in PRETRAINED and not resuming]
    opened = {given: writer_first(partial(open_source, given)) for given in named}
    # Orbax reads a run in all processes at once.
    variables, notes = together(lambda: start(config, model, resuming, opened))
    optimizer = make_optimizer(variables["params"], config.optim, length.steps, config.model.freeze_encoder)
    loss = build_loss(config.loss, train.dataset, train.num_classes, lambda: class_frequencies(train))
    if config.train.accumulate > 1 and "batch_stats" in variables:
        notes += ("gradient accumulation with batch norm: each part is normalised by its own statistics",)

    parallel = make_parallel(config.parallel, build_step(config, model, optimizer, loss), devices)
    # One process may have another file under the same name.
    check_same({"training images": len(train), "validation images": len(val), "starting weights": digest(variables)})
    predict = make_predictor(model, config.data.preprocessing, parallel.mesh.local_mesh)
    return Trainer(
        model=model,
        train=train,
        val=val,
        length=length,
        schedule=make_schedule(config.optim, length.steps),
        parallel=parallel,
        predict=lambda variables, *rest, **options: predict(parallel.local(variables), *rest, **options),
        state=parallel.place_state(new_state(variables, optimizer, config.train.seed)),
        notes=notes,
    )
