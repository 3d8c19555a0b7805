"""The training step: a pure function (state, batch) -> (state, sums) for pmap, jit on a mesh, or one device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from fcn_jax.losses import Loss, LossSum

Batch = Mapping[str, jax.Array]
"""{"image": (b, h, w, 3), "label": (b, h, w) integers, 255 is ignored}."""


class TrainState(flax.struct.PyTreeNode):
    """The state that a step updates, and the dropout key, which stays constant."""

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    key: jax.Array
    """Key data (uint32) for dropout; every step folds in its number."""


class StepSums(NamedTuple):
    """The results of a step, over the global batch."""

    loss: jax.Array
    """The training loss, the auxiliary head's share included."""
    pixels: jax.Array
    """Valid pixels, or the sum of their class weights."""
    grad_norm: jax.Array
    """Global L2 norm of the gradient, before clipping."""
    finite: jax.Array
    """Whether loss and gradient were finite; if not, the step changed only counters."""


AxisName = str | tuple[str, ...]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, StepSums]]


def new_state(variables: Mapping[str, Any], optimizer: optax.GradientTransformation, seed: int = 0) -> TrainState:
    """Make the state at step 0 from a model's variables; ``seed`` decides the dropout masks."""
    params = variables["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=variables.get("batch_stats", {}),
        opt_state=optimizer.init(params),
        # Not the seed's own key, from which parameters are usually initialised.
        key=jax.random.key_data(jax.random.fold_in(jax.random.key(seed), 1)),
    )


def make_train_step(
    apply_fn: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    loss: Loss,
    *,
    reduction: str = "mean",
    accumulate: int = 1,
    axis_name: AxisName | None = None,
    pass_example_ids: bool = False,
    shard: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
) -> TrainStep:
    """Make the training step.

    The gradient of the *sum* of the loss is added up over accumulated parts and devices, then divided once by the
    weight of the global batch. So each valid pixel counts equally, even if devices have unequal numbers of them. A step
    whose loss or gradient is not finite leaves parameters, statistics and momentum unchanged.

    Args:
        apply_fn: ``apply_fn(variables, images, train=True, rngs={"dropout": key}, mutable=["batch_stats"])`` returns
            (logits (b, h, w, classes), updated collections), as ``flax.linen.Module.apply`` does; logits may be a
            pair with those of an auxiliary head. Its batch norm has to average over ``axis_name`` itself.
        optimizer: any optax transformation.
        loss: (logits, labels) -> ``LossSum``, see ``losses.make_loss``.
        reduction: "mean" over valid pixels of the global batch, or "sum" (the paper).
        accumulate: compute the batch in this many parts, one after the other. Part k has the examples whose index in
            the global batch is k modulo the number of parts, for any number of devices. Batch norm normalises each part
            by its own statistics and updates the running ones once per part, so that results equal those of the whole
            batch only for a model without it.
        axis_name: the axis (or axes) of ``jax.pmap`` or ``jax.shard_map`` over which the batch is split; None if
            each call gets the global batch.
        pass_example_ids: give ``apply_fn`` the keyword ``example_ids``, (b,) indices in the global batch, on which this
            package's networks key their dropout masks. Without it the masks depend on how the batch is split.
        shard: applies ``jax.shard_map`` over ``axis_name`` to the gradient alone, a function (params, batch_stats,
            batch, key) -> (batch_stats, sums, gradient). The step then takes the global batch, and the optimiser's
            state may be sharded.

    Returns:
        ``train_step(state, batch) -> (state, sums)``; ``batch`` is the device's part with an ``axis_name`` and no
        ``shard``, otherwise the global batch.
    """

    def loss_sum(params: Any, batch_stats: Any, batch: Batch, ids: jax.Array, key: jax.Array) -> Any:
        logits, updated = apply_fn(
            {"params": params, "batch_stats": batch_stats},
            batch["image"],
            train=True,
            rngs={"dropout": key},
            mutable=["batch_stats"],
            **({"example_ids": ids} if pass_example_ids else {}),
        )
        total, weight = loss(logits, batch["label"])
        return total, (weight, updated.get("batch_stats", {}))

    def gradient(params: Any, batch_stats: Any, batch: Batch, ids: jax.Array, key: jax.Array) -> Any:
        grad = jax.value_and_grad(loss_sum, has_aux=True)
        (total, (weight, batch_stats)), grads = grad(params, batch_stats, batch, ids, key)
        return batch_stats, (LossSum(total, weight), grads)

    def gradient_of_parts(params: Any, batch_stats: Any, batch: Batch, ids: jax.Array, key: jax.Array) -> Any:
        def add_part(carry: Any, part: Any) -> Any:
            batch_stats, total = carry
            batch_stats, new = gradient(params, batch_stats, part[0], part[1], key)
            return (batch_stats, jax.tree.map(jnp.add, total, new)), None

        parts = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, accumulate, *x.shape[1:]), 1, 0), (dict(batch), ids))
        first = jax.tree.map(lambda x: x[0], parts)
        shapes = jax.eval_shape(gradient, params, batch_stats, first[0], first[1], key)[1]
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return jax.lax.scan(add_part, (batch_stats, zeros), parts)[0]

    def global_gradient(params: Any, batch_stats: Any, batch: Batch, key: jax.Array) -> Any:
        count = batch["label"].shape[0]
        first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * count
        compute = gradient if accumulate == 1 else gradient_of_parts
        batch_stats, (sums, grads) = compute(params, batch_stats, batch, first + jnp.arange(count), key)
        if axis_name is not None:
            sums, grads = jax.lax.psum((sums, grads), axis_name)
        return batch_stats, sums, grads

    if shard is not None:
        global_gradient = shard(global_gradient)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepSums]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        batch_stats, sums, grads = global_gradient(state.params, state.batch_stats, dict(batch), key)
        # Without a valid pixel the gradient is zero: the step applies only weight decay and momentum.
        scale = 1.0 if reduction == "sum" else 1.0 / jnp.maximum(sums.weight, jnp.finfo(sums.weight.dtype).tiny)
        grads = jax.tree.map(lambda g: g * scale, grads)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(sums.total) & jnp.isfinite(norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        new = state.replace(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            batch_stats=batch_stats,
            opt_state=opt_state,
        )
        return _unless(finite, new, state), StepSums(sums.total * scale, sums.weight, norm, finite)

    return train_step


def _unless(finite: jax.Array, new: TrainState, old: TrainState) -> TrainState:
    """Return the new state if the step was finite, otherwise the old one with the new counters."""

    def choose(new: jax.Array, old: jax.Array) -> jax.Array:
        counter = jnp.issubdtype(new.dtype, jnp.integer)  # so that the schedule advances
        return new if counter else jnp.where(finite, new, old)

    return jax.tree.map(choose, new, old)
