"""Rows of whole networks: the encoder's forward pass, inference, and the training step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fcn_jax import weights
from fcn_jax.compare.experiments import random_batch, random_variables
from fcn_jax.compare.jax_side import without_dropout
from fcn_jax.compare.rows import Numbers, Pair, Row, Runner, compile_step, jax_runner, planned_bytes
from fcn_jax.compare.settings import NETWORKS, NUM_CLASSES, Settings
from fcn_jax.config import OptimConfig
from fcn_jax.losses import make_loss
from fcn_jax.models import create_model, summarize
from fcn_jax.models.fcn import FCN
from fcn_jax.models.vgg import ENCODERS, VGG
from fcn_jax.optim import make_optimizer
from fcn_jax.step import make_train_step, new_state
from fcn_jax.training.devices import make_parallel

__all__ = ["network_rows"]

_OPTIM = OptimConfig(lr=0.01, momentum=0.9, weight_decay=5e-4)
_VARIANTS = {"cpu": ("contiguous", "channels_last"), "gpu": ("channels_last", "channels_last compiled")}
# "update" is how far one step moved all parameters. float32: two computations already part by 2e-4 in gradients, where
# a rounding flips a ReLU or the winner of a pool. bfloat16 flips many more: by 0.2 in `ladder`, whose five batch norms
# follow each other; a wrong layer is off by about 1.
_TOLERANCES: dict[str, dict[str, float]] = {
    "float32": {"pool5": 1e-5, "logits": 1e-4, "statistics": 1e-4, "loss": 1e-4, "update": 5e-3},
    "bfloat16": {"pool5": 5e-2, "logits": 5e-2, "statistics": 5e-2, "loss": 1e-2, "update": 0.5},
}


def network_rows(settings: Settings) -> Iterator[Row]:
    """Yield the rows; weights are drawn when a row is opened."""
    yield _encoder_row(settings)
    for name in NETWORKS:
        model = without_dropout(
            create_model(name, NUM_CLASSES, encoder=settings.encoder, width=settings.width, dtype=settings.jax_dtype)
        )
        yield _inference_row(name, model, settings)
        yield _train_row(name, model, settings)


def _row(name: str, settings: Settings, open_pair: Any, quantities: tuple[str, ...], flops: int) -> Row:
    return Row(
        name,
        "networks",
        open_pair,
        {quantity: _TOLERANCES[settings.dtype][quantity] for quantity in quantities},
        _VARIANTS[settings.kind],
        flops,
        settings.batch_size,
        about={
            "encoder": settings.encoder,
            "width": settings.width,
            "num_classes": NUM_CLASSES,
            "images_shape": [settings.batch_size, settings.image_size, settings.image_size, 3],
            "dtype": settings.dtype,
        },
    )


def _forward_flops(model: FCN, settings: Settings, part: str = "") -> int:
    """Return the FLOPs of convolutions and transposed convolutions, as ``models.summary`` counts them."""
    rows = summarize(model, (settings.image_size, settings.image_size), settings.batch_size)
    return sum(row.flops for row in rows if row.kind != "BatchNorm" and row.path.startswith(part))


def _batch(settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    return random_batch((settings.image_size, settings.image_size), NUM_CLASSES, settings.batch_size)


def _whole(name: str) -> Any:
    return lambda out: {name: {"": np.asarray(out).astype(np.float32)}}


def _encoder_row(settings: Settings) -> Row:
    # Of the smallest head: torch's twin has one.
    sizes = {"encoder": settings.encoder, "width": settings.width, "fc_features": 1, "fc6_kernel": 1}
    model = create_model("fcn32s", NUM_CLASSES, dtype=settings.jax_dtype, **sizes)
    vgg = VGG(ENCODERS[settings.encoder], model.compute, width=settings.width)

    def open_pair() -> Pair:
        variables, (images, _) = random_variables(model), _batch(settings)

        def forward(params: Any, images: jax.Array) -> Any:
            return vgg.apply({"params": params}, images.astype(model.dtype), False)[-1]

        def theirs(variant: str) -> Runner:
            from fcn_jax.compare import bench_torch as torch_side

            return torch_side.encoder(model, variables, images, settings, variant)

        arguments = (variables["params"]["vgg"], images)
        return Pair(lambda: jax_runner(jax.jit(forward), arguments, _whole("pool5")), theirs)

    flops = _forward_flops(model, settings, "vgg/")
    return _row(f"encoder-{settings.encoder}", settings, open_pair, ("pool5",), flops)


def _inference_row(name: str, model: FCN, settings: Settings) -> Row:
    def open_pair() -> Pair:
        variables, (images, _) = random_variables(model), _batch(settings)

        def forward(variables: Any, images: jax.Array) -> Any:
            return model.apply(variables, images, train=False)

        def theirs(variant: str) -> Runner:
            from fcn_jax.compare import bench_torch as torch_side

            return torch_side.inference(model, variables, images, settings, variant)

        return Pair(lambda: jax_runner(jax.jit(forward), (variables, images), _whole("logits")), theirs)

    return _row(f"inference-{name}", settings, open_pair, ("logits",), _forward_flops(model, settings))


def _train_row(name: str, model: FCN, settings: Settings) -> Row:
    def open_pair() -> Pair:
        variables, (images, labels) = random_variables(model), _batch(settings)

        def theirs(variant: str) -> Runner:
            from fcn_jax.compare import bench_torch as torch_side

            return torch_side.train_step(model, variables, images, labels, _OPTIM, settings, variant)

        return Pair(lambda: _train_runner(model, variables, images, labels), theirs)

    # The gradients of kernels and of inputs are as many products again, each.
    flops = 3 * _forward_flops(model, settings)
    return _row(f"train-{name}", settings, open_pair, ("loss", "update", "statistics"), flops)


def _train_runner(model: FCN, variables: Mapping[str, Any], images: np.ndarray, labels: np.ndarray) -> Runner:
    """Make the runner of the step of train.py: under pmap, on the first device."""
    optimizer = make_optimizer(variables["params"], _OPTIM, 1)
    loss = make_loss("softmax")
    parallel = make_parallel(
        "pmap",
        lambda axis: make_train_step(model.clone(axis_name=axis).apply, optimizer, loss, axis_name=axis),
        jax.devices()[:1],
    )
    state = parallel.place_state(new_state(jax.tree.map(jnp.array, variables), optimizer, seed=0))
    batch = parallel.place_batch({"image": images, "label": labels.astype(np.int32)})

    def call() -> Any:
        nonlocal state
        state, sums = parallel.step(state, batch)
        return sums.loss

    def numbers(loss: Any) -> Numbers:
        after = weights.to_torch(model, {"params": jax.device_get(state.params)})
        before = weights.to_torch(model, {"params": variables["params"]})
        update = {name: value - before[name] for name, value in after.items()}
        found: Numbers = {"loss": {"": np.asarray(loss, np.float32)}, "update": update}
        if not state.batch_stats:
            return found
        statistics = weights.to_torch(model, {"batch_stats": jax.device_get(state.batch_stats)})
        return {**found, "statistics": {name: value for name, value in statistics.items() if "running_" in name}}

    return Runner(
        call,
        lambda _: jax.block_until_ready(state),
        numbers,
        lambda: planned_bytes(compile_step(parallel, state, batch)),
    )
