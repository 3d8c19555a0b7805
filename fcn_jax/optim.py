"""SGD with momentum, coupled weight decay, a schedule, and factors per parameter; all of it optax."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import jax
import optax

from fcn_jax.config import OptimConfig
from fcn_jax.errors import InputError, unknown

__all__ = ["SCHEDULES", "make_optimizer", "make_schedule", "parameter_groups"]

SCHEDULES = ("fixed", "poly", "step")
_FROZEN = "frozen"


def make_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Make the learning rate as a function of the step.

    "fixed": lr; "poly": lr (1 - step / steps)^power; "step": lr / 10 after every ``step_every`` of the run. A warmup
    multiplies the schedule by a factor that climbs from 1 / warmup_steps to 1 over the first ``warmup_steps`` steps.

    Raises:
        InputError: an unknown schedule.
    """
    if config.schedule == "fixed":
        main = optax.constant_schedule(config.lr)
    elif config.schedule == "poly":
        main = optax.polynomial_schedule(config.lr, 0.0, config.poly_power, steps)
    elif config.schedule == "step":
        span = max(1, round(config.step_every * steps))
        main = optax.piecewise_constant_schedule(config.lr, {step: 0.1 for step in range(span, steps, span)})
    else:
        raise unknown("schedule", config.schedule, SCHEDULES)
    if config.warmup_steps == 0:
        return main
    warmup = config.warmup_steps
    ramp = optax.linear_schedule(1 / warmup, 1.0, max(1, warmup - 1))
    return lambda step: main(step) * ramp(step)


def parameter_groups(params: Any, config: OptimConfig, freeze_encoder: bool = False) -> Any:
    """Label every parameter with its group: "frozen", or its factors on learning rate and decay.

    Returns:
        A tree like ``params`` of strings, e.g. "lr x 2, decay x 0".
    """

    def label(path: tuple[Any, ...], leaf: Any) -> str:
        del leaf
        names = [str(entry.key) for entry in path]
        encoder = names[0] == "vgg"
        if (encoder and freeze_encoder) or (config.freeze_upsampling and names[0].startswith("upscore")):
            return _FROZEN
        bias = names[-1] in ("bias", "scale")
        lr = (config.bias_lr if names[-1] == "bias" else 1.0) * (1.0 if encoder else config.head_lr)
        decay = 1.0 if config.bias_decay or not bias else 0.0
        return f"lr x {lr:g}, decay x {decay:g}"

    return jax.tree_util.tree_map_with_path(label, params)


def _sgd(config: OptimConfig, schedule: optax.Schedule, lr: float, decay: float) -> optax.GradientTransformation:
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay * decay),
        optax.sgd(lambda step: lr * schedule(step), momentum=config.momentum or None, nesterov=config.nesterov),
    )


def make_optimizer(
    params: Any, config: OptimConfig, steps: int, freeze_encoder: bool = False
) -> optax.GradientTransformation:
    """Make the optimiser: v <- momentum v + g + decay w; w <- w - lr v, with the factors of each parameter's group.

    This is ``torch.optim.SGD``: the decay is added to the gradient, the learning rate stands outside the momentum
    (Caffe has it inside; they part where the rate changes).

    Args:
        params: the parameters, for their names.
        config: rates and factors.
        steps: length of the run, for the schedule.
        freeze_encoder: leave the encoder as it is.

    Raises:
        InputError: a rate, momentum or decay out of range, or an unknown schedule.
    """
    _check(config)
    schedule = make_schedule(config, steps)
    groups = parameter_groups(params, config, freeze_encoder)
    transforms: dict[Hashable, optax.GradientTransformation] = {}
    for group in sorted(set(jax.tree.leaves(groups))):
        if group == _FROZEN:
            transforms[group] = optax.set_to_zero()
        else:
            lr, decay = (float(part.split(" x ")[1]) for part in group.split(", "))
            transforms[group] = _sgd(config, schedule, lr, decay)
    optimizer = optax.partition(transforms, groups)
    if config.clip_norm is None:
        return optimizer
    frozen = jax.tree.map(lambda group: group == _FROZEN, groups)
    clip = optax.clip_by_global_norm(config.clip_norm)
    return optax.chain(optax.masked(optax.set_to_zero(), frozen), clip, optimizer)


def _check(config: OptimConfig) -> None:
    if not config.lr > 0:
        raise InputError(f"expected optim.lr > 0, got {config.lr}; the recipes list rates that work")
    if not 0 <= config.momentum < 1:
        raise InputError(f"expected 0 <= optim.momentum < 1, got {config.momentum}; 0.9 is usual")
    if config.weight_decay < 0:
        raise InputError(f"expected optim.weight_decay >= 0, got {config.weight_decay}; 0 turns it off")
    if config.clip_norm is not None and not config.clip_norm > 0:
        raise InputError(f"expected optim.clip_norm > 0, got {config.clip_norm}; leave it out not to clip")
