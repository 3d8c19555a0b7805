"""The optimiser, built from optax: SGD or AdamW, weight decay, a schedule, and factors per parameter."""

from __future__ import annotations

from typing import Any

import jax
import optax

from fcn_jax.config import OptimConfig
from fcn_jax.errors import unknown
from fcn_jax.models.fcn import ENCODER_SCOPES, encoder_stage

SCHEDULES = ("fixed", "poly", "step")


def make_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Make the learning rate as a function of the step.

    "fixed": lr; "poly": lr (1 - step / steps)^power; "step": lr is divided by 10 after every fraction
    ``step_every`` of the run. A warmup multiplies the schedule by a factor that rises linearly from 1 / warmup_steps
    to 1 over the first ``warmup_steps`` steps.

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


def _names(path: tuple[Any, ...]) -> list[str]:
    return [str(entry.key) for entry in path]


def _is_frozen(path: tuple[Any, ...], config: OptimConfig, freeze_stages: int) -> bool:
    names = _names(path)
    if names[0] in ENCODER_SCOPES:
        return encoder_stage(names) <= freeze_stages
    return config.freeze_upsampling and names[0].startswith("upscore")


def _lr_factor(path: tuple[Any, ...], config: OptimConfig) -> float:
    names = _names(path)
    return (config.bias_lr if names[-1] == "bias" else 1.0) * (1.0 if names[0] in ENCODER_SCOPES else config.head_lr)


def make_optimizer(
    params: Any, config: OptimConfig, steps: int, freeze_stages: int = 0
) -> optax.GradientTransformation:
    """Make the optimiser: v <- momentum v + g + decay w; w <- w - lr v, with factors on lr and decay by parameter.

    This is ``torch.optim.SGD``: the decay is added to the gradient, and the learning rate multiplies the momentum
    buffer. Caffe applies it to the gradient instead, which differs once the rate changes. With ``config.kind`` "adamw"
    it is ``optax.adamw`` with the same factors.

    Args:
        params: the parameters, for their names.
        config: rates and factors, in the ranges that ``training.config_checks`` checks.
        steps: length of the run, for the schedule.
        freeze_stages: number of encoder stages to freeze, from the first.

    Raises:
        InputError: an unknown schedule.
    """
    map_with_path = jax.tree_util.tree_map_with_path
    trained = map_with_path(lambda path, _: not _is_frozen(path, config, freeze_stages), params)
    frozen = jax.tree.map(lambda each: not each, trained)

    def decays(params: Any) -> Any:
        return map_with_path(lambda path, _: config.bias_decay or _names(path)[-1] not in ("bias", "scale"), params)

    def scale(updates: Any, params: Any) -> Any:
        del params
        return map_with_path(lambda path, update: _lr_factor(path, config) * update, updates)

    decay = optax.add_decayed_weights(config.weight_decay, decays)
    if config.kind == "adamw":
        rule = (optax.scale_by_adam(config.momentum, nesterov=config.nesterov), decay)
    else:
        rule = (decay, optax.trace(config.momentum, config.nesterov) if config.momentum else optax.identity())
    descent = optax.chain(
        *rule,
        optax.stateless(scale),
        optax.scale_by_learning_rate(make_schedule(config, steps)),
    )
    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    return optax.chain(optax.masked(optax.set_to_zero(), frozen), clip, optax.masked(descent, trained))
