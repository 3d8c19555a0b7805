"""From a config to what a run works with: data, network, starting weights, step."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import optax

from fcn_jax.config import Config
from fcn_jax.data.datasets import Split, load
from fcn_jax.data.pipeline import class_frequencies
from fcn_jax.errors import InputError
from fcn_jax.evaluation.evaluate import Predictor, make_predictor
from fcn_jax.models import model_from_config
from fcn_jax.models.fcn import FCN
from fcn_jax.training.check import check_config
from fcn_jax.training.distributed import check_same, digest, together, writer_first
from fcn_jax.training.losses import Loss, make_loss, median_frequency_weights
from fcn_jax.training.optim import make_optimizer, make_schedule
from fcn_jax.training.parallel import Parallel, make_parallel, pick_devices
from fcn_jax.training.start import start
from fcn_jax.training.step import TrainState, make_train_step, new_state
from fcn_jax.weights.fetch import PRETRAINED, fetch

__all__ = ["Length", "Trainer", "make_trainer", "run_length"]


@dataclass(frozen=True)
class Length:
    """The run in steps."""

    steps: int
    eval_every: int
    keep_every: int | None
    epoch: float
    """Steps in one epoch."""

    def is_milestone(self, step: int) -> bool:
        """Whether this step is followed by a validation and a checkpoint."""
        kept = self.keep_every is not None and step % self.keep_every == 0
        return step > 0 and (step % self.eval_every == 0 or kept or step == self.steps)


def run_length(config: Config, examples: int) -> Length:
    """Convert a run's epochs to steps.

    Raises:
        InputError: neither or a useless number of epochs or steps is given.
    """
    train = config.train
    epoch = examples / train.batch_size
    if train.steps is None and train.epochs is None:
        raise InputError("the length of the run is not given; set --train.epochs or --train.steps")
    steps = train.steps if train.steps is not None else round((train.epochs or 0) * epoch)
    if steps < 1 or train.eval_every <= 0:
        raise InputError(
            f"expected at least one step and eval_every > 0, got {steps} steps and {train.eval_every}; "
            "set --train.epochs or --train.steps, and --train.eval-every"
        )
    keep = None if train.keep_every is None else max(1, round(train.keep_every * epoch))
    return Length(steps, max(1, round(train.eval_every * epoch)), keep, epoch)


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


def _loss(config: Config, train: Split) -> Loss:
    given = config.loss.class_weights
    if given == "none":
        class_weights = None
    elif given == "median":
        class_weights = median_frequency_weights(*class_frequencies(train))
    elif len(given) == train.num_classes:
        class_weights = np.asarray(given)
    else:
        raise InputError(
            f"expected {train.num_classes} class weights for {train.dataset}, got {len(given)}; "
            "give one per class, or 'median'"
        )
    return make_loss(config.loss.kind, class_weights, config.loss.hard_fraction)


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
    share = config.train.accumulate * len(devices)
    if config.train.batch_size % share:
        raise InputError(
            f"expected a batch size that is a multiple of {share}, of {len(devices)} devices x "
            f"{config.train.accumulate} parts, got {config.train.batch_size}; set --train.batch-size or --devices"
        )
    length = run_length(config, len(train))
    model = model_from_config(config.model, train.num_classes, config.train.remat)
    for given in () if resuming else (config.init, config.init_from):
        if given in PRETRAINED:
            writer_first(partial(fetch, given))
    variables, notes = together(lambda: start(config, model, resuming))  # orbax reads a run in all processes at once
    optimizer = make_optimizer(variables["params"], config.optim, length.steps, config.model.freeze_encoder)
    loss = _loss(config, train)
    if config.train.accumulate > 1 and "batch_stats" in variables:
        notes += ("gradient accumulation with batch norm: each part is normalised by its own statistics",)

    def step(axis_name: str | None) -> Any:
        return make_train_step(
            model,
            optimizer,
            loss,
            config.data.preprocessing,
            reduction=config.loss.reduction,
            aux_weight=config.loss.aux_weight,
            accumulate=config.train.accumulate,
            axis_name=axis_name,
        )

    parallel = make_parallel(config.parallel, step, devices)
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
