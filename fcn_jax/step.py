"""The training step: (state, batch) -> (state, sums), pure, the same under pmap, jit on a mesh, or on one device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from fcn_jax.losses import Loss, LossSum
from fcn_jax.models.fcn import FCN
from fcn_jax.preprocessing import normalize

__all__ = ["Batch", "StepSums", "TrainState", "TrainStep", "make_train_step", "new_state"]

Batch = Mapping[str, jax.Array]
"""{"image": (b, h, w, 3) RGB 0 ... 255, "label": (b, h, w) integers, 255 is ignored}."""


class TrainState(flax.struct.PyTreeNode):
    """Everything that a step changes, and the key that it never does."""

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    key: jax.Array
    """Key data (uint32) of the run; the dropout key of a step is this folded with the step's number."""


class StepSums(NamedTuple):
    """What a step reports, over the global batch."""

    loss: jax.Array
    """The minimised loss, the auxiliary head's share included."""
    pixels: jax.Array
    """Valid pixels, or the sum of their class weights."""
    grad_norm: jax.Array
    finite: jax.Array
    """Whether loss and gradient were; otherwise the step changed nothing but counters."""


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, StepSums]]


def new_state(variables: Mapping[str, Any], optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """Make the state at step 0 from a model's variables."""
    params = variables["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=variables.get("batch_stats", {}),
        opt_state=optimizer.init(params),
        key=jax.random.key_data(jax.random.key(seed)),
    )


def make_train_step(
    model: FCN,
    optimizer: optax.GradientTransformation,
    loss: Loss,
    preprocessing: str | None,
    *,
    reduction: str = "mean",
    aux_weight: float = 0.4,
    accumulate: int = 1,
    axis_name: str | None = None,
) -> TrainStep:
    """Make the step.

    The gradient of the *sum* of the loss is added up over accumulated parts and devices and divided by the weight of
    the global batch once, so that devices with unequal numbers of ignored pixels count by pixels and not by device.

    Args:
        model: the network.
        optimizer: from ``optim.make_optimizer``.
        loss: from ``losses.make_loss``.
        preprocessing: what the network's weights expect, see ``preprocessing.normalize``; None: the images of a batch
            are normalised already.
        reduction: "mean" over valid pixels of the global batch, or "sum" (the paper).
        aux_weight: weight of the auxiliary head's loss, where the model has one.
        accumulate: compute the batch in this many parts, one after the other. With batch norm each part is normalised
            by its own statistics (the running ones move once per part), so that only a model without it equals the
            whole batch.
        axis_name: the ``jax.pmap`` axis over which the batch is split; None where the batch is global.

    A step whose loss or gradient is not finite leaves parameters, statistics and momentum as they are.

    Returns:
        ``train_step(state, batch) -> (state, sums)``; ``batch`` is the device's part under pmap, the global batch
        otherwise.
    """
    model = model.clone(axis_name=axis_name)

    def loss_sum(params: Any, batch_stats: Any, batch: Batch, ids: jax.Array, key: jax.Array) -> Any:
        images = batch["image"]
        out, updated = model.apply(
            {"params": params, "batch_stats": batch_stats},
            images if preprocessing is None else normalize(images, preprocessing, model.param_dtype),
            train=True,
            example_ids=ids,
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )
        logits, aux = out if isinstance(out, tuple) else (out, None)
        main = loss(logits, batch["label"])
        total = main.total if aux is None else main.total + aux_weight * loss(aux, batch["label"]).total
        return total, (main.weight, updated.get("batch_stats", {}))

    def part_gradient(state: TrainState, batch_stats: Any, batch: Batch, ids: jax.Array, key: jax.Array) -> Any:
        grad = jax.value_and_grad(loss_sum, has_aux=True)
        (total, (weight, batch_stats)), grads = grad(state.params, batch_stats, batch, ids, key)
        return LossSum(total, weight), batch_stats, grads

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepSums]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        count = batch["label"].shape[0]
        first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * count
        ids = first + jnp.arange(count)
        if accumulate == 1:
            sums, batch_stats, grads = part_gradient(state, state.batch_stats, batch, ids, key)
        else:
            sums, batch_stats, grads = _scan_parts(part_gradient, state, batch, ids, key, accumulate)
        if axis_name is not None:
            sums, grads = jax.lax.psum((sums, grads), axis_name)
        # A batch without a single valid pixel has no gradient; its step only decays and coasts.
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
    """Take the new state where the step was finite, and otherwise the old one with the new counters."""

    def choose(new: jax.Array, old: jax.Array) -> jax.Array:
        counter = jnp.issubdtype(new.dtype, jnp.integer)  # the schedule goes on
        return new if counter else jnp.where(finite, new, old)

    return jax.tree.map(choose, new, old)


def _scan_parts(
    part_gradient: Callable[..., Any], state: TrainState, batch: Batch, ids: jax.Array, key: jax.Array, parts: int
) -> Any:
    """Add up loss and gradient over the parts of a batch; the running statistics pass from part to part."""

    def body(carry: Any, part: Any) -> Any:
        sums, batch_stats, grads = carry
        part_sums, batch_stats, part_grads = part_gradient(state, batch_stats, *part, key)
        return (jax.tree.map(jnp.add, sums, part_sums), batch_stats, jax.tree.map(jnp.add, grads, part_grads)), None

    split = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), (dict(batch), ids))
    first = jax.tree.map(lambda x: x[0], split)
    shapes = jax.eval_shape(part_gradient, state, state.batch_stats, *first, key)
    sums, _, grads = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    (sums, batch_stats, grads), _ = jax.lax.scan(body, (sums, state.batch_stats, grads), split)
    return sums, batch_stats, grads
