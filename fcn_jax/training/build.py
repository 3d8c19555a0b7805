"""From a config to those parts of a run that need no data set and no disk: its length, its loss, its step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import optax

from fcn_jax.config import Config, LossConfig
from fcn_jax.errors import InputError
from fcn_jax.losses import Loss, make_loss, median_frequency_weights
from fcn_jax.models.fcn import FCN
from fcn_jax.step import TrainStep, make_train_step

__all__ = ["Length", "build_loss", "build_step", "check_share", "run_length"]


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


def check_share(config: Config, devices: int) -> None:
    """Raise InputError where a batch cannot be shared equally by the devices and the accumulated parts."""
    share = config.train.accumulate * devices
    if config.train.batch_size % share:
        raise InputError(
            f"expected a batch size that is a multiple of {share}, of {devices} devices x "
            f"{config.train.accumulate} parts, got {config.train.batch_size}; set --train.batch-size or --devices"
        )


def build_loss(config: LossConfig, dataset: str, num_classes: int, count: Callable[[], np.ndarray]) -> Loss:
    """Make a run's loss.

    Args:
        config: what is minimised.
        dataset: its name, for messages.
        num_classes: classes of the training labels.
        count: returns ``data.pipeline.class_frequencies``; called only where weights follow from it.

    Raises:
        InputError: another number of weights than of classes, or as ``make_loss``.
    """
    given = config.class_weights
    if given == "none":
        class_weights = None
    elif given == "median":
        class_weights = median_frequency_weights(*count()) ** config.weight_power
    elif len(given) == num_classes:
        class_weights = np.asarray(given)
    else:
        raise InputError(
            f"expected {num_classes} class weights for {dataset}, got {len(given)}; give one per class, or 'median'"
        )
    return make_loss(config.kind, class_weights, config.hard_fraction)


def build_step(
    config: Config, model: FCN, optimizer: optax.GradientTransformation, loss: Loss
) -> Callable[[str | None], TrainStep]:
    """Return what makes a run's step for a pmap axis or for None, as ``parallel.make_parallel`` wants it."""

    def step(axis_name: str | None) -> TrainStep:
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

    return step
